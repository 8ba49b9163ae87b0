"""Collectives of every kind and size, drawn by a seed that all ranks share, and their results compared to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from reliability_values import DTYPES, Samples, same_bits, scale_of
from torch import Tensor

# Elements of the whole tensor, and how often each is drawn.
_COUNTS = {0: 1, 1: 3, 7: 4, 1003: 5, 16_385: 5, 100_003: 3, 300_001: 2, 1_000_003: 1}
_KINDS = {"all_reduce": 12, "reduce": 2, "broadcast": 2, "reduce_scatter": 2, "all_gather": 2, "barrier": 1}
_UNDER_WAY_MAX = 6


@dataclass(frozen=True)
class Call:
    """One collective. `number` counts a group's calls and chooses the values."""

    number: int
    kind: str
    count: int
    dtype: str
    root: int

    def __str__(self) -> str:
        return f"#{self.number} {self.kind}({self.dtype}, {self.count} elements, root {self.root})"


def draw_calls(dice: random.Random, first: int, world_size: int) -> list[Call]:
    """The next calls, to be under way together; `first`: the number of the first."""
    calls = []
    for number in range(first, first + dice.randint(1, _UNDER_WAY_MAX)):
        (kind,) = dice.choices(list(_KINDS), list(_KINDS.values()))
        (count,) = dice.choices(list(_COUNTS), list(_COUNTS.values()))
        calls.append(Call(number, kind, count, dice.choice(list(DTYPES)), dice.randrange(world_size)))
    return calls


@dataclass
class Started:
    """A call under way, and how to see what it did: the output to compare and what it must be, None for nothing."""

    call: Call
    work: dist.Work
    result: Callable[[], tuple[Tensor, Tensor] | None]

    def check(self) -> tuple[int, bool]:
        """After the end: bytes compared, and whether they are right."""
        compared = self.result()
        if compared is None:
            return 0, True
        actual, expected = compared
        return actual.nbytes, same_bits(actual, expected)


def start(call: Call, samples: Samples, group: dist.ProcessGroup) -> Started:
    """Starts it on this rank."""
    scale = scale_of(call.number)
    rank, n = group.rank(), group.size()
    sample = samples.of(call.count, DTYPES[call.dtype])
    mine = sample.parts[rank] * scale
    root = dist.get_global_rank(group, call.root)
    work: dist.Work | None
    if call.kind == "all_reduce":
        work = dist.all_reduce(mine, group=group, async_op=True)
        return _started(call, work, lambda: (mine, sample.total * scale))
    if call.kind == "reduce":
        work = dist.reduce(mine, root, group=group, async_op=True)
        return _started(call, work, lambda: (mine, sample.total * scale) if rank == call.root else None)
    if call.kind == "broadcast":
        work = dist.broadcast(mine, root, group=group, async_op=True)
        return _started(call, work, lambda: (mine, sample.parts[call.root] * scale))
    part = call.count // n
    if call.kind == "reduce_scatter":
        output = torch.empty(part, dtype=mine.dtype)
        work = dist.reduce_scatter_tensor(output, mine[: part * n].contiguous(), group=group, async_op=True)
        return _started(call, work, lambda: (output, sample.total[part * rank : part * (rank + 1)] * scale))
    if call.kind == "all_gather":
        gathered = torch.empty(part * n, dtype=mine.dtype)
        work = dist.all_gather_into_tensor(gathered, mine[:part].contiguous(), group=group, async_op=True)
        return _started(call, work, lambda: (gathered, torch.cat([each[:part] for each in sample.parts]) * scale))
    assert call.kind == "barrier", call
    return _started(call, dist.barrier(group=group, async_op=True), lambda: None)


def _started(call: Call, work: dist.Work | None, result: Callable[[], tuple[Tensor, Tensor] | None]) -> Started:
    assert work is not None
    return Started(call, work, result)
