"""One rank of the demo: trains the model by DistributedDataParallel, once per backend.

DDP compares a communication hook's annotations with types: they must not be postponed to strings.
"""

import hashlib
import os
import signal
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from gpt import Gpt, GptConfig, Windows, learning_rate_share, standard_library_text
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

_RATE_MAX = 3e-3
# Small buckets, as a large model has them in number: several collectives are under way at once.
_BUCKET_MIB = 1


@dataclass(frozen=True)
class RankPlan:
    """What a rank must know. `stores` has a rendezvous file per backend; times in seconds."""

    rank: int
    world_size: int
    steps: int
    batch: int
    seed: int
    loader_workers: int
    timeout_s: float
    servers: str
    algorithm: str
    interface: str
    stores: dict[str, str]


@dataclass(frozen=True)
class Progress:
    """Sent by rank 0 after each step."""

    backend: str
    step: int
    loss: float


@dataclass
class RunResult:
    """What one rank saw of one run. Times in seconds; `collectives` are (bytes, seconds)."""

    backend: str
    rank: int
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    collectives: list[tuple[int, float]] = field(default_factory=list)
    weights_sha256: str = ""
    parameters: int = 0
    sample: str = ""


@dataclass(frozen=True)
class RankFailure:
    """Why a rank ended early."""

    rank: int
    backend: str
    message: str
    traceback: str


def run_rank(plan: RankPlan, connection: Connection) -> None:
    """The whole life of a rank's process; everything it has to say goes through `connection`."""
    # Ctrl-C reaches the whole terminal; the parent answers it and ends the ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    backend = ""
    try:
        torch.set_num_threads(1)
        for backend in plan.stores:
            connection.send(train(plan, backend, connection))
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        connection.send(RankFailure(plan.rank, backend, text, traceback.format_exc()))
        # Other ranks may never come: nothing of this process waits for them any more.
        connection.close()
        os._exit(1)
    connection.close()


def train(plan: RankPlan, backend: str, connection: Connection) -> RunResult:
    """One run on `backend`, from making the group to destroying it."""
    os.environ["GLOO_SOCKET_IFNAME"] = plan.interface
    if backend == "reducer":
        import reducer  # noqa: F401 - registers the backend where the package is not installed

        os.environ["REDUCER_SERVERS"] = plan.servers
        os.environ["REDUCER_ALGORITHM"] = plan.algorithm
    dist.init_process_group(
        backend,
        init_method=f"file://{plan.stores[backend]}",
        rank=plan.rank,
        world_size=plan.world_size,
        timeout=timedelta(seconds=plan.timeout_s),
    )
    result = RunResult(backend, plan.rank)
    torch.manual_seed(plan.seed)
    model = Gpt(GptConfig())
    _train_steps(plan, model, result, connection)
    result.parameters = sum(parameter.numel() for parameter in model.parameters())
    result.weights_sha256 = weights_sha256(model)
    if plan.rank == 0:
        result.sample = model.generate("def ", 240, plan.seed)
    dist.destroy_process_group()
    return result


def _train_steps(plan: RankPlan, model: Gpt, result: RunResult, connection: Connection) -> None:
    wrapped = DistributedDataParallel(model, bucket_cap_mb=_BUCKET_MIB)
    wrapped.register_comm_hook(result, timed_average)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE_MAX, weight_decay=0.05)
    windows = Windows(
        standard_library_text(),
        model.config.context,
        plan.steps * plan.batch,
        plan.rank,
        plan.seed,
    )
    # The loader's processes are forked from one that has a live group, as in any real job.
    loader = DataLoader(windows, batch_size=plan.batch, num_workers=plan.loader_workers)
    begin = time.perf_counter()
    for step, (inputs, targets) in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = _RATE_MAX * learning_rate_share(step, plan.steps)
        loss = model.loss(wrapped(inputs), targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        now = time.perf_counter()
        result.step_seconds.append(now - begin)
        begin = now
        result.losses.append(float(loss.detach()))
        if plan.rank == 0:
            connection.send(Progress(result.backend, step, result.losses[-1]))


def timed_average(result: RunResult, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: the mean of a bucket, and how long the collective took."""
    gradients = bucket.buffer().div_(dist.get_world_size())
    begin = time.perf_counter()
    work = dist.all_reduce(gradients, async_op=True)
    assert work is not None

    def finish(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        result.collectives.append((gradients.nbytes, time.perf_counter() - begin))
        return future.value()[0]

    averaged: torch.futures.Future[Tensor] = work.get_future().then(finish)
    return averaged


def weights_sha256(model: torch.nn.Module) -> str:
    """The hash of all parameters' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()
