"""FSDP2's fully_shard: training in shards gives what one process gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

N, FEATURES, BATCH, STEPS = 4, 10, 4, 4


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(N) as all_ranks:
        yield all_ranks


def model() -> nn.Sequential:
    # Sizes that do not divide by the number of ranks, so that shards are padded.
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(FEATURES, 17), nn.Tanh(), nn.Linear(17, 17), nn.Tanh(), nn.Linear(17, 3), nn.Tanh(), nn.Linear(3, 1)
    )


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(BATCH, FEATURES, generator=generator)
    return x, torch.sin(x.sum(1, keepdim=True))


def whole(parameters: Any) -> torch.Tensor:
    return torch.cat([(p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten() for p in parameters])


def train(setting: str) -> tuple[torch.Tensor, int]:
    """In a rank: the weights that `fully_shard` trains, and how many of them the rank itself holds."""
    options: dict[str, Any] = {}
    if setting == "hybrid":  # shards within a row of the mesh, copies along its columns
        options["mesh"] = init_device_mesh("cpu", (2, N // 2), mesh_dim_names=("replicate", "shard"))
    if setting == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    elif setting == "bf16 reduced":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    elif setting == "fp16 reduced":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float16)
    if setting == "kept after forward":
        options["reshard_after_forward"] = False
    sharded: Any = model()
    for layer in sharded:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    fully_shard(sharded, **options)
    if setting == "divide factor":
        for module in sharded.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(2.0 * N)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        x, y = batch(step, dist.get_rank())
        optimizer.zero_grad()
        nn.functional.mse_loss(sharded(x).float(), y).backward()
        if setting == "clipped":
            nn.utils.clip_grad_norm_(sharded.parameters(), 0.2)
        optimizer.step()
    held = sum(p.to_local().numel() for p in sharded.parameters())
    return whole(sharded.parameters()), held


def single(divide: float = N, clip: float = 0.0) -> torch.Tensor:
    alone = model()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(N):
            x, y = batch(step, rank)
            (nn.functional.mse_loss(alone(x), y) / divide).backward()
        if clip:
            nn.utils.clip_grad_norm_(alone.parameters(), clip)
        optimizer.step()
    return whole(alone.parameters())


EXACT = ["plain", "kept after forward", "hybrid", "clipped", "divide factor"]


@pytest.mark.parametrize("setting", EXACT)
def test_fully_shard(ranks: Ranks, setting: str) -> None:
    results = ranks.call(train, setting)
    divide = 2.0 * N if setting == "divide factor" else N
    expected = single(divide, 0.2 if setting == "clipped" else 0.0)
    assert not torch.allclose(expected, whole(model().parameters()), atol=0.01), "the reference did not learn"
    total = expected.numel()
    for weights, held in results:
        assert torch.equal(weights, results[0][0]), "ranks see different weights"
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
        assert held < total, "a rank holds all of the weights"
    assert sum(held for _, held in results) == total * (2 if setting == "hybrid" else 1)


@pytest.mark.parametrize("setting", ["bf16", "bf16 reduced", "fp16 reduced"])
def test_fully_shard_in_mixed_precision(ranks: Ranks, setting: str) -> None:
    results = ranks.call(train, setting)
    expected, begin = single(), whole(model().parameters())
    for weights, _ in results:
        assert weights.dtype == torch.float32
        assert torch.equal(weights, results[0][0]), "ranks see different weights"
    ours = results[0][0]
    # Half types keep 8 (bfloat16) or 11 bits: what was learned agrees within 5 % of its own length.
    assert (ours - expected).norm() < 0.05 * (expected - begin).norm()
    assert not torch.equal(ours, expected), "it was not computed in a half type"


def accumulate() -> tuple[torch.Tensor, int, int]:
    """In a rank: gradients of three batches, reduced with the last; operations without and with communication."""
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    sharded: Any = fully_shard(model())
    counts = []
    for part in range(3):
        before = backend.counters()["operations"]
        sharded.set_requires_gradient_sync(part == 2)
        x, y = batch(part, dist.get_rank())
        nn.functional.mse_loss(sharded(x), y).backward()
        counts.append(backend.counters()["operations"] - before)
    return whole([p.grad for p in sharded.parameters()]), counts[1], counts[2]


def test_gradients_are_accumulated_without_communication(ranks: Ranks) -> None:
    results = ranks.call(accumulate)
    alone = model()
    for part in range(3):
        for rank in range(N):
            x, y = batch(part, rank)
            (nn.functional.mse_loss(alone(x), y) / N).backward()
    expected = whole([p.grad for p in alone.parameters()])
    for gradients, without, with_sync in results:
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
        assert without == with_sync - 1, "the gradients were reduced before the last batch"
