"""Who is left: the survivors of a group agree on it, from worker to worker, without a store.

In rounds, all to all. In each round a rank tells all others whom it knows to be out, and waits for what each of them
says of that round, or until it is out itself: dead (its door refuses) or silent (it did not come in time). A round in
which everybody said the same, and nobody was lost, decides; the decision is told to all before anybody acts by it,
and handed on by each that hears it. So two ranks that live cannot decide differently: who goes on to another round
waits there for one who has decided, and hears of it. Words of those that one holds to be out do not count.

A group may meet again after a meeting that failed. Meetings of a group are numbered: each rank counts its own, and
goes over to a later one that it hears of. What was said in an earlier one does not count, be it late or replayed; what
was said in this one can be said any number of times: it is taken once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from reducer import errors
from reducer._door import Calls, Door, Message

_STEP_S = 0.05
# After the first round all are there.
_ROUND_S = 5.0
# How long a decision may take to reach the others' hosts, if one of them does not answer.
_DELIVERY_S = 2.0
# How far ahead the words of others are kept: who is two rounds ahead holds this rank to be out.
_AHEAD_MAX = 8
_NUMBER_MAX = 1 << 31
# What is taken in between two looks at the time: of 4,096 ranks two rounds' longest words, and more.
_TURNS_MAX = 128

# The last meeting of a rank (by its door) about a topic.
_meetings: dict[tuple[str, str], int] = {}


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
    refused = door.refused
    with Calls[int](door.keys) as calls:
        calls.watch({rank: address for rank, address in enumerate(doors) if rank != me})
        meeting = _Meeting(topic, me, len(doors), calls, door, timeout_s)
        try:
            outside = meeting.run()
        finally:
            door.forget(topic)
    silent = sorted(outside.silent)
    if silent and 2 * (len(doors) - len(outside.all)) <= len(doors) - len(outside.dead):
        raise errors.UnavailableError(
            f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))} did not come within {timeout_s:g} s "
            f"and may be alive, and those that came are no majority: of {len(doors)} ranks {len(outside.dead)} have "
            f"ended; look at these ranks, or start the job again{_unsigned(door, refused)}"
        )
    return outside


def _unsigned(door: Door, before: int) -> str:
    count = door.refused - before
    if not door.keys or not count:
        return ""
    return (
        f" ({count} connection{'s' if count > 1 else ''} to this rank said what this job's token did not sign: is "
        "REDUCER_TOKEN_FILE the same on all ranks?)"
    )


@dataclass(frozen=True)
class _Word:
    """What a rank said in a round."""

    meeting: int
    rank: int
    round: int
    view: Outside
    decided: bool


def _word(message: Message, size: int) -> _Word | None:
    """None: nothing that a rank of a group of `size` says."""
    meeting, rank, number = (message.get(name) for name in ("meeting", "rank", "round"))
    decided = message.get("decided")
    if not (_is_number(meeting, _NUMBER_MAX) and _is_number(rank, size) and _is_number(number, _NUMBER_MAX)):
        return None
    dead, silent = (_ranks(message.get(name), size) for name in ("dead", "silent"))
    if dead is None or silent is None or not isinstance(decided, bool):
        return None
    return _Word(meeting, rank, number, Outside(dead, silent - dead), decided)


def _is_number(value: object, end: int) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < end


def _ranks(value: object, size: int) -> frozenset[int] | None:
    if not isinstance(value, list) or len(value) > size or not all(_is_number(rank, size) for rank in value):
        return None
    return frozenset(value)


class _Meeting:
    def __init__(self, topic: str, me: int, size: int, calls: Calls[int], door: Door, timeout_s: float) -> None:
        self._topic = topic
        self._me = me
        self._size = size
        self._others = [rank for rank in range(size) if rank != me]
        self._calls = calls
        self._door = door
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s + _ROUND_S * (size + 1)
        self._decided: Outside | None = None
        self._begin(_meetings.get((door.address, topic), 0) + 1)

    def _begin(self, number: int) -> None:
        self._number = number
        _meetings[self._door.address, self._topic] = number
        self._patience = time.monotonic() + self._timeout_s
        self._round = 0
        self._view = Outside()
        self._found = Outside()  # since the round began
        self._said: dict[int, dict[int, Outside]] = {}  # by round and rank
        self._views: dict[Outside, Outside] = {}  # each once: they can be long, and most are equal
        self._tell(decided=False)

    def run(self) -> Outside:
        while self._decided is None:
            self._calls.step(_STEP_S, self._door)
            # First what they said, then who has ended: it may have been said before.
            ended = self._calls.dead()
            self._listen()
            self._found |= Outside(dead=frozenset(ended - self._view.dead))
            waits_for = self._missing()
            if waits_for and time.monotonic() >= self._patience:
                self._found |= Outside(silent=frozenset(waits_for))
                waits_for = set()
            if self._decided is None and not waits_for:
                self._end_round()
                self._patience = time.monotonic() + _ROUND_S
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
        self._said.pop(self._round, None)
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
        message: Message = {
            "topic": self._topic,
            "meeting": self._number,
            "rank": self._me,
            "round": self._round,
            "dead": sorted(self._view.dead),
            "silent": sorted(self._view.silent),
            "decided": decided,
        }
        self._calls.say(message)

    def _listen(self) -> None:
        for _ in range(_TURNS_MAX):
            messages = self._door.hear(self._topic)
            if not messages:
                return
            words = [word for message in messages if (word := _word(message, self._size)) is not None]
            self._take(words)
            latest = max((word.meeting for word in words), default=0)
            if latest > self._number and self._decided is None:
                self._begin(latest)
                self._take(words)

    def _take(self, words: list[_Word]) -> None:
        for word in words:
            if word.meeting != self._number or word.rank == self._me:
                continue
            if word.rank in self._view.all or word.rank in self._found.all:
                continue
            view = self._views.setdefault(word.view, word.view)
            if word.decided and self._decided is None:
                self._decided = view
            if self._round <= word.round <= self._round + _AHEAD_MAX:
                self._said.setdefault(word.round, {})[word.rank] = view
            if word.round > self._round:  # it has waited for those already
                self._found |= Outside(view.dead - self._view.dead, view.silent - self._view.all)
