"""A contender: its standalone reducers and its workers, from start to end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from netlab_cluster import INTERFACE, Cluster, NetlabError, become_child, signals_held
from netlab_scenarios import Competitor
from netlab_worker import Turn, TurnResult, Worker, WorkerFailure, WorkerPlan

START_SECONDS_MAX = 60.0
_STOP_SECONDS_MAX = 5.0


@dataclass
class Reducer:
    """A standalone reducer's process and the address that it printed."""

    process: subprocess.Popen[str]
    label: str
    address: str


@dataclass(frozen=True)
class ContenderResult:
    """A turn's all-reduces: seconds of each, wrong results and CPU seconds of all ranks and reducers together."""

    seconds: list[float]
    wrong: int
    cpu_s: float


@dataclass
class Contender:
    """One way to all-reduce, with all its processes. Not thread-safe."""

    competitor: Competitor
    cluster: Cluster
    workers: list[Worker] = field(default_factory=list)
    reducers: list[Reducer] = field(default_factory=list)
    failure: str | None = None
    # What its workers do; None: all-reduces.
    serve: Callable[[WorkerPlan, Connection], None] | None = None

    def __post_init__(self) -> None:
        self._store = self.cluster.directory / (self.name.replace("/", "-") + "-store")

    @property
    def name(self) -> str:
        return self.competitor.name

    def start_reducers(self, binary: Path, labels: Sequence[str], threads: int, congestion_control: str) -> None:
        """Starts a reducer on each host of `labels`. NetlabError if one does not come up."""
        for label in labels:
            address, namespace = (
                self.cluster.address(label),
                self.cluster.namespace(label),
            )
            command = [
                str(binary),
                "--listen",
                f"{address}:0",
                "--threads",
                str(threads),
                "--congestion-control",
                congestion_control,
            ]
            with signals_held():
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    # Single-threaded, as netlab is, it may run Python between fork and exec.
                    preexec_fn=partial(become_child, namespace),
                )
                self.reducers.append(Reducer(process, label, address))
        deadline = time.monotonic() + START_SECONDS_MAX
        for reducer in self.reducers:
            reducer.address = _ready_address(reducer.process, deadline)

    def start_workers(
        self, labels: Sequence[str], extra: dict[str, str], bandwidths: Mapping[str, str] | None = None
    ) -> None:
        """Forks a worker for each of `labels` into that host and waits until their group exists.

        `bandwidths` of all hosts, by label, are told to reducer as a user of unequal NICs would.
        """
        told = bandwidths or {}
        servers = [f"{each.address}@{told[each.label]}" if told else each.address for each in self.reducers]
        environment = {
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "REDUCER_INTERFACE": INTERFACE,
            "REDUCER_SERVERS": ",".join(servers),
            **self.competitor.environment,
            **extra,
        }
        for rank, label in enumerate(labels):
            plan = WorkerPlan(
                backend="gloo" if self.competitor.name == "gloo" else "reducer",
                rank=rank,
                world_size=len(labels),
                store=str(self._store),
                namespace=self.cluster.namespace(label),
                timeout=timedelta(seconds=START_SECONDS_MAX),
                environment={**environment, "REDUCER_BANDWIDTH": told.get(label, "")},
                serve=self.serve,
            )
            self.workers.append(Worker(plan))
        self._gather("start", START_SECONDS_MAX + 5)

    def run(self, turn: Turn, seconds_max: float) -> ContenderResult:
        """Runs one turn.

        An all-reduce's time runs from when the last rank had the previous result to when the last rank has this one:
        their sum is the turn's, and what ranks that were ahead have waited for the others is not counted twice.
        """
        reducers_cpu_s = 0.0

        def begin() -> None:
            nonlocal reducers_cpu_s
            reducers_cpu_s = self._reducers_cpu_s()

        results: list[TurnResult] = self.ask(turn, seconds_max, begin)
        reducers_cpu_s = self._reducers_cpu_s() - reducers_cpu_s
        return ContenderResult(
            seconds_between([result.done_s for result in results]),
            sum(result.wrong for result in results),
            sum(result.cpu_s for result in results) + reducers_cpu_s,
        )

    def ask(self, what: object, seconds_max: float, begin: Callable[[], None] = lambda: None) -> list[Any]:
        """Every worker's answer, by rank: they say when they are prepared, and all begin together after `begin`."""
        self.thaw()
        try:
            self._tell(what)
            self._gather("prepare", seconds_max)
            begin()
            self._tell("go")
            return self._gather(type(what).__name__, seconds_max)
        finally:
            self.freeze()

    def freeze(self) -> None:
        """Stops its processes where they are: a turn's processor time is all for the one whose turn it is."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets its processes go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for worker in self.workers:
            worker.send_signal(number)
        for reducer in self.reducers:
            reducer.process.send_signal(number)

    def _reducers_cpu_s(self) -> float:
        """CPU seconds that its standalone reducers have used since they started."""
        ticks = 0
        for reducer in self.reducers:
            try:
                words = Path(f"/proc/{reducer.process.pid}/stat").read_text(encoding="ascii")
            except OSError as error:
                raise NetlabError(f"{self.name}: the reducer at {reducer.address} died") from error
            # The name, in parentheses, may hold blanks: user and system ticks are 14th and 15th.
            ticks += sum(int(word) for word in words.rpartition(")")[2].split()[11:13])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _tell(self, message: object) -> None:
        for worker in self.workers:
            try:
                worker.connection.send(message)
            except OSError as error:
                raise NetlabError(f"{self.name}: rank {worker.plan.rank}: {worker.last_words()}") from error

    def _gather(self, what: str, seconds_max: float) -> list[Any]:
        """One answer of each worker, by rank. NetlabError at the first failure or the deadline."""
        deadline = time.monotonic() + seconds_max
        answers: dict[int, Any] = {}
        waiting = {worker.connection.fileno(): worker for worker in self.workers}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                ranks = ", ".join(str(rank) for rank in sorted(each.plan.rank for each in waiting.values()))
                raise NetlabError(f"{self.name}: no answer to `{what}` from rank {ranks} in {seconds_max:.0f} s")
            for descriptor in ready:
                assert isinstance(descriptor, int)
                worker = waiting.pop(descriptor)
                rank = worker.plan.rank
                try:
                    answers[rank] = worker.connection.recv()
                except (EOFError, OSError) as error:
                    words = worker.last_words()
                    raise NetlabError(f"{self.name}: rank {rank} during `{what}`: {words}") from error
                if isinstance(answers[rank], WorkerFailure):
                    raise NetlabError(f"{self.name}: rank {rank} during `{what}`: {answers[rank].message}")
        return [answers[rank] for rank in sorted(answers)]

    def stop(self) -> None:
        """Ends all its processes, gently where nothing has failed."""
        self.thaw()
        if self.failure is None and self.workers:
            try:
                self._tell(None)
                self._gather("stop", _STOP_SECONDS_MAX)
            except NetlabError:
                pass
        for worker in self.workers:
            worker.end()
        self.workers.clear()
        for reducer in self.reducers:
            _end_process(reducer.process)
        self.reducers.clear()
        self._store.unlink(missing_ok=True)


def seconds_between(done_s: Sequence[Sequence[float]]) -> list[float]:
    """From when each rank was done with each thing: seconds from one thing's last rank to the next one's."""
    return [after - before for before, after in pairwise(max(each) for each in zip(*done_s, strict=True))]


def _ready_address(process: subprocess.Popen[str], deadline: float) -> str:
    """The address in the reducer's line "reducer ready on HOST:PORT (...)"."""
    assert process.stdout is not None
    left = max(0.0, deadline - time.monotonic())
    if not wait([process.stdout.fileno()], timeout=left):
        raise NetlabError("a reducer did not say within the deadline that it is ready")
    line = process.stdout.readline()
    words = line.split()
    if words[:3] != ["reducer", "ready", "on"] or len(words) < 4:
        raise NetlabError(f"a reducer did not start: it said {line.strip()!r}")
    return words[3]


def _end_process(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_STOP_SECONDS_MAX)
    if process.stdout is not None:
        process.stdout.close()


def stop_all(contenders: Sequence[Contender], note: Callable[[str], None]) -> None:
    """Stops every contender; what goes wrong with one is noted and does not spare the others."""
    for contender in contenders:
        try:
            contender.stop()
        except OSError as error:
            note(f"{contender.name}: {error}")
