"""Inputs whose result is known beforehand, to the bit, in whatever order it is computed.

Every pattern consists of small whole numbers, so that float sums are exact in any order, and
repeats after `PERIOD` elements, a number that shares no factor with chunk sizes: a chunk that ends
up in the wrong place shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

PERIOD = 1001

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
}
OPS = ("sum", "avg", "product", "min", "max", "band", "bor", "bxor")

#: Up to here every whole number is exact.
_EXACT_LIMIT = {
    "float32": 1 << 24,
    "float64": 1 << 53,
    "float16": 1 << 11,
    "bfloat16": 1 << 8,
    "float8_e4m3fn": 1 << 4,
    "float8_e5m2": 1 << 3,
}


def period(dtype: str, op: str, rank: int, world_size: int) -> Tensor:
    """What `rank` gives for one period. Shape [PERIOD], of the dtype named."""
    i = torch.arange(PERIOD, dtype=torch.int64)
    if op == "product":
        # One rank per element has a 2 or 3, the others 1: no product leaves the range of any dtype.
        values = torch.where((i + rank) % world_size == 0, 2 + i % 2, torch.ones_like(i))
    elif op == "avg":
        # The ranks' values are spread around a whole mean.
        values = 2 * ((i + rank) % world_size) + i % 3
    else:
        limit = _EXACT_LIMIT.get(dtype, PERIOD * world_size)
        modulus = min(PERIOD, limit // world_size)
        # Where there is little room for each rank, some give a one: how many, changes from element to element.
        values = (i + 3 * rank) % modulus if modulus > 2 else (rank < i % (limit + 1)).to(torch.int64)
    return values.to(DTYPES[dtype])


def reduced(dtype: str, op: str, world_size: int) -> Tensor:
    """What all ranks' periods give together. Shape [PERIOD]."""
    rows = torch.stack([period(dtype, op, rank, world_size) for rank in range(world_size)])
    wide = rows.to(torch.int64)
    if op == "sum":
        return wide.sum(0).to(rows.dtype)
    if op == "avg":
        return (wide.sum(0).to(torch.float64) / world_size).to(rows.dtype)
    if op == "product":
        return wide.prod(0).to(rows.dtype)
    if op == "min":
        return wide.amin(0).to(rows.dtype)
    if op == "max":
        return wide.amax(0).to(rows.dtype)
    bitwise = {"band": torch.bitwise_and, "bor": torch.bitwise_or, "bxor": torch.bitwise_xor}
    result = rows[0]
    for row in rows[1:]:
        result = bitwise[op](result, row)
    return result


def tiled(one_period: Tensor, count: int) -> Tensor:
    """The period repeated to `count` elements."""
    return one_period.repeat(-(-count // PERIOD))[:count].contiguous()


def first_difference(actual: Tensor, expected: Tensor) -> str | None:
    """Where two flat tensors of equal shape differ first, in words; None when they are equal."""
    if actual.dtype.itemsize == 1:  # torch does not compare float8; no pattern has a NaN or a negative zero
        same = torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
    else:
        same = torch.equal(actual, expected)
    if same:
        return None
    index = int((actual != expected).nonzero()[0])
    return f"element {index} of {actual.numel()} is {actual[index]}, not {expected[index]}"
