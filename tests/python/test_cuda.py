"""Tensors of an NVIDIA GPU; skipped where there is none. What needs care is tested everywhere, on a fake device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, here, init_group

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and this machine has none")

SIZES = [1, 1000, 3 << 20]


def join() -> None:
    torch.cuda.set_device(here().rank % torch.cuda.device_count())
    init_group(backend="cpu:reducer,cuda:reducer")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2, init=False) as team:
        team.call(join)
        yield team


def late(value: float, count: int) -> torch.Tensor:
    """A tensor whose kernel runs long after the call that is made with it."""
    tensor = torch.zeros(count, device="cuda")
    torch.cuda._sleep(50_000_000)
    return tensor.fill_(value)


def collectives(count: int) -> None:
    rank = dist.get_rank()
    tensor = late(rank + 1.0, count)
    dist.all_reduce(tensor)
    assert bool((tensor == 3).all())
    tensor = late(rank + 1.0, count)
    work = dist.broadcast(tensor, 1, async_op=True)
    work.wait()
    assert bool((tensor == 2).all())
    gathered = torch.empty(2 * count, device="cuda")
    dist.all_gather_into_tensor(gathered, late(rank + 1.0, count))
    assert bool((gathered[:count] == 1).all())
    assert bool((gathered[count:] == 2).all())
    part = torch.empty(count, device="cuda")
    dist.reduce_scatter_tensor(part, late(rank + 1.0, 2 * count))
    assert bool((part == 3).all())
    swapped = torch.empty(2 * count, device="cuda")
    dist.all_to_all_single(swapped, late(rank + 1.0, 2 * count))
    assert bool((swapped[:count] == 1).all())
    assert bool((swapped[count:] == 2).all())
    received = torch.empty(count, device="cuda")
    sent = dist.isend(late(rank + 1.0, count), 1 - rank)
    dist.recv(received, 1 - rank)
    sent.wait()
    assert bool((received == 2 - rank).all())


@pytest.mark.parametrize("count", SIZES)
def test_collectives(ranks: Ranks, count: int) -> None:
    ranks.call(collectives, count)


def train() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(1000, 1000).cuda()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for step in range(5):
        data = torch.randn(8, 1000, generator=torch.Generator().manual_seed(10 * step + dist.get_rank())).cuda()
        parallel(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    mine = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    others = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(others, mine)
    assert torch.equal(others[0], others[1])


def test_ddp(ranks: Ranks) -> None:
    ranks.call(train)
