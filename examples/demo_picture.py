"""The demo's picture: the loss of each run, the time of its collectives, and its speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = {"reducer": "#2ca02c", "gloo": "#7f7f7f"}
_STYLES = {"reducer": "-", "gloo": "--"}
# The losses lie upon one another: the lower curve must be the broader one.
_LOSS_WIDTHS = {"reducer": 1.2, "gloo": 5.0}


def draw(
    losses: Mapping[str, Sequence[float]],
    collectives: Mapping[str, Sequence[tuple[int, float]]],
    rates: Mapping[str, float],
    path: Path,
) -> None:
    """Writes a PNG. Per backend: losses by step, (bytes, seconds) of collectives, tokens/s."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(14, 4.4), width_ratios=(5, 5, 2), layout="constrained"
    )
    _draw_losses(left, losses)
    _draw_collectives(middle, collectives)
    names = list(rates)
    bars = right.bar(names, list(rates.values()), color=[_COLOURS.get(name) for name in names])
    right.bar_label(bars, fmt="{:,.0f}")
    right.set_ylabel("tokens/s, all ranks")
    right.margins(y=0.12)
    figure.suptitle("a byte-level GPT by DistributedDataParallel, all ranks on one machine")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_losses(axes: Any, losses: Mapping[str, Sequence[float]]) -> None:
    for name, values in losses.items():
        steps = range(1, len(values) + 1)
        width = _LOSS_WIDTHS.get(name, 1.5)
        shade = 0.45 if width > 2 else 1.0
        colour = _COLOURS.get(name)
        axes.plot(steps, values, color=colour, label=name, linewidth=width, alpha=shade, zorder=5 - width / 2)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per byte (mean of the ranks)")
    axes.grid(alpha=0.25)
    axes.legend()


def _draw_collectives(axes: Any, collectives: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    for name, measured in collectives.items():
        times = sorted(seconds * 1e3 for _, seconds in measured)
        shares = [(i + 1) / len(times) for i in range(len(times))]
        axes.step(times, shares, _STYLES.get(name, "-"), color=_COLOURS.get(name), label=name)
    sizes = sorted({nbytes for measured in collectives.values() for nbytes, _ in measured})
    axes.set_xscale("log")
    if sizes:
        axes.set_title(
            f"gradient all-reduces of {sizes[0] / 2**20:.2f} to {sizes[-1] / 2**20:.2f} MiB",
            fontsize=10,
        )
    axes.set_xlabel("from DDP's call to the result on rank 0, ms (log)")
    axes.set_ylabel("share of the collectives done by then")
    axes.grid(alpha=0.25)
    axes.legend()
