"""What a simulation found, as a table and as a picture beside the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from reducer._bench.report import COLOURS, MARKERS, label_sizes, label_times
from reducer._bench.units import format_seconds, format_size, format_tick
from reducer._simulate.model import Network, Row


def describe(network: Network) -> str:
    """The network in a line."""
    text = f"NICs of {network.bandwidth / 1e9:g} Gbit/s"
    if network.reducer_bandwidth is not None:
        text += f" (reducers {network.reducer_bandwidth / 1e9:g})"
    text += f", latency {format_seconds(network.latency_s)}"
    if network.cores:
        whose = "for all hosts" if network.shared_cores else "a host"
        text += (
            f", {network.cores} cores {whose} at {format_seconds(network.frame_s)} a frame"
            f" and {network.byte_s * 1e9:.3g} ns a byte"
        )
    return text


def simulation_table(rows: Sequence[Row], title: str) -> Table:
    """One row per job and size."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for heading in ("workers", "reducers", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("algorithm", no_wrap=True)
    for heading in (
        *("time", "algbw\nGbit/s", "busbw\nGbit/s", "of its\nbound", "fullest\nNIC", "through\nit"),
        *("frames/s,\nowner", "held,\nowner", "promised,\nowner", "waits at\na port", "connections\nworker, red."),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("limited by", no_wrap=True)
    for number, row in enumerate(rows):
        last = number + 1 == len(rows) or rows[number + 1].job.workers != row.job.workers
        table.add_row(*_cells(row), end_section=last)
    return table


def _cells(row: Row) -> list[str]:
    found, shape = row.found, row.shape
    share = row.bound_share
    return [
        str(row.job.workers),
        str(row.job.reducers),
        format_size(row.nbytes),
        row.algorithm,
        format_seconds(row.seconds),
        f"{row.algbw / 1e9:.3g}",
        f"{row.busbw / 1e9:.3g}",
        "-" if share is None else f"{share:.2f}",
        f"{found['nic_share']:.0%}",
        format_size(int(found["nic_bytes"])),
        f"{found['frames_per_second']:,.0f}",
        format_size(found["held_bytes"]),
        format_size(shape["promised_bytes"]),
        format_size(found["waiting_bytes"]),
        f"{shape['worker_connections']}, {shape['reducer_connections']}",
        row.limit,
    ]


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Time against size, number of workers and number of reducers (those that vary), with the model dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes_of: list[tuple[str, Callable[[Row], int]]] = [
        ("size", lambda row: row.nbytes),
        ("workers", lambda row: row.job.workers),
        ("reducers", lambda row: row.job.reducers),
    ]
    varying = [(name, get) for name, get in axes_of if len({get(row) for row in rows}) > 1] or axes_of[:1]
    figure, all_axes = pyplot.subplots(1, len(varying), figsize=(6.2 * len(varying), 4.8), layout="constrained")
    for axes, (name, get) in zip([all_axes] if len(varying) == 1 else all_axes, varying, strict=True):
        _draw_panel(axes, name, get, rows)
    figure.suptitle(title + "; dashed: the model of docs/algorithms.md", x=0.01, ha="left", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _draw_panel(axes: Any, name: str, get: Callable[[Row], int], rows: Sequence[Row]) -> None:
    """One quantity varies; of the others, the largest that there are."""
    largest_size, most_workers = max(row.nbytes for row in rows), max(row.job.workers for row in rows)
    shown = [
        row
        for row in rows
        if (name == "size" or row.nbytes == largest_size) and (name == "workers" or row.job.workers == most_workers)
    ]
    most_reducers = {
        n: max(r.job.reducers for r in shown if r.job.workers == n) for n in {r.job.workers for r in shown}
    }
    if name != "reducers":
        shown = [row for row in shown if row.job.reducers in (0, most_reducers[row.job.workers])]
    for number, algorithm in enumerate(dict.fromkeys(row.algorithm for row in rows)):
        mine = sorted((row for row in shown if row.algorithm == algorithm), key=get)
        xs = [get(row) for row in mine]
        colour = COLOURS[number % len(COLOURS)]
        if name == "reducers" and xs == [0]:  # it has none, whatever the others have
            axes.axhline(mine[0].seconds, color=colour, linestyle="-.", linewidth=1.2, label=algorithm)
            continue
        axes.plot(
            xs, [row.seconds for row in mine], color=colour, marker=MARKERS[number % len(MARKERS)],
            markersize=5, label=algorithm,
        )  # fmt: skip
        if all(row.model_s is not None for row in mine):
            axes.plot(xs, [row.model_s for row in mine], color=colour, linestyle="--", linewidth=1, alpha=0.7)
    if name == "size":
        label_times(axes)
        axes.set_xscale("log", base=2)
        label_sizes(axes)
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda seconds, _: format_tick(seconds))
    if name == "workers":
        axes.set_xscale("log", base=2)
        ticks = sorted({get(row) for row in shown})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel(name)
    axes.set_ylabel("time")
    fixed = []
    if name != "size":
        fixed.append(format_size(largest_size))
    if name != "workers":
        fixed.append(f"{most_workers} workers")
    axes.set_title("time against " + name + (" (" + ", ".join(fixed) + ")" if fixed else ""), loc="left", fontsize=10)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False)
