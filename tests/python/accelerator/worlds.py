"""Two ranks, each with a fake device of its own, and tensors that are not there yet when a collective is called."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ranks import Ranks, here, init_group

import accelerator

Pairs = list[tuple[torch.Tensor, torch.Tensor]]  # what came, what should have
COUNT = 2500  # two whole chunks of 4 KiB and a part of one
SMALL = 700  # one chunk
PRODUCER_MS = 40.0
COPY_MS = 10.0
HANG_S = 20.0  # a call that takes so long has met a gate

# Algorithm, standalone reducers.
WORLDS = [("direct", 0), ("server", 1), ("ring", 0)]


def join() -> None:
    accelerator.load()
    torch.accelerator.set_device_index(here().rank)
    init_group(backend="cpu:reducer,fake:reducer")


class World:
    """Two ranks. After a failure the next call has new ones, so that it fails or passes for a reason of its own."""

    def __init__(self, env: dict[str, str]) -> None:
        accelerator.build()
        self._env = env
        self._ranks: Ranks | None = None

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if self._ranks is None:
            self._ranks = Ranks(2, self._env, init=False)
            self._ranks.call(join)
        try:
            return self._ranks.call(function, *arguments, timeout_s=HANG_S)
        except BaseException:
            self.renew()
            raise

    def renew(self) -> None:
        """The next call has new ranks: what a test has broken stays behind."""
        if self._ranks is not None:
            self._ranks.kill()
            self._ranks = None

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.close()


def mine() -> torch.device:
    return torch.device("fake", dist.get_rank())


def sample(rank: int, count: int = COUNT, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small whole numbers, so that no order and no rounding of a part can change a sum."""
    return ((torch.arange(count) * 7 + rank * 5) % 11 + 1).to(dtype)


def total(count: int = COUNT) -> torch.Tensor:
    return sample(0, count) + sample(1, count)


def produce(host: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """A tensor that is poison until a kernel has run that the current stream has not come to yet."""
    ready = host.to(device or mine())
    torch.accelerator.synchronize(ready.device)
    tensor = torch.empty_strided(ready.size(), ready.stride(), dtype=ready.dtype, device=ready.device)
    with torch.fake.slow(PRODUCER_MS):
        tensor.copy_(ready)
    return tensor


def produce_at_once(host: torch.Tensor) -> torch.Tensor:
    """By a kernel without delay: the test has a gate."""
    return torch.empty_like(host, device=mine()).copy_(host.pin_memory(), non_blocking=True)


def blank(count: int = COUNT) -> torch.Tensor:
    """An output: poison."""
    return torch.empty(count, device=mine())


def slow_copies() -> contextlib.AbstractContextManager[None]:
    return torch.fake.slow(COPY_MS)


def verify(pairs: Pairs) -> None:
    """Reads by kernels that begin at once, if nothing makes their stream wait."""
    read = [(got + 0, expected) for got, expected in pairs]
    for number, (got, expected) in enumerate(read):
        assert got.device == mine()
        assert torch.equal(got.cpu(), expected), f"result {number} is {got.cpu()}, it should be {expected}"


def stays_busy(stream: torch.Stream) -> bool:
    """Whether it still is when what could run has run."""
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        if stream.query():
            return False
        time.sleep(0.001)
    return True
