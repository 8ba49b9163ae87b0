"""What it costs to be able to lose a reducer, and to check every byte: throughput with and without.

4 workers and 2 reducers on loopback; three groups in one run, by turns in short blocks so that the machine's noise
meets all alike: as by default, with REDUCER_FAILOVER=0 (nothing is kept), and with REDUCER_CHECKSUM=1. A block of a
group is compared with the default group's block of the same turn: each turn gives a ratio of the medians of their
times, and what counts is the median of these ratios; beside it their quartiles.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer
from reliability_team import RANK_ERRORS, logs, started_team
from rich.console import Console
from rich.table import Table

from reducer._bench.contest import Contender
from reducer._bench.start import started_reducers
from reducer._bench.statistics import slowest_per_iteration
from reducer._bench.team import LocalTeam
from reducer._bench.units import format_seconds, format_size, parse_sizes

RETENTION_COST_MAX = 0.05
_TIMEOUT_S = 60.0
_BLOCK_S = 0.1
_DEFAULT, _NOTHING_KEPT, _CHECKED = "default", "failover off", "checksum on"
_VARIANTS = {_DEFAULT: {}, _NOTHING_KEPT: {"REDUCER_FAILOVER": "0"}, _CHECKED: {"REDUCER_CHECKSUM": "1"}}
_ITERATIONS_MIN, _ITERATIONS_MAX = 3, 500


@dataclass
class Case:
    """A size: the median seconds of each block, by the variant's name; blocks of one turn at one place."""

    nbytes: int
    blocks: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in _VARIANTS})
    wrong: int = 0

    def ratios(self, of: str, to: str) -> tuple[float, float, float]:
        """Times of one beside those of another, turn by turn: the quartiles, the median in the middle."""
        turns = [mine / other for mine, other in zip(self.blocks[of], self.blocks[to], strict=True)]
        if len(turns) == 1:
            return turns[0], turns[0], turns[0]
        low, middle, high = statistics.quantiles(turns, n=4, method="inclusive")
        return low, middle, high

    @property
    def retention_cost(self) -> float:
        """How much longer an all-reduce takes because answers are kept: 0.05 is 5%."""
        return self.ratios(_DEFAULT, _NOTHING_KEPT)[1] - 1

    @property
    def checksum_cost(self) -> float:
        return self.ratios(_CHECKED, _DEFAULT)[1] - 1


def measure(contenders: Mapping[str, Contender], nbytes: int, turns: int) -> Case:
    case = Case(nbytes)
    iterations = _ITERATIONS_MIN
    for turn in range(-1, turns):  # the one before the first says how many iterations a block has
        names = list(contenders)
        for index in range(len(names)):
            name = names[(turn + index) % len(names)]
            seconds, wrong = _block(contenders[name], nbytes, iterations)
            case.wrong += wrong
            if turn >= 0:
                case.blocks[name].append(seconds)
        if turn < 0:
            iterations = min(_ITERATIONS_MAX, max(_ITERATIONS_MIN, round(_BLOCK_S / seconds)))
    return case


def _block(contender: Contender, nbytes: int, iterations: int) -> tuple[float, int]:
    """The median seconds of a call on the slowest rank, and wrong elements."""
    case = {"collective": "all_reduce", "dtype": "float32", "op": "sum", "nbytes": nbytes}
    command = {**case, "do": "measure", "group": contender.name, "iterations": iterations}
    replies = contender.team.call(command, _TIMEOUT_S)
    times = slowest_per_iteration([reply["times_ns"] for reply in replies])
    return statistics.median(times), sum(reply["wrong"] for reply in replies)


def open_all(team: LocalTeam, servers: str, algorithm: str, transport: str) -> dict[str, Contender]:
    """A group of each variant. RuntimeError if one cannot be made."""
    environment = {"REDUCER_SERVERS": servers, "REDUCER_ALGORITHM": algorithm, "REDUCER_TRANSPORT": transport}
    contenders = {}
    for name, variant in _VARIANTS.items():
        contenders[name] = Contender(name, "reducer", team, {**environment, **variant})
        contenders[name].open(_TIMEOUT_S)
        if contenders[name].failed is not None:
            raise RuntimeError(f"{name}: {contenders[name].failed}")
    return contenders


def make_table(cases: Sequence[Case], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    columns = ("size", "variant", "turns", "median", "GB/s", "cost", "quartiles", "goal")
    for name in columns:
        table.add_column(name, justify="left" if name == "variant" else "right", no_wrap=True)
    for case in cases:
        pairs = {
            _NOTHING_KEPT: None,
            _DEFAULT: ("keeping", case.ratios(_DEFAULT, _NOTHING_KEPT)),
            _CHECKED: ("checking", case.ratios(_CHECKED, _DEFAULT)),
        }
        for name, pair in pairs.items():
            seconds = statistics.median(case.blocks[name])
            cells = [format_size(case.nbytes), name, str(len(case.blocks[name]))]
            cells += [format_seconds(seconds), f"{case.nbytes / seconds / 1e9:.3f}"]
            if pair is None:
                table.add_row(*cells, "-", "-", "-")
                continue
            what, (low, middle, high) = pair
            cells += [f"{what} {middle - 1:+.1%}", f"{low - 1:+.1%} to {high - 1:+.1%}"]
            met = "met" if case.retention_cost <= RETENTION_COST_MAX else "missed"
            table.add_row(*cells, f"<= {RETENTION_COST_MAX:.0%}: {met}" if name == _DEFAULT else "-")
        table.add_section()
    return table


def main(
    sizes: Annotated[str, typer.Option()] = "64KiB,1MiB,16MiB",
    turns: Annotated[int, typer.Option(min=1, help="Blocks of each variant and size.")] = 40,
    workers: Annotated[int, typer.Option(min=2)] = 4,
    reducers: Annotated[int, typer.Option(min=1)] = 2,
    algorithm: Annotated[str, typer.Option()] = "server",
    transport: Annotated[str, typer.Option(help="tcp or grpc.")] = "tcp",
) -> None:
    """Throughput with failover and checksums, on against off."""
    console = Console(width=132)
    wrong: list[str] = []
    with started_reducers(reducers) as servers, started_team("retention", workers) as team:
        addresses = ",".join(server.address for server in servers)
        try:
            contenders = open_all(team, addresses, algorithm, transport)
            cases = [measure(contenders, nbytes, turns) for nbytes in parse_sizes(sizes)]
        except (*RANK_ERRORS, RuntimeError) as error:
            console.print(f"{error}\n{logs(team)}", markup=False, highlight=False)
            raise typer.Exit(1) from None
    title = f"all-reduce, {workers} workers, {reducers} reducers, {algorithm}, {transport}"
    console.print(make_table(cases, title))
    for case in cases:
        if case.wrong:
            wrong.append(f"{format_size(case.nbytes)}: {case.wrong} wrong elements")
        if case.retention_cost > RETENTION_COST_MAX:
            wrong.append(f"{format_size(case.nbytes)}: keeping costs {case.retention_cost:.1%}")
    for text in wrong:
        console.print(text, markup=False, highlight=False)
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
