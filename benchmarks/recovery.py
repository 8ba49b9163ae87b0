"""How long a reducer's death holds a job up, and how soon it is of use again when it was started again.

4 workers sum in rounds, a small all-reduce and one of 1 MiB, of which every reducer has a part; a reducer is killed
(SIGKILL) at a random instant. Its time: from the signal to the end, on the last rank, of the first round that began
after it; a round that was under way may have had its answers already. Then the reducer is started again at its
address. Its time: from its line "reducer ready" until it is a member of the group on the last rank.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer
from reliability_faults import Fault, FaultError, Kind, Reducers, Storm
from reliability_team import RANK_ERRORS, logs, opening, started_team
from rich.console import Console
from rich.table import Table

from reducer._bench.statistics import percentile
from reducer._bench.team import LocalTeam
from reducer._bench.units import format_seconds, parse_size

_TIMEOUT_S = 60.0
GROUP = "recovery"
_KILLED_S = (0.1, 0.3)
_WORK_S = 0.6
# How long it stays away after that: workers look for it ever less often.
_AWAY_S = (0.0, 2.0)
_TAKEN_IN_S = 20.0


class RecoveryError(RuntimeError):
    """What went wrong, in a sentence."""


@dataclass
class Times:
    """Seconds. `rounds`: of all rounds that no fault met."""

    recoveries: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)
    wrong: int = 0


def recovered_after(replies: Sequence[dict[str, Any]], killed: float) -> float:
    """Seconds from the signal to the end of the next round on the last rank. RecoveryError if a rank had none."""
    ends: list[float] = []
    for rank, reply in enumerate(replies):
        after = [end for began, end in reply["rounds"] if began >= killed]
        if not after:
            raise RecoveryError(f"rank {rank} began no round after the signal")
        ends.append(after[0])
    return max(ends) - killed


def measure(team: LocalTeam, reducers: Reducers, kills: int, nbytes: int, seed: int, console: Console) -> Times:
    times = Times()
    dice = random.Random(seed)
    count = len(reducers.servers)
    command = {"do": "rounds", "name": GROUP, "nbytes": nbytes}
    for kill in range(kills):
        victim = dice.randrange(count)
        storm = Storm(reducers, [Fault(dice.uniform(*_KILLED_S), victim, Kind.KILL)])
        replies = storm.during(team, {**command, "until": storm.began + _WORK_S}, _TIMEOUT_S)
        killed = reducers.done[-1].at
        times.wrong += sum(reply["wrong"] for reply in replies)
        times.recoveries.append(recovered_after(replies, killed))
        times.rounds += [end - began for reply in replies for began, end in reply["rounds"] if end < killed]

        storm = Storm(reducers, [Fault(dice.uniform(*_AWAY_S), victim, Kind.START)])
        until = storm.began + _TAKEN_IN_S
        replies = storm.during(team, {**command, "until": until, "servers": count}, _TAKEN_IN_S + _TIMEOUT_S)
        times.wrong += sum(reply["wrong"] for reply in replies)
        if any(reply["there_at"] is None for reply in replies):
            raise RecoveryError(f"the reducer that was started again was not taken in within {_TAKEN_IN_S:.0f} s")
        times.returns.append(max(reply["there_at"] for reply in replies) - reducers.done[-1].ready)
        if (kill + 1) % 10 == 0:
            console.print(f"{kill + 1} of {kills} kills")
    return times


def make_table(times: Times, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("from ... to")
    for name in ("median", "p99", "longest"):
        table.add_column(name, justify="right")
    rows = {
        "kill -9 to the end of the next round, last rank": times.recoveries,
        '"ready" to taking part, last rank': times.returns,
        "beginning to end of a round without a fault": times.rounds,
    }
    for name, seconds in rows.items():
        figures = [statistics.median(seconds), percentile(seconds, 99), max(seconds)] if seconds else []
        table.add_row(name, *(format_seconds(figure) for figure in figures))
    return table


def main(
    kills: Annotated[int, typer.Option(min=1)] = 100,
    workers: Annotated[int, typer.Option(min=2)] = 4,
    reducers: Annotated[int, typer.Option(min=1)] = 3,
    size: Annotated[str, typer.Option(help="Of the large all-reduce.")] = "1MiB",
    algorithm: Annotated[str, typer.Option()] = "server",
    transport: Annotated[str, typer.Option(help="auto, tcp or grpc.")] = "auto",
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """From kill -9 to the next finished all-reduce; from the restart to taking part."""
    console = Console(width=120)
    servers = Reducers.start(reducers)
    environment = {"REDUCER_SERVERS": servers.addresses, "REDUCER_ALGORITHM": algorithm}
    environment["REDUCER_TRANSPORT"] = transport
    places = [f"host{rank}" for rank in range(workers)]
    wrong = ""
    began = time.monotonic()
    try:
        with started_team("recovery", workers) as team:
            try:
                team.call(opening(GROUP, environment, places, _TIMEOUT_S), 2 * _TIMEOUT_S)
                times = measure(team, servers, kills, parse_size(size), seed, console)
                servers.check()
            except (*RANK_ERRORS, FaultError, RecoveryError) as error:
                wrong = f"{error}\n{logs(team)}"
            else:
                took = f"{time.monotonic() - began:.0f} s"
                title = f"{kills} kills, {workers} workers, {reducers} reducers, {algorithm}, {size}; {took}"
                console.print(make_table(times, title))
                wrong = f"{times.wrong} wrong results" if times.wrong else ""
    finally:
        servers.close()
    if wrong:
        console.print(wrong, markup=False, highlight=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
