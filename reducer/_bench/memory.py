"""Peak resident memory, of this process or another, over a stretch of time (Linux, /proc).

The kernel keeps each process' highest resident size (VmHWM) and sets it back to the present size when
a 5 is written to /proc/PID/clear_refs, so a peak is exact and needs no sampling.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from reducer._bench import patterns


def reset_peak(pid: int | str = "self") -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def resident_bytes(pid: int | str = "self") -> int:
    return _status_bytes(pid, "VmRSS")


def peak_bytes(pid: int | str = "self") -> int:
    """Highest resident size since reset_peak()."""
    return _status_bytes(pid, "VmHWM")


def measure_worker(
    group: dist.ProcessGroup, nbytes: int, rank: int, world_size: int
) -> dict[str, Any]:
    """One all-reduce of float32 in place. What is resident beforehand includes the whole tensor.

    Returns {"extra_bytes", "wrong", "counters"}: `wrong` elements, and the group's own counters
    (`reducer.backend.counters`), none for other backends.
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
    for rows in tensor_rows.split(4096):
        wrong += int((rows != expected).sum())
    return {"extra_bytes": peak - before, "wrong": wrong, "counters": _counters(group)}


def _counters(group: dist.ProcessGroup) -> dict[str, int]:
    if dist.get_backend(group) != "reducer":
        return {}
    from reducer import backend

    return {name: int(value) for name, value in dict(backend.counters(group)).items()}


def _status_bytes(pid: int | str, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no {field}: the process has ended")
