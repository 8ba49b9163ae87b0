"""The ranks of one benchmark, commanded together.

A `Team` sends one command to all ranks and collects their answers. `LocalTeam` starts the ranks
as processes of this machine (or of its network namespaces) and speaks to them through Unix
sockets, which no rate limit on a network touches; `JoinedTeam` is rank 0's view of ranks that
torchrun started, and speaks through their store.
"""

from __future__ import annotations

import itertools
import json
import os
import selectors
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from reducer._bench.processes import Child, ChildError, python_path, stop_all

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from reducer._bench.rank import Rank

Message = dict[str, Any]

# The job's one store keeps the commands of each team: the next team must not read them.
_joined = itertools.count()


class TeamError(RuntimeError):
    """At least one rank answered with an error. The text names the ranks."""


class Team(Protocol):
    world_size: int

    def call(self, command: Message, timeout_s: float) -> list[Message]:
        """Answers by rank. TeamError when a rank reports an error; ChildError when one is lost."""
        ...

    def close(self) -> None:
        """Ends the ranks. Idempotent."""
        ...


def raise_errors(replies: Sequence[Message]) -> None:
    """TeamError with every distinct error once, and the ranks that reported it."""
    ranks_by_error: dict[str, list[int]] = {}
    for rank, reply in enumerate(replies):
        if "error" in reply:
            ranks_by_error.setdefault(reply["error"], []).append(rank)
    if not ranks_by_error:
        return
    everybody = list(range(len(replies)))
    parts = []
    for error, ranks in ranks_by_error.items():
        who = "every rank" if ranks == everybody else "rank " + ", ".join(map(str, ranks))
        parts.append(f"{who}: {error}")
    raise TeamError("\n".join(parts))


class LocalTeam:
    """Ranks as child processes. Not thread safe; close() ends them."""

    def __init__(
        self,
        name: str,
        world_size: int,
        *,
        prefixes: Sequence[Sequence[str]] = (),
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = ("-m", "reducer._bench.rank"),
    ) -> None:
        """`prefixes[rank]` goes before rank's command line (`ip netns exec NAME`).

        `program`: what Python runs as a rank, a Rank served by `rank.main`.
        """
        self.name = name
        self._program = program
        self.world_size = world_size
        self._children: list[Child] = []
        self._sockets: list[socket.socket] = []
        self._unread = [b""] * world_size
        self._number = 0
        variables = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": python_path(),
            **(environment or {}),
        }
        try:
            for rank in range(world_size):
                self._start(rank, prefixes[rank] if prefixes else (), variables)
        except BaseException:
            self.close()
            raise

    def _start(self, rank: int, prefix: Sequence[str], variables: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._sockets.append(ours)
            control = str(theirs.fileno())
            child = Child(
                f"{self.name}: rank {rank}",
                [*prefix, sys.executable, *self._program, "--control", control],
                environment=variables,
                inherit=[theirs.fileno()],
            )
            self._children.append(child)

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self._children]

    def meet(self, host: str, timeout_s: float) -> None:
        """Gives the ranks a store at rank 0, which the others reach at `host`."""
        first = {"do": "host_store", "host": host, "world_size": self.world_size}
        [reply] = self._ask({0: first}, timeout_s)
        raise_errors([reply])
        join = {"do": "join_store", "host": host, "port": reply["port"], "world_size": self.world_size}
        others = {rank: {**join, "rank": rank} for rank in range(1, self.world_size)}
        raise_errors([reply, *self._ask(others, timeout_s)])

    def call(self, command: Message, timeout_s: float) -> list[Message]:
        self.begin(command)
        return self.end(timeout_s)

    def begin(self, command: Message) -> None:
        """Has all ranks start on it. The caller may do other things before end()."""
        self._tell(dict.fromkeys(range(self.world_size), command))

    def quiet(self, seconds: float) -> bool:
        """Waits so long, or until a rank answers or ends: whether none did. Between begin() and end()."""
        with selectors.DefaultSelector() as selector:
            for control in self._sockets:
                selector.register(control, selectors.EVENT_READ)
            return not selector.select(max(0.0, seconds))

    def end(self, timeout_s: float) -> list[Message]:
        """The answers to what began, by rank."""
        replies = self._collect(list(range(self.world_size)), timeout_s)
        raise_errors(replies)
        return replies

    def log(self, rank: int, lines: int = 200) -> str:
        """The last lines that a rank wrote."""
        return self._children[rank].output(lines)

    def close(self) -> None:
        for control in self._sockets:
            control.close()
        stop_all(self._children)
        self._sockets, self._children = [], []

    def _ask(self, commands: Mapping[int, Message], timeout_s: float) -> list[Message]:
        """The answers to commands by rank, in their order. Answers to commands before, that come late, are skipped."""
        self._tell(commands)
        return self._collect(list(commands), timeout_s)

    def _tell(self, commands: Mapping[int, Message]) -> None:
        self._number += 1
        for rank, command in commands.items():
            self._send(rank, {**command, "number": self._number})

    def _send(self, rank: int, command: Message) -> None:
        if not self._sockets:
            raise ChildError(f"{self.name} has ended")
        try:
            self._sockets[rank].sendall(json.dumps(command).encode() + b"\n")
        except OSError:
            raise self._children[rank].fail("ended") from None

    def _collect(self, ranks: Sequence[int], timeout_s: float) -> list[Message]:
        """One answer from each of the ranks, in their order. A lost rank ends the wait at once."""
        deadline = time.monotonic() + timeout_s
        replies: dict[int, Message] = {}
        with selectors.DefaultSelector() as selector:
            for rank in ranks:
                selector.register(self._sockets[rank], selectors.EVENT_READ, rank)
            while len(replies) < len(ranks):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    silent = next(rank for rank in ranks if rank not in replies)
                    raise self._children[silent].fail(f"did not answer within {timeout_s:.0f} s")
                for key, _ in ready:
                    rank = key.data
                    try:
                        piece = self._sockets[rank].recv(1 << 16)
                    except ConnectionError:
                        piece = b""  # It ended with a command unread.
                    if not piece:
                        raise self._children[rank].fail("ended")
                    *lines, self._unread[rank] = (self._unread[rank] + piece).split(b"\n")
                    for reply in map(json.loads, lines):
                        if reply.pop("number") == self._number:
                            replies[rank] = reply
                            selector.unregister(self._sockets[rank])
        return [replies[rank] for rank in ranks]


class JoinedTeam:
    """Ranks that torchrun started, through its store. Rank 0 commands and takes part itself."""

    def __init__(self, me: Rank, store: Store, rank: int, world_size: int) -> None:
        self.world_size = world_size
        self._me = me
        self._store = store
        self._rank = rank
        self._number = 0

    def call(self, command: Message, timeout_s: float) -> list[Message]:
        self._number += 1
        self._store.set(f"command/{self._number}", json.dumps(command))
        replies = [self._me.handle(command)]
        for rank in range(1, self.world_size):
            key = f"reply/{self._number}/{rank}"
            self._store.wait([key], timedelta(seconds=timeout_s))
            replies.append(json.loads(self._store.get(key)))
        raise_errors(replies)
        return replies

    def follow(self, idle_timeout_s: float = 3600.0) -> None:
        """What the other ranks do: answer rank 0's commands until it closes."""
        while True:
            self._number += 1
            key = f"command/{self._number}"
            self._store.wait([key], timedelta(seconds=idle_timeout_s))
            command = json.loads(self._store.get(key))
            reply = self._me.handle(command)
            self._store.set(f"reply/{self._number}/{self._rank}", json.dumps(reply))
            if command["do"] == "close":
                return

    def close(self) -> None:
        self.call({"do": "close"}, 60.0)


def join_torchrun() -> tuple[JoinedTeam, int]:
    """The team of the torchrun job that this process belongs to, and this process' rank."""
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    from reducer._bench.rank import Rank

    store, rank, world_size = next(iter(rendezvous("env://")))
    number = next(_joined)
    me = Rank()
    me.adopt(
        PrefixStore(f"reducer-bench-{number}", store),
        rank,
        world_size,
        int(os.environ.get("LOCAL_RANK", str(rank))),
    )
    team = JoinedTeam(me, PrefixStore(f"reducer-bench-control-{number}", store), rank, world_size)
    return team, rank
