"""What netlab runs: clusters, who competes on them at which sizes, and what is to be reached there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reducer._bench.formulas import all_reduce_rate
from reducer._bench.units import parse_rate, parse_size

KIB, MIB = 1 << 10, 1 << 20
ALGORITHMS = ("ring", "direct", "server", "mixed", "auto")
TRANSPORTS = ("grpc", "tcp", "shm", "auto")
# Between processes, even of one host: no sums within a host before its NIC.
_FLAT_TRANSPORTS = ("grpc", "tcp")
CONTENDERS = ("gloo", "ring", "direct", "server", "mixed")
# A choice is right if it takes at most a tenth more time than the best one.
RIGHT_CHOICE = 1 / 1.1
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Competitor:
    """Gloo, or an algorithm of ours with its chunk and window and its transport, where they matter; written `server`,
    `server:grpc`, `server/63KiB/2MiB:tcp`.
    """

    name: str

    def __post_init__(self) -> None:
        way, colon, transport = self.name.partition(":")
        algorithm, *sizes = way.split("/")
        fine = algorithm in ALGORITHMS and len(sizes) <= 2 and (not colon or transport in TRANSPORTS)
        if self.name != "gloo" and not fine:
            raise ValueError(
                f"{self.name!r} is no contender: write gloo or one of {', '.join(ALGORITHMS)}, with a chunk and a "
                f"window (server/63KiB/2MiB) and a transport ({', '.join(TRANSPORTS)}; server:grpc) if they matter"
            )
        for size in sizes:
            parse_size(size)

    @property
    def algorithm(self) -> str:
        return self.name.partition(":")[0].partition("/")[0]

    @property
    def _way(self) -> str:
        """What REDUCER_ALGORITHM says for it."""
        way = self.name.partition(":")[0]
        return f"0-:{way}" if "/" in way else way

    @property
    def transport(self) -> str:
        return self.name.partition(":")[2] or "auto"

    @property
    def uses_reducers(self) -> bool:
        return self.algorithm in ("server", "mixed", "auto")

    @property
    def environment(self) -> dict[str, str]:
        """What selects it; nothing for Gloo."""
        if self.name == "gloo":
            return {}
        return {"REDUCER_ALGORITHM": self._way, "REDUCER_TRANSPORT": self.transport}

    def unknown_here(self) -> str | None:
        """Why this build cannot run it, or None."""
        if self.name == "gloo":
            return None
        from reducer.options import Options, resolve

        try:
            resolve(Options(algorithm=self._way, transport=self.transport, servers="127.0.0.1:1"), {})
        except ValueError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class Shape:
    """Hosts with `ranks_per_host` workers each, and hosts with a reducer each. Rates as `tc` writes them; `rates` by
    host (`w0`, `r3`) or by kind (`w`, `r`) go before `rate`. A rate of None: no limits.
    """

    hosts: int = 8
    reducers: int = 8
    ranks_per_host: int = 1
    rate: str | None = "1gbit"
    rates: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for label, rate in self.rates.items():
            if label not in ("w", "r", *self.labels):
                raise ValueError(f"{label!r} is no host here: write w, r or one of {', '.join(self.labels)}")
            parse_rate(rate)

    @property
    def workers(self) -> list[str]:
        return [f"w{i}" for i in range(self.hosts)]

    @property
    def reducer_labels(self) -> list[str]:
        return [f"r{i}" for i in range(self.reducers)]

    @property
    def labels(self) -> list[str]:
        return self.workers + self.reducer_labels

    @property
    def rank_hosts(self) -> list[str]:
        """The host of each rank; ranks of a host follow one another, as under torchrun."""
        return [label for label in self.workers for _ in range(self.ranks_per_host)]

    @property
    def world_size(self) -> int:
        return self.hosts * self.ranks_per_host

    def rate_of(self, label: str) -> str | None:
        """The NIC of a host, as `tc` writes it."""
        if self.rate is None:
            return None
        return self.rates.get(label) or self.rates.get(label[0]) or self.rate

    @property
    def bandwidths(self) -> dict[str, str]:
        """Every host's NIC by label where they differ; empty where they do not, or have no limit."""
        return {label: self.rate_of(label) or "" for label in self.labels} if self.rates and self.rate else {}

    def bits(self, label: str) -> float:
        """The NIC of a host in bit/s. Only where NICs are limited."""
        rate = self.rate_of(label)
        assert rate is not None
        return parse_rate(rate)

    def bound(self, competitor: Competitor, efficiency: float) -> float:
        """The highest algbw in bit/s; `efficiency` is the part of a NIC's rate that a TCP stream can have."""
        return all_reduce_rate(
            competitor.algorithm,
            [efficiency * self.bits(label) for label in self.workers],
            [efficiency * self.bits(label) for label in self.reducer_labels],
            self.ranks_per_host,
            two_levels=competitor.transport not in _FLAT_TRANSPORTS,
        )

    def __str__(self) -> str:
        what = (
            f"{self.hosts} hosts x {self.ranks_per_host} workers"
            if self.ranks_per_host > 1
            else f"{self.hosts} workers"
        )
        others = "".join(f", {label} {rate}" for label, rate in self.rates.items())
        return f"{what} + {self.reducers} reducers, {self.rate or 'no limit'} per host{others}"


@dataclass(frozen=True)
class Goal:
    """What a contender is to reach at every measured size from `least` to `most` bytes.

    `measure`: `gloo` is Gloo's time over its own, `line` its algbw over the line rate, `bound` its algbw over its
    bound, `best` the time of the best fixed choice over its own.
    """

    contender: str
    measure: str
    at_least: float
    least: int = 0
    most: int = UNLIMITED


@dataclass(frozen=True)
class Scenario:
    """One cluster, and about how many seconds to measure on it."""

    name: str
    shape: Shape
    sizes: Sequence[int]
    contenders: Sequence[str]
    goals: Sequence[Goal]
    budget_s: float


_ALL_SIZES = (KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
_CHOICE = Goal("auto", "best", RIGHT_CHOICE)

# The rows of the table of goals. Where a row names no algorithm, it is what a user gets who names none.
SCENARIOS = {
    each.name: each
    for each in (
        Scenario(
            "8+8",
            Shape(8, 8),
            _ALL_SIZES,
            ("gloo", "ring", "direct", "server", "auto"),
            (
                Goal("auto", "gloo", 1.70, 16 * MIB),
                Goal("auto", "line", 0.97, 16 * MIB),
                Goal("auto", "bound", 0.75, 256 * KIB, 4 * MIB),
                Goal("auto", "gloo", 1.5, 256 * KIB, 4 * MIB),
                _CHOICE,
            ),
            280.0,
        ),
        Scenario(
            "8+4",
            Shape(8, 4),
            (KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB),
            ("gloo", "ring", "direct", "server", "mixed", "auto"),
            (Goal("mixed", "gloo", 1.25, 16 * MIB), Goal("mixed", "bound", 0.95, 16 * MIB), _CHOICE),
            220.0,
        ),
        Scenario(
            "8+0",
            Shape(8, 0),
            _ALL_SIZES,
            ("gloo", "ring", "direct", "auto"),
            (
                Goal("direct", "gloo", 1.0, 16 * MIB),
                Goal("direct", "gloo", 1.7, MIB, MIB),
                Goal("direct", "gloo", 5.0, KIB, 256 * KIB),
                Goal("direct", "bound", 0.75, 256 * KIB, 4 * MIB),
                Goal("direct", "gloo", 1.5, 256 * KIB, 4 * MIB),
                _CHOICE,
            ),
            240.0,
        ),
        Scenario(
            "4x2+4",
            Shape(4, 4, ranks_per_host=2),
            (KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB),
            ("gloo", "ring", "direct", "server", "mixed", "auto"),
            (Goal("auto", "gloo", 1.6, 16 * MIB), _CHOICE),
            220.0,
        ),
        Scenario(
            "unequal",
            Shape(4, 4, rate="500mbit", rates={"r0": "1gbit", "r1": "1gbit"}),
            (MIB, 16 * MIB, 64 * MIB),
            ("gloo", "direct", "server", "mixed", "auto"),
            (_CHOICE,),
            120.0,
        ),
    )
}
