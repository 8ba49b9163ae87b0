"""What a benchmark needs to run: standalone reducers, and ranks here or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from reducer._bench.contest import Contender
from reducer._bench.servers import Server, start_servers, stop_servers
from reducer._bench.team import JoinedTeam, LocalTeam, Team, join_torchrun

ReducersOption = Annotated[
    int,
    typer.Option(
        min=0,
        help="Standalone reducers to start on this machine. "
        "Without any, those in REDUCER_SERVERS are used, if it is set.",
    ),
]


@contextmanager
def started_reducers(count: int) -> Iterator[list[Server]]:
    servers = start_servers(count)
    try:
        yield servers
    finally:
        stop_servers(servers)


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def started_team(ranks: int) -> Iterator[tuple[Team, bool]]:
    """The ranks, and whether this process commands them. Under torchrun others only follow."""
    if under_torchrun():
        joined, rank = join_torchrun()
        if rank != 0:
            joined.follow()
            yield joined, False
            return
        with _closing(joined):
            yield joined, True
        return
    started = LocalTeam("bench", ranks, environment={"GLOO_SOCKET_IFNAME": "lo"})
    with _closing(started):
        started.meet("127.0.0.1", 120.0)
        # The first group of a process is the one that torch calls the default one: nobody's.
        Contender("default", "gloo", started).open(60.0)
        yield started, True


@contextmanager
def _closing(team: LocalTeam | JoinedTeam) -> Iterator[None]:
    try:
        yield
    finally:
        team.close()
