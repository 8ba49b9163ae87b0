"""How the time of an all-reduce grows: with the message, with workers, with reducers, and with processes on a core.

The first three run on emulated hosts (root), beside the model of docs/algorithms.md: bytes through the busiest NIC over
its rate, and a latency for each hop, taken from the smallest message of the same run. The fourth runs on this machine's
loopback with more ranks than cores, where the time of a byte must not grow with the number of ranks. Figures of all
parts are kept in OUTPUT/growth.json, and the picture shows those that it holds, so that parts can be run one by one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import netlab_cluster
import typer
from growth_picture import draw
from netlab_cluster import NetlabError
from netlab_report import Row
from netlab_run import Setting, run
from netlab_scenarios import KIB, MIB, Competitor, Shape
from rich.console import Console
from rich.table import Table

from reducer._bench.contest import CONTENDER_ERRORS, Budget, Contender, run_case
from reducer._bench.team import LocalTeam
from reducer._bench.units import format_seconds, format_size

# 32 hosts at this rate leave the two cores of a small machine some room.
_RATE = "200mbit"
_SIZES = (KIB, 16 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB)
_MESSAGE = 4 * MIB
_WORLDS = (2, 4, 8, 16, 32)
_REDUCERS = (0, 1, 2, 4, 8)
_PROCESSES = (2, 4, 8, 16, 32)
_PROCESS_SIZES = (64 * KIB, MIB)
# From here on there are more ranks than cores on every machine that this is made for.
_REFERENCE_PROCESSES = 4
# A byte may cost so much more than with 4 ranks before the growth counts as worse than linear: noise, and no more.
_LINEAR = 1.15
PARTS = ("size", "world", "reducers", "processes")


@dataclass(frozen=True)
class Point:
    """One median time. `x` is what the part varies; `model_s` is None where no NIC limits."""

    part: str
    contender: str
    x: int
    nbytes: int
    seconds: float
    model_s: float | None


def with_model(part: str, x: int | None, rows: Sequence[Row], world_size: int) -> list[Point]:
    """Points of one cluster's rows: 8 S / bound + a for each hop, a being half of our smallest message's time."""
    ours = [row.median_s for row in rows if row.contender != "gloo" and row.nbytes == min(each.nbytes for each in rows)]
    hop = min(ours) / 2
    points = []
    for row in rows:
        assert row.bound is not None
        hops = 2 * (world_size - 1) if row.contender == "gloo" else 2
        model = 8 * row.nbytes / row.bound + hops * hop
        points.append(Point(part, row.contender, row.nbytes if x is None else x, row.nbytes, row.median_s, model))
    return points


def _rows(
    shape: Shape,
    contenders: Iterable[str],
    sizes: tuple[int, ...],
    budget_s: float,
    console: Console,
    output: Path,
) -> list[Row]:
    setting = Setting(
        name=f"growth-{shape.hosts}+{shape.reducers}",
        shape=shape,
        sizes=sizes,
        contenders=tuple(Competitor(name) for name in contenders),
        rounds=None,
        budget_s=budget_s,
        threads=1,
        congestion_control="auto",
        host_congestion_control=None,
        output=output / "growth",
    )
    result = run(setting, console)
    if not result.ok:
        raise NetlabError(f"{shape}: wrong results or failures, above")
    return result.rows


def measure_part(part: str, budget_s: float, console: Console, output: Path) -> list[Point]:
    """All points of a part. NetlabError, or one of CONTENDER_ERRORS."""
    if part == "processes":
        return _processes(budget_s, console)
    if part == "size":
        shape = Shape(8, 8, rate=_RATE)
        rows = _rows(shape, ("gloo", "direct", "server"), _SIZES, 3 * budget_s, console, output)
        return with_model(part, None, rows, shape.world_size)
    points: list[Point] = []
    few = (KIB, _MESSAGE)
    for x in _WORLDS if part == "world" else _REDUCERS:
        if part == "world":
            shape, names = Shape(x, 0, rate=_RATE), ["gloo", "direct"]
        else:
            shape, names = Shape(8, x, rate=_RATE), ["gloo", *(("server", "mixed") if x else ("direct",))]
        rows = _rows(shape, names, few, budget_s, console, output)
        found = with_model(part, x, rows, shape.world_size)
        for each in found:
            if each.nbytes == _MESSAGE:
                # Without reducers `mixed` is `direct`.
                is_mixed = part == "reducers" and each.contender == "direct"
                points.append(replace(each, contender="mixed") if is_mixed else each)
    return points


def _processes(budget_s: float, console: Console) -> list[Point]:
    points = []
    local = {"GLOO_SOCKET_IFNAME": "lo", "REDUCER_INTERFACE": "lo"}
    budget = Budget(seconds=budget_s / 4, iterations_min=3, timeout_s=120.0)
    for count in _PROCESSES:
        console.print(f"{count} processes")
        team = LocalTeam("growth", count, environment=local)
        try:
            team.meet("127.0.0.1", 240.0)
            Contender("default", "gloo", team).open(120.0)
            contenders = [Contender("gloo", "gloo", team, local)]
            for name in ("auto", "direct"):
                contenders.append(Contender(name, "reducer", team, {**local, "REDUCER_ALGORITHM": name}))
            for contender in contenders:
                contender.open(60.0)
            for nbytes in _PROCESS_SIZES:
                case = {"collective": "all_reduce", "dtype": "float32", "op": "sum", "nbytes": nbytes}
                for outcome in run_case(contenders, case, budget):
                    if not outcome.ok:
                        raise NetlabError(f"{outcome.contender}, {count} processes: {outcome.error or 'wrong results'}")
                    points.append(Point("processes", outcome.contender, count, nbytes, outcome.median_s, None))
        finally:
            team.close()
    return points


def byte_cost(point: Point, points: Sequence[Point]) -> float | None:
    """Time of a byte of all ranks together, over the one with 4 ranks: 1 is linear growth, more is worse."""
    for other in points:
        same = (other.part, other.contender, other.nbytes) == (point.part, point.contender, point.nbytes)
        if same and other.x == _REFERENCE_PROCESSES:
            return point.seconds / other.seconds * other.x / point.x
    return None


def make_table(part: str, points: Sequence[Point]) -> Table:
    """The points of one part, with their model or, for processes, the time of a byte."""
    processes = part == "processes"
    titles = {
        "size": f"time against message size, 8 workers + 8 reducers, {_RATE}",
        "world": f"time against world size, {format_size(_MESSAGE)}, no reducers, {_RATE}",
        "reducers": f"time against reducers, 8 workers, {format_size(_MESSAGE)}, {_RATE}",
        "processes": f"time against processes, {os.cpu_count()} cores, loopback",
    }
    table = Table(title=titles[part], title_justify="left")
    varied = [] if part == "size" else [part]
    for name in ("size", *varied, "contender", "median"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for name in ("of 4 ranks', per byte", "growth") if processes else ("model", "over model"):
        table.add_column(name, justify="right")
    for point in points:
        cells = [format_size(point.nbytes), *(str(point.x) for _ in varied)]
        cells += [point.contender, format_seconds(point.seconds)]
        cost = byte_cost(point, points)
        if point.model_s is not None:
            cells += [format_seconds(point.model_s), f"{point.seconds / point.model_s:.2f}"]
        elif cost is not None and point.x > _REFERENCE_PROCESSES:
            word = "[green]linear or less" if cost <= _LINEAR else "[red]worse than linear"
            cells += [f"{cost:.2f}", word]
        table.add_row(*cells)
    return table


def _load(path: Path) -> list[Point]:
    if not path.is_file():
        return []
    return [Point(**each) for each in json.loads(path.read_text())]


def _terminate(number: int, _: FrameType | None) -> None:
    for each in netlab_cluster.ENDING_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main(
    part: Annotated[str, typer.Option(help=f"What to measure: some of {','.join(PARTS)}.")] = ",".join(PARTS),
    budget: Annotated[float, typer.Option(min=1, help="Seconds for a cluster, or for a size of processes.")] = 10.0,
    output: Annotated[Path, typer.Option(help="Where growth.json and growth.png are.")] = Path("out"),
) -> None:
    """Measures the parts, prints them beside the model, and draws all that have been measured so far."""
    console = Console() if sys.stdout.isatty() else Console(width=125)
    wanted = part.split(",")
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is no part: choose from {', '.join(PARTS)}")
    reason = netlab_cluster.why_not()
    if reason is not None and wanted != ["processes"]:
        print(f"growth cannot run here: {reason}", file=sys.stderr)
        raise SystemExit(2)
    for each in netlab_cluster.ENDING_SIGNALS:
        signal.signal(each, _terminate)
    figures = output / "growth.json"
    points = [point for point in _load(figures) if point.part not in wanted]
    try:
        for name in wanted:
            found = measure_part(name, budget, console, output)
            points += found
            console.print(make_table(name, found))
            output.mkdir(parents=True, exist_ok=True)
            figures.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")
    except (NetlabError, *CONTENDER_ERRORS) as error:
        console.print(f"[red]{error}[/red]")
        raise SystemExit(1) from None
    draw([asdict(point) for point in points], output / "growth.png")
    console.print(f"wrote {output / 'growth.png'} and {figures}")


if __name__ == "__main__":
    typer.run(main)
