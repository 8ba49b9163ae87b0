"""Kernels and engine under pytest-benchmark: ``.venv/bin/python -m pytest benchmarks/test_core.py --benchmark-enable``.

The column to read is ``extra_info`` (printed by ``--benchmark-json`` and in the summary line at the end): GB/s of
memory moved, and the
ratio to a plain ``a[i] += b[i]`` loop measured in the same test, in turns.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import pytest

from reducer import _core

MIB = 1 << 20
ROUNDS = 9


def _bandwidth(probe: Any) -> float:
    begin = time.perf_counter()
    moved = probe.run()
    return float(moved) / (time.perf_counter() - begin) / 1e9


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("chunk_bytes", [32 << 10, 256 << 10])
def test_engine_sums_at_memory_speed(benchmark: Any, ranks: int, chunk_bytes: int) -> None:
    """What the engine moves per second, beside a plain add loop (both in turns: noise hits both alike)."""
    engine = _core.EngineProbe(ranks, chunk_bytes, 64 * MIB)
    add = _core.AddProbe(64 * MIB)
    engine.run()
    add.run()
    turns = [(_bandwidth(engine), _bandwidth(add)) for _ in range(ROUNDS)]
    ratio = statistics.median(one / other for one, other in turns)
    benchmark.extra_info["engine_GB_per_s"] = statistics.median(one for one, _ in turns)
    benchmark.extra_info["add_GB_per_s"] = statistics.median(other for _, other in turns)
    benchmark.extra_info["ratio"] = ratio
    print(f"engine, {ranks} ranks, {chunk_bytes >> 10} KiB chunks: {ratio:.2f} of a plain add loop's bandwidth")
    benchmark.pedantic(engine.run, rounds=3, iterations=1)
    assert ratio > 0.3, "far below memory speed: something is broken, not merely slow"


@pytest.mark.parametrize("instruction_set", _core.instruction_sets())
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float64", "int32"]
)
def test_kernel(benchmark: Any, dtype: str, instruction_set: str) -> None:
    """A sum of four inputs of 256 KiB, on each instruction set of this machine."""
    nbytes = 256 << 10
    inputs = [np.zeros(nbytes, dtype=np.uint8) for _ in range(4)]
    out = np.empty(nbytes, dtype=np.uint8)
    _core.pin_instruction_set(instruction_set)
    try:
        benchmark(_core.reduce, dtype, "sum", inputs, out)
    finally:
        _core.pin_instruction_set("")
    benchmark.extra_info["input_bytes"] = 4 * nbytes
    assert not out.any()
