"""DistributedDataParallel through standalone reducers gives every rank the weights of a single-process run."""

# No postponed annotations here: DistributedDataParallel looks at those of a communication hook.
import hashlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

SAMPLES, FEATURES, BATCH, EPOCHS = 192, 16, 8, 2


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(SAMPLES, FEATURES, generator=generator)
    return TensorDataset(x, torch.sin(x.sum(1, keepdim=True)))


def model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def train(workers: int, bucket_cap_mb: float, static: bool) -> tuple[str, torch.Tensor, list[float]]:
    """In a rank: a training run; the weights' hash, the weights and the losses."""
    n, rank = dist.get_world_size(), dist.get_rank()
    sampler = DistributedSampler(data(), n, rank, shuffle=False)
    loader = DataLoader(data(), batch_size=BATCH, sampler=sampler, num_workers=workers)
    # Small buckets, so that several all-reduces are under way at once.
    wrapped = DistributedDataParallel(model(), bucket_cap_mb=bucket_cap_mb, static_graph=static)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(wrapped(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    final = weights(wrapped)
    return hashlib.sha256(final.numpy().tobytes()).hexdigest(), final, losses


def reference(n: int) -> torch.Tensor:
    """The same training in one process: each step has the batches of all ranks."""
    samples = data()
    single = model()
    optimizer = torch.optim.SGD(single.parameters(), lr=0.05, momentum=0.9)
    per_rank = [list(DistributedSampler(samples, n, rank, shuffle=False)) for rank in range(n)]
    for _ in range(EPOCHS):
        for start in range(0, len(per_rank[0]), BATCH):
            rows = [index for indices in per_rank for index in indices[start : start + BATCH]]
            optimizer.zero_grad()
            nn.functional.mse_loss(single(samples.tensors[0][rows]), samples.tensors[1][rows]).backward()
            optimizer.step()
    return weights(single)


def test_ddp_through_standalone_reducers(reducers: Callable[..., list[str]]) -> None:
    n = 3
    with Ranks(n, {"REDUCER_SERVERS": ",".join(reducers(2))}) as ranks:
        # DataLoader's workers are forked from a process with a group, and end before the run does.
        results = ranks.call(train, 2, 0.01, False, timeout_s=90.0)
        again = ranks.call(train, 0, 25.0, True, timeout_s=90.0)
    for hashes in ([result[0] for result in results], [result[0] for result in again]):
        assert len(set(hashes)) == 1, "ranks ended with different weights"
    torch.testing.assert_close(results[0][1], reference(n), rtol=1e-4, atol=1e-5)
    losses = results[0][2]
    assert sum(losses[-4:]) < sum(losses[:4]), "the loss did not go down"


def hooked() -> str:
    """In a rank: a Python communication hook, whose `then` runs on the completion thread."""

    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        assert work is not None
        n = dist.get_world_size()

        def divide(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
            return future.value()[0].div_(n)

        future: torch.futures.Future[torch.Tensor] = work.get_future().then(divide)
        return future

    wrapped = DistributedDataParallel(model(), bucket_cap_mb=0.01)
    wrapped.register_comm_hook(None, hook)
    x, y = data().tensors
    for step in range(5):
        part = slice(step * 8 + 4 * dist.get_rank(), step * 8 + 4 * dist.get_rank() + 4)
        nn.functional.mse_loss(wrapped(x[part]), y[part]).backward()
    gradients = torch.cat([p.grad.flatten() for p in wrapped.parameters() if p.grad is not None])
    return hashlib.sha256(gradients.numpy().tobytes()).hexdigest()


def test_ddp_with_a_python_hook() -> None:
    with Ranks(2) as ranks:
        hashes = ranks.call(hooked)
    assert hashes[0] == hashes[1]
