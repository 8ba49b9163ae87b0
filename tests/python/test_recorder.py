"""The flight recorder in real processes: what it holds, when it is written, how it is asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

import reducer
from reducer import recorder
from reducer.blame import blame

COMMAND = [sys.executable, "-m", "reducer"]
WAIT_S = 60.0


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **environ},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


def environment(algorithm: str, ranks: int, **more: str) -> list[dict[str, str]]:
    places = [f"host{rank}" if algorithm == "direct" else "" for rank in range(ranks)]
    return [{"REDUCER_ALGORITHM": algorithm, "REDUCER_TEST_PLACE": place, **more} for place in places]


def calls_of_every_kind() -> recorder.Dump | None:
    rank = dist.get_rank()
    tensor = torch.ones(1000)
    dist.all_reduce(tensor)
    dist.broadcast(tensor[:10], 1)
    dist.barrier()
    dist.all_gather([torch.empty(5), torch.empty(5)], torch.ones(5))
    if rank == 0:
        dist.send(torch.ones(3), 1, tag=7)
    else:
        dist.recv(torch.empty(3), 0, tag=7)
    if rank == 0:
        dist.send(torch.ones(4), 1, tag=8)
    else:
        dist.recv(torch.empty(4), tag=8)
    pair = dist.new_group([0, 1])
    dist.all_reduce(torch.ones(2, dtype=torch.int64), op=dist.ReduceOp.MAX, group=pair)
    return reducer.dump()


@pytest.mark.parametrize("algorithm", ["local", "direct"])
def test_it_holds_the_calls_of_all_kinds_and_groups(algorithm: str) -> None:
    with Ranks(2, environment(algorithm, 2)) as ranks:
        dumps = ranks.call(calls_of_every_kind)
    for rank, dump in enumerate(dumps):
        assert dump is not None
        assert (dump.rank, dump.entries, dump.reason) == (rank, 1000, "reducer.dump()")
        assert dump.groups[0].name == "default"
        assert [group.rank for group in dump.groups] == [rank, rank]
        assert dump.groups[0].hosts[rank] == f"{dump.host}:{dump.pid}"
        collectives = [call for call in dump.calls if call.kind == "collective" and call.group == 0]
        assert [(call.seq, call.text) for call in collectives] == [
            (0, "all_reduce(sum, float32, 1000 elements)"),
            (1, "broadcast(float32, 10 elements, root 1)"),
            (2, "barrier()"),
            (3, "all_gather(float32, 10 elements)"),
        ]
        assert {call.algorithm for call in collectives} == {algorithm}
        assert [call.bytes for call in collectives] == [4000, 40, 0, 40]
        sends = [call for call in dump.calls if call.kind == "send/recv" and call.state == "done"]
        assert [(call.source, call.to, call.tag, call.seq, call.count) for call in sends] == [
            (0, 1, 7, 0, 3),
            (0, 1, 8, 0, 4),
        ]
        passed = [call for call in dump.calls if call.state == "passed on"]
        assert [(call.to, call.tag, call.source) for call in passed] == ([(1, 8, None)] if rank == 1 else [])
        (last,) = [call for call in dump.calls if call.group == dump.groups[1].id]
        assert last.text == "all_reduce(max, int64, 2 elements)"
        for call in dump.calls:
            assert call.state in ("done", "passed on")
            assert call.ended is not None
            assert call.queued <= (call.started or call.queued) <= call.ended <= dump.time
            assert dump.time - call.ended < WAIT_S
            assert (call.answered is not None) == (call.state == "done" and call.algorithm != "local")
        assert [call.number for call in dump.calls] == list(range(1, dump.recorded + 1))
    assert [verdict.kind for verdict in blame(dumps)] == ["fine", "fine"]


def many_calls(count: int) -> recorder.Dump | None:
    for _ in range(count):
        dist.all_reduce(torch.ones(1))
    return reducer.dump()


@pytest.mark.parametrize("entries", [0, 1, 16])
def test_it_is_bounded_and_can_be_switched_off(entries: int) -> None:
    with Ranks(2, {"REDUCER_RECORDER_ENTRIES": str(entries)}) as ranks:
        for dump in ranks.call(many_calls, 100):
            if entries == 0:
                assert dump is None
                continue
            assert [call.seq for call in dump.calls] == list(range(100 - entries, 100))
            assert dump.recorded == 100
            assert dump.groups[0].called == 100


def test_a_process_without_a_group_has_recorded_nothing() -> None:
    assert run("dump", str(os.getpid())).returncode == 1
    program = "import reducer; assert reducer.dump() is None"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=WAIT_S)


def wait_in_vain(timeout_expected: bool) -> str:
    try:
        dist.all_reduce(torch.ones(1000))
    except dist.DistBackendError as error:
        return str(error)
    return ""


def written(folder: Path, count: int) -> list[Path]:
    deadline = time.monotonic() + 20.0
    while True:
        files = sorted(folder.glob("reducer-*/rank*.json"))
        if len(files) == count:
            return files
        assert time.monotonic() < deadline, files
        time.sleep(0.05)


@pytest.mark.parametrize("algorithm", ["local", "direct"])
def test_a_timeout_writes_it_and_says_where(algorithm: str, tmp_path: Path) -> None:
    with Ranks(3, environment(algorithm, 3, REDUCER_RECORDER_DIR=str(tmp_path)), group_timeout_s=2.0) as ranks:
        ranks.call(many_calls, 3)
        assert all("waiting for rank 2" in text for text in ranks.call(wait_in_vain, True, only=[0, 1]))
        files = written(tmp_path, 2)
        logs = ranks.logs()
        name = f"rank 2 ({os.uname().nodename}:{ranks.pid(2)})"
    assert [file.name for file in files] == ["rank0.json", "rank1.json"]
    for rank, file in enumerate(files):
        assert f"after an error in group 'default' the last calls of rank {rank} are in {file}" in logs
        dump = recorder.read(file)
        failed = dump.calls[-1]
        assert (failed.seq, failed.state, failed.code) == (3, "failed", "timeout")
        assert "waiting for rank 2" in (failed.error or "")
        assert name in (failed.late or "")
    done = run("blame", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "all_reduce #3 of group 'default' (sum, float32, 1000 elements) failed on ranks 0 and 1" in done.stdout
    assert f"rank 2 of 3 left no dump ({name}: " in done.stdout


def hold(seconds: float, path: str) -> None:
    """Not in the collective until the file is there."""
    deadline = time.monotonic() + seconds
    while not Path(path).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    dist.all_reduce(torch.ones(1000))


def test_a_hang_is_dumped_from_outside_and_blamed(tmp_path: Path) -> None:
    """Nobody fails; the dumps of all ranks are asked for while they wait."""
    with Ranks(4, {"REDUCER_RECORDER_DIR": str(tmp_path)}) as ranks:
        ranks.call(many_calls, 118)
        go_on = tmp_path / "go-on"
        ranks.start([0, 1, 3], wait_in_vain, False)
        ranks.start([2], hold, 30.0, str(go_on))
        time.sleep(0.5)  # the others are in it
        done = run("dump", *(str(ranks.pid(rank)) for rank in range(4)))
        assert done.returncode == 0, done.stderr
        files = [Path(line) for line in done.stdout.split()]
        assert [file.name for file in files] == [f"rank{rank}.json" for rank in range(4)]
        named = run("blame", "--verbose", str(tmp_path))
        late = f"rank 2 ({os.uname().nodename}:{ranks.pid(2)})"
        go_on.touch()
        assert [outcome.value for outcome in ranks.answers([0, 1, 2, 3], 30.0)] == ["", "", None, ""]
        # And once more, with a plain signal: nobody waits any more.
        for rank in range(4):
            os.kill(ranks.pid(rank), signal.SIGRTMIN + 5)
        deadline = time.monotonic() + 20.0
        while any(recorder.read(file).groups[0].called != 119 for file in files):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    sentence, table = named.stdout.split("\n", 1)
    assert sentence.startswith(
        f"{late} is behind: it has not called all_reduce #118 of group 'default' (sum, float32, 1000 elements), which "
        "ranks 0, 1 and 3 wait in since "
    )
    assert sentence.endswith("; its last was #117, all_reduce(sum, float32, 1 element), done")
    assert table.count("started") == 3
    assert "nobody is behind in group 'default'" in run("blame", str(files[0].parent)).stdout


def with_another_group() -> tuple[str, tuple[recorder.Group, ...]]:
    """The number of the job, and its two groups; the second one's name comes from how many ranks it has."""
    dist.new_group(list(range(dist.get_world_size())), use_local_synchronization=True)
    dump = reducer.dump()
    assert dump is not None
    return dump.job, dump.groups


def test_the_processes_of_one_job_among_several(tmp_path: Path) -> None:
    with (
        Ranks(2, {"REDUCER_RECORDER_DIR": str(tmp_path)}) as one,
        Ranks(3, {"REDUCER_RECORDER_DIR": str(tmp_path)}) as other,
    ):
        (first, _), *_ = one.call(with_another_group)
        (second, groups), *_ = other.call(with_another_group)
        assert first != second
        folders = [tmp_path / f"reducer-{job}" for job in (first, second)]

        done = run("dump", "--job", first)
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.split()) == [str(folders[0] / f"rank{rank}.json") for rank in range(2)]
        assert not folders[1].exists(), "the other job's processes got no signal"
        for text in (groups[1].name, groups[1].job[:12].upper()):
            done = run("dump", "--job", text)
            assert done.returncode == 0, done.stderr
            assert sorted(done.stdout.split()) == [str(folders[1] / f"rank{rank}.json") for rank in range(3)]

        done = run("dump", "--job", "default")
        assert (done.returncode, done.stdout) == (1, "")
        assert "'default' fits several jobs; say more of the number of one: " in done.stderr
        assert f"{first} (2 processes, groups 'default', " in done.stderr
        assert f"{second} (3 processes, groups 'default', " in done.stderr

        done = run("dump", "--job", "none")
        assert (done.returncode, done.stdout) == (1, "")
        assert "no process of yours on this host is of the job 'none'; there are: " in done.stderr
        assert f"{first} (2 processes" in done.stderr
    assert run("dump", "--job", "").returncode == 1
    done = run("dump", "--job", "1", str(os.getpid()))
    assert done.returncode == 2 and "give processes or a job, not both" in done.stderr


SIGNALLED = """
import json, os, signal, sys, time
heard = []
signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
import torch.distributed as dist
from datetime import timedelta
dist.init_process_group("reducer", store=dist.HashStore(), rank=0, world_size=1)
dist.barrier()
child = os.fork()
if child == 0:  # its signals are no business of the parent
    os.kill(os.getpid(), signal.SIGUSR1)
    os._exit(0 if heard == [signal.SIGUSR1] else 1)
assert os.waitpid(child, 0)[1] == 0
folder = os.environ["REDUCER_RECORDER_DIR"]
assert os.listdir(folder) == [], "nothing is written for a child's signal"
os.kill(os.getpid(), signal.SIGUSR1)
deadline = time.monotonic() + 20
while not any(name == "rank0.json" for _, _, names in os.walk(folder) for name in names):
    assert time.monotonic() < deadline
    time.sleep(0.02)
assert heard == [signal.SIGUSR1], "the handler that was there before is called, too"
dist.destroy_process_group()
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.1)
assert heard == [signal.SIGUSR1] * 2, "and after the group"
"""


def test_a_signals_earlier_handler_is_called_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED],
        env={**os.environ, "REDUCER_RECORDER_DIR": str(tmp_path), "REDUCER_RECORDER_SIGNAL": "USR1"},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("reducer-*/rank0.json")
    assert recorder.read(file).reason == "signal"
    assert f"after a signal the last calls of rank 0 are in {file}" in done.stderr


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with Ranks(2, {"REDUCER_RECORDER_DIR": str(blocked)}, group_timeout_s=2.0) as ranks:
        ranks.call(many_calls, 1)
        assert ranks.call(wait_in_vain, True, only=[0]) != [""]
        deadline = time.monotonic() + 20.0
        while "the flight recorder cannot be written to" not in ranks.logs():
            assert time.monotonic() < deadline, ranks.logs()
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("REDUCER_RECORDER_ENTRIES", "-1", "no number of calls"),
        ("REDUCER_RECORDER_ENTRIES", "many", "no number of calls"),
        ("REDUCER_RECORDER_SIGNAL", "KILL", "none of USR1, USR2"),
        ("REDUCER_RECORDER_SIGNAL", "RTMIN+99", "none of USR1, USR2"),
    ],
)
def test_wrong_settings(variable: str, value: str, complaint: str) -> None:
    from reducer.options import resolve

    with pytest.raises(reducer.InvalidArgumentError, match=complaint) as caught:
        resolve(None, {variable: value})
    assert variable in str(caught.value)


def test_files_that_are_no_dumps(tmp_path: Path) -> None:
    path = tmp_path / "rank0.json"
    texts: list[Any] = ["", "{}", "[]", '{"format": 2}', '{"format": 1, "groups": 3}']
    for text in texts:
        path.write_text(text)
        done = run("blame", str(path))
        assert done.returncode == 1
        assert done.stderr.startswith(f"reducer: {path} ")
        assert "Traceback" not in done.stderr
