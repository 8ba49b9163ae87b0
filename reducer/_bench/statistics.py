"""From the times that each rank took to one figure per case."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def slowest_per_iteration(times_ns: Sequence[Sequence[int]]) -> list[float]:
    """Seconds of each iteration: the slowest rank's, given one list of nanoseconds per rank."""
    return [max(iteration) / 1e9 for iteration in zip(*times_ns, strict=True)]


def median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)


def percentile(seconds: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of the values do not exceed (nearest rank)."""
    ordered = sorted(seconds)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]
