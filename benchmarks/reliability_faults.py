"""Faults of standalone reducers: a schedule that a seed gives, and the reducers that it is done to."""

from __future__ import annotations

import enum
import random
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reducer._bench.processes import stop_all
from reducer._bench.servers import Server
from reducer._bench.team import LocalTeam, Message

# A reducer that is told to stop waits no longer than its grace period (30 s) for groups that cannot lose it.
_DRAIN_S = 35.0
# How long a reducer is away: too short to be missed by a heartbeat of 1 s, or longer.
_SHORT_S, _LONG_S = (0.05, 0.9), (1.2, 4.0)
_STRUCK_AGAIN = 0.25
_STRUCK_AGAIN_S = 1.5
_KILLED_WHILE_STOPPED = 0.2
#: No reducer is away for longer, with all that may strike it again.
AWAY_S_MAX = 6.0


class Kind(enum.Enum):
    KILL = "kill -9"
    STOP = "SIGSTOP"
    GO_ON = "SIGCONT"
    DRAIN = "SIGTERM"
    START = "started again"

    @property
    def takes_away(self) -> bool:
        return self in (Kind.KILL, Kind.STOP, Kind.DRAIN)


@dataclass(frozen=True)
class Fault:
    """`at`: seconds since the beginning."""

    at: float
    reducer: int
    kind: Kind


@dataclass(frozen=True)
class Done:
    """A fault when it was done; `at` and `ready`, when a started reducer was, by CLOCK_MONOTONIC."""

    fault: Fault
    at: float
    ready: float

    def __str__(self) -> str:
        return f"reducer {self.fault.reducer} {self.fault.kind.value}"


class FaultError(RuntimeError):
    """A reducer did what it must not: it ended by itself, or did not end, or ended with an error."""


def schedule(seed: int, reducers: int, seconds: float, mean_s: float) -> list[Fault]:
    """Faults at random, `mean_s` apart on average, in the order of their times. In the end all reducers are up.

    Now and then several reducers are struck at once, or all, or one again just after it came back.
    """
    dice = random.Random(seed)
    up_from = [0.0] * reducers
    faults: list[Fault] = []
    at = 0.0
    while (at := at + dice.expovariate(1 / mean_s)) < seconds - AWAY_S_MAX:
        up = [reducer for reducer in range(reducers) if up_from[reducer] <= at]
        (wanted,) = dice.choices([1, 2, reducers], [7, 2, 1])
        for reducer in dice.sample(up, min(wanted, len(up))):
            up_from[reducer] = _strike(dice, faults, reducer, at)
    return sorted(faults, key=lambda fault: fault.at)


def _strike(dice: random.Random, faults: list[Fault], reducer: int, at: float) -> float:
    """Takes a reducer away at `at`, and brings it back; when it is up for good."""
    latest = at + AWAY_S_MAX
    while True:
        (kind,) = dice.choices([Kind.KILL, Kind.STOP, Kind.DRAIN], [4, 3, 2])
        faults.append(Fault(at, reducer, kind))
        at += dice.uniform(*dice.choice([_SHORT_S, _LONG_S]))
        if kind is Kind.STOP and dice.random() < _KILLED_WHILE_STOPPED:
            faults.append(Fault(at, reducer, Kind.KILL))
            at += dice.uniform(*_SHORT_S)
            kind = Kind.KILL
        faults.append(Fault(at, reducer, Kind.GO_ON if kind is Kind.STOP else Kind.START))
        again = at + dice.uniform(0.0, _STRUCK_AGAIN_S)
        if dice.random() >= _STRUCK_AGAIN or again + _LONG_S[1] + _SHORT_S[1] > latest:
            return at
        at = again


@dataclass
class Reducers:
    """Standalone reducers on fixed ports of loopback, and what was done to them. Not thread safe; close() ends them."""

    servers: list[Server]
    done: list[Done] = field(default_factory=list)

    @classmethod
    def start(cls, count: int) -> Reducers:
        reducers = cls([])
        try:
            for number, port in enumerate(_fixed_ports(count)):
                reducers.servers.append(Server(f"reducer {number}", f"127.0.0.1:{port}"))
        except BaseException:
            reducers.close()
            raise
        return reducers

    @property
    def addresses(self) -> str:
        return ",".join(server.address for server in self.servers)

    @property
    def pids(self) -> list[int]:
        return [server.child.pid for server in self.servers]

    def do(self, fault: Fault) -> Done:
        """Raises FaultError if the reducer is not as the faults before have left it."""
        server = self.servers[fault.reducer]
        child, at = server.child, time.monotonic()
        ready = at
        if fault.kind is Kind.START:
            self._await_end(fault.reducer)
            ready, at = self._start_again(fault.reducer)
        elif child.process.poll() is not None:
            raise FaultError(str(child.fail("ended by itself")))
        else:
            signals = {Kind.KILL: signal.SIGKILL, Kind.STOP: signal.SIGSTOP}
            signals |= {Kind.GO_ON: signal.SIGCONT, Kind.DRAIN: signal.SIGTERM}
            child.process.send_signal(signals[fault.kind])
        self.done.append(Done(fault, at, ready))
        return self.done[-1]

    def _await_end(self, reducer: int) -> None:
        child = self.servers[reducer].child
        last = next(done for done in reversed(self.done) if done.fault.reducer == reducer)
        deadline = last.at + _DRAIN_S
        try:
            code = child.process.wait(max(0.0, deadline - time.monotonic()))
        except Exception:
            raise FaultError(str(child.fail(f"was told to stop {_DRAIN_S:.0f} s ago"))) from None
        expected = -signal.SIGKILL if last.fault.kind is Kind.KILL else 0
        if code != expected:
            raise FaultError(str(child.fail(f"ended after {last.fault.kind.value}")))

    def _start_again(self, reducer: int) -> tuple[float, float]:
        old = self.servers[reducer]
        old.child.stop()
        at = time.monotonic()
        self.servers[reducer] = Server(old.child.name, old.address)
        return time.monotonic(), at

    def check(self) -> None:
        """Raises FaultError unless all are alive."""
        for server in self.servers:
            if server.child.process.poll() is not None:
                raise FaultError(str(server.child.fail("ended by itself")))

    def close(self) -> None:
        for server in self.servers:
            if server.child.process.poll() is None:
                server.child.process.send_signal(signal.SIGCONT)
        stop_all([server.child for server in self.servers])


@dataclass
class Storm:
    """Does a schedule to reducers while ranks work."""

    reducers: Reducers
    faults: Sequence[Fault]
    tell: Callable[[Done], None] = lambda done: None
    began: float = field(default_factory=time.monotonic)
    _next: int = 0

    def during(self, team: LocalTeam, command: Message, timeout_s: float) -> list[Message]:
        """The ranks' answers to a command, with all faults whose time comes until then."""
        deadline = time.monotonic() + timeout_s
        team.begin(command)
        while self._next < len(self.faults):
            due = self.began + self.faults[self._next].at
            if not team.quiet(min(due, deadline) - time.monotonic()) or due > deadline:
                break
            self.tell(self.reducers.do(self.faults[self._next]))
            self._next += 1
        return team.end(max(1.0, deadline - time.monotonic()))


def _fixed_ports(count: int) -> list[int]:
    """Free ports that no outgoing connection takes while a reducer is away: they are below the kernel's range."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports: list[int] = []
    for port in random.sample(range(first // 2, first), min(200, first // 2)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise FaultError(f"there are no {count} free ports below {first}")
