"""One rank of one contender: a process forked from the warm parent into its emulated host.

The parent tells it over a socket pair what to run; between two commands it waits there, so that
only one contender is ever at work. Commands and answers are pickled by multiprocessing's Connection.
"""

from __future__ import annotations

import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe

import torch
import torch.distributed as dist
from netlab_cluster import become_child, signals_held

# A lead-in of at most this many bytes wakes the connections up before anything is timed.
_LEAD_IN_BYTES_MAX = 1 << 20
# A worker whose connection has closed has nothing left to do.
_EXIT_SECONDS_MAX = 1.0
# Values stay below this, so that every sum of a few dozen ranks is exact in float32.
_VALUES = 61


@dataclass(frozen=True)
class WorkerPlan:
    """What a worker must know before it starts."""

    backend: str
    rank: int
    world_size: int
    store: str
    namespace: str
    timeout: timedelta
    environment: dict[str, str] = field(default_factory=dict)
    # What it does once its group exists; None: `Turn`s of all-reduces.
    serve: Callable[[WorkerPlan, Connection], None] | None = None


@dataclass(frozen=True)
class Turn:
    """`count` all-reduces, one after the other, of float32 tensors of `nbytes` each."""

    nbytes: int
    count: int


@dataclass(frozen=True)
class TurnResult:
    """When the lead-in and then each all-reduce of a turn was done on one rank (seconds of the machine's monotonic
    clock), wrong results, and the CPU time it all took."""

    done_s: list[float]
    wrong: int
    cpu_s: float


class Worker:
    """The parent's handle on a forked worker. Not thread-safe."""

    def __init__(self, plan: WorkerPlan) -> None:
        """Forks the worker. The caller must be single-threaded, as torch's import leaves it."""
        self.plan = plan
        ours, theirs = Pipe(duplex=True)
        with signals_held():
            self.pid = os.fork()
            if self.pid == 0:
                code = 1
                try:
                    ours.close()
                    code = _worker(plan, theirs)
                finally:
                    # A forked child must not run the parent's clean-up.
                    os._exit(code)
        theirs.close()
        self.connection: Connection = ours
        self._exit_code: int | None = None

    def last_words(self) -> str:
        """Why it ended, for one that has closed its connection: its own words, or how it ended."""
        try:
            while self.connection.poll():
                message = self.connection.recv()
                if isinstance(message, WorkerFailure):
                    return message.message
        except (EOFError, OSError):
            pass
        self.end()
        code = self._exit_code or 0
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def send_signal(self, number: signal.Signals) -> None:
        """Sends a signal, unless the process has been reaped."""
        if self._exit_code is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        """Closes the connection, kills the process unless it ends very soon, and reaps it."""
        self.connection.close()
        if self._exit_code is not None:
            return
        descriptor = os.pidfd_open(self.pid)
        try:
            if not select.select([descriptor], [], [], _EXIT_SECONDS_MAX)[0]:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            self._exit_code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        finally:
            os.close(descriptor)


def _worker(plan: WorkerPlan, connection: Connection) -> int:
    try:
        become_child(plan.namespace)
        os.environ.update(plan.environment)
        torch.set_num_threads(1)
        dist.init_process_group(
            plan.backend,
            init_method=f"file://{plan.store}",
            rank=plan.rank,
            world_size=plan.world_size,
            timeout=plan.timeout,
        )
        # Connections are made by now: a process that is stopped while it greets another one is taken for a stranger.
        dist.all_reduce(torch.ones(_LEAD_IN_BYTES_MAX // 4))
        connection.send("ready")
        (plan.serve or _serve)(plan, connection)
        dist.destroy_process_group()
        connection.send("done")
    except (EOFError, BrokenPipeError):
        return 1
    except BaseException as error:
        connection.send(WorkerFailure(f"{type(error).__name__}: {error}", traceback.format_exc()))
        return 1
    return 0


@dataclass(frozen=True)
class WorkerFailure:
    """Why a worker ended early: one sentence, and the traceback for the curious."""

    message: str
    traceback: str


def _serve(plan: WorkerPlan, connection: Connection) -> None:
    base = torch.empty(0)
    while True:
        turn = connection.recv()
        if turn is None:
            return
        count = max(1, turn.nbytes // 4)
        if base.numel() != count:
            base = torch.arange(count, dtype=torch.float32).remainder_(_VALUES)
        _run_turn(plan, turn, base, connection)


def _run_turn(plan: WorkerPlan, turn: Turn, base: torch.Tensor, connection: Connection) -> None:
    tensors = [base + float(plan.rank + i) for i in range(turn.count)]
    lead_in = torch.ones(min(base.numel(), _LEAD_IN_BYTES_MAX // 4))
    connection.send("prepared")
    connection.recv()

    cpu = time.process_time()
    # It also brings all ranks to the same point, whenever the scheduler woke each of them up.
    dist.all_reduce(lead_in)
    done_s = [time.monotonic()]
    for tensor in tensors:
        dist.all_reduce(tensor)
        done_s.append(time.monotonic())
    cpu = time.process_time() - cpu

    ranks = plan.world_size
    wrong = int(not bool((lead_in == ranks).all()))
    for i, tensor in enumerate(tensors):
        expected = base.mul(ranks).add_(ranks * (ranks - 1) // 2 + ranks * i)
        wrong += int(not torch.equal(tensor, expected))
    connection.send(TurnResult(done_s, wrong, cpu))
