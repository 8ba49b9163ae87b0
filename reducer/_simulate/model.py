"""A job, the network that it is simulated on, and what came out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reducer._bench.formulas import all_reduce_rate, bus_factor
from reducer._bench.statistics import median

#: Ethernet, IP and TCP take 66 of a packet's 1514 bytes.
PAYLOAD_SHARE = 1448 / 1514
#: A NIC, or a processor, that is busy for so much of the time is what limits.
_FULL_SHARE = 0.9


@dataclass(frozen=True)
class Network:
    """What hosts and the network between them are like. Rates in bit/s, times in seconds."""

    bandwidth: float = 25e9
    reducer_bandwidth: float | None = None  #: None: as the workers'
    latency_s: float = 20e-6
    jitter_s: float = 0.0
    cores: int = 0  #: 0: processors cost no time
    shared_cores: bool = False  #: all hosts share the cores, as on an emulated cluster
    frame_s: float = 0.0
    byte_s: float = 0.0
    burst_bytes: int = 0  #: pass at once after a pause, as through an emulated NIC

    @property
    def line(self) -> float:
        """What of a worker's NIC is there for data, in bit/s."""
        return self.bandwidth * PAYLOAD_SHARE


@dataclass(frozen=True)
class Job:
    """One group: how many of whom, and its settings (0: chosen by the library)."""

    workers: int
    reducers: int
    algorithm: str
    chunk_bytes: int = 0
    window_bytes: int = 0


@dataclass(frozen=True)
class Row:
    """One job at one size. Rates in bit/s; `found` as `_core.Simulation.measure` gives it."""

    job: Job
    network: Network
    nbytes: int
    algorithm: str  #: after `auto` was resolved
    found: dict[str, Any]
    shape: dict[str, Any]

    @property
    def seconds(self) -> float:
        return median(self.found["seconds"])

    @property
    def algbw(self) -> float:
        return 8 * self.nbytes / self.seconds

    @property
    def busbw(self) -> float:
        return self.algbw * bus_factor("all_reduce", self.job.workers)

    @property
    def bound(self) -> float | None:
        """The largest algbw by docs/algorithms.md; None where nothing is sent."""
        if self.job.workers < 2:
            return None
        mine = self.network.bandwidth
        others = self.network.reducer_bandwidth or mine
        rate = all_reduce_rate(self.algorithm, [mine] * self.job.workers, [others] * self.job.reducers)
        return rate * PAYLOAD_SHARE

    @property
    def bound_share(self) -> float | None:
        return None if self.bound is None else self.algbw / self.bound

    @property
    def hops_s(self) -> float:
        """The messages' latency alone: two hops, or a ring's (after the two in which it compares the calls)."""
        hops = 2 * self.job.workers if self.algorithm == "ring" else 2
        return hops * self.network.latency_s

    @property
    def model_s(self) -> float | None:
        """The time of docs/algorithms.md: the bytes at the bound, and the hops."""
        return None if self.bound is None else 8 * self.nbytes / self.bound + self.hops_s

    @property
    def limit(self) -> str:
        """What the job waits for most."""
        found = self.found
        if found["processor_share"] >= _FULL_SHARE:
            if self.network.shared_cores:
                return "the shared cores"
            return f"cores of {'reducers' if found['processor_of_reducer'] else 'workers'}"
        if found["nic_share"] >= _FULL_SHARE:
            side = "in" if found["nic_receiving"] else "out"
            return f"NICs of {'reducers' if found['nic_of_reducer'] else 'workers'}, {side}"
        if self.hops_s > self.seconds / 2:
            return "latency"
        return "waiting"

    def as_json(self) -> dict[str, Any]:
        """SI units: bytes, seconds, bit/s."""
        return {
            "workers": self.job.workers,
            "reducers": self.job.reducers,
            "algorithm": self.algorithm,
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "algbw_bit_s": self.algbw,
            "busbw_bit_s": self.busbw,
            "bound_bit_s": self.bound,
            "bound_share": self.bound_share,
            "model_s": self.model_s,
            "limit": self.limit,
            **{name: value for name, value in self.found.items() if name != "seconds"},
            **{name: value for name, value in self.shape.items() if name != "algorithm"},
        }


def parse_duration(text: str) -> float:
    """Seconds of "20us", "1.5ms", "300ns" or "1s". ValueError says what is wrong with it."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ns|us|ms|s)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a time: write it like 20us, 1.5ms or 300ns")
    return float(match[1]) * {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]]


def parse_counts(text: str, workers: int) -> list[int]:
    """Numbers of reducers of "0,4,8" or, beside n workers, "0,n/4,n/2,n". ValueError says which is wrong."""
    counts = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(?:(\d+)|n(?:/(\d+))?)\s*", item)
        if match is None or match[2] == "0":
            raise ValueError(f"{item!r} is no number of reducers: write numbers, or n, n/2 and so on for n workers")
        counts.append(int(match[1]) if match[1] else workers // int(match[2] or 1))
    return list(dict.fromkeys(counts))


def jobs_of(workers: Sequence[int], reducers: str, algorithms: Sequence[str], chunk: int, window: int) -> list[Job]:
    """Every combination that is one: direct and ring once, without reducers, server and mixed only with some."""
    jobs = []
    for n in workers:
        for k in parse_counts(reducers, n):
            for algorithm in algorithms:
                if algorithm in ("server", "mixed") and k == 0:
                    continue
                if algorithm == "auto" and ("mixed" if k else "direct") in algorithms:
                    continue  # the same job again
                own = 0 if algorithm in ("direct", "ring") else k
                jobs.append(Job(n, own, algorithm, chunk, window))
    if not jobs:
        raise ValueError("server and mixed need reducers: say --reducers n, for as many as there are workers")
    return list(dict.fromkeys(jobs))


def simulate(job: Job, network: Network, sizes: Sequence[int], iterations: int, check: bool = False) -> list[Row]:
    """Runs the job at each size. reducer.errors.ReducerError says what cannot be simulated."""
    from reducer import _core

    simulation = _core.Simulation(
        workers=job.workers,
        reducers=job.reducers,
        algorithm=job.algorithm,
        bytes_per_second=network.bandwidth / 8,
        reducer_bytes_per_second=(network.reducer_bandwidth or 0.0) / 8,
        latency_s=network.latency_s,
        jitter_s=network.jitter_s,
        chunk_bytes=job.chunk_bytes,
        window_bytes=job.window_bytes,
        burst_bytes=network.burst_bytes,
        cores=network.cores,
        shared_cores=network.shared_cores,
        frame_s=network.frame_s,
        byte_s=network.byte_s,
        seed=1,
        check=check,
    )
    rows = []
    for nbytes in sizes:
        found = simulation.measure(nbytes, iterations)
        shape = simulation.shape()
        rows.append(Row(job, network, nbytes, shape["algorithm"], found, shape))
    return rows
