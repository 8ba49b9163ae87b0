"""A worker of netlab's DDP scenario: trains the examples' GPT, some steps at a time, and records one step if asked.

DDP compares a communication hook's annotations with types: they must not be postponed to strings.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from gpt import Gpt, GptConfig, Windows
from netlab_worker import WorkerPlan
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

_SAMPLE_SECONDS = 0.001
# Windows of the text that a rank draws; no run has as many steps.
_WINDOWS = 4096


@dataclass(frozen=True)
class Training:
    """What is trained, the same by all contenders."""

    model: GptConfig
    text: bytes
    batch: int
    bucket_mib: float
    rate: float
    seed: int


@dataclass(frozen=True)
class Steps:
    """`count` steps. `alone`: without communication. `recorded`: the events of all but the first, of rank 0."""

    count: int
    alone: bool = False
    recorded: bool = False


@dataclass
class Span:
    """Something that took time, in seconds since its step began."""

    name: str
    begin_s: float
    end_s: float


@dataclass
class Bucket:
    """A bucket's way: handed over, and with the average in it. Seconds since its step began."""

    nbytes: int
    ready_s: float
    done_s: float = 0.0


@dataclass
class Record:
    """One step of rank 0. `pushed` are (seconds, bytes sent to owners so far), for backends that count them."""

    spans: list[Span] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    pushed: list[tuple[float, int]] = field(default_factory=list)
    step_s: float = 0.0

    @property
    def backward_end_s(self) -> float:
        return max(span.end_s for span in self.spans if span.name != "forward")

    @property
    def overlap(self) -> float:
        """The part of the time from the first bucket ready to the last one done in which backward was at work."""
        first, last = self.buckets[0].ready_s, max(bucket.done_s for bucket in self.buckets)
        return max(0.0, min(self.backward_end_s, last) - first) / (last - first)


@dataclass(frozen=True)
class StepsResult:
    """When the lead-in and then each step was done (seconds of the machine's monotonic clock), and the losses."""

    done_s: list[float]
    losses: list[float]
    records: list[Record]


def serve_training(training: Training, plan: WorkerPlan, connection: Connection) -> None:
    """Answers `Steps` until told None."""
    trainer: _Trainer | None = None
    while True:
        steps = connection.recv()
        if steps is None:
            return
        # Not before it is told to: it makes connections, and between two turns processes are stopped.
        trainer = trainer or _Trainer(training, plan.rank)
        connection.send("prepared")
        connection.recv()
        connection.send(trainer.run(steps, plan.rank))


class _Trainer:
    """The model, its data and its optimizer on one rank."""

    def __init__(self, training: Training, rank: int) -> None:
        torch.manual_seed(training.seed)
        self._training = training
        self._model = Gpt(training.model)
        self._wrapped = DistributedDataParallel(
            self._model, bucket_cap_mb=training.bucket_mib, gradient_as_bucket_view=True
        )
        self._windows = Windows(training.text, training.model.context, _WINDOWS, rank, training.seed)
        self._next = 0
        self._has_hook = False
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=training.rate)

    def run(self, steps: Steps, rank: int) -> StepsResult:
        if steps.recorded and not self._has_hook:
            # On all ranks, as every rank has to call the same.
            self._wrapped.register_comm_hook(None, _sum_hook)
            self._has_hook = True
        dist.barrier()
        done_s, losses = [time.monotonic()], []
        records: list[Record] = []
        for index in range(steps.count):
            if steps.recorded and rank == 0 and index > 0:
                records.append(Record())
            with recording(self._model, records[-1]) if records else nullcontext():
                losses.append(self._step(steps.alone))
            done_s.append(time.monotonic())
            if records:
                records[-1].step_s = done_s[-1] - done_s[-2]
        return StepsResult(done_s, losses, records)

    def _step(self, alone: bool) -> float:
        batch = [self._windows[(self._next + i) % _WINDOWS] for i in range(self._training.batch)]
        self._next += self._training.batch
        inputs, targets = (torch.stack(column) for column in zip(*batch, strict=True))
        self._optimizer.zero_grad()
        with self._wrapped.no_sync() if alone else nullcontext():
            loss = self._model.loss(self._wrapped(inputs), targets)
            torch.autograd.backward(loss)
        self._optimizer.step()
        return float(loss.detach())


def _sum_hook(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP does without a hook, where it can be seen."""
    buffer = bucket.buffer().div_(dist.get_world_size())
    work = dist.all_reduce(buffer, async_op=True)
    assert work is not None
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
    return summed


@contextmanager
def recording(model: Gpt, record: Record) -> Iterator[None]:
    """Takes the times of one step: forward, each layer's backward, each bucket, and the bytes pushed."""
    begin = time.monotonic()
    begun: dict[str, float] = {}
    handles: list[Any] = []

    def now() -> float:
        return time.monotonic() - begin

    def watch(name: str, module: torch.nn.Module) -> None:
        handles.append(module.register_full_backward_pre_hook(lambda *_: begun.__setitem__(name, now())))
        handles.append(
            module.register_full_backward_hook(lambda *_: record.spans.append(Span(name, begun[name], now())))
        )

    for number, block in enumerate(model.blocks):
        watch(f"layer {number}", block)
    handles.append(model.register_forward_hook(lambda *_: record.spans.append(Span("forward", 0.0, now()))))
    plain = dist.all_reduce

    def watched(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        bucket = Bucket(tensor.nbytes, now())
        record.buckets.append(bucket)
        work = plain(tensor, *arguments, **options)
        assert work is not None
        work.get_future().then(lambda _: setattr(bucket, "done_s", now()))
        return work

    ended = threading.Event()
    sampler = threading.Thread(target=_sample_pushed, args=(record, now, ended))
    dist.all_reduce = watched
    sampler.start()
    try:
        yield
    finally:
        ended.set()
        sampler.join()
        dist.all_reduce = plain
        for handle in handles:
            handle.remove()


def _sample_pushed(record: Record, now: Callable[[], float], ended: threading.Event) -> None:
    native: Any = dist.group.WORLD._get_backend(torch.device("cpu")) if dist.group.WORLD is not None else None
    if not hasattr(native, "counters"):
        return
    before = int(native.counters()["pushed_bytes"])
    while not ended.wait(_SAMPLE_SECONDS):
        record.pushed.append((now(), int(native.counters()["pushed_bytes"]) - before))
