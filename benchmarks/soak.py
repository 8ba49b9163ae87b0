"""A million small and ten thousand large all-reduces: does memory grow, are descriptors lost, is a result wrong?

Small and large ones take turns in blocks, on 4 workers with 2 reducers; after each block the resident memory of every
process is read. It grows if the median of the last tenth of the blocks is more than 1% and 1 MiB above that of the
second tenth (the first fills buffers). Once through the network, and once through shared memory.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer
from reliability_team import RANK_ERRORS, logs, opening, started_team
from rich.console import Console
from rich.table import Table

from reducer._bench.machine import resident_bytes
from reducer._bench.report import COLOURS
from reducer._bench.servers import Server
from reducer._bench.start import started_reducers
from reducer._bench.team import LocalTeam
from reducer._bench.units import format_seconds, format_size, parse_size

_TIMEOUT_S = 60.0
_BLOCK_TIMEOUT_S = 600.0
_BLOCKS = 100
_TENTH = _BLOCKS // 10
_GROWTH_SHARE, _GROWTH_BYTES = 0.01, 1 << 20
_WAYS = {"network": {"REDUCER_ALGORITHM": "server"}, "shared memory": {"REDUCER_ALGORITHM": "local"}}


@dataclass
class Course:
    """One process: resident bytes after each block, and open descriptors before the first and after the last."""

    name: str
    pid: int
    resident: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def sample(self) -> None:
        self.resident.append(resident_bytes(self.pid))

    def count_descriptors(self) -> None:
        self.descriptors.append(len(list(Path(f"/proc/{self.pid}/fd").iterdir())))

    @property
    def growth(self) -> tuple[float, float]:
        """Medians of the second and the last tenth, in bytes."""
        tenth = max(1, len(self.resident) // 10)
        return statistics.median(self.resident[tenth : 2 * tenth]), statistics.median(self.resident[-tenth:])

    @property
    def faults(self) -> list[str]:
        found = []
        before, after = self.growth
        if after > before * (1 + _GROWTH_SHARE) + _GROWTH_BYTES:
            found.append(f"grew from {format_size(round(before))} to {format_size(round(after))}")
        if self.descriptors[-1] > self.descriptors[0]:
            found.append(f"had {self.descriptors[0]} descriptors and has {self.descriptors[-1]}")
        return found


@dataclass
class Run:
    """One way of all calls."""

    way: str
    small: int
    large: int
    courses: list[Course]
    wrong: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def faults(self) -> list[str]:
        found = [f"{self.way}: {self.error}"] if self.error else []
        if self.wrong:
            found.append(f"{self.way}: {self.wrong} wrong results")
        if not self.error:
            found += [f"{self.way}: {course.name} {fault}" for course in self.courses for fault in course.faults]
        return found


def soak(way: str, servers: Sequence[Server], workers: int, small: int, large: int, nbytes: int) -> Run:
    environment = dict(_WAYS[way])
    places = []
    if way == "network":
        environment["REDUCER_SERVERS"] = ",".join(server.address for server in servers)
        places = [f"host{rank}" for rank in range(workers)]
    with started_team(f"soak, {way}", workers) as team:
        courses = [Course(f"worker {rank}", pid) for rank, pid in enumerate(team.pids)]
        courses += [Course(f"reducer {n}", server.child.pid) for n, server in enumerate(servers if places else [])]
        run = Run(way, 0, 0, courses)
        try:
            team.call(opening("soak", environment, places, _TIMEOUT_S), 2 * _TIMEOUT_S)
            # A first block makes what stays.
            do_block(team, run, max(1, small // _BLOCKS), max(1, large // _BLOCKS), nbytes)
            run.small = run.large = 0
            for course in courses:
                course.count_descriptors()
            began = time.monotonic()
            for block in range(_BLOCKS):
                few, many = _share(small, block), _share(large, block)
                do_block(team, run, few, many, nbytes)
                for course in courses:
                    course.sample()
            run.seconds = time.monotonic() - began
            for course in courses:
                course.count_descriptors()
        except RANK_ERRORS as error:
            run.error = f"{error}\n{logs(team)}"
        return run


def _share(count: int, block: int) -> int:
    """How many of `count` a block has."""
    return count * (block + 1) // _BLOCKS - count * block // _BLOCKS


def do_block(team: LocalTeam, run: Run, small: int, large: int, nbytes: int) -> None:
    """Small ones, then large ones, in the group named soak."""
    command = {"do": "soak", "name": "soak", "small": small, "large": large, "nbytes": nbytes}
    replies = team.call(command, _BLOCK_TIMEOUT_S)
    run.small += small
    run.large += large
    run.wrong += sum(reply["wrong"] for reply in replies)


def make_table(runs: Sequence[Run], size: str) -> Table:
    table = Table(title=f"soak: all-reduces of 16 floats and of {size}", title_justify="left")
    for name in ("way", "small", "large", "wrong", "time", "process", "second tenth", "last tenth", "descriptors"):
        table.add_column(name, justify="left" if name in ("way", "process") else "right", no_wrap=True)
    for run in runs:
        cells = [run.way, f"{run.small:,}", f"{run.large:,}", f"{run.wrong}", format_seconds(run.seconds)]
        for course in [] if run.error else run.courses:
            before, after = (f"{nbytes / (1 << 20):.2f} MiB" for nbytes in course.growth)
            table.add_row(*cells, course.name, before, after, " -> ".join(map(str, course.descriptors)))
            cells = [""] * len(cells)
        table.add_section()
    return table


def draw(runs: Sequence[Run], path: Path) -> None:
    """Resident memory of every process over the calls, a panel for each way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(runs), figsize=(6.4 * len(runs), 4.4), layout="constrained", squeeze=False)
    for one, run in zip(axes[0], runs, strict=True):
        for index, course in enumerate(run.courses):
            count = len(course.resident)
            calls = [(run.small + run.large) * (sample + 1) / _BLOCKS for sample in range(count)]
            mebibytes = [nbytes / (1 << 20) for nbytes in course.resident]
            style = "--" if course.name.startswith("reducer") else "-"
            one.plot(calls, mebibytes, style, color=COLOURS[index % len(COLOURS)], label=course.name)
        one.set_ylim(bottom=0)
        one.set_xlabel("all-reduces")
        one.set_ylabel("resident, MiB")
        one.set_title(run.way, loc="left")
        one.grid(alpha=0.3)
        one.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(
    small: Annotated[int, typer.Option(min=_BLOCKS)] = 1_000_000,
    large: Annotated[int, typer.Option(min=_BLOCKS)] = 10_000,
    size: Annotated[str, typer.Option(help="Of a large one.")] = "1MiB",
    workers: Annotated[int, typer.Option(min=2)] = 4,
    reducers: Annotated[int, typer.Option(min=1)] = 2,
    ways: Annotated[str, typer.Option(help="network, shared memory, or both.")] = "network,shared memory",
    png: Annotated[Path, typer.Option(help="The figure.")] = Path("out/soak.png"),
) -> None:
    """Many all-reduces: memory, descriptors, results."""
    console = Console(width=132)
    names = [way.strip() for way in ways.split(",")]
    for name in names:
        if name not in _WAYS:
            raise typer.BadParameter(f"{name!r} is not among {', '.join(_WAYS)}", param_hint="--ways")
    with started_reducers(reducers) as servers:
        runs = [soak(name, servers, workers, small, large, parse_size(size)) for name in names]
    console.print(make_table(runs, size))
    draw(runs, png)
    console.print(f"figure: {png}")
    faults = [fault for run in runs for fault in run.faults]
    for fault in faults:
        console.print(fault, markup=False, highlight=False)
    if faults:
        raise typer.Exit(1)
    console.print("memory is flat, no descriptor was lost, and no result was wrong")


if __name__ == "__main__":
    typer.run(main)
