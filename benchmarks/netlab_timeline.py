"""Timelines of one training step: forward, each layer's backward, each bucket's way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reducer._bench.units import format_size

if TYPE_CHECKING:
    from netlab_ddp_worker import Record

_FORWARD, _BACKWARD, _PUSHING, _WAITING = "#999999", "#0072B2", "#E69F00", "#009E73"


def pushed_times(record: Record) -> list[float | None]:
    """When the last byte of each bucket had left, from the samples of what was pushed: buckets go one after the other,
    and each that is done has gone. None where the backend does not count.
    """
    if not record.pushed:
        return [None] * len(record.buckets)
    whole, so_far = sum(bucket.nbytes for bucket in record.buckets), 0
    total = max(nbytes for _, nbytes in record.pushed)
    times: list[float | None] = []
    for bucket in record.buckets:
        so_far += bucket.nbytes
        # What is pushed to an owner in the same process counts nowhere: shares, not bytes.
        reached = next((at for at, nbytes in record.pushed if nbytes >= total * so_far / whole), bucket.done_s)
        times.append(min(max(reached, bucket.ready_s), bucket.done_s))
    return times


def draw_timelines(records: Mapping[str, Record], title: str, path: Path) -> None:
    """A picture with a timeline for each contender, on one scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    rows = [len(record.buckets) + 2 for record in records.values()]
    figure, axes = pyplot.subplots(
        len(records), 1, figsize=(11, 0.22 * sum(rows) + 1.0 * len(rows) + 0.6), sharex=True,
        gridspec_kw={"height_ratios": rows}, layout="constrained", squeeze=False,
    )  # fmt: skip
    for one, (name, record) in zip(axes[:, 0], records.items(), strict=True):
        _draw_one(one, name, record)
    axes[-1, 0].set_xlabel("ms since the step began")
    figure.legend(
        handles=[
            Patch(color=_FORWARD, label="forward"),
            Patch(color=_BACKWARD, label="backward, by layer"),
            Patch(color=_PUSHING, label="bucket: ready until pushed (Gloo: until done)"),
            Patch(color=_WAITING, label="pushed until done"),
        ],
        loc="outside lower center", ncols=4, frameon=False, fontsize=8,
    )  # fmt: skip
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_one(axes: Any, name: str, record: Record) -> None:
    labels = ["compute"]
    for span in record.spans:
        colour = _FORWARD if span.name == "forward" else _BACKWARD
        width = span.end_s - span.begin_s
        axes.barh(0, 1e3 * width, left=1e3 * span.begin_s, color=colour, edgecolor="white", linewidth=0.6)
    for row, (bucket, pushed) in enumerate(zip(record.buckets, _ways(record), strict=True), start=1):
        labels.append(format_size(bucket.nbytes))
        axes.barh(row, 1e3 * (pushed - bucket.ready_s), left=1e3 * bucket.ready_s, color=_PUSHING)
        axes.barh(row, 1e3 * (bucket.done_s - pushed), left=1e3 * pushed, color=_WAITING)
    axes.axvline(1e3 * record.backward_end_s, color=_BACKWARD, linestyle=":", linewidth=1)
    axes.axvline(1e3 * record.step_s, color="#333333", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.grid(alpha=0.25, axis="x")
    axes.set_title(
        f"{name}: step of {1e3 * record.step_s:.0f} ms, {record.overlap:.0%} of the communication behind backward",
        loc="left", fontsize=9,
    )  # fmt: skip


def _ways(record: Record) -> Sequence[float]:
    pairs = zip(record.buckets, pushed_times(record), strict=True)
    return [bucket.done_s if pushed is None else pushed for bucket, pushed in pairs]
