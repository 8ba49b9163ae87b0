"""What ranks give and what must come of it, to the bit, whatever happened to the reducers meanwhile.

The numbers are of very different size, so that every order of summing has bits of its own. A call's values are the
sample of its size times a power of two that changes from call to call: the sums are scaled exactly, and the answer of
another call is no right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
_EXPONENT_MAX = 12
#: A prime, so that no pattern of calls repeats in step with it.
_SCALES = 13


def scale_of(number: int) -> float:
    """The power of two of the call with this number."""
    return 2.0 ** (number % _SCALES - _SCALES // 2)


def contribution(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    """A rank's sample of `count` elements, shape [count]."""
    generator = torch.Generator().manual_seed(count * 1009 + rank)
    exponents = torch.randint(-_EXPONENT_MAX, _EXPONENT_MAX, (count,), generator=generator)
    return (torch.randn(count, generator=generator) * torch.pow(2.0, exponents)).to(dtype)


def placed_sum(parts: Sequence[Tensor], places: Sequence[str]) -> Tensor:
    """The sum of all ranks' `parts` in the order that docs/architecture.md fixes for ranks at these `places`.

    Each host's ranks in their order, rounded; then the hosts', in the order of their lowest ranks.
    """
    by_host: dict[str, list[Tensor]] = {}
    for part, place in zip(parts, places, strict=True):
        by_host.setdefault(place, []).append(part)
    return _ordered_sum([_ordered_sum(host) for host in by_host.values()])


def _ordered_sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    return torch.equal(actual.view(_BITS[actual.dtype]), expected.view(_BITS[expected.dtype]))


@dataclass(frozen=True)
class Sample:
    """All ranks' parts of one size, and their sum."""

    parts: tuple[Tensor, ...]
    total: Tensor


@dataclass
class Samples:
    """Samples by size and type, made at their first use. `places`: each rank's host."""

    places: tuple[str, ...]
    _made: dict[tuple[int, torch.dtype], Sample] = field(default_factory=dict)

    def of(self, count: int, dtype: torch.dtype) -> Sample:
        if (count, dtype) not in self._made:
            parts = tuple(contribution(rank, count, dtype) for rank in range(len(self.places)))
            self._made[count, dtype] = Sample(parts, placed_sum(parts, self.places))
        return self._made[count, dtype]
