"""What carries the frames between processes, where the ends were told different things."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailure, run_ranks, standalone_reducers

COUNT = 300_000


def environment(servers: list[str], transport: str) -> dict[str, str]:
    return {
        "REDUCER_SERVERS": ",".join(servers),
        "REDUCER_ALGORITHM": "server" if servers else "direct",
        "REDUCER_TRANSPORT": transport,
        "REDUCER_CONNECT_TIMEOUT": "2",
        "REDUCER_LOG": "info",
    }


def sums() -> tuple[list[float], set[str]]:
    """In a rank: what sums of several sizes give; the threads of this process."""
    rank, n = dist.get_rank(), dist.get_world_size()
    results = []
    for count in (0, 1, 1001, COUNT):
        tensor = torch.full((count,), float(rank + 1))
        dist.all_reduce(tensor)
        assert torch.equal(tensor, torch.full((count,), n * (n + 1) / 2))
        results.append(tensor.sum().item())
    return results, threads()


def threads() -> set[str]:
    """The names of this process' threads, those that are not Python's too."""
    names = set()
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as comm:
            names.add(comm.read().strip())
    return names


@pytest.mark.parametrize(
    ("workers", "server", "carried_by"),
    [
        ("auto", "auto", "reducer-tcp"),
        ("tcp", "auto", "reducer-tcp"),
        ("grpc", "auto", "reducer-cq"),
        ("auto", "grpc", "reducer-cq"),
        ("grpc", "grpc", "reducer-cq"),
    ],
)
def test_whatever_the_two_ends_were_told_they_meet(workers: str, server: str, carried_by: str) -> None:
    with standalone_reducers(2, "--transport", server) as servers:
        for results, names in run_ranks(3, sums, env=environment(servers, workers)):
            assert results == [0.0, 6.0, 6006.0, 6.0 * COUNT]
            # gRPC is not started in a worker that does not need it.
            assert ("reducer-cq" in names) == (carried_by == "reducer-cq"), names
            assert ("reducer-tcp" in names) == (workers != "grpc"), names


def test_workers_of_different_transports_meet() -> None:
    kinds = ["auto", "grpc", "auto"]
    environments = [environment([], kind) for kind in kinds]
    with pytest.raises(RankFailure, match="REDUCER_TRANSPORT is 'auto' on ranks 0 .*and 'grpc' on rank 1"):
        run_ranks(3, sums, env=environments)


def test_tcp_alone_is_refused_in_words_by_a_reducer_that_has_grpc_only() -> None:
    with (
        standalone_reducers(1, "--transport", "grpc") as servers,
        pytest.raises(RankFailure, match="does not speak the tcp transport"),
    ):
        run_ranks(2, sums, env=environment(servers, "tcp"))
