"""What a netlab run measured: rows, the table for the terminal, the JSON and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from netlab_scenarios import Competitor, Shape
from rich.table import Table

from reducer._bench.formulas import bus_factor
from reducer._bench.statistics import median, percentile
from reducer._bench.units import format_seconds, format_size, parse_rate


@dataclass
class Samples:
    """All that was measured of one contender at one size. CPU times in seconds.

    `cpu_busy` of `cpu_total` is the whole machine's; `cpu_own` is of the contender's processes (what
    the kernel does for the network outside of them is in neither process).
    """

    nbytes: int
    contender: str
    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    cpu_busy: float = 0.0
    cpu_total: float = 0.0
    cpu_own: float = 0.0


@dataclass(frozen=True)
class Row:
    """One line of the table. Bandwidths in bit/s; shares and ratios are plain numbers."""

    nbytes: int
    contender: str
    iterations: int
    median_s: float
    p99_s: float
    algbw: float
    busbw: float
    bound: float | None
    bound_share: float | None
    line_share: float | None
    gloo_ratio: float | None
    cpu_share: float | None
    own_cpu_share: float | None
    wrong: int


def make_rows(samples: Sequence[Samples], shape: Shape, efficiency: float | None) -> list[Row]:
    """Rows in the order of `samples`; `efficiency` is the part of a NIC's rate that a stream had, None: no bounds."""
    measured = [each for each in samples if each.seconds]
    gloo = {each.nbytes: median(each.seconds) for each in measured if each.contender == "gloo"}
    rows = []
    for each in measured:
        middle = median(each.seconds)
        algbw = 8 * each.nbytes / middle
        bound = line = None
        if efficiency is not None and shape.rate is not None:
            bound = shape.bound(Competitor(each.contender), efficiency)
            line = efficiency * parse_rate(shape.rate)
        rows.append(
            Row(
                nbytes=each.nbytes,
                contender=each.contender,
                iterations=len(each.seconds),
                median_s=middle,
                p99_s=percentile(each.seconds, 99),
                algbw=algbw,
                busbw=algbw * bus_factor("all_reduce", shape.world_size),
                bound=bound,
                bound_share=None if bound is None else algbw / bound,
                line_share=None if line is None else algbw / line,
                gloo_ratio=gloo[each.nbytes] / middle if each.nbytes in gloo else None,
                cpu_share=each.cpu_busy / each.cpu_total if each.cpu_total else None,
                own_cpu_share=each.cpu_own / each.cpu_total if each.cpu_total else None,
                wrong=each.wrong,
            )
        )
    return rows


def make_table(rows: Sequence[Row], title: str) -> Table:
    """The table for the terminal, a section per size."""
    table = Table(title=title, title_justify="left")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("contender", no_wrap=True)
    for name in (
        "runs",
        "median",
        "p99",
        "algbw\nGbit/s",
        "busbw\nGbit/s",
        "of its\nbound",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("x Gloo", "CPU,\nall", "CPU,\nown", "ok"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        last = index + 1 == len(rows) or rows[index + 1].nbytes != row.nbytes
        table.add_row(
            format_size(row.nbytes),
            row.contender,
            str(row.iterations),
            format_seconds(row.median_s),
            format_seconds(row.p99_s),
            f"{row.algbw / 1e9:.3f}",
            f"{row.busbw / 1e9:.3f}",
            _or_dash(row.bound_share, "{:.3f}"),
            _or_dash(row.gloo_ratio, "{:.2f}"),
            _or_dash(row.cpu_share, "{:.0%}"),
            _or_dash(row.own_cpu_share, "{:.0%}"),
            "yes" if row.wrong == 0 else f"[red]{row.wrong} wrong[/red]",
            end_section=last,
        )
    return table


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def make_json(rows: Sequence[Row], setting: dict[str, Any]) -> dict[str, Any]:
    """The run as plain data: `setting` (what was asked for) and one object per row, SI units."""
    return {"setting": setting, "rows": [asdict(row) for row in rows]}


_COLOURS = {
    "gloo": "#7f7f7f",
    "ring": "#9467bd",
    "direct": "#1f77b4",
    "server": "#2ca02c",
    "mixed": "#ff7f0e",
    "auto": "#d62728",
}


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Writes the picture: bandwidth against size with the bounds, and time relative to Gloo."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.contender for row in rows))
    sizes = sorted({row.nbytes for row in rows})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for name in names:
        mine = [row for row in rows if row.contender == name]
        colour = _COLOURS.get(name)
        xs = [row.nbytes for row in mine]
        left.plot(xs, [row.algbw / 1e9 for row in mine], "o-", color=colour, label=name)
    bounds: dict[float, list[str]] = {}
    for row in rows:
        if row.bound is None:
            continue
        # Bounds that differ by rounding alone are one line with one label.
        whose = bounds.setdefault(float(f"{row.bound:.4g}"), [])
        if row.contender not in whose:
            whose.append(row.contender)
    for bound, whose in bounds.items():
        left.axhline(bound / 1e9, color="#555555", linestyle=":", linewidth=1)
        left.annotate(
            "bound of " + ", ".join(whose), (sizes[0], bound / 1e9), (0, 3),
            textcoords="offset points", fontsize=8, color="#555555",
        )  # fmt: skip
    left.set_xscale("log", base=2)
    left.set_xticks(sizes, [format_size(size) for size in sizes])
    left.set_xlabel("tensor")
    left.set_ylabel("algbw, Gbit/s")
    left.set_ylim(0, 1.08e-9 * max(max(row.algbw, row.bound or 0.0) for row in rows))
    left.grid(alpha=0.25)
    # Between the bounds, where no small tensor reaches.
    left.legend(loc="upper left", bbox_to_anchor=(0.01, 0.91))
    _draw_ratios(right, rows, names, sizes)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_ratios(axes: Any, rows: Sequence[Row], names: Sequence[str], sizes: Sequence[int]) -> None:
    others = [name for name in names if name != "gloo"]
    width = 0.8 / max(1, len(others))
    for index, name in enumerate(others):
        mine = {row.nbytes: row.gloo_ratio for row in rows if row.contender == name}
        places = [i for i, size in enumerate(sizes) if mine.get(size) is not None]
        heights = [mine[sizes[i]] or 0.0 for i in places]
        xs = [i + (index - (len(others) - 1) / 2) * width for i in places]
        bars = axes.bar(xs, heights, width * 0.92, color=_COLOURS.get(name), label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.axhline(1.0, color=_COLOURS["gloo"], linewidth=1)
    axes.set_yscale("log", base=2)
    axes.set_xticks(range(len(sizes)), [format_size(size) for size in sizes])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("tensor")
    axes.set_ylabel("times as fast as Gloo (log)")
    axes.grid(alpha=0.25, axis="y")
