"""The emulated cluster's results as a table, as JSON rows and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reducer._bench.contest import Outcome
from reducer._bench.formulas import all_reduce_bound, bus_factor
from reducer._bench.report import (
    COLOURS,
    MARKERS,
    as_json,
    label_sizes,
    label_times,
    ok_cell,
    ratio_cell,
    ratio_to,
)
from reducer._bench.units import format_seconds, format_size
from rich.table import Table


@dataclass(frozen=True)
class Setting:
    """The emulated cluster that the figures belong to. Rates in bytes a second."""

    workers: int
    reducers: int
    rate: str | None
    line: float

    @property
    def title(self) -> str:
        limit = f"NICs of {self.rate} each way" if self.rate else "NICs without a limit"
        return f"all_reduce of float32, {self.workers} workers, {self.reducers} reducers, {limit}"

    def bound(self, contender: str) -> float | None:
        """Largest algbw that the network allows, in bytes a second; None without a limit."""
        if self.rate is None:
            return None
        return self.line * all_reduce_bound(algorithm_of(contender), self.workers, self.reducers)


def algorithm_of(contender: str) -> str:
    """ "reducer ring" -> "ring", "gloo" -> "gloo"."""
    return contender.split()[-1]


def bound_share(setting: Setting, outcome: Outcome) -> float | None:
    bound = setting.bound(outcome.contender)
    return None if bound is None or not outcome.measured else outcome.algbw / bound


def netlab_table(setting: Setting, cases: Sequence[Sequence[Outcome]], rows_max: int) -> Table:
    """One row per size and contender; only the last rows when there are more than `rows_max`."""
    table = Table(title=setting.title, title_justify="left", header_style="bold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("contender", no_wrap=True)
    for heading in ("median", "p99", "algbw", "busbw", "of bound", "vs gloo", "CPU", "times"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("correct", no_wrap=True)
    rows = [(outcome, case) for case in cases for outcome in case]
    for outcome, case in rows[max(0, len(rows) - rows_max) :]:
        table.add_row(*_cells(setting, outcome, case), end_section=outcome is case[-1])
    table.caption = "algbw and busbw in Gbit/s; CPU: busy part of all cores of this machine"
    return table


def _cells(setting: Setting, outcome: Outcome, case: Sequence[Outcome]) -> list[str]:
    size = format_size(outcome.nbytes) if outcome is case[0] else ""
    if not outcome.measured:
        return [size, outcome.contender, *["-"] * 8, ok_cell(outcome)]
    share = bound_share(setting, outcome)
    gbit = outcome.algbw * 8 / 1e9
    return [
        size,
        outcome.contender,
        format_seconds(outcome.median_s),
        format_seconds(outcome.p99_s),
        f"{gbit:.3f}",
        f"{gbit * bus_factor('all_reduce', setting.workers):.3f}",
        "-" if share is None else f"{share:.0%}",
        ratio_cell(ratio_to("gloo", outcome, case)),
        f"{outcome.cpu_share:.0%}",
        str(len(outcome.seconds)),
        ok_cell(outcome),
    ]


def json_rows(setting: Setting, cases: Sequence[Sequence[Outcome]]) -> list[dict[str, Any]]:
    factor = bus_factor("all_reduce", setting.workers)
    return [
        as_json(outcome, factor, ratio_to("gloo", outcome, case))
        | {"share_of_bound": bound_share(setting, outcome)}
        for case in cases
        for outcome in case
    ]


def write_png(path: Path, setting: Setting, cases: Sequence[Sequence[Outcome]]) -> None:
    """Bandwidth beside its bounds, time, and speed over Gloo."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(outcome.contender for case in cases for outcome in case))
    figure, (bandwidth, time, speed) = pyplot.subplots(
        1, 3, figsize=(16, 5), layout="constrained", width_ratios=(1, 1, 1.1)
    )
    for number, name in enumerate(names):
        found = [o for case in cases for o in case if o.contender == name and o.measured]
        style: dict[str, Any] = {
            "label": name,
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 5,
        }
        sizes = [outcome.nbytes for outcome in found]
        bandwidth.plot(sizes, [outcome.algbw * 8 / 1e9 for outcome in found], **style)
        time.plot(sizes, [outcome.median_s for outcome in found], **style)
    _draw_bounds(bandwidth, setting, names)
    _draw_speed(speed, names, cases)
    for axes in (bandwidth, time):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("size")
        label_sizes(axes)
        axes.grid(True, which="major", alpha=0.3)
    bandwidth.set_ylim(bottom=0)
    bandwidth.set_ylabel("algbw, Gbit/s")
    bandwidth.set_title("Bandwidth (dashed: what the network allows)", loc="left")
    label_times(time)
    time.set_title("Time, median", loc="left")
    time.legend(frameon=False)
    figure.suptitle(setting.title, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_bounds(axes: Any, setting: Setting, names: Sequence[str]) -> None:
    algorithms_by_bound: dict[float, list[str]] = {}
    for name in names:
        bound = setting.bound(name)
        if bound is not None:
            algorithms_by_bound.setdefault(bound, []).append(algorithm_of(name))
    for bound, algorithms in algorithms_by_bound.items():
        axes.axhline(bound * 8 / 1e9, color="black", linestyle="--", linewidth=0.9, alpha=0.7)
        axes.annotate(
            ", ".join(algorithms),
            (0.01, bound * 8 / 1e9),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8,
        )


def _draw_speed(axes: Any, names: Sequence[str], cases: Sequence[Sequence[Outcome]]) -> None:
    """Bars of speed over Gloo, a group per size."""
    others = [name for name in names if name != "gloo"]
    width = 0.8 / max(1, len(others))
    for position, case in enumerate(cases):
        for outcome in case:
            ratio = ratio_to("gloo", outcome, case)
            if outcome.contender not in others or ratio is None:
                continue
            place = position + (others.index(outcome.contender) - (len(others) - 1) / 2) * width
            colour = COLOURS[names.index(outcome.contender) % len(COLOURS)]
            axes.bar(place, ratio, width * 0.92, color=colour)
            axes.annotate(
                f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}",
                (place, ratio),
                ha="center",
                va="bottom",
                fontsize=7,
                rotation=90,
                xytext=(0, 2),
                textcoords="offset points",
            )
    axes.axhline(1, color="black", linewidth=0.9)
    axes.set_yscale("log")
    axes.margins(y=0.15)
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
    axes.set_xticks(range(len(cases)), [format_size(case[0].nbytes) for case in cases if case])
    axes.set_title("Speed over Gloo (1x: as fast)", loc="left")
    axes.grid(True, axis="y", which="major", alpha=0.3)
