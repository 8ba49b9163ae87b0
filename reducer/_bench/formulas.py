"""Bandwidth as benchmarks report it, and the least time that the network allows.

`algbw` is bytes / time; `busbw` is algbw times the share of the bytes that a ring would send over
each link, as derived in PERFORMANCE.md of NVIDIA's nccl-tests. It makes results for different
numbers of ranks comparable; through standalone reducers it may exceed the line rate, because the
factor assumes a ring. S below is the size that nccl-tests reports: the whole tensor, which for
all-gather is the output and for reduce-scatter the input.
"""

from __future__ import annotations

from collections.abc import Sequence

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

    n workers, each on a host of its own, and k standalone reducers.
    """
    return all_reduce_rate(algorithm, [1.0] * n, [1.0] * k)


def all_reduce_rate(
    algorithm: str,
    hosts: Sequence[float],
    reducers: Sequence[float],
    ranks_per_host: int = 1,
    *,
    two_levels: bool = True,
) -> float:
    """Largest algbw of an all-reduce that these NICs allow, in their unit (docs/algorithms.md).

    `hosts` and `reducers` are the rates of the NICs, full duplex, of the workers' hosts, each shared by
    `ranks_per_host` ranks, and of the standalone reducers. With `two_levels` the ranks of a host sum within it first,
    so that only one tensor's bytes are the host's; a ring passes each host once anyhow, as its ranks stand in order.
    `auto` may choose any.
    """
    n = len(hosts) * ranks_per_host
    if len(hosts) < 2:
        raise ValueError("a bound needs at least two workers, on two hosts: one alone sends nothing")
    sharing = 1 if two_levels else ranks_per_host
    pushers = len(hosts) * sharing
    if algorithm in ("gloo", "ring"):
        return min(hosts) * n / (2 * (n - 1))
    if algorithm == "direct":
        return 1 / _least_time(hosts, [], sharing)
    if algorithm == "server":
        if not reducers:
            raise ValueError("server needs at least one standalone reducer")
        return min(min(hosts) / sharing, sum(reducers) / pushers)
    if algorithm == "mixed":
        return 1 / _least_time(hosts, reducers, sharing)
    if algorithm == "auto":
        fixed = ("ring", "mixed")
        return max(all_reduce_rate(each, hosts, reducers, ranks_per_host, two_levels=two_levels) for each in fixed)
    raise ValueError(f"no bound is known for {algorithm!r}")


def _least_time(hosts: Sequence[float], reducers: Sequence[float], sharing: int) -> float:
    """Seconds for one byte, with the shares that are best for these rates.

    In a time T a reducer of rate B can own the share T B / n (it receives n parts of what it owns and sends n), and a
    host whose m ranks own the share Y together moves m (1 - Y) as workers do and Y (n - m) as owners, so m + Y (n - 2m)
    within T B. The least T is that in which all shares together reach 1; they grow with T, so halving finds it.
    """
    n = len(hosts) * sharing
    growth = n - 2 * sharing

    def owned(time: float) -> float:
        from_reducers = sum(time * rate / n for rate in reducers)
        return from_reducers + sum(min(1.0, (time * rate - sharing) / growth) if growth else 1.0 for rate in hosts)

    low = sharing / min(hosts)  # every rank's own bytes have to leave its host
    if owned(low) >= 1:
        return low
    high = 2 * n * low
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if owned(middle) >= 1 else (middle, high)
    return high
