"""The ranks of a reliability benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reducer._bench.contest import CONTENDER_ERRORS as RANK_ERRORS
from reducer._bench.contest import Contender
from reducer._bench.team import LocalTeam, TeamError

__all__ = ["RANK_ERRORS", "logs", "opening", "started_team"]

_PROGRAM = Path(__file__).resolve().parent / "reliability_rank.py"
_TIMEOUT_S = 60.0


@contextmanager
def started_team(name: str, workers: int) -> Iterator[LocalTeam]:
    """Ranks that know the commands of reliability_rank.py. They always end."""
    variables = {"GLOO_SOCKET_IFNAME": "lo", "REDUCER_INTERFACE": "lo", "REDUCER_BENCH_TRACEBACK": "1"}
    team = LocalTeam(name, workers, environment=variables, program=[str(_PROGRAM)])
    try:
        team.meet("127.0.0.1", _TIMEOUT_S)
        # The first group of a process is the one that torch calls the default one: nobody's.
        first = Contender("default", "gloo", team)
        first.open(_TIMEOUT_S)
        if first.failed is not None:
            raise TeamError(first.failed)
        yield team
    finally:
        team.close()


def opening(name: str, environment: Mapping[str, str], places: list[str], timeout_s: float) -> dict[str, Any]:
    """The command that makes a group."""
    command = {"do": "open_placed", "name": name, "environment": dict(environment)}
    return {**command, "places": places, "timeout_s": timeout_s}


def logs(team: LocalTeam) -> str:
    """What the ranks wrote, for the report of a failure."""
    return "\n".join(f"--- log of rank {rank}\n{team.log(rank)}" for rank in range(team.world_size))
