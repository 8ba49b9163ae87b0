"""The picture of `growth.py`: a panel a part, measured times as points and the model as lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reducer._bench.report import COLOURS, MARKERS, label_sizes, label_times
from reducer._bench.units import format_size

_TITLES = {
    "size": "message size",
    "world": "workers, without reducers",
    "reducers": "reducers, 8 workers",
    "processes": "processes on one machine, loopback",
}
_NAMES = ("gloo", "direct", "server", "mixed", "auto")


def draw(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the panels of the parts that `points` (dictionaries of growth.Point) has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [part for part in _TITLES if any(point["part"] == part for point in points)]
    figure, axes = pyplot.subplots(1, len(parts), figsize=(5.2 * len(parts), 4.6), layout="constrained", squeeze=False)
    for one, part in zip(axes[0], parts, strict=True):
        _draw_part(one, part, [point for point in points if point["part"] == part])
    figure.suptitle("time of an all-reduce: measured (points) and the model (dotted)", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_part(axes: Any, part: str, points: Sequence[Mapping[str, Any]]) -> None:
    sizes = sorted({point["nbytes"] for point in points})
    several = part == "processes" and len(sizes) > 1
    for index, name in enumerate(_NAMES):
        mine = [point for point in points if point["contender"] == name]
        for size in sizes if several else [None]:
            line = sorted((p for p in mine if size is None or p["nbytes"] == size), key=lambda point: point["x"])
            if not line:
                continue
            xs = [max(point["x"], 0.5) for point in line]
            label = name if size is None else f"{name}, {format_size(size)}"
            filled = size is None or size == sizes[0]
            axes.plot(
                xs, [point["seconds"] for point in line], MARKERS[index], color=COLOURS[index], label=label,
                linestyle="-" if several else "none", markerfacecolor=COLOURS[index] if filled else "white",
            )  # fmt: skip
            if all(point["model_s"] is not None for point in line):
                axes.plot(xs, [point["model_s"] for point in line], ":", color=COLOURS[index])
    axes.set_xscale("log", base=2)
    label_times(axes)
    if part == "size":
        label_sizes(axes)
    else:
        ticks = sorted({max(point["x"], 0.5) for point in points})
        axes.set_xticks(ticks, [str(int(tick)) if tick >= 1 else "0" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel(_TITLES[part])
    size = "" if part in ("size", "processes") else f", {format_size(sizes[0])}"
    axes.set_title(f"by {part}{size}", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
