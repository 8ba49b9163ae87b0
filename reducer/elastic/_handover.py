"""How new workers get what the others have: all that training goes on with, from one of them to all new ones."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from reducer import errors


class Stateful(Protocol):
    """As torch.distributed.checkpoint's, whose import takes seconds."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor."""

    index: int


@dataclass(frozen=True)
class _Shape:
    dtype: torch.dtype
    sizes: tuple[int, ...]


def collect(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Stateful]) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "state": {name: one.state_dict() for name, one in state.items()},
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
    }


def load(
    held: Mapping[str, Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Stateful],
    *,
    randomness: bool,
) -> None:
    """`randomness`: the random state, too. Raises MismatchError: this worker was set up otherwise than the others."""
    missing = sorted(set(held["state"]) ^ set(state))
    if missing:
        raise errors.MismatchError(f"state: not both this worker and the others have {', '.join(missing)}")
    try:
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise errors.MismatchError(f"this worker's model or optimizer is not that of the others: {error}") from error
    for name, one in state.items():
        one.load_state_dict(held["state"][name])
    if randomness:
        torch.set_rng_state(held["torch"])
        random.setstate(held["python"])


def exchange(held: dict[str, Any] | None, source: int, *, wanted: bool) -> dict[str, Any] | None:
    """All ranks of the default group call it; `held` at the source; those that `wanted` it get it.

    What is no tensor goes as a pickle, as in `broadcast_object_list`: workers trust each other. Memory beside what is
    held: the largest tensor. Raises DistBackendError.
    """
    tensors: list[torch.Tensor] = []
    head = b""
    if held is not None:
        outline = _outline(held, tensors)
        shapes = [_Shape(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
        head = pickle.dumps((outline, shapes))
    size = torch.tensor([len(head)])
    dist.broadcast(size, src=source)
    text = torch.frombuffer(bytearray(head), dtype=torch.uint8) if held else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(text, src=source)
    outline, shapes = pickle.load(io.BytesIO(text.numpy().tobytes()))
    kept: list[torch.Tensor] = []
    for index, shape in enumerate(shapes):
        if held is not None:
            tensor = tensors[index].detach().cpu().contiguous()
        else:
            tensor = torch.empty(shape.sizes, dtype=shape.dtype)
        if tensor.numel() > 0:
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=source)
        if wanted and held is None:
            kept.append(tensor)
    return _fill_in(outline, kept) if wanted and held is None else None


def _outline(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _Slot(len(tensors) - 1)
    if isinstance(value, Mapping):
        return {key: _outline(one, tensors) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_outline(one, tensors) for one in value)
    return value


def _fill_in(outline: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(outline, _Slot):
        return tensors[outline.index]
    if isinstance(outline, dict):
        return {key: _fill_in(one, tensors) for key, one in outline.items()}
    if type(outline) in (list, tuple):
        return type(outline)(_fill_in(one, tensors) for one in outline)
    return outline
