"""Real worker processes for tests: they start, join a group, run what a test sends them, and always end.

Every wait has a deadline. A rank that is still at work when its time is over writes the stacks of all its threads
into its log, and
the failure shows every rank's log.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import selectors
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

import reducer

READY = "reducer ready on "
_END_S = 20.0

# Forked from a server that has imported torch once: a rank starts in milliseconds, and in a process with no threads.
# (The first optimizer of a process would import torch._dynamo, for a second and more.)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "numpy", "pytest", "hypothesis"])


class RankFailure(AssertionError):
    """A rank failed, died or did not answer in time; the text has the stacks and logs of all ranks."""


@dataclass(frozen=True)
class Outcome:
    """What one rank made of a call."""

    value: Any = None
    error: str = ""  # the exception's text
    kind: str = ""  # its type's name
    trace: str = ""


@dataclass(frozen=True)
class _Place:
    """Where a rank belongs."""

    rank: int
    world_size: int
    port: int
    prefix: str
    env: dict[str, str]
    init: bool
    group_timeout_s: float
    log: str


def server_binary() -> Path:
    """The standalone reducer that belongs to the package under test."""
    named = os.environ.get("REDUCER_SERVER_BINARY")
    return Path(named) if named else Path(reducer.__file__).parent / "bin" / "reducer-server"


def store_of(place: _Place) -> dist.Store:
    store = dist.TCPStore(
        "127.0.0.1", place.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    return dist.PrefixStore(place.prefix, store)


_place: _Place | None = None


def here() -> _Place:
    """In a rank: its place."""
    assert _place is not None
    return _place


def init_group(suffix: str = "", backend: str = "reducer", **options: Any) -> None:
    """In a rank: makes the default group."""
    place = here()
    store = store_of(place)
    options.setdefault("timeout", timedelta(seconds=place.group_timeout_s))
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(suffix, store) if suffix else store,
        rank=place.rank,
        world_size=place.world_size,
        **options,
    )


def _serve(place: _Place, pipe: Connection) -> None:
    """The life of a rank."""
    global _place
    _place = place
    log = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(place.env)
    torch.set_num_threads(1)
    while True:
        request = pipe.recv()
        if request is None:
            break
        timeout_s, function, arguments = request
        # Sooner than the parent, who will kill this process.
        faulthandler.dump_traceback_later(timeout_s * 0.9, exit=False)
        try:
            if place.init and not dist.is_initialized() and function is not _nothing:
                init_group()
            outcome = Outcome(value=function(*arguments))
        except BaseException as error:  # noqa: BLE001: everything is reported to the parent
            outcome = Outcome(error=str(error), kind=type(error).__name__, trace=traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        pipe.send(outcome)
    faulthandler.dump_traceback_later(_END_S * 0.9, exit=False)
    if dist.is_initialized():
        dist.destroy_process_group()
    pipe.send(Outcome(value="bye"))


def _nothing() -> None:
    """A call without effect."""


class Ranks:
    """`n` worker processes of one group."""

    def __init__(
        self,
        n: int,
        env: Mapping[str, str] | list[Mapping[str, str]] | None = None,
        *,
        init: bool = True,
        group_timeout_s: float = 60.0,
    ) -> None:
        """`env`: for all ranks, or a list by rank. `init`: make the default group before the first call."""
        self.n = n
        self._folder = tempfile.TemporaryDirectory(prefix="reducer-ranks-")
        # Here and not in a rank, so that it outlives them all. Port 0: the system picks one.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes = []
        self._pipes: list[Connection] = []
        environments = list(env) if isinstance(env, list) else [env or {}] * n
        for rank in range(n):
            ours, theirs = _context.Pipe()
            place = _Place(
                rank=rank,
                world_size=n,
                port=self._store.port,
                prefix="test",
                env=dict(environments[rank]),
                init=init,
                group_timeout_s=group_timeout_s,
                log=self.log_path(rank),
            )
            # Not daemonic: a rank has children of its own (DataLoader).
            process = _context.Process(target=_serve, args=(place, theirs), daemon=False)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self.close()
        else:
            self.kill()

    def log_path(self, rank: int) -> str:
        return f"{self._folder.name}/rank{rank}.log"

    def logs(self) -> str:
        texts = []
        for rank in range(self.n):
            path = Path(self.log_path(rank))
            text = path.read_text(errors="replace")[-8000:] if path.exists() else ""
            texts.append(f"--- log of rank {rank}\n{text}")
        return "\n".join(texts)

    def try_call(
        self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 60.0, only: list[int] | None = None
    ) -> list[Outcome]:
        """Runs `function` on every rank (or `only` some) at once; the outcomes, by rank."""
        ranks = list(range(self.n)) if only is None else only
        self.start(ranks, function, *arguments, timeout_s=timeout_s)
        return self.answers(ranks, timeout_s)

    def start(self, ranks: list[int], function: Callable[..., Any], *arguments: Any, timeout_s: float = 60.0) -> None:
        """Has them run `function`; answers() has what comes of it."""
        for rank in ranks:
            self._pipes[rank].send((timeout_s, function, arguments))

    def call(
        self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 60.0, only: list[int] | None = None
    ) -> list[Any]:
        """The same; raises RankFailure if a rank raised."""
        outcomes = self.try_call(function, *arguments, timeout_s=timeout_s, only=only)
        failed = [f"--- rank {rank}\n{outcome.trace}" for rank, outcome in enumerate(outcomes) if outcome.kind]
        if failed:
            raise RankFailure("\n".join(failed) + "\n" + self.logs())
        return [outcome.value for outcome in outcomes]

    def answers(self, ranks: list[int], timeout_s: float) -> list[Outcome]:
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Outcome] = {}
        while len(answers) < len(ranks):
            pending = {self._pipes[rank]: rank for rank in ranks if rank not in answers}
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = ", ".join(str(rank) for rank in pending.values())
                self._fail(f"no answer from rank {silent} within {timeout_s} s", answers)
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pending[pipe]
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, ConnectionError):
                    self._processes[rank].join(_END_S)
                    self._fail(f"rank {rank} died with exit code {self._processes[rank].exitcode}", answers)
        return [answers[rank] for rank in ranks]

    def _fail(self, text: str, answers: Mapping[int, Outcome] | None = None) -> NoReturn:
        # A rank that raised is often why the others wait.
        traces = "".join(f"--- rank {rank}\n{a.trace}" for rank, a in (answers or {}).items() if a.kind)
        logs = self.logs()
        self.kill()
        raise RankFailure(f"{text}\n{traces}{logs}")

    def kill_rank(self, rank: int) -> None:
        """As if its host had lost power."""
        self._processes[rank].kill()
        self._processes[rank].join(_END_S)

    def pid(self, rank: int) -> int:
        pid = self._processes[rank].pid
        assert pid is not None
        return pid

    def end(self) -> list[int | None]:
        """Lets every living rank leave its group and end; exit codes by rank."""
        living = [rank for rank in range(self.n) if self._processes[rank].is_alive()]
        for rank in living:
            self._pipes[rank].send(None)
        self.answers(living, _END_S)
        deadline = time.monotonic() + _END_S
        for rank in living:
            self._processes[rank].join(max(0.0, deadline - time.monotonic()))
            if self._processes[rank].exitcode is None:
                self._fail(f"rank {rank} left its group but did not end within {_END_S} s")
        return [process.exitcode for process in self._processes]

    def close(self) -> None:
        codes = self.end()
        logs = self.logs()
        self._folder.cleanup()
        if any(code != 0 for code in codes):
            raise RankFailure(f"ranks ended with the exit codes {codes}\n{logs}")

    def kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join(_END_S)
        self._folder.cleanup()


def run_ranks(
    n: int,
    function: Callable[..., Any],
    *arguments: Any,
    env: Mapping[str, str] | list[Mapping[str, str]] | None = None,
    timeout: float = 60.0,
    init: bool = True,
) -> list[Any]:
    """Starts `n` ranks, runs `function` on each, ends them; the results by rank. Raises RankFailure."""
    with Ranks(n, env, init=init) as ranks:
        return ranks.call(function, *arguments, timeout_s=timeout)


@contextlib.contextmanager
def standalone_reducers(count: int, *options: str) -> Iterator[list[str]]:
    """`count` standalone reducers, each on a port of its own choice; their addresses. They always end."""
    processes: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            processes.append(start_reducer(*options))
        yield [ready_address(process) for process in processes]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(_END_S)
            assert process.stdout is not None
            process.stdout.close()


def start_reducer(*options: str, listen: str = "127.0.0.1:0") -> subprocess.Popen[str]:
    """One standalone reducer. The caller ends it."""
    command = [str(server_binary()), "--listen", listen, "--threads", "1", "--grace", "1", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ready_address(process: subprocess.Popen[str]) -> str:
    """The address in the line that a reducer prints when it is ready."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(_END_S):
            raise RankFailure(f"the reducer printed nothing within {_END_S} s")
    line = process.stdout.readline()
    if not line.startswith(READY):
        raise RankFailure(f"the reducer did not start: {line}{process.stdout.read()}")
    return line.removeprefix(READY).split()[0]
