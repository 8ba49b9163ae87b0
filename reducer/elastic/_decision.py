"""What becomes of the step in flight when the workers of a job change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from reducer import errors


class Phase(str, Enum):
    """Where a worker is in its step."""

    BOUNDARY = "boundary"  # between two steps
    BEGUN = "begun"  # its own gradient is computed, or being reduced
    REDUCED = "reduced"  # it has the whole average, and does not know whether the others have


class Action(str, Enum):
    """What a worker does with it."""

    GO_ON = "go on"  # it was between steps
    COMMIT = "commit"  # it has the average, which another worker may have applied already: it applies it, too
    AVERAGE = "average"  # its gradient is reduced again, with those that are left
    RETRY = "retry"  # it computes the step again


@dataclass(frozen=True)
class Standing:
    """How far a worker has come: steps that it has applied, and where it is in the next one."""

    step: int
    phase: Phase


@dataclass(frozen=True)
class Decision:
    """What all do: equal on all that know the same standings."""

    step: int  # that new workers begin with
    actions: tuple[Action, ...]  # in the order of the standings
    source: int | None  # who has the state that new workers need; None: there can be none yet

    @property
    def takes_in(self) -> bool:
        """Whether new workers may begin with the step at hand."""
        return self.source is not None


def decide(standings: Sequence[Standing], gone: Sequence[Standing], on_loss: str, *, retry: bool = False) -> Decision:
    """Of the workers that are there (at least one), beside some that have left in good order.

    A step is applied by nobody before all have reduced it (they vote). So if one has applied it, all others can.
    `retry`: a step that nobody has applied is done again, whatever `on_loss` says.
    """
    step = max(standing.step for standing in [*standings, *gone])
    ahead = [standing.phase for standing in standings if standing.step == step]
    for standing in standings:
        if standing.step < step and standing != Standing(step - 1, Phase.REDUCED):
            raise errors.InternalError(f"a worker has applied step {step - 1}, and another is at {standing}")
    together = len(ahead) == len(standings)
    if all(phase == Phase.BOUNDARY for phase in ahead):
        action = Action.GO_ON
    elif together and not retry and all(phase == Phase.REDUCED for phase in ahead):
        action = Action.COMMIT
    elif together and not retry and on_loss == "average" and Phase.BOUNDARY not in ahead:
        action = Action.AVERAGE
    else:
        action = Action.RETRY
    actions = tuple(
        Action.COMMIT if standing.step < step else Action.GO_ON if standing.phase == Phase.BOUNDARY else action
        for standing in standings
    )
    source = next((i for i, one in enumerate(actions) if one in (Action.GO_ON, Action.RETRY)), None)
    return Decision(step, actions, source)
