"""Which samples of a data set a worker computes, when the number of workers changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from reducer import errors


class Sampler:
    """Deals the samples of a data set out to the workers of a session, `batch` to each in a step.

    Epoch after epoch in a new random order, the same on all workers; an epoch's last samples and the next one's first
    share a step. A step takes as many as there are workers times `batch`. One that is done again deals the same samples
    anew to those that are left; what is not dealt then is the next step's. Under on_loss="average" the samples of a
    lost worker in that step are left out. Give it to the session in its `state`. Thread safety: one thread.
    """

    def __init__(self, length: int, batch: int, *, seed: int = 0, shuffle: bool = True) -> None:
        """`length`: samples in the data set; equal on all workers, as all else. Raises InvalidArgumentError."""
        if length < 1 or batch < 1:
            raise errors.InvalidArgumentError(f"Sampler: length {length} and batch {batch} must be at least 1")
        self._length = length
        self._batch = batch
        self._seed = seed
        self._shuffle = shuffle
        self._position = 0
        self._place: Callable[[], tuple[int, int]] | None = None
        self._order: tuple[int, list[int]] = (-1, [])  # epoch, permutation

    @property
    def epoch(self) -> float:
        """How often the data set was gone through, with a fraction."""
        return self._position / self._length

    def indices(self) -> list[int]:
        """This worker's `batch` samples in the step at hand. Raises InvalidArgumentError outside of a session."""
        if self._place is None:
            raise errors.InvalidArgumentError("Sampler: give it to a session, state={'sampler': sampler}, first")
        rank, _ = self._place()
        first = self._position + rank * self._batch
        return [self._sample(at) for at in range(first, first + self._batch)]

    def _sample(self, at: int) -> int:
        epoch, place = divmod(at, self._length)
        if not self._shuffle:
            return place
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._order = (epoch, torch.randperm(self._length, generator=generator).tolist())
        return self._order[1][place]

    def bind(self, place: Callable[[], tuple[int, int]]) -> None:
        """For the session: the rank and the number of workers of the step at hand."""
        self._place = place

    def advance(self) -> None:
        """For the session: the step is done."""
        assert self._place is not None
        _, world_size = self._place()
        self._position += self._batch * world_size

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._position = int(state_dict["position"])
