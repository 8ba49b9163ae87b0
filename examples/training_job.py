"""What the examples of the frameworks train: the model, its data, and what every rank says at the end.

Nothing here knows of a framework: lightning_train.py, accelerate_train.py and ray_train.py do.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from gpt import Gpt, GptConfig, Windows, standard_library_text

BATCH = 8
LEARNING_RATE = 3e-3
_CONFIG = GptConfig(context=64, width=64, heads=4, layers=2)
_TEXT_BYTES = 1 << 20
# The first and the last of the losses that are averaged.
_ENDS = 5


def model(seed: int) -> Gpt:
    """A small GPT. The frameworks give every rank the weights of rank 0, whatever its own seed was."""
    torch.manual_seed(seed)
    return Gpt(_CONFIG)


def data(windows: int) -> Windows:
    """`windows` of Python's standard library, the same ones on all ranks: the frameworks deal them out."""
    return Windows(standard_library_text(_TEXT_BYTES), _CONFIG.context, windows, rank=0, seed=1)


def weights_sha256(trained: torch.nn.Module) -> str:
    """The hash of all weights, in the model's order."""
    digest = hashlib.sha256()
    for parameter in trained.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def summary(trained: torch.nn.Module, losses: list[float]) -> list[str]:
    """A line for each rank of the default group, on all ranks; every rank must call it, with its own losses."""
    # What the group itself counted, not what was asked for: the native backend behind Python's group.
    backend: Any = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    counters = backend.counters()
    first, last = (sum(part) / len(part) for part in (losses[:_ENDS], losses[-_ENDS:]))
    line = (
        f"rank {dist.get_rank()} of {dist.get_world_size()}: backend {dist.get_backend()} ({backend.algorithm}), "
        f"{len(losses)} steps, loss {first:.3f} -> {last:.3f}, {counters['operations']} operations, "
        f"{counters['pushed_bytes']} bytes pushed, weights {weights_sha256(trained)}"
    )
    lines: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(lines, line)
    return lines
