"""Training that goes on: workers are killed at every place of a step, and new ones come, in real processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from elastic_worker import WAIT_S, Job, run_script
from ranks import _context as context
from ranks import standalone_reducers

import reducer
import reducer.elastic as elastic
from reducer.elastic._decision import Action, Phase, Standing, decide

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
LOST_AT = 9


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with Job(tmp_path, steps=STEPS) as one:
        yield one


def begun(job: Job, slot: int, step: int) -> int:
    """How often a worker computed a step."""
    return [event["step"] for event in job.events(slot, "begin")].count(step)


@pytest.mark.parametrize("place", ["begin", "vote"])
@pytest.mark.parametrize("on_loss", ["retry", "average"])
def test_a_lost_worker_costs_no_more_than_the_step(job: Job, on_loss: str, place: str) -> None:
    job.start(0, 1, 3, options={"on_loss": on_loss, "min_workers": 3, "max_workers": 4})
    job.start(2, options={"on_loss": on_loss, "min_workers": 3, "max_workers": 4}, die_at=(place, LOST_AT))
    assert job.finish() == {0: 0, 1: 0, 3: 0, 2: -9}
    contributions = job.check(STEPS)
    assert contributions[:LOST_AT] == [[0, 1, 2, 3]] * LOST_AT
    assert contributions[LOST_AT + 1 :] == [[0, 1, 3]] * (STEPS - LOST_AT - 1)
    if place == "begin":
        assert contributions[LOST_AT] == [0, 1, 3]
        assert {begun(job, slot, LOST_AT) for slot in (0, 1, 3)} == {2 if on_loss == "retry" else 1}
        # Each has its own random numbers, and the same ones when it does the step again.
        drawn = [{one["drawn"] for one in job.events(slot, "begin") if one["step"] == LOST_AT} for slot in (0, 1, 3)]
        assert [len(numbers) for numbers in drawn] == [1, 1, 1]
        assert len(set.union(*drawn)) == 3
    else:
        # The lost one's gradient was in already: the step is whole where all others had that.
        assert contributions[LOST_AT] in ([0, 1, 2, 3], [0, 1, 3])
    (change,) = [event for event in job.events(0, "change") if event["lost"]]
    assert len(change["lost"]) == 1
    assert change["world_size"] == 3
    assert job.logs().count("WARNING:reducer:reducer: elastic: generation 2: lost") == 1


@pytest.mark.parametrize("place", ["vote", "averaged"])
@pytest.mark.parametrize("on_loss", ["retry", "average"])
def test_two_at_once(job: Job, on_loss: str, place: str) -> None:
    """Whatever the others had of the step, and whether some of them had applied it: they do the same."""
    options = {"on_loss": on_loss, "max_workers": 4}
    job.start(0, 1, options=options, die_at=(place, LOST_AT))
    job.start(2, 3, options=options)
    assert job.finish() == {0: -9, 1: -9, 2: 0, 3: 0}
    contributions = job.check(STEPS)
    assert contributions[LOST_AT] in ([0, 1, 2, 3], [2, 3]) or place == "vote"
    assert contributions[LOST_AT + 1 :] == [[2, 3]] * (STEPS - LOST_AT - 1)


@pytest.mark.parametrize("servers", [0, 2])
def test_killed_and_back(tmp_path: Path, servers: int) -> None:
    """Three times: a worker is killed at any moment, another takes its place."""
    with standalone_reducers(servers) as addresses:
        env = {"REDUCER_SERVERS": ",".join(addresses)} if servers else {}
        with Job(tmp_path, steps=120, env=env, step_s=0.02) as job:
            job.start(0, 1, 2, options={"max_workers": 3})
            for i, slot in enumerate((1, 0, 2)):
                job.wait_for(slot, "done", 10)
                threading.Event().wait(random.Random(i + servers).uniform(0.0, 0.05))
                job.kill(slot)
                job.start(slot + 3, options={"max_workers": 3})
                job.wait_for(slot + 3, "done")
            codes = job.finish()
            assert codes == {0: -9, 1: -9, 2: -9, 3: 0, 4: 0, 5: 0}
            contributions = job.check(120)
            assert contributions[-1] == [3, 4, 5]
            assert job.events(5, "done")[0]["step"] > job.events(4, "done")[0]["step"] > 9


def test_two_come_at_once(job: Job) -> None:
    both = {"options": {"min_workers": 2, "max_workers": 4, "last_call": 0.1}, "steps": 150, "step_s": 0.02}
    job.start(0, 1, **both)
    job.wait_for(0, "done", 5)
    job.start(2, 3, **both)
    job.wait_for(2, "done")
    job.start(4, **both)  # waits for a place
    job.wait_for(3, "done")
    job.kill(1)
    assert job.finish() == {0: 0, 1: -9, 2: 0, 3: 0, 4: 0}
    contributions = job.check(150)
    assert [0, 1, 2, 3] in contributions
    # A new worker draws what the one draws that gave it the state.
    first = job.events(2, "begin")[0]
    drawn = {one["drawn"] for slot in (0, 1) for one in job.events(slot, "begin") if one["step"] == first["step"]}
    assert first["drawn"] in drawn
    assert contributions[-1] == [0, 2, 3, 4]
    assert all(len(slots) <= 4 for slots in contributions)


@pytest.mark.parametrize("who", ["gives", "takes"])
def test_a_death_while_the_state_is_handed_over(job: Job, who: str) -> None:
    """The source or the new worker dies in the middle; the next one to come gets the state from another."""
    both = {"steps": 80, "step_s": 0.02, "options": {"min_workers": 3, "last_call": 0.1}}
    job.start(0, 1, 2, die_at=(who, 2), **both)
    job.wait_for(0, "done", 5)
    job.start(3, die_at=(who, 2), **both)
    if who == "takes":
        job.finish(3)
        job.start(4, **both)
    codes = job.finish()
    contributions = job.check(80)
    if who == "gives":
        assert sorted(codes.values()) == [-9, 0, 0, 0]
        assert 3 in contributions[-1]
    else:
        assert codes == {0: 0, 1: 0, 2: 0, 3: -9, 4: 0}
        assert contributions[-1] == [0, 1, 2, 4]


def test_the_source_dies_in_the_change_after_a_loss(job: Job) -> None:
    """Those that have dropped the step by then are between two steps for the next change."""
    both = {"options": {"min_workers": 2, "max_workers": 3}, "steps": 40, "step_s": 0.02}
    job.start(0, 1, die_at=("gives", 2), **both)
    job.start(2, die_at=("begin", 30), **both)
    job.wait_for(2, "done", 3)
    job.start(3, **both)  # waits for a place
    codes = job.finish()
    assert sorted(codes.values()) == [-9, -9, 0, 0]
    assert codes[3] == 0
    contributions = job.check(40)
    assert contributions[29] == [0, 1, 2]
    assert len(contributions[30]) == 2
    assert 3 in contributions[30]


@pytest.mark.parametrize("place", ["forming", "formed"])
def test_a_death_while_the_others_find_each_other(job: Job, place: str) -> None:
    """A second worker dies in the generation that is made since the first did, before or while its group is made."""
    options = {"max_workers": 4}
    job.start(0, 1, options=options)
    job.start(2, options=options, die_at=("begin", LOST_AT))
    job.start(3, options=options, die_at=(place, 2))
    assert job.finish() == {0: 0, 1: 0, 2: -9, 3: -9}
    contributions = job.check(STEPS)
    assert contributions[LOST_AT:] == [[0, 1]] * (STEPS - LOST_AT)
    change = [event for event in job.events(0, "change") if event["lost"]][-1]
    assert len(change["lost"]) == 2
    # Nobody has waited for what cannot come.
    (death,) = [event["time"] for event in job.events(2, "begin") if event["step"] == LOST_AT]
    assert change["time"] - death < 10.0


def test_a_stopped_worker_is_left_behind_and_comes_back_as_a_new_one(job: Job) -> None:
    options = {"max_workers": 3, "timeout": 2.0}
    job.start(0, 1, 2, options=options, steps=80, step_s=0.02)
    job.wait_for(2, "done", 5)
    os.kill(job.processes[2].pid, signal.SIGSTOP)
    stopped = len(job.events(2, "done"))
    job.wait_for(0, "change", 2)
    before = len(job.events(0, "done"))
    job.wait_for(0, "done", before + 5)
    os.kill(job.processes[2].pid, signal.SIGCONT)
    assert job.finish() == {0: 0, 1: 0, 2: 0}
    contributions = job.check(80)
    assert [0, 1] in contributions
    assert contributions[-1] == [0, 1, 2]
    assert len(job.events(2, "done")) > stopped


# ---------------------------------------------------------------- limits, and errors


def test_below_the_minimum_it_waits_for_another(job: Job) -> None:
    options = {"min_workers": 2, "max_workers": 2}
    job.start(0, options=options)
    job.start(1, options=options, die_at=("begin", LOST_AT))
    job.finish(1)
    assert not [event for event in job.events(0, "done") if event["step"] >= LOST_AT]
    job.start(2, options=options)
    assert job.finish() == {0: 0, 1: -9, 2: 0}
    assert job.check(STEPS)[LOST_AT:] == [[0, 2]] * (STEPS - LOST_AT)


def test_below_the_minimum_for_too_long(job: Job) -> None:
    options = {"min_workers": 2, "max_workers": 2, "patience": 2.0}
    job.start(0, options=options)
    job.start(1, options=options, die_at=("begin", LOST_AT))
    began = time.monotonic()
    assert job.finish() == {0: 3, 1: -9}
    assert time.monotonic() - began < 20
    (error,) = job.events(0, "error")
    assert error["kind"] == "TimeoutError"
    assert "1 of at least 2 workers were there within 2 s; start more: they find this job by tcp://" in error["text"]


def test_all_that_had_the_state_are_gone(job: Job) -> None:
    job.start(0, 1, options={"max_workers": 2}, die_at=("begin", LOST_AT))
    assert job.finish() == {0: -9, 1: -9}
    job.start(2, options={"max_workers": 2})
    assert job.finish(2) == {2: 3}
    (error,) = job.events(2, "error")
    assert error["kind"] == "UnavailableError"
    assert "start again from a checkpoint" in error["text"]


def test_a_worker_that_comes_too_late_or_was_told_otherwise(job: Job) -> None:
    job.start(0, 1, options={"max_workers": 2}, steps=120, step_s=0.02)
    job.wait_for(0, "done")
    job.start(2, options={"max_workers": 3})
    assert job.finish(2) == {2: 3}
    assert job.events(2, "error")[0]["kind"] == "MismatchError"
    job.start(4, options={"max_workers": 2, "patience": 0.3})
    assert job.finish(4) == {4: 3}
    assert job.events(4, "error")[0]["kind"] == "TimeoutError"
    assert "those at work did not let this worker in within 0.3 s" in job.events(4, "error")[0]["text"]
    assert job.finish(0, 1) == {0: 0, 1: 0}
    job.start(3, options={"max_workers": 2})
    assert job.finish(3) == {3: 3}
    assert job.events(3, "error")[0]["kind"] == "AbortedError"
    assert "this job is over: its workers have done all 120 steps" in job.events(3, "error")[0]["text"]
    job.check(120)


def test_what_fails_again_and_again_without_a_loss_is_an_error(job: Job) -> None:
    """Workers that cut their gradients differently: each attempt is an error that names both calls."""
    options = {"max_workers": 2, "min_workers": 2, "patience": 5.0}
    job.start(0, options=options)
    job.start(1, options={**options, "bucket_bytes": 1 << 20})
    assert job.finish() == {0: 3, 1: 3}
    errors = [job.events(slot, "error")[0] for slot in (0, 1)]
    # Who raises it leaves, and the other may hear of that instead.
    kinds = {error["kind"]: error["text"] for error in errors}
    assert "ranks made different calls" in kinds["DistBackendError"]
    assert not set(kinds) - {"DistBackendError", "TimeoutError"}
    assert {begun(job, slot, 0) for slot in (0, 1)} == {3}


def parts() -> tuple[torch.nn.Linear, torch.optim.SGD]:
    model = torch.nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"on_loss": "panic"}, "on_loss: 'panic' is neither"),
        ({"min_workers": 0}, "min_workers 0 must be"),
        ({"min_workers": 3, "max_workers": 2}, "max_workers .2. no less"),
    ],
)
def test_arguments(options: dict[str, Any], text: str) -> None:
    with pytest.raises(reducer.InvalidArgumentError, match=text):
        elastic.Session(*parts(), "tcp://127.0.0.1:1", **options)


def test_rendezvous_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for rendezvous, text in ((None, "only under torchrun"), ("http://a:1", "neither"), ("tcp://a", "neither")):
        with pytest.raises(reducer.InvalidArgumentError, match=text), elastic.Session(*parts(), rendezvous):
            pass
    with (
        pytest.raises(reducer.UnavailableError, match="start `reducer rendezvous"),
        elastic.Session(*parts(), "tcp://127.0.0.1:9", patience=1.0),
    ):
        pass


def test_a_job_of_one_in_this_process(tmp_path: Path) -> None:
    """Accumulated gradients, misuse, properties; the store is a file."""
    model, optimizer = parts()
    with elastic.Session(model, optimizer, f"file://{tmp_path}/store", last_call=0.0) as session:
        assert (session.rank, session.world_size, session.generation, session.step) == (0, 1, 1, 0)
        x = torch.arange(3.0)
        seen = []
        with pytest.raises(reducer.InvalidArgumentError, match="belongs into the loop"):
            session.reduce()
        for step in session.steps(3):
            seen.append(step)
            with session.no_sync():
                model(x).sum().backward()
            model(x).sum().backward()
            assert session.reduce()
            assert model.weight.grad is not None
            assert torch.equal(model.weight.grad, 2 * x.view(1, 3))
            optimizer.step()
        assert seen == [0, 1, 2]
        with pytest.raises(RuntimeError, match="backward ran twice"):
            for _ in session.steps(4):
                model(x).sum().backward()
                model(x).sum().backward()
    with pytest.raises(reducer.InvalidArgumentError, match="used once"), session:
        pass
    with (
        pytest.raises(reducer.InvalidArgumentError, match="did not call"),
        elastic.Session(model, optimizer, f"file://{tmp_path}/other", last_call=0.0) as session,
    ):
        for _ in session.steps(4):
            pass


def test_the_store_of_torchruns_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(store.port))):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with elastic.Session(*parts(), last_call=0.0) as session:
        assert session.world_size == 1
    assert store.check(["elastic/default/record"])


def test_workers_that_stop_early_together(job: Job) -> None:
    """They leave the loop by `break`: none of them waits for the minimum because others are gone."""
    job.start(0, 1, 2, options={"min_workers": 3, "max_workers": 3, "patience": 5.0}, stop_after=LOST_AT)
    assert job.finish() == {0: 0, 1: 0, 2: 0}
    job.check(LOST_AT + 1)


# ---------------------------------------------------------------- what is decided


def test_every_decision_is_one_that_all_can_follow() -> None:
    """All standings of three workers that can be at once: nobody steps twice or not at all, all are together after."""
    standings = [Standing(7, phase) for phase in Phase] + [Standing(8, Phase.BOUNDARY), Standing(8, Phase.BEGUN)]
    for on_loss, three in itertools.product(("retry", "average"), itertools.product(standings, repeat=3)):
        ahead = any(one.step == 8 for one in three)
        if ahead and any(one.step == 7 and one.phase != Phase.REDUCED for one in three):
            with pytest.raises(reducer.InternalError):
                decide(three, [], on_loss)
            continue
        decision = decide(three, [], on_loss)
        assert decision.step == (8 if ahead else 7)
        after = set()
        for standing, action in zip(three, decision.actions, strict=True):
            if action == Action.COMMIT:
                assert standing.phase == Phase.REDUCED
            if action == Action.AVERAGE:
                assert on_loss == "average"
                assert standing.phase in (Phase.BEGUN, Phase.REDUCED)
                assert set(decision.actions) == {Action.AVERAGE}
            if action == Action.GO_ON:
                assert standing.phase == Phase.BOUNDARY
            after.add(standing.step + (action == Action.COMMIT))
        assert len(after) == 1
        if decision.source is not None:
            assert three[decision.source].step == decision.step
            assert decision.actions[decision.source] in (Action.GO_ON, Action.RETRY)


def test_those_that_left_count() -> None:
    """The last worker of a job that did not hear that the last step is whole."""
    decision = decide([Standing(7, Phase.REDUCED)], [Standing(8, Phase.BOUNDARY)], "retry")
    assert decision.actions == (Action.COMMIT,)
    assert decision.source is None


# ---------------------------------------------------------------- the sampler


def test_the_sampler_deals_everything_once_whatever_the_number_of_workers() -> None:
    samplers = [elastic.Sampler(100, 4, seed=3) for _ in range(5)]
    dealt: list[int] = []
    for world_size in (2, 3, 5, 1, 5, 5, 4):
        for rank in range(world_size):
            samplers[rank].bind(lambda place=(rank, world_size): place)
            dealt += samplers[rank].indices()
            assert samplers[rank].indices() == dealt[-4:]
        # Those that come later get the state of those that were there.
        samplers[0].advance()
        for other in samplers[1:]:
            other.load_state_dict(samplers[0].state_dict())
    assert len(dealt) == 100
    assert sorted(dealt) == list(range(100))
    assert samplers[0].epoch == 1.0
    samplers[0].bind(lambda: (0, 1))
    assert samplers[0].indices() != dealt[:4]
    with pytest.raises(reducer.InvalidArgumentError):
        elastic.Sampler(10, 0)
    with pytest.raises(reducer.InvalidArgumentError, match="session"):
        elastic.Sampler(10, 1).indices()


# ---------------------------------------------------------------- the command, the example, the documentation


@contextlib.contextmanager
def rendezvous(listen: str = "127.0.0.1:0") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`reducer rendezvous` and the address that it prints."""
    command = [sys.executable, "-m", "reducer", "rendezvous", "--listen", listen]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], WAIT_S)[0]
        line = process.stdout.readline()
        assert line.startswith("reducer rendezvous ready on "), line
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait(WAIT_S)


@contextlib.contextmanager
def scripts(arguments: list[str], count: int, tmp_path: Path) -> Iterator[list[Any]]:
    """So many processes that run a Python program, with logs worker0.log, ..."""
    workers = [context.Process(target=run_script, args=(arguments, f"{tmp_path}/worker{i}.log")) for i in range(count)]
    for worker in workers:
        worker.start()
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.join(WAIT_S)


def exits(workers: list[Any]) -> list[int | None]:
    for worker in workers:
        worker.join(WAIT_S)
    return [worker.exitcode for worker in workers]


def test_the_command_holds_the_store_of_a_job_and_ends_by_a_signal(tmp_path: Path) -> None:
    with rendezvous() as (process, address):
        _, port = address.split(":")
        # Only where it was told to listen.
        with pytest.raises(OSError), socket.create_connection(("127.0.0.2", int(port)), timeout=5):
            pass
        with Job(tmp_path, steps=STEPS) as job:
            job.start(0, 1, rendezvous=f"tcp://{address}", options={"max_workers": 2})
            assert job.finish() == {0: 0, 1: 0}
            job.check(STEPS)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
        again = subprocess.run(
            [sys.executable, "-m", "reducer", "rendezvous", "--listen", "nowhere.invalid:1"],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert again.returncode == 1
        assert "reducer: cannot listen on nowhere.invalid:1" in again.stderr


def test_the_store_is_lost(tmp_path: Path) -> None:
    """Training goes on; the loss of a worker then is an error that says so."""
    with rendezvous() as (process, address), Job(tmp_path, rendezvous=f"tcp://{address}", steps=150) as job:
        job.start(0, 1, options={"max_workers": 2}, step_s=0.02)
        job.wait_for(0, "done", 3)
        process.kill()
        process.wait(WAIT_S)
        count = len(job.events(0, "done"))
        job.wait_for(0, "done", count + 30)
        job.kill(1)
        assert job.finish() == {0: 3, 1: -9}
        (error,) = job.events(0, "error")
        assert error["kind"] == "UnavailableError"
        assert "by which the workers of this job find each other" in error["text"]
        assert job.logs().count("Training goes on; the next loss of a worker ends it") == 1


def test_the_documented_example_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "elastic.md").read_text()
    script = tmp_path / "train.py"
    script.write_text(text.split("```python\n", 1)[1].split("```", 1)[0])
    with scripts([str(script), f"file://{tmp_path}/store"], 2, tmp_path) as workers:
        assert exits(workers) == [0, 0], (tmp_path / "worker0.log").read_text()
    ends = {(tmp_path / f"worker{i}.log").read_text().splitlines()[-1] for i in range(2)}
    assert len(ends) == 1
    assert ends.pop().startswith("500 steps, weights ")


def test_the_example_trains_on_when_a_worker_is_killed(tmp_path: Path) -> None:
    first = tmp_path / "worker1.log"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    program = [str(ROOT / "examples" / "elastic_train.py"), f"tcp://127.0.0.1:{store.port}", "--steps", "40"]
    with scripts(program, 3, tmp_path) as workers:
        deadline = time.monotonic() + WAIT_S
        while not first.exists() or "step 10:" not in first.read_text():
            assert time.monotonic() < deadline, first.read_text()
            threading.Event().wait(0.02)
        workers[0].kill()
        assert exits(workers) == [-signal.SIGKILL, 0, 0], first.read_text()
    logs = [(tmp_path / f"worker{i}.log").read_text() for i in (1, 2)]
    ends = [log.splitlines()[-1] for log in logs]
    assert "weights " in ends[0]
    assert ends[0].split("weights ")[1] == ends[1].split("weights ")[1]
    assert sum(log.count("reducer: elastic:") for log in logs) == 1, logs
