"""Bandwidth as benchmarks report it, and the least time that the network allows.

`algbw` is bytes / time; `busbw` is algbw times the share of the bytes that a ring would send over
each link, as derived in PERFORMANCE.md of NVIDIA's nccl-tests. It makes results for different
numbers of ranks comparable; through standalone reducers it may exceed the line rate, because the
factor assumes a ring. S below is the size that nccl-tests reports: the whole tensor, which for
all-gather is the output and for reduce-scatter the input.
"""

from __future__ import annotations

#: Collectives that `reducer bench` runs.
COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "send_recv",
    "barrier",
)


def bus_factor(collective: str, n: int) -> float:
    """busbw / algbw for n ranks (nccl-tests, PERFORMANCE.md)."""
    if collective == "all_reduce":
        return 2 * (n - 1) / n
    if collective in ("all_gather", "reduce_scatter", "all_to_all"):
        return (n - 1) / n
    if collective in ("reduce", "broadcast", "send_recv"):
        return 1.0
    if collective == "barrier":
        return 0.0
    raise ValueError(f"no collective is called {collective!r}: choose one of {COLLECTIVES}")


def owner_shares(algorithm: str, n: int, k: int) -> tuple[float, float]:
    """Parts of the bytes that each worker's and each standalone reducer owns (docs/algorithms.md).

    n workers, k standalone reducers; n times the first and k times the second make 1.
    """
    if algorithm == "auto":
        algorithm = "mixed" if k else "direct"
    if algorithm == "direct" or (algorithm == "mixed" and k == 0):
        return 1 / n, 0.0
    if algorithm == "server" or (algorithm == "mixed" and k >= n):
        return 0.0, 1 / k
    if algorithm == "mixed":
        total = n * n + k * n - 2 * k
        return (n - k) / total, 2 * (n - 1) / total
    raise ValueError(f"{algorithm!r} has no owners")


def all_reduce_bound(algorithm: str, n: int, k: int) -> float:
    """Largest algbw of an all-reduce, as a multiple of the NIC's rate (equal NICs, full duplex).

    n workers, k standalone reducers. The times for large S are those of docs/algorithms.md:
    ring and direct 2(n-1)S/(nB); server max(S/B, nS/(kB)); mixed 2n(n-1)S/(DB), D = n^2 + kn - 2k,
    for k <= n, above which only standalone reducers own anything.
    """
    if n < 2:
        raise ValueError("a bound needs at least two workers: one alone sends nothing")
    if algorithm in ("gloo", "ring", "direct"):
        return n / (2 * (n - 1))
    if algorithm == "server":
        if k < 1:
            raise ValueError("server needs at least one standalone reducer")
        return min(1.0, k / n)
    if algorithm == "mixed":
        k = min(k, n)
        return (n * n + k * n - 2 * k) / (2 * n * (n - 1))
    raise ValueError(f"no bound is known for {algorithm!r}")
