"""Sizes, times and rates as people write and read them.

Bytes are counted in powers of two where an `i` says so (MiB = 2**20) and in powers of ten elsewhere
(MB = 1e6); bandwidth is always in powers of ten (GB/s = 1e9 bytes a second, Gbit/s = 1e9 bits).
"""

from __future__ import annotations

import re

_FACTORS = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "kib": 1 << 10,
    "m": 1000**2,
    "mb": 1000**2,
    "mib": 1 << 20,
    "g": 1000**3,
    "gb": 1000**3,
    "gib": 1 << 30,
}
_RATES = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def parse_size(text: str) -> int:
    """Bytes of "64KiB", "1MiB", "4", "1.5GB". ValueError says what is wrong with it."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _FACTORS:
        raise ValueError(f"{text!r} is not a size: write it like 4096, 64KiB or 1.5GB")
    nbytes = float(match[1]) * _FACTORS[match[2].lower()]
    if nbytes != int(nbytes):
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(nbytes)


def parse_sizes(text: str) -> list[int]:
    """Bytes of each item of "1KiB,64KiB", in the order given."""
    return [parse_size(item) for item in text.split(",")]


def size_range(first: int, last: int, factor: int) -> list[int]:
    """first, first * factor, ... up to and including last."""
    if first < 1 or last < first or factor < 2:
        raise ValueError(
            f"sizes from {first} to {last} by the factor {factor}: "
            "the first must be at least 1 byte, the last not below it, the factor at least 2"
        )
    sizes = []
    while first <= last:
        sizes.append(first)
        first *= factor
    return sizes


def parse_rate(text: str) -> float:
    """Bits a second of "1gbit" or "250mbit", the way `tc` writes them."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?bit)", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a rate: write it like 1gbit or 250mbit")
    return float(match[1]) * _RATES[match[2]]


def format_size(nbytes: int) -> str:
    """ "64 KiB": the largest power-of-two unit that keeps the figure at least 1."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"


def format_seconds(seconds: float) -> str:
    """Three digits in the smallest unit in which the figure stays below 1000."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds)} s"


def format_tick(seconds: float) -> str:
    """A round figure for an axis: "10 us", "1 ms"."""
    if seconds < 0.9e-3:
        return f"{seconds * 1e6:g} us"
    return f"{seconds * 1e3:g} ms" if seconds < 0.9 else f"{seconds:g} s"


def _three_digits(value: float) -> str:
    if value < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
