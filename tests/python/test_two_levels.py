"""Ranks that share a host sum among themselves first: the bits, many calls at once, and a rank that dies."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, here, init_group
from test_backend_answer import BITS, contribution

import reducer

# Hosts by rank, algorithm, standalone reducers.
CLUSTERS = [
    ("aabb", "direct", 0),
    ("aabb", "server", 3),
    ("aabb", "mixed", 1),
    ("abab", "server", 1),
    ("aaabbc", "direct", 0),
    ("aaabbc", "mixed", 1),
]


def environment(
    placement: str, algorithm: str, servers: list[str], chunk: str = "8KiB", transport: str = "auto"
) -> list[dict[str, str]]:
    return [
        {
            "REDUCER_TEST_PLACE": f"test-{place}",
            "REDUCER_ALGORITHM": algorithm,
            "REDUCER_SERVERS": ",".join(servers),
            "REDUCER_CHUNK_BYTES": chunk,
            "REDUCER_TRANSPORT": transport,
        }
        for place in placement
    ]


def sum_by_host(placement: str, seed: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Each host's ranks in rank order, rounded; then the hosts in the order of their lowest rank."""
    total = torch.zeros(0)
    for number, place in enumerate(dict.fromkeys(placement)):
        ranks = [rank for rank, other in enumerate(placement) if other == place]
        host = contribution(ranks[0], seed, count, dtype).float()
        for rank in ranks[1:]:
            host = host + contribution(rank, seed, count, dtype).float()
        host = host.to(dtype).float()
        total = host if number == 0 else total + host
    return total.to(dtype)


def check_bits(placement: str, seed: int, count: int, dtype: torch.dtype, average: bool) -> None:
    tensor = contribution(dist.get_rank(), seed, count, dtype)
    dist.all_reduce(tensor, op=dist.ReduceOp.AVG if average else dist.ReduceOp.SUM)
    expected = sum_by_host(placement, seed, count, dtype)
    if average:
        expected = (expected.float() / len(placement)).to(dtype)
    wrong = (tensor.view(BITS[dtype]) != expected.view(BITS[dtype])).nonzero().flatten()
    assert len(wrong) == 0, f"{len(wrong)} of {count} differ, first at {wrong[:5].tolist()}"


def check_many(placement: str) -> None:
    """Large and small calls, all under way at once."""
    counts = [300_001, 7, 50_000, 0, 1_000_003, 4096] * 2
    tensors = [contribution(dist.get_rank(), seed, count, torch.float32) for seed, count in enumerate(counts)]
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        work.wait()
    for seed, (count, tensor) in enumerate(zip(counts, tensors, strict=True)):
        assert torch.equal(tensor, sum_by_host(placement, seed, count, torch.float32)), count


def check_others(placement: str, count: int) -> None:
    """The other collectives that have two levels; `count`: of a rank's part."""
    rank, n = dist.get_rank(), len(placement)
    whole = contribution(rank, 3, n * count, torch.float32)
    total = sum_by_host(placement, 3, n * count, torch.float32)
    part = torch.empty(count)
    dist.reduce_scatter_tensor(part, whole)
    assert torch.equal(part, total[rank * count : (rank + 1) * count]), "reduce_scatter"
    gathered = torch.empty(n * count)
    dist.all_gather_into_tensor(gathered, part)
    assert torch.equal(gathered, total), "all_gather"
    for root in range(n):
        reduced = whole.clone()
        dist.reduce(reduced, root)
        assert torch.equal(reduced, total if rank == root else whole), "reduce"
        sent = contribution(rank, 4, count, torch.bfloat16)
        dist.broadcast(sent, root)
        assert torch.equal(sent, contribution(root, 4, count, torch.bfloat16)), "broadcast"


def shared_memory_maps() -> int:
    """Of this process."""
    with open("/proc/self/maps") as maps:
        return sum("memfd:" in line for line in maps)


@pytest.mark.parametrize(("placement", "algorithm", "servers"), CLUSTERS, ids=str)
def test_the_bits_are_those_of_the_documented_order(
    reducers: Callable[..., list[str]], placement: str, algorithm: str, servers: int
) -> None:
    with Ranks(len(placement), environment(placement, algorithm, reducers(servers))) as ranks:
        for count in (1003, 100_003, 600_000):
            for dtype in BITS:
                ranks.call(check_bits, placement, count, count, dtype, count == 100_003)
        ranks.call(check_many, placement)
        for count in (20, 30_001, 300_000):
            ranks.call(check_others, placement, count)
        maps = ranks.call(shared_memory_maps)
        assert [number > 0 for number in maps] == [placement.count(place) > 1 for place in placement]


def test_without_shared_memory_the_bits_are_the_same() -> None:
    with Ranks(4, environment("aabb", "direct", [], transport="grpc")) as ranks:
        for dtype in BITS:
            ranks.call(check_bits, "aabb", 5, 200_000, dtype, False)
        ranks.call(check_many, "aabb")
        ranks.call(check_others, "aabb", 100_001)
        assert ranks.call(shared_memory_maps) == [0, 0, 0, 0]


def without_memory(placement: str) -> str:
    """In a rank: the third one may have no file grow, and so has no memory to share."""
    if here().rank == 2:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        init_group()
    except reducer.UnavailableError as error:
        return str(error)
    check_bits(placement, 5, 200_000, torch.float32, False)
    check_others(placement, 100_001)
    assert shared_memory_maps() == 0
    return ""


def test_a_rank_without_memory_sends_all_over_the_network_and_one_rank_says_so() -> None:
    with Ranks(4, environment("aabb", "direct", []), init=False) as ranks:
        assert ranks.call(without_memory, "aabb") == [""] * 4
        logs = ranks.logs()
    assert logs.count("cannot share memory: File too large; every rank goes over the network for itself") == 1, logs
    assert "rank 2 (" in logs
    with Ranks(4, environment("aabb", "direct", [], transport="shm"), init=False) as ranks:
        for text in ranks.call(without_memory, "aabb"):
            assert "REDUCER_TRANSPORT is 'shm', and rank 2 (" in text
            assert "cannot share memory: File too large; mend that" in text


def reduce_until_it_fails() -> str:
    tensor = torch.ones(2_000_000)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            return str(error)
    return "(no error)"


@pytest.mark.parametrize(
    ("algorithm", "servers", "victim"), [("direct", 0, 0), ("server", 3, 0), ("server", 3, 3), ("mixed", 1, 1)], ids=str
)
def test_a_rank_that_dies_in_the_middle_is_named(
    reducers: Callable[..., list[str]], algorithm: str, servers: int, victim: int
) -> None:
    ranks = Ranks(4, environment("aabb", algorithm, reducers(servers), "64KiB"))
    try:
        ranks.call(check_bits, "aabb", 1, 200_000, torch.float32, False)
        rest = [rank for rank in range(4) if rank != victim]
        ranks.start(list(range(4)), reduce_until_it_fails)
        time.sleep(0.3)  # in the middle of one of many
        ranks.kill_rank(victim)
        began = time.monotonic()
        texts = [outcome.value for outcome in ranks.answers(rest, 60.0)]
        assert time.monotonic() - began < 10
    finally:
        ranks.kill()
    for text in texts:
        assert f"rank {victim}" in text, text
