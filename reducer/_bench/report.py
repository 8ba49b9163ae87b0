"""What `reducer bench` found, as a table, as JSON and as a picture."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from reducer._bench.contest import Outcome
from reducer._bench.formulas import bus_factor
from reducer._bench.units import format_seconds, format_size, format_tick

#: Colours that stay apart for most colour-blind readers (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def ratio_to(reference: str, outcome: Outcome, case: Sequence[Outcome]) -> float | None:
    """How many times as fast as the reference of the same case; None where one has no figure."""
    for other in case:
        if other.contender == reference and other.measured and outcome.measured:
            return other.median_s / outcome.median_s
    return None


def ok_cell(outcome: Outcome) -> str:
    if outcome.error is not None:
        return "[red]failed"
    return "[green]yes" if outcome.wrong == 0 else f"[red]{outcome.wrong} wrong"


def ratio_cell(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def bench_table(
    title: str, collective: str, n: int, cases: Sequence[Sequence[Outcome]], rows_max: int = 10_000
) -> Table:
    """One row per size and contender; only the last rows when there are more than `rows_max`."""
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("contender", no_wrap=True)
    for heading in ("median", "p99", "algbw GB/s", "busbw GB/s", "vs gloo", "times"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("correct", no_wrap=True)
    factor = bus_factor(collective, n)
    flat = [(outcome, case) for case in cases for outcome in case]
    hidden = len(flat) - rows_max
    for number, (outcome, case) in enumerate(flat):
        if number >= hidden:
            last = outcome is case[-1]
            table.add_row(*_cells(outcome, case, factor), end_section=last)
    return table


def _cells(outcome: Outcome, case: Sequence[Outcome], factor: float) -> list[str]:
    size = format_size(outcome.nbytes) if outcome is case[0] else ""
    if not outcome.measured:
        return [size, outcome.contender, *["-"] * 6, ok_cell(outcome)]
    return [
        size,
        outcome.contender,
        format_seconds(outcome.median_s),
        format_seconds(outcome.p99_s),
        f"{outcome.algbw / 1e9:.3g}",
        f"{outcome.algbw * factor / 1e9:.3g}",
        ratio_cell(ratio_to("gloo", outcome, case)),
        str(len(outcome.seconds)),
        ok_cell(outcome),
    ]


def complaints(cases: Sequence[Sequence[Outcome]]) -> list[str]:
    """Every distinct error or wrong result, once, with the first size at which it came."""
    seen: dict[tuple[str, str], str] = {}
    for outcome in (outcome for case in cases for outcome in case):
        text = outcome.error or outcome.difference
        if text is not None:
            seen.setdefault((outcome.contender, text), format_size(outcome.nbytes))
    return [f"{name} (from {size}): {text}" for (name, text), size in seen.items()]


def as_json(outcome: Outcome, factor: float, ratio: float | None) -> dict[str, Any]:
    """One row for machines: bytes, seconds, bytes a second."""
    row: dict[str, Any] = {
        "contender": outcome.contender,
        "bytes": outcome.nbytes,
        "correct": outcome.ok,
        "wrong_results": outcome.wrong,
        "error": outcome.error or outcome.difference,
    }
    if outcome.measured:
        row |= {
            "median_s": outcome.median_s,
            "p99_s": outcome.p99_s,
            "min_s": min(outcome.seconds),
            "iterations": len(outcome.seconds),
            "algbw_bytes_per_s": outcome.algbw,
            "busbw_bytes_per_s": outcome.algbw * factor,
            "speed_over_gloo": ratio,
            "cpu_share": outcome.cpu_share,
        }
    return row


def write_json(path: Path, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "results": list(rows)}, indent=2) + "\n")


def check_can_draw(png_file: Path | None) -> None:
    """ValueError if a picture is asked for and matplotlib is not there: before a run, not after it."""
    if png_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--png needs matplotlib: pip install matplotlib")


def write_bench_png(path: Path, title: str, collective: str, n: int, cases: Sequence[Sequence[Outcome]]) -> None:
    """Time and bus bandwidth over size, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    factor = bus_factor(collective, n)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    names = list(dict.fromkeys(outcome.contender for case in cases for outcome in case))
    for number, name in enumerate(names):
        found = [o for case in cases for o in case if o.contender == name and o.measured]
        if not found:
            continue
        sizes = [outcome.nbytes for outcome in found]
        style: dict[str, Any] = {
            "label": name,
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 5,
        }
        medians = [outcome.median_s for outcome in found]
        left.plot(sizes, medians, **style)
        if len(names) <= 2:  # More of them would hide each other.
            slow = [outcome.p99_s for outcome in found]
            left.fill_between(sizes, medians, slow, alpha=0.12, color=style["color"])
        right.plot(sizes, [o.algbw * factor / 1e9 for o in found], **style)
    shade = ", shade: up to p99" if len(names) <= 2 else ""
    left.set_ylabel(f"time (line: median{shade})")
    right.set_ylabel("bus bandwidth, GB/s")
    left.set_title("Time", loc="left")
    right.set_title("Bus bandwidth", loc="left")
    label_times(left)
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("size")
        label_sizes(axes)
        axes.grid(True, which="major", alpha=0.3)
    right.legend(frameon=False)
    figure.suptitle(title, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def label_times(axes: Any) -> None:
    """Seconds in words on a vertical axis with a logarithmic scale."""
    from matplotlib.ticker import FuncFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: format_tick(seconds)))


def label_sizes(axes: Any) -> None:
    """Sizes in words on an axis whose logarithm has base 2."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.xaxis.set_major_locator(LogLocator(base=16))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda nbytes, _: format_size(int(nbytes))))
