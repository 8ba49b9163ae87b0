"""Who is left: the survivors of a group agree on it, from worker to worker, without a store.

In rounds, all to all. In each round a rank tells all others whom it knows to be out, and waits for what each of them
says of that round, or until it is out itself: dead (its door refuses) or silent (it did not come in time). A round in
which everybody said the same, and nobody was lost, decides; the decision is told to all before anybody acts by it,
and handed on by each that hears it. So two ranks that live cannot decide differently: who goes on to another round
waits there for one who has decided, and hears of it. Words of those that one holds to be out do not count.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reducer import errors
from reducer._door import Calls, Door

_STEP_S = 0.05
# After the first round all are there.
_ROUND_S = 5.0
# How long a decision may take to reach the others' hosts, if one of them does not answer.
_DELIVERY_S = 2.0


@dataclass(frozen=True)
class Outside:
    """Ranks that are not among the survivors."""

    dead: frozenset[int] = frozenset()  # proven: nobody listens there any more
    silent: frozenset[int] = frozenset()  # they did not come

    @property
    def all(self) -> frozenset[int]:
        return self.dead | self.silent

    def __or__(self, other: Outside) -> Outside:
        dead = self.dead | other.dead
        return Outside(dead, (self.silent | other.silent) - dead)


def agree(topic: str, me: int, doors: Sequence[str], door: Door, timeout_s: float) -> Outside:
    """Which ranks are out; the same on all that are not. `doors`: of all ranks; `topic`: a secret of this meeting's.

    Ranks whose processes live must all call it, within `timeout_s` of each other: whoever does not is out. Raises
    AbortedError (the others went on without this rank), UnavailableError (too few came to tell a majority from a
    part that was cut off), TimeoutError.
    """
    with Calls[int]() as calls:
        calls.watch({rank: address for rank, address in enumerate(doors) if rank != me})
        meeting = _Meeting(topic, me, len(doors), calls, door, timeout_s)
        outside = meeting.run()
    silent = sorted(outside.silent)
    if silent and 2 * (len(doors) - len(outside.all)) <= len(doors) - len(outside.dead):
        raise errors.UnavailableError(
            f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))} did not come within {timeout_s:g} s "
            f"and may be alive, and those that came are no majority: of {len(doors)} ranks {len(outside.dead)} have "
            "ended; look at these ranks, or start the job again"
        )
    return outside


class _Meeting:
    def __init__(self, topic: str, me: int, size: int, calls: Calls[int], door: Door, timeout_s: float) -> None:
        self._topic = topic
        self._me = me
        self._others = [rank for rank in range(size) if rank != me]
        self._calls = calls
        self._door = door
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s + _ROUND_S * (size + 1)
        self._round = 0
        self._view = Outside()
        self._found = Outside()  # since the round began
        self._said: dict[int, dict[int, Outside]] = {}  # by round and rank
        self._decided: Outside | None = None

    def run(self) -> Outside:
        patience = time.monotonic() + self._timeout_s
        self._tell(decided=False)
        while self._decided is None:
            self._calls.step(_STEP_S, self._door)
            # First what they said, then who has ended: it may have been said before.
            ended = self._calls.dead()
            self._listen()
            self._found |= Outside(dead=frozenset(ended - self._view.dead))
            waits_for = self._missing()
            if waits_for and time.monotonic() >= patience:
                self._found |= Outside(silent=frozenset(waits_for))
                waits_for = set()
            if self._decided is None and not waits_for:
                self._end_round()
                patience = time.monotonic() + _ROUND_S
            if time.monotonic() >= self._end:
                raise errors.TimeoutError(f"the ranks that are left found no agreement within {self._timeout_s:g} s")
        self._view = self._decided
        self._tell(decided=True)
        delivery = time.monotonic() + _DELIVERY_S
        while not self._calls.delivered() and time.monotonic() < delivery:
            self._calls.step(_STEP_S)
        self._check_in(self._view)
        return self._view

    def _missing(self) -> set[int]:
        came = self._said.get(self._round, {})
        out = self._view.all | self._found.all
        return {rank for rank in self._others if rank not in out and rank not in came}

    def _end_round(self) -> None:
        views = [view for rank, view in self._said.get(self._round, {}).items() if rank not in self._found.dead]
        now = self._view | self._found
        for view in views:
            now |= view
        self._check_in(now)
        if now == self._view and all(view == now for view in views):
            self._decided = now
            return
        self._round += 1
        self._view = now
        self._found = Outside()
        self._tell(decided=False)

    def _check_in(self, view: Outside) -> None:
        if self._me in view.all:
            raise errors.AbortedError(
                f"the other ranks waited {self._timeout_s:g} s for this one (rank {self._me}) and went on without it"
            )

    def _tell(self, *, decided: bool) -> None:
        message: dict[str, Any] = {
            "topic": self._topic,
            "rank": self._me,
            "round": self._round,
            "dead": sorted(self._view.dead),
            "silent": sorted(self._view.silent),
            "decided": decided,
        }
        self._calls.say(message)

    def _listen(self) -> None:
        for message in self._door.hear(self._topic):
            try:
                rank, number = int(message["rank"]), int(message["round"])
                view = Outside(frozenset(map(int, message["dead"])), frozenset(map(int, message["silent"])))
                decided = bool(message["decided"])
            except (KeyError, TypeError, ValueError, OverflowError):
                continue
            if rank in self._view.all or rank in self._found.all or rank not in self._others:
                continue
            if decided and self._decided is None:
                self._decided = view
            self._said.setdefault(number, {})[rank] = view
            if number > self._round:  # it has waited for those already
                self._found |= Outside(view.dead - self._view.dead, view.silent - self._view.all)
