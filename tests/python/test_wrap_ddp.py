"""DistributedDataParallel in all its variants, and what goes with it, gives the bits that Gloo gives.

With two ranks a sum has one order up to commutation, so equality is exact; a single process is met within rounding.
"""

# No postponed annotations here: DistributedDataParallel looks at those of a communication hook.
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import ddp_zero_hook, default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

N, FEATURES, BATCH, STEPS = 2, 12, 4, 4


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(N) as all_ranks:
        yield all_ranks


class Model(nn.Module):
    """Has a branch that not every batch takes and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.begin = nn.Linear(FEATURES, 32)
        self.twice = nn.Linear(32, 32)
        self.branch = nn.Linear(32, 32)
        self.end = nn.Linear(32, 1)

    def forward(self, x: torch.Tensor, branch: bool = True) -> torch.Tensor:
        x = torch.tanh(self.begin(x))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        if branch:
            x = torch.tanh(self.branch(x))
        y: torch.Tensor = self.end(x)
        return y


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(BATCH, FEATURES, generator=generator)
    return x, torch.sin(x.sum(1, keepdim=True))


def loss_of(model: nn.Module, step: int, rank: int, branch: bool = True) -> torch.Tensor:
    x, y = batch(step, rank)
    return nn.functional.mse_loss(model(x, branch), y)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


_gloo: Any = None


def gloo() -> Any:
    """In a rank: the group of the same ranks on Gloo."""
    global _gloo
    if _gloo is None:
        _gloo = dist.new_group(backend="gloo")
    return _gloo


def wrap(group: Any, **options: Any) -> DistributedDataParallel:
    # Small buckets, so that several all-reduces are under way at once.
    return DistributedDataParallel(Model(), process_group=group, bucket_cap_mb=0.002, **options)


# ---------------------------------------------------------------- training by DDP, variant by variant


def plain(group: Any, **options: Any) -> torch.Tensor:
    model = wrap(group, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        optimizer.step()
    return flat(model)


def unused(group: Any) -> torch.Tensor:
    """The branch is taken by one rank in a step, by no rank, or by both."""
    model = wrap(group, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank(), branch_taken(step, dist.get_rank())).backward()
        optimizer.step()
    return flat(model)


def branch_taken(step: int, rank: int) -> bool:
    return (step == 0) or (step % 2 == 1 and rank == 1)


def accumulated(group: Any) -> torch.Tensor:
    """Three batches to a step; only the last one communicates."""
    model = wrap(group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(3):
            with model.no_sync() if part < 2 else contextlib.nullcontext():
                loss_of(model, 3 * step + part, dist.get_rank()).backward()
        optimizer.step()
    return flat(model)


def bf16_by_another_name(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """torch asks for CUDA when it sees the name of its own hook."""
    return default_hooks.bf16_compress_hook(state, bucket)


def hooked(group: Any, hook: str) -> torch.Tensor:
    # PowerSGD's calls from callbacks come in a fixed order only if there is one bucket; with more Gloo hangs as well.
    model = DistributedDataParallel(Model(), process_group=group) if hook == "PowerSGD" else wrap(group)
    if hook == "fp16":
        model.register_comm_hook(group, default_hooks.fp16_compress_hook)
    elif hook == "bf16":
        with pytest.raises(TypeError, match="BF16 all reduce communication hook required CUDA"):
            model.register_comm_hook(group, default_hooks.bf16_compress_hook)
        model.register_comm_hook(group, bf16_by_another_name)
    elif hook == "allreduce":
        model.register_comm_hook(group, default_hooks.allreduce_hook)
    elif hook == "native fp16":
        model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    else:
        state = powerSGD_hook.PowerSGDState(
            group, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=0.5
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        optimizer.step()
    return flat(model)


VARIANTS: dict[str, Callable[[Any], torch.Tensor]] = {
    "plain": plain,
    "static graph": lambda group: plain(group, static_graph=True),
    "bucket views": lambda group: plain(group, gradient_as_bucket_view=True),
    "find_unused_parameters": unused,
    "no_sync": accumulated,
    "hook allreduce": lambda group: hooked(group, "allreduce"),
    "hook fp16": lambda group: hooked(group, "fp16"),
    "hook bf16": lambda group: hooked(group, "bf16"),
    "hook native fp16": lambda group: hooked(group, "native fp16"),
    "hook PowerSGD": lambda group: hooked(group, "PowerSGD"),
}


def on_both(variant: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """In a rank: the weights trained on reducer and on Gloo, and how many operations reducer saw."""
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    other = gloo()
    dist.barrier()
    before = backend.counters()["operations"]
    torch.manual_seed(0)
    ours = VARIANTS[variant](dist.group.WORLD)
    operations = backend.counters()["operations"] - before
    torch.manual_seed(0)
    return ours, VARIANTS[variant](other), operations


def single(parts: int = 1, branches: bool = False) -> torch.Tensor:
    """The same training in one process, which takes the mean over the ranks itself."""
    model = Model()
    momentum = 0.9 if parts == 1 and not branches else 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    for step in range(STEPS):
        # DDP gives every parameter a gradient, zero where no rank has used it.
        optimizer.zero_grad()
        losses = [
            loss_of(model, parts * step + part, rank, not branches or branch_taken(step, rank))
            for part in range(parts)
            for rank in range(N)
        ]
        (torch.stack(losses).sum() / N).backward()
        optimizer.step()
    return flat(model)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "hook PowerSGD"])
def test_ddp(ranks: Ranks, variant: str) -> None:
    check_variant(ranks.call(on_both, variant), variant)


def test_ddp_with_power_sgd() -> None:
    """Its callbacks start collectives and wait for their futures, on the thread that runs callbacks."""
    with Ranks(N) as fresh:
        check_variant(fresh.call(on_both, "hook PowerSGD", timeout_s=30.0), "hook PowerSGD")


def check_variant(results: list[tuple[torch.Tensor, torch.Tensor, int]], variant: str) -> None:
    for ours, theirs, operations in results:
        assert operations >= STEPS, "the training did not go through reducer"
        assert torch.equal(ours, results[0][0]), "ranks ended with different weights"
        assert torch.equal(ours, theirs), f"not as Gloo: {(ours - theirs).abs().max()}"
    ours = results[0][0]
    if variant in ("plain", "static graph", "bucket views"):
        torch.testing.assert_close(ours, single(), rtol=1e-4, atol=1e-6)
    elif variant == "find_unused_parameters":
        torch.testing.assert_close(ours, single(branches=True), rtol=1e-4, atol=1e-6)
    elif variant == "no_sync":
        torch.testing.assert_close(ours, single(parts=3), rtol=1e-4, atol=1e-6)
    else:
        assert not torch.equal(ours, flat(Model())), "the weights did not change"


# ---------------------------------------------------------------- uneven inputs


def steps_of(rank: int) -> int:
    return 3 + 4 * rank


def joined(group: Any, zero: bool) -> torch.Tensor:
    """Rank 1 has more batches than rank 0, which shadows its collectives."""
    model = wrap(group)
    optimizer: Any
    if zero:
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), torch.optim.SGD, process_group=group, lr=0.1, parameters_as_bucket_view=False
        )
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Join([model, optimizer] if zero else [model]):
        for step in range(steps_of(dist.get_rank())):
            optimizer.zero_grad()
            loss_of(model, step, dist.get_rank()).backward()
            optimizer.step()
    return flat(model)


def join_on_both(zero: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return joined(dist.group.WORLD, zero), joined(gloo(), zero)


@pytest.mark.parametrize("zero", [False, True], ids=["DDP", "DDP and ZeRO"])
def test_join_with_uneven_inputs(ranks: Ranks, zero: bool) -> None:
    results = ranks.call(join_on_both, zero)
    for ours, theirs in results:
        assert torch.equal(ours, results[0][0]), "ranks ended with different weights"
        assert torch.equal(ours, theirs), f"not as Gloo: {(ours - theirs).abs().max()}"
    if zero:
        return  # a rank that has joined steps its shard with its last gradients, which no single process does
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps_of(N - 1)):
        optimizer.zero_grad()
        # Divided by the number of all ranks, also when only one is left: DDP's divide_by_initial_world_size.
        (sum(loss_of(model, step, rank) for rank in range(N) if step < steps_of(rank)) / N).backward()
        optimizer.step()
    torch.testing.assert_close(results[0][0], flat(model), rtol=1e-4, atol=1e-6)


def join_thrown() -> str:
    """In a rank: all ranks stop together when the first has no more batches."""
    model = wrap(dist.group.WORLD)
    with pytest.raises(RuntimeError) as caught, Join([model], throw_on_early_termination=True):
        for step in range(steps_of(dist.get_rank())):
            loss_of(model, step, dist.get_rank()).backward()
    dist.barrier()
    return str(caught.value)


def test_join_stops_all(ranks: Ranks) -> None:
    texts = ranks.call(join_thrown)
    assert "Rank 0 exhausted all inputs" in texts[0]
    assert "Detected at least one rank that exhausted inputs" in texts[1]


# ---------------------------------------------------------------- ZeroRedundancyOptimizer


def sharded_adam(group: Any) -> tuple[torch.Tensor, int, dict[str, Any]]:
    model = wrap(group)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, process_group=group, lr=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        optimizer.step()
    held = sum(state["exp_avg"].numel() for state in optimizer.optim.state.values())
    optimizer.consolidate_state_dict(to=0)
    whole = optimizer.state_dict() if dist.get_rank() == 0 else {}
    return flat(model), held, whole


def full_adam() -> tuple[torch.Tensor, dict[str, Any]]:
    model = wrap(dist.group.WORLD)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        optimizer.step()
    return flat(model), optimizer.state_dict()


def check_zero() -> int:
    ours, held, whole = sharded_adam(dist.group.WORLD)
    theirs, _, _ = sharded_adam(gloo())
    full, state = full_adam()
    assert torch.equal(ours, theirs), "not as Gloo"
    assert torch.equal(ours, full), "not as an Adam that keeps everything"
    if dist.get_rank() == 0:
        assert whole["state"].keys() == state["state"].keys()
        for key, values in state["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(whole["state"][key][name], values[name]), (key, name)
    return held


def test_zero_redundancy_optimizer(ranks: Ranks) -> None:
    total = flat(Model()).numel()
    held = ranks.call(check_zero)
    assert sum(held) == total
    assert max(held) < total, "one rank holds all of the state"


def overlapped(interleaved: bool) -> torch.Tensor:
    """In a rank: the optimizer's step runs in the communication hook, which torch refuses on Gloo."""
    # Interleaved, it broadcasts from callbacks: as with PowerSGD, the order is fixed with one bucket only.
    model = DistributedDataParallel(Model()) if interleaved else wrap(dist.group.WORLD)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.1)
    make = ddp_zero_hook.hook_with_zero_step_interleaved if interleaved else ddp_zero_hook.hook_with_zero_step
    model.register_comm_hook(None, make(default_hooks.allreduce_hook, model, optimizer))
    for step in range(STEPS + 2):  # the first two only learn the buckets
        loss_of(model, step, dist.get_rank()).backward()
        model.zero_grad()
    return flat(model)


@pytest.mark.parametrize("interleaved", [False, True], ids=["after the last bucket", "bucket by bucket"])
def test_zero_overlapped_with_ddp(ranks: Ranks, interleaved: bool) -> None:
    results = ranks.call(overlapped, interleaved)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2, STEPS + 2):
        optimizer.zero_grad()
        (sum(loss_of(model, step, rank) for rank in range(N)) / N).backward()
        optimizer.step()
    for result in results:
        assert torch.equal(result, results[0])
    torch.testing.assert_close(results[0], flat(model), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- SyncBatchNorm


def check_sync_batch_norm_is_refused() -> None:
    for group in (dist.group.WORLD, gloo()):
        layer = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(3), group)
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU or XPU"):
            layer(torch.ones(4, 3))


def test_sync_batch_norm_on_cpu_is_refused_by_torch(ranks: Ranks) -> None:
    ranks.call(check_sync_batch_norm_is_refused)


def batch_norm_step() -> tuple[torch.Tensor, ...]:
    """In a rank: the collectives of SyncBatchNorm, around the arithmetic that torch has for accelerators only.

    Forward gathers (mean, invstd, count) of uneven batches into one tensor; backward sums (sum_dy, sum_dy_xmu).
    """
    n, rank = dist.get_world_size(), dist.get_rank()
    x, dy = (part[5 * rank : 5 + 6 * rank] for part in batch_norm_data())
    stats = torch.cat([x.mean(0), 1 / (x.var(0, correction=0) + 1e-5).sqrt(), torch.tensor([float(len(x))])])
    gathered = torch.empty(1, n * stats.numel())
    dist.all_gather_into_tensor(gathered, stats)
    mean_all, invstd_all, count_all = torch.split(gathered.reshape(n, -1), 3, dim=1)
    total = count_all.sum()
    mean = (mean_all * count_all).sum(0) / total
    square = ((1 / invstd_all.square() - 1e-5 + mean_all.square()) * count_all).sum(0) / total
    invstd = 1 / (square - mean.square() + 1e-5).sqrt()
    combined = torch.cat([dy.sum(0), (dy * (x - mean)).sum(0)])
    dist.all_reduce(combined)
    sum_dy, sum_dy_xmu = torch.split(combined, 3)
    dx = (dy - sum_dy / total - (x - mean) * invstd.square() * sum_dy_xmu / total) * invstd
    return (x - mean) * invstd, dx


def batch_norm_data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(11, 3, generator=generator), torch.randn(11, 3, generator=generator)


def test_the_collectives_of_sync_batch_norm(ranks: Ranks) -> None:
    results = ranks.call(batch_norm_step)
    x, dy = batch_norm_data()
    x.requires_grad_()
    y = nn.functional.batch_norm(x, None, None, training=True)
    y.backward(dy)
    assert x.grad is not None
    torch.testing.assert_close(torch.cat([result[0] for result in results]), y.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([result[1] for result in results]), x.grad, rtol=1e-4, atol=1e-5)
