"""A worker of an elastic job for tests: its gradients can be computed anew elsewhere, and it logs all it does."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import _context as context

import reducer.elastic as elastic

COUNT = 301
SLOTS = 16
WAIT_S = 60.0


@dataclass
class Plan:
    """What a worker is to do. `slot`: which worker it is, whatever its rank."""

    slot: int
    rendezvous: str
    log: str
    steps: int = 30
    options: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    die_at: tuple[str, int] | None = None  # a place, and a step
    step_s: float = 0.005
    stop_after: int | None = None


class Model(torch.nn.Module):
    """Its gradient at a step is what it has learned, less what the worker was given; `probe` tells who took part."""

    def __init__(self, slot: int) -> None:
        super().__init__()
        # Unequal at first: workers take over the first one's.
        self.first = torch.nn.Parameter(torch.full((COUNT,), float(slot)))
        self.second = torch.nn.Parameter(torch.full((COUNT,), float(slot)))
        self.probe = torch.nn.Parameter(torch.zeros(SLOTS))
        self.unused = torch.nn.Parameter(torch.zeros(3))
        self.register_buffer("turns", torch.zeros((), dtype=torch.int64))

    def forward(self, slot: int, step: int) -> torch.Tensor:
        self.turns += 1
        loss = self.probe[slot]
        for i, parameter in enumerate((self.first, self.second)):
            loss = loss + 0.5 * (parameter - given(slot, step, i)).square().sum()
        return loss


def given(slot: int, step: int, part: int) -> torch.Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed((slot * 1000 + step) * 2 + part))


def optimizer_of(model: Model) -> torch.optim.SGD:
    return torch.optim.SGD([model.first, model.second], lr=0.25, momentum=0.5)


def checksum(model: Model, optimizer: torch.optim.Optimizer) -> str:
    digest = hashlib.sha256()
    for tensor in [*model.state_dict().values()]:
        digest.update(tensor.numpy().tobytes())
    for state in optimizer.state_dict()["state"].values():
        digest.update(state["momentum_buffer"].numpy().tobytes())
    return digest.hexdigest()


def reference(contributions: list[list[int]], first: int) -> torch.Tensor:
    """One process' training with the averages of these slots' gradients, in this order, step by step."""
    model = Model(first)
    optimizer = optimizer_of(model)
    for step, slots in enumerate(contributions):
        for i, parameter in enumerate((model.first, model.second)):
            total = parameter.detach() - given(slots[0], step, i)
            for slot in slots[1:]:
                total = total + (parameter.detach() - given(slot, step, i))
            parameter.grad = total / len(slots)
        optimizer.step()
    return torch.cat([model.first.detach(), model.second.detach()])


def work(plan: Plan) -> None:
    """The life of a worker."""
    # What torch and the native parts print goes there, too.
    number = os.open(plan.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(number, 2)
    os.environ.update(plan.env)
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s:%(name)s:%(message)s")

    def note(what: str, **more: Any) -> None:
        line = json.dumps({"what": what, "slot": plan.slot, "time": time.time(), **more})
        os.write(number, line.encode() + b"\n")

    def changed(change: elastic.Change) -> None:
        note("change", **change.__dict__)

    try:
        _train(plan, note, changed)
    except Exception as error:
        note("error", kind=type(error).__name__, text=str(error), trace=traceback.format_exc())
        raise SystemExit(3) from error


def _train(plan: Plan, note: Callable[..., None], changed: Callable[[elastic.Change], None]) -> None:
    torch.manual_seed(plan.slot)
    model = Model(plan.slot)
    optimizer = optimizer_of(model)
    sampler = elastic.Sampler(997, 3, seed=5)
    session = elastic.Session(
        model,
        optimizer,
        plan.rendezvous,
        state={"sampler": sampler},
        on_change=changed,
        **{"timeout": 20.0, "patience": 30.0, "last_call": 10.0, "bucket_bytes": 64, **plan.options},
    )
    _arm(plan, session, note)
    with session:
        for step in session.steps(plan.steps):
            note("begin", step=step, indices=sampler.indices(), drawn=float(torch.rand(1)))
            _die(plan, "begin", step)
            model(plan.slot, step).backward()
            threading.Event().wait(plan.step_s)
            if session.reduce():
                slots = [slot for slot in range(SLOTS) if model.probe.grad is not None and model.probe.grad[slot] != 0]
                assert model.unused.grad is None
                _die(plan, "averaged", step)
                optimizer.step()
                note("done", step=step, slots=slots, sum=checksum(model, optimizer), turns=int(model.turns))
                if step == plan.stop_after:
                    break
        torch.save(torch.cat([model.first.detach(), model.second.detach()]), f"{plan.log}.weights")
        note("end")


def _die(plan: Plan, place: str, step: int) -> None:
    if plan.die_at == (place, step):
        os.kill(os.getpid(), signal.SIGKILL)


def _arm(plan: Plan, session: elastic.Session, note: Callable[..., None]) -> None:
    """Deaths at places that only the session comes by."""
    from reducer.elastic import _handover
    from reducer.elastic._rendezvous import Rendezvous

    vote, confirm, exchange = session._vote, Rendezvous.confirm, _handover.exchange

    def at_vote() -> None:
        _die(plan, "vote", session.step)
        vote()

    def at_confirm(self: Rendezvous, generation: Any) -> None:
        _die(plan, "forming", generation.number)
        confirm(self, generation)
        _die(plan, "formed", generation.number)

    def at_exchange(held: Any, source: int, *, wanted: bool) -> Any:
        if plan.die_at == ("gives" if held is not None else "takes" if wanted else "", session.generation):
            dist.broadcast(torch.tensor([1000 if held is not None else 0]), src=source)
            os.kill(os.getpid(), signal.SIGKILL)
        return exchange(held, source, wanted=wanted)

    session._vote = at_vote  # type: ignore[method-assign]
    Rendezvous.confirm = at_confirm  # type: ignore[method-assign]
    _handover.exchange = at_exchange


def run_script(arguments: list[str], log: str) -> None:
    """In a process: a Python program with its arguments, and what it prints."""
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(number, 1)
    os.dup2(number, 2)
    torch.set_num_threads(1)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


class Job:
    """Workers of one elastic job and their logs. Every wait has a deadline; all processes end with it."""

    def __init__(self, folder: Path, **common: Any) -> None:
        self._folder = folder
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._common = {"rendezvous": f"tcp://127.0.0.1:{self._store.port}", **common}
        self.processes: dict[int, Any] = {}

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.is_alive():
                process.kill()
            process.join(WAIT_S)

    def start(self, *slots: int, **own: Any) -> None:
        for slot in slots:
            plan = Plan(slot=slot, log=str(self._folder / f"{slot}.log"), **{**self._common, **own})
            self.processes[slot] = context.Process(target=work, args=(plan,))
            self.processes[slot].start()

    def kill(self, slot: int) -> None:
        self.processes[slot].kill()
        self.processes[slot].join(WAIT_S)

    def events(self, slot: int, what: str = "") -> list[dict[str, Any]]:
        path = self._folder / f"{slot}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        all_events = []
        for line in lines:
            if line.startswith('{"what"') and line.endswith("}"):
                all_events.append(json.loads(line))
        return [event for event in all_events if what in ("", event["what"])]

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-20000:]}" for path in sorted(self._folder.glob("*.log")))

    def wait_for(self, slot: int, what: str, count: int = 1) -> None:
        """Until the slot's log has so many of them."""
        end = time.monotonic() + WAIT_S
        while len(self.events(slot, what)) < count:
            assert time.monotonic() < end, f"worker {slot} has no {count} x {what}\n{self.logs()}"
            threading.Event().wait(0.01)

    def finish(self, *slots: int) -> dict[int, int]:
        """Waits for the ends of all (or these); exit codes."""
        end = time.monotonic() + WAIT_S
        codes = {}
        for slot in slots or tuple(self.processes):
            self.processes[slot].join(max(0.0, end - time.monotonic()))
            assert self.processes[slot].exitcode is not None, f"worker {slot} hangs\n{self.logs()}"
            codes[slot] = self.processes[slot].exitcode
        return codes

    def check(self, steps: int) -> list[list[int]]:
        """Whether all that any worker has done fits together; by step whose gradients it has, in the order of ranks.

        Each step is the same on all workers that did it, to the bit, and what comes out is what one process computes.
        """
        slots = list(self.processes)
        try:
            return self._check(slots, steps)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from error

    def _check(self, slots: list[int], steps: int) -> list[list[int]]:
        by_step: dict[int, set[tuple[str, tuple[int, ...], int]]] = {}
        ranks: dict[int, dict[int, int]] = {}
        for slot in slots:
            for event in self.events(slot, "done"):
                by_step.setdefault(event["step"], set()).add((event["sum"], tuple(event["slots"]), event["turns"]))
            for event in self.events(slot, "change"):
                ranks.setdefault(event["generation"], {})[slot] = event["rank"]
        assert sorted(by_step) == list(range(steps))
        contributions = []
        for step in range(steps):
            assert len(by_step[step]) == 1, f"step {step}: {by_step[step]}"
            ((_, took_part, turns),) = by_step[step]
            # However often it was computed.
            assert turns == step + 1
            contributions.append(list(took_part))
        ends = [torch.load(f"{self._folder}/{slot}.log.weights") for slot in slots if self.events(slot, "end")]
        assert ends
        first = next(slot for slot, rank in ranks[min(ranks)].items() if rank == 0)
        # Sums are in the order of ranks, which is that of the slots in no job with joins: the last bits differ.
        torch.testing.assert_close(ends[0], reference(contributions, first), rtol=1e-4, atol=1e-5)
        assert all(torch.equal(end, ends[0]) for end in ends)
        return contributions
