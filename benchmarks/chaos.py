"""`make chaos`: reducers are killed, stopped, told to stop and started again at random while workers sum.

4 workers call collectives of every kind and size, several under way, and compare each result to the bit with what it
must be; meanwhile 3 standalone reducers come and go by a schedule that the seed gives. Nothing may be wrong, no rank
may fail, and in the end all reducers take part again. The time is divided among groups: of each algorithm, with every
worker on a host of its own, and with the workers on two hosts (in two levels). A group is made in the same storm.
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer
from reliability_faults import Done, FaultError, Reducers, Storm, schedule
from reliability_team import RANK_ERRORS, logs, opening, started_team
from rich.console import Console
from rich.table import Table

from reducer._bench.team import LocalTeam
from reducer._bench.units import format_seconds, format_size

_TIMEOUT_S = 60.0
_TAKEN_IN_S = 30.0
# A fault is noticed by what is under way, or by what comes next.
_NOTICED_S = 0.1
_LEVELS = {"one": ("one",), "two": ("two",), "both": ("one", "two")}


@dataclass(frozen=True)
class Phase:
    """A group's part of the time."""

    number: int
    algorithm: str
    levels: str
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.number}: {self.algorithm}, " + ("hosts apart" if self.levels == "one" else "two levels")

    def places(self, workers: int) -> list[str]:
        """Each worker's host: one each, or two for all."""
        hosts = workers if self.levels == "one" else 2
        return [f"host{rank * hosts // workers}" for rank in range(workers)]


def phases(seconds: float, algorithms: Sequence[str], levels: Sequence[str], group_seconds: float) -> list[Phase]:
    """Every combination equally often, each for about `group_seconds` at a time."""
    combinations = list(itertools.product(levels, algorithms))
    turns = max(1, round(seconds / group_seconds / len(combinations)))
    each = seconds / (turns * len(combinations))
    return [Phase(n, algorithm, level, each) for n, (level, algorithm) in enumerate(combinations * turns)]


@dataclass
class Outcome:
    """What all phases found. Times in seconds, by CLOCK_MONOTONIC."""

    faults: list[Done] = field(default_factory=list)
    collectives: int = 0
    nbytes: int = 0
    wrong: list[str] = field(default_factory=list)
    wrong_results: int = 0
    owner_changes: int = 0
    longest: dict[str, Any] = field(default_factory=lambda: {"seconds": 0.0, "began": 0.0, "call": "none"})
    longest_phase: str = ""
    #: Of each rank, when its batches of collectives began and how long they took.
    batches: list[tuple[float, float]] = field(default_factory=list)

    def add(self, phase: Phase, replies: Sequence[dict[str, Any]]) -> None:
        self.collectives += replies[0]["collectives"]
        self.owner_changes += max(reply["counters"]["owner_changes"] for reply in replies)
        for rank, reply in enumerate(replies):
            self.nbytes += reply["nbytes"]
            self.wrong_results += reply["wrong"]
            if reply["wrong"]:
                self.wrong.append(f"{phase.name}, rank {rank}: {reply['wrong']} wrong, first {reply['first_wrong']}")
            self.batches += [(began, seconds) for began, seconds in reply["batches"]]
            if reply["longest"]["seconds"] > self.longest["seconds"]:
                self.longest, self.longest_phase = reply["longest"], phase.name

    def pauses(self) -> list[float]:
        """For each fault that takes a reducer away, the longest batch that it may have met."""
        found = []
        for done in self.faults:
            if not done.fault.kind.takes_away:
                continue
            met = [s for began, s in self.batches if began < done.at + _NOTICED_S and began + s > done.at]
            if met:
                found.append(max(met))
        return found

    def beside_longest(self) -> list[Done]:
        """The faults from a second before the longest collective until its end."""
        began = self.longest["began"]
        return [done for done in self.faults if began - 1.0 <= done.at <= began + self.longest["seconds"]]


def run(
    team: LocalTeam, plan: Sequence[Phase], storm: Storm, environment: Mapping[str, str], console: Console
) -> Outcome:
    """All phases. RANK_ERRORS if a rank fails, FaultError if a reducer does."""
    reducers = storm.reducers
    outcome = Outcome(reducers.done)
    workers = team.world_size
    end = storm.began
    for phase, following in itertools.zip_longest(plan, plan[1:]):
        if phase.number == 0:
            team.call(_opening(phase, workers, environment), _TIMEOUT_S)
            end = storm.began = time.monotonic()
        end += phase.seconds
        chaos = {"do": "chaos", "name": phase.name, "seed": phase.number, "until": end}
        replies = storm.during(team, chaos, max(0.0, end - time.monotonic()) + 2 * _TIMEOUT_S)
        outcome.add(phase, replies)
        told = f"{phase.name}: {replies[0]['collectives']} collectives, {len(reducers.done)} faults so far"
        if following:
            # While the old group is there: it knows which reducers are away.
            made = storm.during(team, _opening(following, workers, environment), 2 * _TIMEOUT_S)
            told += f"; the next group was made in {format_seconds(max(each['seconds'] for each in made))}"
            storm.during(team, {"do": "close_group", "name": phase.name}, _TIMEOUT_S)
        console.print(told)
    _await_all(team, plan[-1].name, storm, len(reducers.servers), outcome)
    reducers.check()
    return outcome


def _opening(phase: Phase, workers: int, environment: Mapping[str, str]) -> dict[str, Any]:
    return opening(phase.name, {**environment, "REDUCER_ALGORITHM": phase.algorithm}, phase.places(workers), _TIMEOUT_S)


def _await_all(team: LocalTeam, group: str, storm: Storm, servers: int, outcome: Outcome) -> None:
    """Until all reducers take part again; to `outcome.wrong` if they do not."""
    until = time.monotonic() + _TAKEN_IN_S
    rounds = {"do": "rounds", "name": group, "nbytes": 1 << 16, "until": until, "servers": servers}
    replies = storm.during(team, rounds, _TAKEN_IN_S + _TIMEOUT_S)
    outcome.wrong_results += sum(reply["wrong"] for reply in replies)
    late = [str(rank) for rank, reply in enumerate(replies) if reply["there_at"] is None]
    if late:
        counters = team.call({"do": "counters", "name": group}, _TIMEOUT_S)
        outcome.wrong.append(
            f"{_TAKEN_IN_S:.0f} s after the last fault not all reducers take part again: on rank {', '.join(late)}; "
            f"by rank there are {', '.join(str(each['servers']) for each in counters)} of {servers}"
        )


def make_table(outcome: Outcome, log_of_rank_0: str, seconds: float) -> Table:
    table = Table(title=f"chaos, {seconds:.0f} s", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    counts = Counter(done.fault.kind.value for done in outcome.faults)
    table.add_row("faults", ", ".join(f"{count} x {kind}" for kind, count in counts.most_common()) or "none")
    table.add_row("collectives", f"{outcome.collectives:,}")
    table.add_row("bytes compared, all ranks", format_size(outcome.nbytes))
    table.add_row("wrong results", f"{outcome.wrong_results}")
    losses = log_of_rank_0.count(": lost the reducer at")
    returns = log_of_rank_0.count("is back, and takes part again")
    table.add_row("noticed", f"{losses} losses, {returns} returns; {outcome.owner_changes} changes of owners")
    longest = outcome.longest
    beside = ", ".join(f"{done} {done.at - longest['began']:+.2f} s" for done in outcome.beside_longest())
    where = f"group {outcome.longest_phase}, {longest['call']}; beside it: {beside or 'no fault'}"
    table.add_row("longest collective", f"{format_seconds(longest['seconds'])}, {where}")
    pauses = outcome.pauses()
    if pauses:
        table.add_row("median pause by a fault", format_seconds(statistics.median(pauses)))
    if outcome.batches:
        table.add_row("median batch", format_seconds(statistics.median(each for _, each in outcome.batches)))
    return table


def main(
    workers: Annotated[int, typer.Option(min=2)] = 4,
    reducers: Annotated[int, typer.Option(min=1)] = 3,
    minutes: Annotated[float, typer.Option(min=0.1)] = 10.0,
    seed: Annotated[int | None, typer.Option(help="Of the faults. Default: another each time.")] = None,
    algorithms: Annotated[str, typer.Option(help="By turns.")] = "server,mixed",
    levels: Annotated[str, typer.Option(help="one: every worker a host of its own; two: two hosts; both.")] = "both",
    interval: Annotated[float, typer.Option(min=0.01, help="Seconds from incident to incident, on average.")] = 1.5,
    heartbeat: Annotated[float, typer.Option(min=0.5)] = 1.0,
    transport: Annotated[str, typer.Option(help="auto, tcp or grpc.")] = "auto",
    group_seconds: Annotated[float, typer.Option(min=0.5, help="About how long a group lives.")] = 60.0,
    verbose: Annotated[bool, typer.Option(help="Print each fault.")] = False,
) -> None:
    """Reducers die, stop and come back at random; nothing may be wrong."""
    if levels not in _LEVELS:
        raise typer.BadParameter(f"{levels!r} is not among {', '.join(_LEVELS)}", param_hint="--levels")
    seed = random.SystemRandom().randrange(1 << 31) if seed is None else seed
    console = Console(width=120)
    console.print(f"seed {seed} (--seed {seed} repeats the schedule)")
    seconds = 60 * minutes
    plan = phases(seconds, algorithms.split(","), _LEVELS[levels], group_seconds)
    faults = schedule(seed, reducers, seconds, interval)
    servers = Reducers.start(reducers)
    environment = {"REDUCER_SERVERS": servers.addresses, "REDUCER_HEARTBEAT": f"{heartbeat:g}"}
    environment["REDUCER_TRANSPORT"] = transport
    errors: list[str] = []
    try:
        with started_team("chaos", workers) as team:
            storm = Storm(servers, faults)
            if verbose:
                storm.tell = lambda done: console.print(f"{done.at - storm.began:7.2f} s: {done}")
            try:
                outcome = run(team, plan, storm, environment, console)
            except (*RANK_ERRORS, FaultError) as error:
                recent = "\n".join(f"{done.at - storm.began:7.2f} s: {done}" for done in servers.done[-10:])
                after = time.monotonic() - storm.began
                errors.append(f"after {after:.2f} s: {error}\nthe last faults:\n{recent}\n{logs(team)}")
            else:
                console.print(make_table(outcome, team.log(0, lines=1_000_000), seconds))
                errors += outcome.wrong
                if errors:
                    errors.append(logs(team))
    finally:
        servers.close()
    if not errors:
        console.print("nothing was wrong, and no rank failed")
        return
    for text in errors:
        console.print(text, markup=False, highlight=False)
    raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
