"""Every collective on accelerator tensors, in every manner of calling it.

Inputs are written by kernels that have not run when the collective is called; outputs are read by kernels that are
launched right after wait(). Each rank has a device of its own, so that nothing can rest on device 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerator.worlds import COUNT, Pairs, World, blank, mine, produce, sample, slow_copies, total, verify


class Manner:
    """How a test makes its tensors and calls: here, as most programs do."""

    def put(self, host: torch.Tensor) -> torch.Tensor:
        return produce(host)

    def new(self, count: int = COUNT) -> torch.Tensor:
        return blank(count)

    def stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        with slow_copies():
            function(*arguments, **options)


class Async(Manner):
    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        peer = {dist.send: dist.isend, dist.recv: dist.irecv}.get(function)
        with slow_copies():
            work = peer(*arguments, **options) if peer else function(*arguments, **options, async_op=True)
            assert work.wait()


class SideStream(Manner):
    def stream(self) -> contextlib.AbstractContextManager[None]:
        return torch.fake.stream(torch.Stream(mine()))


class Strided(Manner):
    def put(self, host: torch.Tensor) -> torch.Tensor:
        return produce(torch.stack([host, -host], 1))[:, 0]

    def new(self, count: int = COUNT) -> torch.Tensor:
        return blank(2 * count).view(count, 2)[:, 0]


MANNERS = [Manner, Async, SideStream, Strided]


def all_reduce(how: Manner, rank: int) -> Pairs:
    tensor = how.put(sample(rank))
    how.run(dist.all_reduce, tensor)
    return [(tensor, total())]


def average(how: Manner, rank: int) -> Pairs:
    tensor = how.put(sample(rank) * 2)
    how.run(dist.all_reduce, tensor, dist.ReduceOp.AVG)
    return [(tensor, total())]


def reduce(how: Manner, rank: int) -> Pairs:
    tensor = how.put(sample(rank))
    how.run(dist.reduce, tensor, 1)
    return [(tensor, total())] if rank == 1 else []


def broadcast(how: Manner, rank: int) -> Pairs:
    tensor = how.put(sample(1)) if rank == 1 else how.new()
    how.run(dist.broadcast, tensor, 1)
    return [(tensor, sample(1))]


def all_gather(how: Manner, rank: int) -> Pairs:
    outputs = [how.new(), how.new()]
    how.run(dist.all_gather, outputs, how.put(sample(rank)))
    return [(outputs[r], sample(r)) for r in range(2)]


def all_gather_into_tensor(how: Manner, rank: int) -> Pairs:
    output = how.new(2 * COUNT)
    how.run(dist.all_gather_into_tensor, output, how.put(sample(rank)))
    return [(output, torch.cat([sample(0), sample(1)]))]


def gather(how: Manner, rank: int) -> Pairs:
    outputs = [how.new(), how.new()] if rank == 1 else None
    how.run(dist.gather, how.put(sample(rank)), outputs, dst=1)
    return [(outputs[r], sample(r)) for r in range(2)] if outputs else []


def scatter(how: Manner, rank: int) -> Pairs:
    output = how.new()
    inputs = [how.put(sample(r)) for r in range(2)] if rank == 1 else None
    how.run(dist.scatter, output, inputs, src=1)
    return [(output, sample(rank))]


def reduce_scatter(how: Manner, rank: int) -> Pairs:
    output = how.new()
    how.run(dist.reduce_scatter, output, [how.put(sample(rank) + r) for r in range(2)])
    return [(output, total() + 2 * rank)]


def reduce_scatter_tensor(how: Manner, rank: int) -> Pairs:
    output = how.new()
    how.run(dist.reduce_scatter_tensor, output, how.put(torch.cat([sample(rank), sample(rank) + 1])))
    return [(output, total() + 2 * rank)]


def all_to_all(how: Manner, rank: int) -> Pairs:
    outputs = [how.new(), how.new()]
    how.run(dist.all_to_all, outputs, [how.put(sample(rank) + 10 * r) for r in range(2)])
    return [(outputs[r], sample(r) + 10 * rank) for r in range(2)]


def all_to_all_single(how: Manner, rank: int) -> Pairs:
    output = how.new(2 * COUNT)
    how.run(dist.all_to_all_single, output, how.put(torch.cat([sample(rank), sample(rank) + 10])))
    return [(output, torch.cat([sample(0), sample(1)]) + 10 * rank)]


def all_to_all_uneven(how: Manner, rank: int) -> Pairs:
    # Rank 0 keeps one element and gives the rest; rank 1 gives one and keeps the rest.
    output = how.new(2 if rank == 0 else 2 * COUNT - 2)
    arguments = (output, how.put(sample(rank)), [1, 1] if rank == 0 else [COUNT - 1, COUNT - 1], [1, COUNT - 1])
    how.run(dist.all_to_all_single, *arguments)
    parts = [sample(r)[:1] if rank == 0 else sample(r)[1:] for r in range(2)]
    return [(output, torch.cat(parts))]


def send_recv(how: Manner, rank: int) -> Pairs:
    if rank == 0:
        how.run(dist.send, how.put(sample(0)), 1, tag=3)
        return []
    output = how.new()
    how.run(dist.recv, output, 0, tag=3)
    return [(output, sample(0))]


def recv_from_any(how: Manner, rank: int) -> Pairs:
    if rank == 0:
        how.run(dist.send, how.put(sample(0)), 1)
        return []
    output = how.new()
    how.run(dist.recv, output)
    return [(output, sample(0))]


def all_reduce_coalesced(how: Manner, rank: int) -> Pairs:
    counts = (COUNT, 1, 300)
    tensors = [how.put(sample(rank, count)) for count in counts]
    how.run(dist.all_reduce_coalesced, tensors)
    return [(tensor, total(count)) for tensor, count in zip(tensors, counts, strict=True)]


COLLECTIVES = [
    all_reduce,
    average,
    reduce,
    broadcast,
    all_gather,
    all_gather_into_tensor,
    gather,
    scatter,
    reduce_scatter,
    reduce_scatter_tensor,
    all_to_all,
    all_to_all_single,
    all_to_all_uneven,
    send_recv,
    recv_from_any,
    all_reduce_coalesced,
]


def run_manners(collective: Callable[[Manner, int], Pairs]) -> None:
    for kind in MANNERS:
        how = kind()
        with how.stream():
            try:
                verify(collective(how, dist.get_rank()))
            except Exception as error:
                error.add_note(f"in the manner {kind.__name__}")
                raise


@pytest.mark.parametrize("collective", COLLECTIVES, ids=lambda collective: collective.__name__)
def test_collective(accelerator_world: World, collective: Callable[[Manner, int], Pairs]) -> None:
    accelerator_world.call(run_manners, collective)
