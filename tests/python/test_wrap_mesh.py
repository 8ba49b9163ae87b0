"""Meshes: DTensor, tensor and pipeline parallel, and all three dimensions at once, against a single process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

WIDTH, HIDDEN, BATCH, STEPS, MICRO = 8, 16, 8, 3, 4


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(4) as all_ranks:
        yield all_ranks


# ---------------------------------------------------------------- DTensor


def check_redistribute() -> set[str]:
    """In a rank: every placement on a 2-D mesh becomes every other; the collectives that this took."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    whole = torch.arange(7 * 6, dtype=torch.float32).reshape(7, 6)  # 7 rows: uneven shards
    placements: list[tuple[Any, Any]] = [(a, b) for a in PLACEMENTS for b in PLACEMENTS]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for source in placements:
            placed = distribute_tensor(whole, mesh, source)
            for target in placements:
                moved = placed.redistribute(placements=target)
                assert moved.placements == target
                assert torch.equal(moved.full_tensor(), whole), (source, target)
        # A sum that is still to be made, towards each placement.
        for target in placements:
            partial = DTensor.from_local(whole, mesh, [Partial(), Partial()])
            assert torch.equal(partial.redistribute(placements=target).full_tensor(), 4 * whole), target
        average = DTensor.from_local(whole * (dist.get_rank() + 1), mesh, [Partial("avg"), Partial("avg")])
        torch.testing.assert_close(average.full_tensor(), 2.5 * whole)
        largest = DTensor.from_local(whole * (dist.get_rank() + 1), mesh, [Partial("max"), Partial("max")])
        assert torch.equal(largest.full_tensor(), 4 * whole)
    return {event.key for event in profile.key_averages() if event.key.startswith("reducer:")}


PLACEMENTS = [Replicate(), Shard(0), Shard(1)]


def test_dtensor_redistributes_between_all_placements(ranks: Ranks) -> None:
    for names in ranks.call(check_redistribute):
        for part in ("all_gather", "reduce_scatter", "all_reduce", "scatter", "broadcast"):
            assert any(part in name for name in names), (part, names)


def check_all_to_all() -> None:
    """What moves Shard(0) to Shard(1); on a CPU mesh torch's Python gathers instead, whatever the backend."""
    n, rank = dist.get_world_size(), dist.get_rank()
    whole = torch.arange(8.0 * 12).reshape(8, 12)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        moved = torch.ops._dtensor.shard_dim_alltoall(
            whole.chunk(n, 0)[rank].contiguous(), 0, 1, dist.group.WORLD.group_name
        )
    assert torch.equal(moved, whole.chunk(n, 1)[rank])
    names = {event.key for event in profile.key_averages() if event.key.startswith("reducer:")}
    assert len(names) == 1, names
    assert "all_to_all" in names.pop()


def test_the_all_to_all_of_dtensor(ranks: Ranks) -> None:
    ranks.call(check_all_to_all)


def check_matmul() -> None:
    """Products of tensors placed in every way, with their gradients."""
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(1)
    left, right = torch.randn(6, 8), torch.randn(8, 4)
    wanted_left, wanted_right = left.clone().requires_grad_(), right.clone().requires_grad_()
    wanted = wanted_left @ wanted_right
    wanted.square().sum().backward()
    for a in PLACEMENTS:
        for b in PLACEMENTS:
            x = distribute_tensor(left, mesh, [a, b]).requires_grad_()
            y = distribute_tensor(right, mesh, [b, a]).requires_grad_()
            product = x @ y
            product.square().sum().backward()
            torch.testing.assert_close(product.full_tensor(), wanted, rtol=1e-4, atol=1e-5)
            assert isinstance(x.grad, DTensor)
            assert isinstance(y.grad, DTensor)
            torch.testing.assert_close(x.grad.full_tensor(), wanted_left.grad, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(y.grad.full_tensor(), wanted_right.grad, rtol=1e-4, atol=1e-4)


def test_dtensor_computes(ranks: Ranks) -> None:
    ranks.call(check_matmul)


def check_mesh() -> None:
    """Submeshes are groups; a flattened one is a group of all."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    rank = dist.get_rank()
    assert dist.get_process_group_ranks(mesh["model"].get_group()) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert dist.get_process_group_ranks(mesh["data"].get_group()) == [rank % 2, rank % 2 + 2]
    for name in ("data", "model"):
        assert dist.get_backend(mesh[name].get_group()) == "reducer"
        tensor = torch.tensor([float(rank)])
        dist.all_reduce(tensor, group=mesh[name].get_group())
        assert tensor.item() == sum(dist.get_process_group_ranks(mesh[name].get_group()))
    tensor = torch.tensor([float(rank)])
    dist.all_reduce(tensor, group=mesh["data", "model"]._flatten().get_group())
    assert tensor.item() == 6


def test_device_mesh(ranks: Ranks) -> None:
    ranks.call(check_mesh)


# ---------------------------------------------------------------- one model for what follows


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(torch.tanh(self.up(x)))
        return y


def blocks(count: int = 2) -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(*[Block() for _ in range(count)])


def batch(step: int, replica: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + replica)
    x = torch.randn(BATCH, WIDTH, generator=generator)
    return x, torch.sin(x.cumsum(1))


def named(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in module.named_parameters()
    }


def single(replicas: int = 1) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The training in one process: weights by name and the losses."""
    model = blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros(())
        for replica in range(replicas):
            x, y = batch(step, replica)
            total = total + nn.functional.mse_loss(model(x), y) / replicas
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return named(model), losses


def assert_as_single(results: list[tuple[dict[str, torch.Tensor], list[float]]], replicas: int = 1) -> None:
    """Every rank's weights are the reference's, and together they have all of them."""
    weights, losses = single(replicas)
    start = named(blocks())
    assert max((weights[name] - start[name]).abs().max() for name in weights) > 0.01, "the reference did not learn"
    seen: set[str] = set()
    for ours, _ in results:
        assert ours
        for name, value in ours.items():
            torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        seen |= ours.keys()
    assert seen == weights.keys()
    told = [reported for _, reported in results if reported]
    assert told, "no rank knows the losses"
    if replicas == 1:
        for reported in told:
            torch.testing.assert_close(torch.tensor(reported), torch.tensor(losses), rtol=1e-4, atol=1e-6)


def split(block: nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


# ---------------------------------------------------------------- tensor parallel


def tensor_parallel(data: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """In a rank: `data` replicas (in shards), each of them split over the other ranks."""
    n = dist.get_world_size()
    mesh = init_device_mesh("cpu", (data, n // data), mesh_dim_names=("data", "model"))
    model: Any = blocks()
    for block in model:
        split(block, mesh["model"])
        assert block.up.weight.to_local().shape == (HIDDEN * data // n, WIDTH)
    if data > 1:
        for block in model:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    losses = []
    for step in range(STEPS):
        x, y = batch(step, mesh["data"].get_local_rank())
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return named(model), losses


@pytest.mark.parametrize("data", [1, 2], ids=["4 parts", "2 replicas of 2 parts by FSDP2"])
def test_tensor_parallel(ranks: Ranks, data: int) -> None:
    assert_as_single(ranks.call(tensor_parallel, data), data)


# ---------------------------------------------------------------- pipeline parallel


def pipeline(schedule: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """In a rank: two pipelines (ranks 0, 1 and 2, 3), each with a block per rank."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "stage"))
    group = mesh["stage"].get_group()
    index = mesh["stage"].get_local_rank()
    part = nn.Sequential()
    part.add_module(str(index), blocks()[index])
    kind: Any = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}[schedule]
    stage = PipelineStage(part, index, 2, torch.device("cpu"), group=group)
    plan = kind(stage, n_microbatches=MICRO, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.SGD(part.parameters(), lr=0.2)
    return named_after(part, optimizer, plan, index, 0)


def named_after(
    part: nn.Module, optimizer: Any, plan: Any, index: int, replica: int
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Trains this stage; its weights, and on the last stage the losses."""
    told = []
    for step in range(STEPS):
        x, y = batch(step, replica)
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        if index == 0:
            plan.step(x)
        else:
            plan.step(target=y, losses=losses)
            told.append(torch.stack(losses).mean().item())
        optimizer.step()
    return named(part), told


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_pipeline_parallel(ranks: Ranks, schedule: str) -> None:
    assert_as_single(ranks.call(pipeline, schedule))


# ---------------------------------------------------------------- data x tensor x pipeline


def three_dimensions() -> tuple[dict[str, torch.Tensor], list[float]]:
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("data", "stage", "model"))
    index = mesh["stage"].get_local_rank()
    part: Any = nn.Sequential()
    part.add_module(str(index), blocks()[index])
    split(part[0], mesh["model"])
    fully_shard(part, mesh=mesh["data"])
    stage = PipelineStage(part, index, 2, torch.device("cpu"), group=mesh["stage"].get_group())
    plan = ScheduleGPipe(stage, n_microbatches=MICRO, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.SGD(part.parameters(), lr=0.2)
    return named_after(part, optimizer, plan, index, mesh["data"].get_local_rank())


def test_three_dimensions_at_once() -> None:
    with Ranks(8) as eight:
        assert_as_single(eight.call(three_dimensions, timeout_s=120.0), 2)
