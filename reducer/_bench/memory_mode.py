"""`reducer bench --memory`: what one large all-reduce needs beyond the tensor, beside its bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from reducer._bench.contest import CONTENDER_ERRORS, Contender
from reducer._bench.formulas import owner_shares
from reducer._bench.machine import peak_bytes, reset_peak, resident_bytes
from reducer._bench.units import format_size


@dataclass
class Finding:
    """One contender's memory, in bytes; a bound is None where the backend gives none."""

    contender: str
    world_size: int
    reducers: int
    worker_extra: int = 0
    reducer_extra: list[int] = field(default_factory=list)
    wrong: int = 0
    error: str | None = None
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.error is None and self.wrong == 0

    @property
    def worker_bound(self) -> int | None:
        """Results under way to this worker, and what the reducer inside it holds for all workers.

        What a worker pushes lies in the tensor and takes no memory of its own. An owner holds each
        worker's window of contributions, and as much again in results that wait to be sent.
        """
        window = self._window
        if window is None:
            return None
        return round(window * (1 + 2 * self.world_size * self._shares[0]))

    @property
    def reducer_bound(self) -> int | None:
        window = self._window
        if window is None or not self.reducer_extra or not self._shares[1]:
            return None
        return round(window * 2 * self.world_size * self._shares[1])

    @property
    def _window(self) -> int | None:
        """Bytes; None where none bounds the memory: of another backend, and of shared memory."""
        return None if self.contender.endswith(" local") else self.counters.get("window_bytes")

    @property
    def _shares(self) -> tuple[float, float]:
        algorithm = self.contender.split()[-1]
        if algorithm == "ring":
            return 0.0, 0.0
        return owner_shares(algorithm, self.world_size, self.reducers)

    def as_json(self) -> dict[str, Any]:
        return {
            "contender": self.contender,
            "worker_extra_bytes": self.worker_extra,
            "worker_bound_bytes": self.worker_bound,
            "reducer_extra_bytes": self.reducer_extra,
            "reducer_bound_bytes": self.reducer_bound,
            "wrong_elements": self.wrong,
            "error": self.error,
            "counters": self.counters,
        }


def run_memory(
    contender: Contender, nbytes: int, reducers: int, reducer_pids: Sequence[int], timeout_s: float
) -> Finding:
    """One all-reduce of `nbytes` by an opened contender; `reducer_pids` are those of the `reducers` that run here."""
    finding = Finding(contender.name, contender.team.world_size, reducers, error=contender.failed)
    if contender.failed is not None:
        return finding
    warm_up = {"do": "memory", "group": contender.name, "nbytes": 16 << 20}
    try:
        # A first one lets heaps reach the size that they keep, so that growth alone is seen below.
        contender.team.call(warm_up, 3 * timeout_s)
        before = []
        for pid in reducer_pids:
            reset_peak(pid)
            before.append(resident_bytes(pid))
        replies = contender.team.call({**warm_up, "nbytes": nbytes}, 5 * timeout_s)
    except CONTENDER_ERRORS as error:
        finding.error = str(error)
        return finding
    finding.worker_extra = max(reply["extra_bytes"] for reply in replies)
    finding.reducer_extra = [peak_bytes(pid) - start for pid, start in zip(reducer_pids, before, strict=True)]
    finding.wrong = sum(reply["wrong"] for reply in replies)
    finding.counters = replies[0]["counters"]
    return finding


def memory_table(nbytes: int, findings: Sequence[Finding]) -> Table:
    title = f"all_reduce of {format_size(nbytes)}: peak resident memory beyond the tensor"
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("contender", no_wrap=True)
    for heading in ("worker", "its bound", "each reducer", "its bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("correct", no_wrap=True)
    for finding in findings:
        if finding.error is not None:
            table.add_row(finding.contender, "-", "-", "-", "-", "[red]failed")
            continue
        table.add_row(
            finding.contender,
            format_size(finding.worker_extra),
            _bound(finding.worker_bound),
            format_size(max(finding.reducer_extra)) if finding.reducer_bound else "-",
            _bound(finding.reducer_bound),
            "[green]yes" if finding.wrong == 0 else f"[red]{finding.wrong} wrong",
        )
    return table


def _bound(nbytes: int | None) -> str:
    return "-" if nbytes is None else format_size(nbytes)
