"""One answer: the bits of a sum do not depend on who sums, in which chunks, or from which memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import Ranks

import reducer

N = 4
CHUNKS = ["4KiB", "64KiB", "1MiB", "4MiB"]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class Setup:
    """A way to sum."""

    algorithm: str
    servers: tuple[str, ...]
    chunk: str


_groups: dict[Setup, Any] = {}


def group_of(setup: Setup) -> Any:
    """In a rank: the group for a setup, made at first use by all ranks."""
    if setup not in _groups:
        options = reducer.Options(algorithm=setup.algorithm, servers=setup.servers, chunk_bytes=setup.chunk)
        _groups[setup] = dist.new_group(pg_options=options)
    return _groups[setup]


def contribution(rank: int, seed: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of very different size, for which every order of summing has its own bits."""
    generator = torch.Generator().manual_seed(seed * N + rank)
    exponents = torch.randint(-12, 12, (count,), generator=generator)
    return (torch.randn(count, generator=generator) * torch.pow(2.0, exponents)).to(dtype)


def rank_order_sum(seed: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    total = contribution(0, seed, count, dtype).float()
    for rank in range(1, N):
        total = total + contribution(rank, seed, count, dtype).float()
    return total.to(dtype)


def laid_out(values: torch.Tensor, offset: int, stride: int) -> torch.Tensor:
    """The same values in other memory: behind `offset` elements, `stride` apart."""
    storage = torch.full((offset + values.numel() * stride + 3,), -1.0, dtype=values.dtype)
    view = torch.as_strided(storage, (values.numel(),), (stride,), offset)
    view.copy_(values)
    return view


def check_bits(setup: Setup, seed: int, count: int, dtype: torch.dtype, offset: int = 0, stride: int = 1) -> None:
    group = group_of(setup)
    tensor = laid_out(contribution(dist.get_rank(), seed, count, dtype), offset, stride)
    dist.all_reduce(tensor, group=group)
    expected = rank_order_sum(seed, count, dtype)
    actual = tensor.contiguous().view(BITS[dtype])
    wrong = (actual != expected.view(BITS[dtype])).nonzero().flatten()
    assert len(wrong) == 0, f"{setup}: {len(wrong)} of {count} differ, first at {wrong[:5].tolist()}"


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """One set of ranks for the module; the groups of all setups are made among them."""
    with Ranks(N) as all_ranks:
        yield all_ranks


@pytest.fixture(scope="module")
def addresses(module_reducers: Callable[..., list[str]]) -> tuple[str, ...]:
    return tuple(module_reducers(3))


# Algorithm, standalone reducers.
WAYS = [
    ("local", 0),
    ("direct", 0),
    ("server", 1),
    ("server", 3),
    ("mixed", 2),
    ("0-4KiB:direct,4KiB-64KiB:server,64KiB-:mixed/8KiB/256KiB", 2),
]


def test_the_samples_depend_on_the_order() -> None:
    """Otherwise these tests would prove nothing."""
    parts = [contribution(rank, 1, 10_000, torch.float32) for rank in range(N)]
    backwards = ((parts[3] + parts[2]) + parts[1]) + parts[0]
    assert not torch.equal(backwards, rank_order_sum(1, 10_000, torch.float32))


@pytest.mark.parametrize("dtype", list(BITS), ids=str)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("algorithm", "count"), WAYS, ids=lambda value: str(value))
def test_rank_order_sum(
    ranks: Ranks, addresses: tuple[str, ...], algorithm: str, count: int, chunk: str, dtype: torch.dtype
) -> None:
    setup = Setup(algorithm, addresses[:count], chunk)
    for elements in (1, 1003, 100_003, 1_300_001 if chunk == "4MiB" else 300_000):
        ranks.call(check_bits, setup, elements, elements, dtype)


@given(
    way=st.sampled_from(WAYS),
    chunk=st.sampled_from(["4KiB", "64KiB"]),
    dtype=st.sampled_from(list(BITS)),
    seed=st.integers(0, 1_000_000),
    count=st.one_of(st.just(0), st.integers(1, 64), st.integers(1, 40_000)),
    offset=st.integers(0, 9),
    stride=st.sampled_from([1, 1, 1, 2, 3]),
)
@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_count_offset_and_stride(
    ranks: Ranks,
    addresses: tuple[str, ...],
    way: tuple[str, int],
    chunk: str,
    dtype: torch.dtype,
    seed: int,
    count: int,
    offset: int,
    stride: int,
) -> None:
    setup = Setup(way[0], addresses[: way[1]], chunk)
    ranks.call(check_bits, setup, seed, count, dtype, offset, stride)
