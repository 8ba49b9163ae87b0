"""One collective on buffers of one size: filling them, calling it, and comparing its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reducer._bench import patterns

Group = dist.ProcessGroup

#: Memory of a rank for buffers that are used in turn within a block of iterations.
_POOL_BYTES = 32 << 20


@dataclass(frozen=True)
class CaseKey:
    """What is measured. `nbytes` is the whole tensor as nccl-tests counts it."""

    collective: str
    dtype: str
    op: str
    nbytes: int


class Case:
    """Buffers for one CaseKey on one rank. Every result is exactly known.

    Iterations run in blocks over `slots` separate buffers: each in-place result can so be compared
    after the block, without work between two timed calls. Not thread safe.
    """

    def __init__(self, key: CaseKey, rank: int, world_size: int, iterations: int, device: torch.device) -> None:
        self.key = key
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._op = getattr(dist.ReduceOp, key.op.upper())
        dtype = patterns.DTYPES[key.dtype]
        inputs, outputs = self._rows(max(1, key.nbytes // dtype.itemsize))
        row_bytes = inputs.numel() * dtype.itemsize
        self.slots = max(1, min(iterations, _POOL_BYTES // max(1, row_bytes)))
        self.nbytes = self._whole_count(inputs, outputs) * dtype.itemsize
        self._source = inputs.to(device)
        self._expected = outputs.to(device)
        self._in_place = key.collective in ("all_reduce", "reduce", "broadcast")
        self._inputs = torch.empty(self.slots, inputs.numel(), dtype=dtype, device=device)
        self._outputs = self._inputs
        if not self._in_place:
            self._outputs = torch.empty(self.slots, outputs.numel(), dtype=dtype, device=device)

    def fill(self) -> None:
        """Puts every slot into its state before the call."""
        self._inputs.copy_(self._source.expand_as(self._inputs))
        if not self._in_place:
            self._outputs.zero_()

    def difference(self, used: int) -> tuple[int, str | None]:
        """How many of the first `used` slots hold a wrong result, and the first difference."""
        wrong, first = 0, None
        for row in self._outputs[:used]:
            found = patterns.first_difference(row, self._expected)
            if found is not None:
                wrong += 1
                first = first or found
        return wrong, first

    def call(self, group: Group) -> Callable[[int], Any]:
        """The function that runs the collective on one slot and returns when it is done."""
        ins, outs, op = self._inputs.unbind(), self._outputs.unbind(), self._op
        collective = self.key.collective
        if collective == "all_reduce":
            return lambda slot: dist.all_reduce(ins[slot], op, group)
        if collective == "reduce":
            return lambda slot: dist.reduce(ins[slot], 0, op, group)
        if collective == "broadcast":
            return lambda slot: dist.broadcast(ins[slot], 0, group)
        if collective == "all_gather":
            gather = _newest("all_gather_single", "all_gather_into_tensor")
            return lambda slot: gather(outs[slot], ins[slot], group)
        if collective == "reduce_scatter":
            scatter = _newest("reduce_scatter_single", "reduce_scatter_tensor")
            return lambda slot: scatter(outs[slot], ins[slot], op, group)
        if collective == "all_to_all":
            return lambda slot: dist.all_to_all_single(outs[slot], ins[slot], group=group)
        if collective == "send_recv":
            return lambda slot: self._shift(ins[slot], outs[slot], group)
        return lambda slot: dist.barrier(group)

    def _shift(self, source: Tensor, target: Tensor, group: Group) -> None:
        """Sends to the next rank while receiving from the one before."""
        n = self._world_size
        works = [
            dist.isend(source, (self._rank + 1) % n, group),
            dist.irecv(target, (self._rank - 1) % n, group),
        ]
        for work in works:
            if work is not None:
                work.wait()

    def _rows(self, count: int) -> tuple[Tensor, Tensor]:
        """This rank's input and the result it must have, for a whole tensor of `count` elements."""
        key, rank, n = self.key, self._rank, self._world_size
        part = max(1, count // n)

        def given(by: int, length: int) -> Tensor:
            return patterns.tiled(patterns.period(key.dtype, key.op, by, n), length)

        def summed(length: int) -> Tensor:
            return patterns.tiled(patterns.reduced(key.dtype, key.op, n), length)

        if key.collective == "all_reduce":
            return given(rank, count), summed(count)
        if key.collective == "reduce":
            # What the other ranks' buffers hold afterwards is the backend's own affair.
            return given(rank, count), summed(count)
        if key.collective == "broadcast":
            return (given(0, count) if rank == 0 else given(rank, count).zero_()), given(0, count)
        if key.collective == "all_gather":
            return given(rank, part), torch.cat([given(by, part) for by in range(n)])
        if key.collective == "reduce_scatter":
            return given(rank, part * n), summed(part * n)[rank * part : (rank + 1) * part].clone()
        if key.collective == "all_to_all":
            mine = slice(rank * part, (rank + 1) * part)
            received = torch.cat([given(by, part * n)[mine] for by in range(n)])
            return given(rank, part * n), received
        if key.collective == "send_recv":
            return given(rank, count), given((rank - 1) % n, count)
        empty = torch.empty(0, dtype=patterns.DTYPES[key.dtype])
        return empty, empty

    def _whole_count(self, inputs: Tensor, outputs: Tensor) -> int:
        return max(inputs.numel(), outputs.numel())

    @property
    def checks(self) -> bool:
        """Whether this rank's buffer has a defined result."""
        return self.key.collective != "reduce" or self._rank == 0


def _newest(new: str, old: str) -> Callable[..., Any]:
    """The function under its name of torch 2.13, or the one that earlier versions have."""
    function: Callable[..., Any] = getattr(dist, new, None) or getattr(dist, old)
    return function
