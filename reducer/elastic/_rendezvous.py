"""Which workers make up the job: generations of members, decided by one record in the store.

A record (`_record.py`) has the members of the generation at hand, in the order of their ranks, and what workers say for
the next one: members that have come out of it (`arrived`, each with how far it is), members that have left in good
order (`left`), and new workers (`waiting`). Whoever sees that nobody is missing any more closes the next generation by
one compare-and-set, with all that follows from it (`Generation`); so there is never more than one. A member is missing
until it has arrived or left, or its door refuses (its process has ended), or it has kept others that arrived waiting
for `timeout_s`. A worker that finds itself left out is a new one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from reducer import errors
from reducer._door import Calls, Door
from reducer.elastic._decision import Action, Decision, Phase, Standing, decide
from reducer.elastic._record import Record, SharedRecord

_POLL_S_MIN = 0.005
_POLL_S_MAX = 0.1
# Within this time it is known who lives, of those whose hosts answer.
_KNOWN_S = 1.0
# For those that were all there a moment ago to make a group.
FORM_S = 15.0

EMPTY: Record = {
    "terms": None,
    "generation": 0,
    "members": [],
    "arrived": {},
    "waiting": {},
    "left": {},
    "begun": False,
    "over": None,
}


class FormingFailed(Exception):
    """A member of the new generation is lost already, or does not come."""


@dataclass(frozen=True)
class Worker:
    """One process in one job."""

    uid: str
    host: str  # "hostname:pid"
    door: str


@dataclass(frozen=True)
class Terms:
    """What all workers of a job must be told alike."""

    on_loss: str
    min_workers: int
    max_workers: int


@dataclass(frozen=True)
class Generation:
    """The job from one change of its workers to the next, as one of them sees it."""

    number: int
    rank: int
    members: tuple[Worker, ...]  # by rank
    step: int  # that new members begin with
    action: Action  # of this member; for a new one without meaning
    source: int | None  # the rank that new members get the state from; None: there are no new ones
    new: frozenset[int]  # ranks
    lost: tuple[str, ...]  # hosts of members of the one before
    left: tuple[str, ...]
    summary: Action  # what most do


class Rendezvous:
    """Thread safety: one thread. Every method raises UnavailableError if the store is gone, and MismatchError if what
    it has is no record of this version."""

    def __init__(
        self, record: SharedRecord, me: Worker, door: Door, terms: Terms, *, timeout_s: float, patience_s: float,
        last_call_s: float, where: str,
    ) -> None:  # fmt: skip
        self._record = record
        self._me = me
        self._door = door
        self._terms = terms
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._last_call_s = last_call_s
        self._where = where
        self._since = time.time()

    # ------------------------------------------------------------ coming

    def arrive(self, number: int, standing: Standing | None) -> Generation:
        """Waits for the generation after `number` (0: none yet) that this worker is in.

        `standing`: how far it is; None: it is new, and has no state. Raises TimeoutError (fewer than the minimum for
        longer than the patience), MismatchError (other terms than the others'), AbortedError (the job is over),
        UnavailableError (all that had the state are gone).
        """
        with Calls[str]() as calls:
            wait = _Wait(self, calls, number, standing)
            deadline = time.monotonic() + self._patience_s
            pause = _POLL_S_MIN
            while True:
                record = self._register(number, standing)
                if record["generation"] > number and self._is_in(record):
                    return self._seen_by_me(record)
                if record["generation"] > number and standing is not None:
                    # The others have waited long enough, and went on.
                    number, standing = record["generation"], None
                    wait = _Wait(self, calls, number, standing)
                    continue
                if wait.try_close(record):
                    continue
                if time.monotonic() >= deadline:
                    raise errors.TimeoutError(self._too_few(record))
                calls.step(pause)
                self._door.hear(None)  # lets go of those who have watched this worker
                pause = min(_POLL_S_MAX, pause * 1.3)

    def _is_in(self, record: Record) -> bool:
        return any(member["uid"] == self._me.uid for member in record["members"])

    def _register(self, number: int, standing: Standing | None) -> Record:
        uid = self._me.uid
        said = {**asdict(self._me), "since": self._since}
        if standing is not None:
            said |= {"step": standing.step, "phase": standing.phase.value}

        def edit(record: Record) -> bool:
            if record["terms"] is None:
                record["terms"] = asdict(self._terms)
            if record["terms"] != asdict(self._terms):
                raise errors.MismatchError(
                    f"the workers of this job were told {record['terms']}, and this one {asdict(self._terms)}"
                )
            arrives = standing is not None and record["generation"] == number
            if record["over"] is not None and not arrives:
                raise errors.AbortedError(
                    f"this job is over: its workers have done all {record['over']} steps; give the next one another "
                    "`job`, or another store"
                )
            if record["generation"] != number and self._is_in(record):
                return False  # it was closed with this worker in it
            place = "arrived" if arrives else "waiting"
            if record[place].get(uid) == said:
                return False
            record["arrived"].pop(uid, None)
            record["waiting"].pop(uid, None)
            record[place][uid] = said
            return True

        return self._record.change(edit)

    def _seen_by_me(self, record: Record) -> Generation:
        members = tuple(Worker(one["uid"], one["host"], one["door"]) for one in record["members"])
        rank = next(rank for rank, member in enumerate(members) if member.uid == self._me.uid)
        news = record["news"]
        return Generation(
            number=record["generation"],
            rank=rank,
            members=members,
            step=news["step"],
            action=Action(news["actions"].get(self._me.uid, Action.GO_ON.value)),
            source=news["source"],
            new=frozenset(news["new"]),
            lost=tuple(news["lost"]),
            left=tuple(news["left"]),
            summary=Action(news["summary"]),
        )

    def _too_few(self, record: Record) -> str:
        there = len(record["arrived"]) + len(record["waiting"])
        at_work = [one["host"] for one in record["members"] if one["uid"] not in record["arrived"]]
        if at_work and there >= self._terms.min_workers:
            return f"those at work did not let this worker in within {self._patience_s:g} s: {', '.join(at_work)}"
        return (
            f"{there} of at least {self._terms.min_workers} workers were there within {self._patience_s:g} s; start "
            f"more: they find this job by {self._where}"
        )

    # ------------------------------------------------------------ beside training

    def somebody_waits(self) -> bool:
        """Whether there are new workers, and room for one."""
        record = self._record.read()
        room = self._terms.max_workers == 0 or len(record["members"]) < self._terms.max_workers
        return room and bool(record["waiting"])

    def begun(self) -> None:
        """There is a state, which must not be begun anew."""

        def edit(record: Record) -> bool:
            changed = not record["begun"]
            record["begun"] = True
            return changed

        self._record.change(edit)

    def leave(self, standing: Standing | None, *, over: bool) -> None:
        """Tells the others that this worker goes. `over`: since all steps are done."""
        last = standing or Standing(0, Phase.BOUNDARY)

        def edit(record: Record) -> bool:
            for place in ("arrived", "waiting"):
                record[place].pop(self._me.uid, None)
            if self._is_in(record):
                record["left"][self._me.uid] = {"step": last.step, "phase": last.phase.value}
            if over:
                record["over"] = last.step
            return True

        self._record.change(edit)

    def confirm(self, generation: Generation) -> None:
        """Returns when all members know of the generation. Raises FormingFailed."""
        self._record.mark(f"ready/{generation.number}/{self._me.uid}")
        missing = {member.uid: member for member in generation.members if member.uid != self._me.uid}
        deadline = time.monotonic() + FORM_S
        pause = _POLL_S_MIN
        with Calls[str]() as calls:
            while missing:
                calls.watch({uid: member.door for uid, member in missing.items()})
                calls.step(pause)
                pause = min(_POLL_S_MAX, pause * 1.3)
                dead = calls.dead()
                for uid in list(missing):
                    if self._record.marked(f"ready/{generation.number}/{uid}"):
                        del missing[uid]
                gone = [member.host for uid, member in missing.items() if uid in dead]
                if gone:
                    raise FormingFailed(f"{', '.join(gone)} has ended")
                if missing and time.monotonic() >= deadline:
                    raise FormingFailed(f"{', '.join(m.host for m in missing.values())} did not come")


class _Wait:
    """One worker's wait for the next generation, and its part in closing it."""

    def __init__(self, of: Rendezvous, calls: Calls[str], number: int, standing: Standing | None) -> None:
        self._of = of
        self._calls = calls
        self._number = number
        self._member = standing is not None
        self._began = time.monotonic()
        self._came: tuple[frozenset[str], float] = (frozenset(), self._began)

    def try_close(self, record: Record) -> bool:
        """Whether it has written anything."""
        of = self._of
        if record["generation"] != self._number and self._member:
            return False
        now = time.monotonic()
        everybody = {uid: one["door"] for place in ("arrived", "waiting") for uid, one in record[place].items()}
        everybody |= {one["uid"]: one["door"] for one in record["members"]}
        everybody.pop(of._me.uid, None)
        self._calls.watch(everybody)
        self._calls.step(0.0)
        dead = self._calls.dead()
        came = frozenset(uid for place in ("arrived", "waiting") for uid in record[place] if uid not in dead)
        if came != self._came[0]:
            self._came = (came, now)
        missing = {
            one["uid"]
            for one in record["members"]
            if one["uid"] not in came and one["uid"] not in dead and one["uid"] not in record["left"]
        }
        if missing and not (self._member and now - self._began >= of._timeout_s):
            return False
        if not self._calls.all_known() and now - self._came[1] < _KNOWN_S:
            return False
        plan = _plan(record, came, of._terms, settled=now - self._came[1] >= of._last_call_s)
        if plan is None:
            return False
        seen = {key: record[key] for key in ("generation", "members", "arrived", "waiting", "left")}

        def edit(current: Record) -> bool:
            if any(current[key] != value for key, value in seen.items()):
                return False  # others were faster; look again
            plan(current)
            return True

        of._record.change(edit)
        return True


def _plan(record: Record, came: frozenset[str], terms: Terms, *, settled: bool) -> Callable[[Record], None] | None:
    """How to close the next generation with these workers; None: not yet. Raises UnavailableError.

    `settled`: no other worker came for a while.
    """
    veterans = [one["uid"] for one in record["members"] if one["uid"] in came and one["uid"] in record["arrived"]]
    fresh = sorted((uid for uid in record["waiting"] if uid in came), key=lambda uid: (_since(record, uid), uid))
    if not veterans:
        if record["begun"]:
            raise errors.UnavailableError(
                f"all workers that had the state of this job have gone (the last were "
                f"{', '.join(one['host'] for one in record['members'])}); start again from a checkpoint, with another "
                "`job` or another store"
            )
        decision = Decision(step=0, actions=(), source=0)
    else:
        decision = _decide(record, veterans, terms, retry=False)
        alone = len(veterans) < terms.min_workers and not decision.takes_in
        if alone and Action.AVERAGE in decision.actions:
            decision = _decide(record, veterans, terms, retry=True)
    if terms.max_workers:
        fresh = fresh[: max(0, terms.max_workers - len(veterans))]
    if not decision.takes_in:
        fresh = []
    count = len(veterans) + len(fresh)
    full = terms.max_workers > 0 and count == terms.max_workers
    # Workers that only have to catch up with such as have left need no company for that.
    caught_up = bool(veterans) and all(action == Action.COMMIT for action in decision.actions)
    enough = 1 if caught_up else terms.min_workers
    if count < enough or (not veterans and not settled and not full):
        return None

    def close(current: Record) -> None:
        current["waiting"] = {uid: one for uid, one in current["waiting"].items() if uid in came}
        _close(current, veterans, fresh, decision)

    return close


def _since(record: Record, uid: str) -> float:
    since: float = record["waiting"][uid]["since"]
    return since


def _standing(said: dict[str, Any]) -> Standing:
    return Standing(said["step"], Phase(said["phase"]))


def _decide(record: Record, veterans: list[str], terms: Terms, *, retry: bool) -> Decision:
    standings = [_standing(record["arrived"][uid]) for uid in veterans]
    gone = [_standing(said) for said in record["left"].values()]
    return decide(standings, gone, terms.on_loss, retry=retry)


def _close(record: Record, veterans: list[str], fresh: list[str], decision: Decision) -> None:
    said = {**record["arrived"], **record["waiting"]}
    uids = veterans + fresh
    before = {one["uid"]: one["host"] for one in record["members"]}
    rare = {Action.COMMIT, Action.GO_ON}
    record["news"] = {
        "step": decision.step,
        "actions": {uid: action.value for uid, action in zip(veterans, decision.actions, strict=False)},
        "source": decision.source if fresh else None,
        "new": list(range(len(veterans), len(uids))),
        "lost": [host for uid, host in before.items() if uid not in uids and uid not in record["left"]],
        "left": [host for uid, host in before.items() if uid not in uids and uid in record["left"]],
        "summary": next((a for a in decision.actions if a not in rare), (*decision.actions, Action.GO_ON)[0]).value,
    }
    record["generation"] += 1
    record["members"] = [{key: said[uid][key] for key in ("uid", "host", "door")} for uid in uids]
    record["waiting"] = {uid: one for uid, one in record["waiting"].items() if uid not in uids}
    record["arrived"] = {}
    record["left"] = {}
