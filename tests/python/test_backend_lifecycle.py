"""How groups begin, live beside each other, and end."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, here, init_group, store_of

import reducer


@pytest.fixture(scope="module", params=["local", "direct"])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with Ranks(3, {"REDUCER_ALGORITHM": request.param}) as all_ranks:
        yield all_ranks


def native() -> Any:
    return dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))


# ---------------------------------------------------------------- work objects


def check_async() -> None:
    n, rank = dist.get_world_size(), dist.get_rank()
    tensors = [torch.full((1000 * i + 1,), float(rank + i)) for i in range(20)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in reversed(works):
        assert work is not None
        assert work.wait()
        assert work.is_completed()
        assert work.is_success()
        assert work.exception() is None
    for i, tensor in enumerate(tensors):
        assert torch.equal(tensor, torch.full_like(tensor, float(sum(range(n)) + n * i)))
    tensor = torch.ones(5)
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    work.wait()
    assert torch.equal(work.result()[0], torch.full((5,), float(n)))


def test_async_operations(ranks: Ranks) -> None:
    ranks.call(check_async)


def check_futures() -> None:
    n = dist.get_world_size()

    def note(future: torch.futures.Future[Any]) -> int:
        return int(future.value()[0].sum().item())

    futures = []
    for i in range(10):
        work = dist.all_reduce(torch.ones(10_000 + i), async_op=True)
        assert work is not None
        futures.append(work.get_future().then(note))
    assert [future.wait() for future in futures] == [n * (10_000 + i) for i in range(10)]
    # A future that is first asked for when the work has ended.
    work = dist.all_reduce(torch.ones(3), async_op=True)
    assert work is not None
    work.wait()
    assert work.get_future().then(note).wait() == 3 * n
    strided = torch.ones(6, 4)[:, 1]
    work = dist.all_reduce(strided, async_op=True)
    assert work is not None
    assert torch.equal(work.get_future().wait()[0], torch.full((6,), float(n)))


def test_futures(ranks: Ranks) -> None:
    ranks.call(check_futures)


def check_many_outstanding(operations: int, count: int) -> None:
    n, rank = dist.get_world_size(), dist.get_rank()
    tensors = [torch.full((count,), float(rank + i)) for i in range(operations)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in works:
        assert work is not None
        work.wait()
    for i, tensor in enumerate(tensors):
        assert torch.equal(tensor, torch.full((count,), float(n * (n - 1) // 2 + n * i)))


@pytest.mark.parametrize("n", [3, 4])
def test_a_ring_with_many_operations_outstanding(n: int) -> None:
    """Each of them alone has more chunks to wait for (1,400 and more) than may be under way in a lane (1,024)."""
    env = {"REDUCER_ALGORITHM": "ring", "REDUCER_CHUNK_BYTES": "4KiB"}
    with Ranks(n, env, group_timeout_s=30.0) as fresh:
        fresh.call(check_many_outstanding, 10, 1 << 20, timeout_s=50.0)


def check_foreign_memory(folder: str) -> None:
    """In a rank: rank 0 holds the GIL when memory that numpy owns is to be let go; the others need its threads."""
    held, release = f"{folder}/held", f"{folder}/release"
    count = 1_000_000
    if dist.get_rank() == 0:
        os.mkfifo(release)
        dist.all_reduce(torch.from_numpy(np.ones(count, dtype=np.float32)), async_op=True)
        work = dist.all_reduce(torch.ones(count), async_op=True)
        assert work is not None
        # A PyDLL keeps the GIL during its calls: from here to the others' word no Python runs in this process.
        assert ctypes.PyDLL(None).system(f"touch {held}; timeout 20 cat {release}".encode()) == 0
        work.wait()
        return
    deadline = time.monotonic() + 20
    while not os.path.exists(held):
        assert time.monotonic() < deadline, "rank 0 does not hold the GIL"
        threading.Event().wait(0.005)
    try:
        for _ in range(2):
            work = dist.all_reduce(torch.ones(count), async_op=True)
            assert work is not None
            work.wait(timedelta(seconds=5))
    finally:
        if dist.get_rank() == 1:
            Path(release).write_text("")


def test_memory_of_numpy_is_let_go_without_waiting_for_the_gil(ranks: Ranks, tmp_path: Path) -> None:
    ranks.call(check_foreign_memory, str(tmp_path))


def check_wait_timeout() -> None:
    """wait() has a timeout of its own, and the operation goes on."""
    rank = dist.get_rank()
    if rank == 0:
        tensor = torch.zeros(1)
        work = dist.irecv(tensor, 1)
        assert work is not None
        with pytest.raises(dist.DistBackendError, match="gave up after 50 ms"):
            work.wait(timedelta(milliseconds=50))
        assert not work.is_completed()
        dist.send(torch.ones(1), 1, tag=1)
        work.wait()
        assert tensor.item() == 5
    elif rank == 1:
        dist.recv(torch.ones(1), 0, tag=1)
        dist.send(torch.full((1,), 5.0), 0)


def test_wait_timeout(ranks: Ranks) -> None:
    ranks.call(check_wait_timeout)


def check_sequence_numbers() -> None:
    group = dist.distributed_c10d._get_default_group()
    backend = native()
    backend._set_sequence_number_for_group()
    before = backend.counters()["operations"]
    work = dist.all_reduce(torch.ones(1), async_op=True)
    assert work is not None
    work.wait()
    dist.barrier()
    assert backend.name() == "reducer"
    assert dist.get_backend() == "reducer"
    assert backend.algorithm == os.environ["REDUCER_ALGORITHM"]
    counters = backend.counters()
    assert counters["operations"] == before + 2
    assert counters["outstanding_bytes_max"] <= counters["window_bytes"]
    assert backend.options._timeout == timedelta(seconds=60)
    group.set_timeout(timedelta(seconds=50))
    assert backend.options._timeout == timedelta(seconds=50)
    group.set_timeout(timedelta(seconds=60))


def test_sequence_numbers_and_options(ranks: Ranks) -> None:
    ranks.call(check_sequence_numbers)


def check_profiler() -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dist.all_reduce(torch.ones(10))
        dist.broadcast(torch.ones(10), 0)
        dist.barrier()
    return [event.key for event in profile.key_averages()]


def test_profiler_shows_collectives(ranks: Ranks) -> None:
    for names in ranks.call(check_profiler):
        assert {"reducer:all_reduce", "reducer:broadcast", "reducer:barrier"} <= set(names)


def check_threads() -> None:
    """Two threads with a group each: neither waits for the other."""
    n = dist.get_world_size()
    groups = [dist.new_group() for _ in range(2)]
    failures: list[BaseException] = []

    def run(group: Any, value: float) -> None:
        try:
            for i in range(30):
                tensor = torch.full((200 * i + 1,), value)
                dist.all_reduce(tensor, group=group)
                assert torch.equal(tensor, torch.full_like(tensor, value * n))
        except BaseException as error:  # noqa: BLE001: for the main thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(group, i + 1.0)) for i, group in enumerate(groups)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
        assert not thread.is_alive()
    assert not failures, failures


def test_two_groups_in_two_threads(ranks: Ranks) -> None:
    ranks.call(check_threads)


# ---------------------------------------------------------------- groups


def check_subsets() -> None:
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([1, 2]), dist.new_group([0, 2])]
    singles = [dist.new_group([r]) for r in range(3)]
    works = []
    for members, group in zip(([0, 1], [1, 2], [0, 2]), pairs, strict=True):
        if rank in members:
            tensor = torch.full((5000,), float(rank))
            works.append((dist.all_reduce(tensor, group=group, async_op=True), tensor, float(sum(members))))
            objects: list[Any] = [None, None]
            dist.all_gather_object(objects, rank, group=group)
            assert objects == members
    for work, tensor, expected in works:
        assert work is not None
        work.wait()
        assert torch.equal(tensor, torch.full_like(tensor, expected))
    alone = torch.ones(3)
    dist.all_reduce(alone, group=singles[rank])
    assert torch.equal(alone, torch.ones(3))
    for group in [*pairs, *singles]:
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)
    dist.barrier()


def test_subsets(ranks: Ranks) -> None:
    ranks.call(check_subsets)


def check_again(times: int) -> None:
    """On one store, which keeps what earlier groups wrote."""
    n = here().world_size
    for i in range(times):
        init_group("again", pg_options=reducer.Options(chunk_bytes="8KiB"))
        tensor = torch.full((5000,), float(i))
        dist.all_reduce(tensor)
        assert torch.equal(tensor, torch.full_like(tensor, float(n * i)))
        dist.destroy_process_group()
        assert not dist.is_initialized()


def test_destroy_and_init_again() -> None:
    with Ranks(3, init=False) as fresh:
        fresh.call(check_again, 5)


def check_abort() -> str:
    """An abort fails what is under way; the group is destroyed and made again."""
    init_group("first")
    tensor = torch.ones(10)
    dist.all_reduce(tensor)
    text = ""
    store = store_of(here())
    if here().rank != 0:
        store.wait(["aborted"], timedelta(seconds=30))
    else:
        work = dist.all_reduce(torch.ones(10), async_op=True)
        assert work is not None
        native().abort()
        with pytest.raises(dist.DistBackendError) as caught:
            work.wait()
        text = str(caught.value)
        with pytest.raises(dist.DistBackendError, match="abort"):
            dist.barrier()
        store.set("aborted", "1")
    dist.destroy_process_group()
    init_group("second")
    tensor = torch.ones(10)
    dist.all_reduce(tensor)
    assert torch.equal(tensor, torch.full((10,), float(here().world_size)))
    dist.destroy_process_group()
    return text


def test_abort_destroy_and_init_again() -> None:
    with Ranks(2, init=False) as fresh:
        text = fresh.call(check_abort)[0]
    assert "[rank 0, group default]" in text
    assert "abort() was called on rank 0" in text


def check_use_after_destroy() -> None:
    init_group()
    group = dist.distributed_c10d._get_default_group()
    pending = dist.irecv(torch.ones(1), (here().rank + 1) % 2)
    assert pending is not None
    dist.destroy_process_group()
    with pytest.raises(dist.DistBackendError, match="destroy|left the group"):
        pending.wait()
    with pytest.raises(dist.DistBackendError, match="was shut down"):
        group.allreduce([torch.ones(1)], dist.AllreduceOptions())


def test_use_after_destroy() -> None:
    with Ranks(2, init=False) as fresh:
        fresh.call(check_use_after_destroy)


def check_detail() -> None:
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    init_group()
    n = here().world_size
    tensor = torch.ones(100)
    dist.all_reduce(tensor)
    assert torch.equal(tensor, torch.full((100,), float(n)))
    outputs = [torch.empty(2) for _ in range(n)]
    dist.all_gather(outputs, torch.full((2,), float(here().rank)))
    assert torch.equal(torch.stack(outputs)[:, 0], torch.arange(float(n)))
    dist.barrier()


def test_debug_level_detail() -> None:
    with Ranks(2, init=False) as fresh:
        fresh.call(check_detail)


def check_monitored_barrier() -> None:
    dist.distributed_c10d._get_default_group().monitored_barrier(timedelta(seconds=20))


def test_monitored_barrier(ranks: Ranks) -> None:
    ranks.call(check_monitored_barrier)


# ---------------------------------------------------------------- forks and ends


def check_fork() -> None:
    """A forked child lives, is refused with a reason, and ends."""
    dist.barrier()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            dist.barrier()
        except RuntimeError as error:
            os.write(write, str(error).encode())
            code = 0
        finally:
            # The objects of the group go as at the end of a process.
            dist.destroy_process_group()
            os._exit(code)
    os.close(write)
    deadline = time.monotonic() + 20
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid != 0:
            break
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise AssertionError("the forked child did not end")
        threading.Event().wait(0.01)
    assert os.waitstatus_to_exitcode(status) == 0
    text = os.read(read, 10_000).decode()
    os.close(read)
    assert f"was made in process {os.getpid()}" in text
    dist.barrier()


def test_forked_child() -> None:
    with Ranks(2) as fresh:
        fresh.call(check_fork)


PREAMBLE = """
import atexit, faulthandler, os, sys, threading
faulthandler.dump_traceback_later(50, exit=True)
# Registered before the backend's own end, and so done after it.
afterwards = []
atexit.register(lambda: [step() for step in afterwards])
import torch, torch.distributed as dist
{imports}
rank = int(sys.argv[1])
dist.init_process_group("reducer", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
tensor = torch.ones(1000)
dist.all_reduce(tensor)
assert tensor[0].item() == 2
"""

ENDINGS = {
    "without destroy": "",
    "with work outstanding": "work = dist.irecv(torch.ones(5), 1 - rank)",
    "with a callback outstanding": """
        future = dist.irecv(torch.ones(5), 1 - rank).get_future().then(lambda f: print("called"))
    """,
    "with an exception": "raise SystemExit(3)",
    "while a thread waits": """
        def wait():
            try:
                dist.recv(torch.ones(5), 1 - rank)
            except dist.DistBackendError:
                print("released")
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        afterwards.append(lambda: thread.join(20))
    """,
    "after destroy": "dist.destroy_process_group()",
}

# What else a rank must have printed at its end.
PRINTED = {"with a callback outstanding": "called\n", "while a thread waits": "released\n"}


def scripts(tmp_path: Path, text: str, env: dict[str, str] | None = None) -> list[subprocess.CompletedProcess[str]]:
    """Two ranks as plain Python programs."""
    path = tmp_path / "rank.py"
    path.write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(env or {})}
    processes = [
        subprocess.Popen(
            [sys.executable, str(path), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    done = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=60)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return done


@pytest.mark.parametrize("ending", list(ENDINGS))
def test_exit(tmp_path: Path, ending: str) -> None:
    text = PREAMBLE.format(imports="import reducer") + textwrap.dedent(ENDINGS[ending])
    for process in scripts(tmp_path, text):
        expected = 3 if ending == "with an exception" else 0
        assert process.returncode == expected, process.stderr
        assert process.stdout == PRINTED.get(ending, "")
        assert "Fatal" not in process.stderr
        assert "terminate called" not in process.stderr


def test_entry_point_makes_the_import_unnecessary(tmp_path: Path) -> None:
    points = importlib.metadata.entry_points(group="torch.backends", name="reducer")
    if not points:
        # From a source tree: the same metadata, as an installation would have it.
        metadata = tmp_path / "site" / "reducer-0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: reducer\nVersion: 0\n")
        (metadata / "entry_points.txt").write_text("[torch.backends]\nreducer = reducer:_autoload\n")
    text = PREAMBLE.format(imports="assert 'reducer.backend' not in sys.modules") + "dist.destroy_process_group()"
    path = os.pathsep.join([str(tmp_path / "site"), *sys.path])
    for process in scripts(tmp_path, text, {"PYTHONPATH": path}):
        assert process.returncode == 0, process.stderr


def test_import_is_cheap_and_needs_no_native_library() -> None:
    """Importing registers the backend; the native modules are loaded with the first group."""
    text = """
        import sys
        import torch
        import reducer
        import torch.distributed as dist
        assert "reducer" in dist.Backend.backend_list
        assert dist.Backend.backend_capability["reducer"][0] == "cpu"
        assert not [name for name in sys.modules if name in ("reducer._core", "reducer._torch", "reducer.backend")]
        assert reducer.Options(algorithm="ring").algorithm == "ring"
        assert issubclass(reducer.MismatchError, ValueError)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        env=environment,
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_another_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from reducer import backend

    monkeypatch.setattr(backend, "_native", None)
    monkeypatch.setattr(backend.torch, "__version__", "2.99.1+cpu")
    with pytest.raises(reducer.VersionError, match=r"built for torch 2\.\d+.*this is torch 2\.99\.1"):
        backend.load_native()


def leave_before_the_first_collective() -> float:
    """In a rank: the last one goes at once, and the others call what it was to join in. Seconds that they waited."""
    init_group()
    rank, n = dist.get_rank(), dist.get_world_size()
    begun = time.monotonic()
    if rank == n - 1:
        dist.destroy_process_group()
        return 0
    with pytest.raises(dist.DistBackendError, match=rf"rank {n - 1} .*(left the group|was lost)"):
        dist.all_reduce(torch.ones(3))
    return time.monotonic() - begun


def test_a_rank_that_leaves_before_the_first_collective_is_named_at_once() -> None:
    with Ranks(3, init=False) as fresh:
        assert max(fresh.call(leave_before_the_first_collective)) < 10
