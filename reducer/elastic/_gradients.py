"""The average of the workers' gradients, made beside backward, with each worker's own gradient kept until it is whole.

As DistributedDataParallel: parameters in the reverse of their order fill buckets, and a bucket is reduced as soon as
backward has its gradients. Other than there, what is reduced is a copy. So a step can be reduced again, or given up,
at any moment before the average is put in place of the gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

FIRST_BUCKET_BYTES = 1 << 20


@dataclass(eq=False)
class _Bucket:
    parameters: list[torch.nn.Parameter]
    missing: int = 0
    # The gradients one after the other, then for each parameter whether it has one (1 or 0).
    flat: torch.Tensor | None = None
    work: Any = None

    @property
    def count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def views(self) -> list[torch.Tensor]:
        assert self.flat is not None
        sizes = [parameter.numel() for parameter in self.parameters]
        parts = torch.split(self.flat[: self.count], sizes)
        return [part.view_as(parameter) for part, parameter in zip(parts, self.parameters, strict=True)]

    def pack(self) -> torch.Tensor:
        first = self.parameters[0]
        if self.flat is None:
            self.flat = torch.empty(self.count + len(self.parameters), dtype=first.dtype, device=first.device)
        flags = []
        for view, parameter in zip(self.views(), self.parameters, strict=True):
            flags.append(0.0 if parameter.grad is None else 1.0)
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
        self.flat[self.count :].copy_(torch.tensor(flags, dtype=first.dtype))
        return self.flat

    def unpack(self) -> None:
        assert self.flat is not None
        used: list[float] | None = None
        for i, (view, parameter) in enumerate(zip(self.views(), self.parameters, strict=True)):
            if parameter.grad is None:
                used = self.flat[self.count :].tolist() if used is None else used
                if used[i] == 0:
                    continue  # nobody has used it
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(view)


@dataclass(eq=False)
class _Buffers:
    """The model's buffers of one type, which all take over from rank 0 with each step, as in DDP."""

    tensors: list[torch.Tensor]
    flat: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    work: Any = None


class Gradients:
    """Thread safety: backward may run its hooks in a thread of its own; all else in one thread."""

    def __init__(self, model: torch.nn.Module, bucket_bytes: int) -> None:
        """Registers hooks with the model's parameters, which close() takes away.

        Raises ValueError: no parameter wants a gradient.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("no parameter of the model requires a gradient")
        self._model = model
        self._buckets = list(_fill(reversed(parameters), bucket_bytes))
        self._bucket_of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}
        self._buffers: list[_Buffers] = []
        self._hooks: list[Any] = []
        for parameter in parameters:
            hook = parameter.register_post_accumulate_grad_hook(self._ready)  # type: ignore[no-untyped-call]
            self._hooks.append(hook)
        self._seen: set[torch.nn.Parameter] = set()
        self._next = 0  # the first bucket that is not started
        self._error: Exception | None = None
        self._active = False
        self.paused = False  # gradients are only added up

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def begin(self) -> None:
        """A step begins."""
        self._reset()
        self._seen.clear()
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        self._active = True

    def _reset(self) -> None:
        self._next = 0
        self._error = None
        self._buffers = []
        for bucket in self._buckets:
            bucket.work = None

    def again(self) -> None:
        """Forgets what is reduced of this step: finish() reduces the gradients as backward has left them."""
        self._reset()
        for bucket in self._buckets:
            bucket.flat = None  # the old group may not be through with it

    def abandon(self) -> None:
        """Forgets the step."""
        self._active = False
        self.again()

    def _ready(self, parameter: torch.nn.Parameter) -> None:
        if not self._active or self.paused:
            return
        if parameter in self._seen:
            raise RuntimeError(
                "backward ran twice in a step: put all but the last backward of a step inside `with session.no_sync():`"
            )
        self._seen.add(parameter)
        self._bucket_of[parameter].missing -= 1
        # In one order on all workers, whatever the order in which backward comes by.
        while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._start(self._buckets[self._next])

    def _start(self, bucket: _Bucket) -> None:
        self._next += 1
        if self._error is not None:
            return
        try:
            bucket.work = dist.all_reduce(bucket.pack(), op=dist.ReduceOp.AVG, async_op=True)
        except dist.DistBackendError as error:
            self._error = error  # backward goes on: the gradient of this worker will be needed

    def _start_buffers(self) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], _Buffers] = {}
        for tensor in self._model.buffers():
            kinds.setdefault((tensor.dtype, tensor.device), _Buffers([])).tensors.append(tensor)
        self._buffers = list(kinds.values())
        for kind in self._buffers:
            kind.flat = torch.cat([tensor.detach().reshape(-1) for tensor in kind.tensors])
            kind.work = dist.broadcast(kind.flat, src=0, async_op=True)

    def finish(self) -> None:
        """Returns when the average is whole, apart from the gradients. Raises DistBackendError."""
        self._active = False
        while self._next < len(self._buckets):
            self._start(self._buckets[self._next])
        if self._error is not None:
            raise self._error
        self._start_buffers()
        for work in [one.work for one in self._buckets] + [one.work for one in self._buffers]:
            work.wait()

    def apply(self) -> None:
        """Puts the average in place of the gradients, and rank 0's buffers in place of the own."""
        for bucket in self._buckets:
            bucket.unpack()
        for kind in self._buffers:
            parts = torch.split(kind.flat, [tensor.numel() for tensor in kind.tensors])
            for tensor, part in zip(kind.tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
        self._reset()


def _fill(parameters: Iterable[torch.nn.Parameter], bucket_bytes: int) -> Iterable[_Bucket]:
    """Buckets of one type each; the first is small, so that its reduction begins early."""
    limit = min(FIRST_BUCKET_BYTES, bucket_bytes)
    held: list[torch.nn.Parameter] = []
    nbytes = 0
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        if held and (nbytes >= limit or kind != (held[0].dtype, held[0].device)):
            yield _Bucket(held)
            held, nbytes, limit = [], 0, bucket_bytes
        held.append(parameter)
        nbytes += parameter.numel() * parameter.element_size()
    yield _Bucket(held)
