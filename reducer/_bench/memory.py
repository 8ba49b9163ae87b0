"""How much memory one large all-reduce takes beyond the tensor itself."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import torch
import torch.distributed as dist

from reducer._bench import patterns
from reducer._bench.machine import peak_bytes, reset_peak, resident_bytes


def measure_worker(group: dist.ProcessGroup, nbytes: int, rank: int, world_size: int) -> dict[str, Any]:
    """One all-reduce of float32 in place. What is resident beforehand includes the whole tensor.

    Returns {"extra_bytes", "wrong", "counters"}: `wrong` elements, and the group's own counters
    (ReducerBackend.counters), none for other backends.
    """
    tensor = torch.empty(max(1, nbytes // 4), dtype=torch.float32)
    tensor_rows = tensor[: tensor.numel() // patterns.PERIOD * patterns.PERIOD]
    tensor_rows = tensor_rows.view(-1, patterns.PERIOD)
    mine = patterns.period("float32", "sum", rank, world_size)
    tail = tensor[tensor_rows.numel() :]
    tensor_rows.copy_(mine.expand_as(tensor_rows))
    tail.copy_(mine[: tail.numel()])
    # A first call makes the connections and buffers that stay.
    dist.all_reduce(torch.zeros(1 << 18), group=group)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    dist.barrier(group)
    reset_peak()
    before = resident_bytes()
    dist.all_reduce(tensor, group=group)
    peak = peak_bytes()
    expected = patterns.reduced("float32", "sum", world_size)
    wrong = int((tail != expected[: tail.numel()]).sum())
    for rows in torch.split(tensor_rows, 4096):
        wrong += int((rows != expected).sum())
    return {"extra_bytes": peak - before, "wrong": wrong, "counters": _counters(group)}


def _counters(group: dist.ProcessGroup) -> dict[str, int]:
    if dist.get_backend(group) != "reducer":
        return {}
    native: Any = group._get_backend(torch.device("cpu"))
    return dict(native.counters())
