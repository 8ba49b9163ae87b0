"""Who is behind, and where: the ranks' dumps of the flight recorder, put side by side.

Ranks are compared by the numbers of their calls, which are equal on all of them, and never by clocks of different
hosts. A time in a sentence is one that a single rank has measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.table import Table
from rich.text import Text

from reducer.errors import InvalidArgumentError
from reducer.recorder import Call, Dump, Group

_RANKS_NAMED = 16


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found in one group."""

    job: str
    group: str
    kind: str  # "behind", "stuck", "missing", "mismatch", "waiting", "sending", "failed", "fine"
    ranks: tuple[int, ...]  # that it is about
    seq: int | None
    sentence: str


@dataclass
class _View:
    """A group as one rank's dump shows it."""

    dump: Dump
    group: Group
    calls: dict[int, Call] = field(default_factory=dict)  # collectives, by number
    pairs: list[Call] = field(default_factory=list)  # send/recv

    @property
    def called(self) -> int:
        """How many collectives the rank has called."""
        recorded = max(self.calls, default=-1) + 1
        return recorded if self.group.called is None else max(self.group.called, recorded)

    def since(self, call: Call) -> float:
        """Seconds from the call to the dump, or to its end if it has failed."""
        return (call.ended or self.dump.time) - call.queued


def views_of(dumps: Iterable[Dump]) -> dict[str, dict[int, _View]]:
    """By job of the group and rank; of several dumps of one rank the latest. Raises InvalidArgumentError."""
    groups: dict[str, dict[int, _View]] = defaultdict(dict)
    for dump in dumps:
        by_id: dict[int, _View] = {}
        for group in dump.groups:
            view = _View(dump, group)
            other = next(iter(groups[group.job].values()), view)
            if other.group.world_size != group.world_size:
                raise InvalidArgumentError(
                    f"the dumps of rank {other.group.rank} and rank {group.rank} say that group '{group.name}' has "
                    f"{other.group.world_size} and {group.world_size} ranks: one of them is not what its process wrote"
                )
            before = groups[group.job].get(group.rank)
            if before is None or before.dump.time <= dump.time:
                groups[group.job][group.rank] = view
            by_id[group.id] = view
        for call in dump.calls:
            own = by_id.get(call.group)
            if own is None or call.state == "passed on":
                continue
            if call.kind == "send/recv":
                own.pairs.append(call)
            elif call.kind == "collective" and call.seq is not None:
                own.calls[call.seq] = call
    return groups


def blame(dumps: Iterable[Dump]) -> list[Verdict]:
    """A verdict for each group, those in which something is wrong first. Raises InvalidArgumentError: a group of dumps
    that cannot be of one job."""
    verdicts = [_Case(views).verdict() for views in views_of(dumps).values()]
    return sorted(verdicts, key=lambda verdict: verdict.kind == "fine")


def _ranks(ranks: Iterable[int]) -> str:
    listed = sorted(ranks)
    if len(listed) == 1:
        return f"rank {listed[0]}"
    if len(listed) > _RANKS_NAMED:
        return f"ranks {', '.join(map(str, listed[:_RANKS_NAMED]))} and {len(listed) - _RANKS_NAMED} more"
    return f"ranks {', '.join(map(str, listed[:-1]))} and {listed[-1]}"


def _have(ranks: Iterable[int], one: str = "has", more: str = "have") -> str:
    return one if len(list(ranks)) == 1 else more


def _details(call: Call) -> str:
    """Of "all_reduce(sum, float32, 1000 elements)" what is in the brackets, with them; nothing for a barrier."""
    inner = call.text.split("(", 1)[1]
    return f" ({inner}" if inner != ")" else ""


class _Case:
    """One group, and all that its ranks have recorded of it."""

    def __init__(self, views: dict[int, _View]) -> None:
        self.views = views
        first = views[min(views)]
        self.group = first.group
        self.absent = [rank for rank in range(self.group.world_size) if rank not in views]
        # Numbers that every dump may still have: what is older was overwritten somewhere.
        self.numbers = sorted({seq for view in views.values() for seq in view.calls})

    def verdict(self) -> Verdict:
        for look in (self._mismatch, self._under_way, self._pairs, self._failed):
            found = look()
            if found is not None:
                return found
        return self._fine()

    def _says(self, kind: str, ranks: Iterable[int], seq: int | None, sentence: str) -> Verdict:
        return Verdict(
            job=self.group.job,
            group=self.group.name,
            kind=kind,
            ranks=tuple(sorted(ranks)),
            seq=seq,
            sentence=sentence,
        )

    def _name(self, rank: int) -> str:
        hosts = next((view.group.hosts for view in self.views.values() if view.group.hosts), ())
        return f"rank {rank} ({hosts[rank]})" if rank < len(hosts) else f"rank {rank}"

    def _names(self, ranks: Iterable[int]) -> str:
        return ", ".join(self._name(rank) for rank in sorted(ranks)[:_RANKS_NAMED])

    @property
    def _where(self) -> str:
        return f"group '{self.group.name}'"

    def _call_at(self, seq: int) -> dict[int, Call]:
        return {rank: view.calls[seq] for rank, view in self.views.items() if seq in view.calls}

    def _last_of(self, rank: int) -> str:
        view = self.views[rank]
        if not view.called:
            return "it has called nothing"
        call = view.calls.get(view.called - 1)
        if call is None:
            return f"its last was #{view.called - 1}"
        state = "which it is still in" if call.under_way else call.state
        return f"its last was #{call.seq}, {call.text}, {state}"

    def _since(self, calls: dict[int, Call]) -> str:
        waited = max(self.views[rank].since(call) for rank, call in calls.items())
        return f"{waited:.1f} s"

    def _no_dump(self) -> str:
        if not self.absent:
            return ""
        return (
            f"; {_ranks(self.absent)} of {self.group.world_size} left no dump ({self._names(self.absent)}: ended, "
            "stopped, or its file is not here)"
        )

    def row(self, rank: int) -> list[str]:
        """Host, collectives called, and the oldest call that is under way, or else the last."""
        hosts = self.group.hosts
        host = hosts[rank] if rank < len(hosts) else ""
        if rank in self.absent:
            return [host, "", "", "no dump", "", ""]
        view = self.views[rank]
        under_way = [call for call in (*view.calls.values(), *view.pairs) if call.under_way]
        last = under_way or [call for call in view.calls.values() if call.seq == view.called - 1]
        if not last:
            return [host, str(view.called), "", "", "", ""]
        call = last[0]
        lasted = f"{view.since(call):.3f} s"
        return [host, str(view.called), f"#{call.seq} {call.text}", call.state, lasted, ", ".join(call.waits_for)]

    # ------------------------------------------------------------ what can be wrong

    def _mismatch(self) -> Verdict | None:
        """The first collective that the ranks called differently. (What all have gone beyond was told to them.)"""
        last = min(view.called for view in self.views.values()) - 1
        for seq in self.numbers:
            if seq < last:
                continue
            calls = self._call_at(seq)
            by_text: dict[str, list[int]] = defaultdict(list)
            for rank, call in calls.items():
                by_text[call.text].append(rank)
            if len(by_text) < 2:
                continue
            most = max(by_text, key=lambda text: len(by_text[text]))
            odd = {text: ranks for text, ranks in by_text.items() if text != most}
            others = "; ".join(f"{_ranks(ranks)} called {text}" for text, ranks in odd.items())
            sentence = f"{others} as #{seq} of {self._where}, where {_ranks(by_text[most])} called {most}"
            return self._says("mismatch", [rank for ranks in odd.values() for rank in ranks], seq, sentence)
        return None

    def _under_way(self) -> Verdict | None:
        """The oldest collective that a rank is still in."""
        for seq in self.numbers:
            calls = self._call_at(seq)
            waiting = {rank: call for rank, call in calls.items() if call.under_way}
            if not waiting:
                continue
            behind = [rank for rank, view in self.views.items() if view.called <= seq]
            if behind:
                return self._behind("behind", behind, waiting, seq)
            done = [rank for rank in calls if calls[rank].state == "done"]
            if done:
                return self._stuck(waiting, done, seq)
            if self.absent:
                return self._missing(waiting, seq)
            return self._all_wait(waiting, seq)
        return None

    def _behind(self, kind: str, behind: list[int], waiting: dict[int, Call], seq: int) -> Verdict:
        call = next(iter(waiting.values()))
        verb = "wait in" if kind == "behind" else "have given up"
        sentence = (
            f"{self._names(behind)} {_have(behind, 'is', 'are')} behind: {_have(behind, 'it', 'they')} "
            f"{_have(behind)} not called {call.collective} #{seq} of {self._where}{_details(call)}, which "
            f"{_ranks(waiting)} {_have(waiting, verb.replace('have', 'has').replace('wait', 'waits'), verb)} "
            f"{'since' if kind == 'behind' else 'after'} {self._since(waiting)}"
        )
        if len(behind) == 1:
            sentence += f"; {self._last_of(behind[0])}"
        return self._says("behind", behind, seq, sentence + self._no_dump())

    def _stuck(self, waiting: dict[int, Call], done: list[int], seq: int) -> Verdict:
        rank = min(waiting)
        call = waiting[rank]
        owners = f", waiting for {', '.join(call.waits_for)}" if call.waits_for else ""
        sentence = (
            f"{self._names(waiting)} {_have(waiting, 'is', 'are')} behind: {_have(waiting, 'it is', 'they are')} still "
            f"in {call.collective} #{seq} of {self._where}{_details(call)} since {self._since(waiting)}{owners}, which "
            f"{_ranks(done)} {_have(done)} done"
        )
        return self._says("stuck", waiting, seq, sentence + self._no_dump())

    def _missing(self, waiting: dict[int, Call], seq: int) -> Verdict:
        call = next(iter(waiting.values()))
        late = next((call.late for call in waiting.values() if call.late), None)
        sentence = (
            f"all ranks that left a dump wait in {call.collective} #{seq} of {self._where}{_details(call)} since "
            f"{self._since(waiting)}{self._no_dump()}"
        )
        if late is not None:
            sentence += f"; a reducer said: {late}"
        return self._says("missing", self.absent, seq, sentence)

    def _all_wait(self, waiting: dict[int, Call], seq: int) -> Verdict:
        call = next(iter(waiting.values()))
        shared = set.intersection(*({name.split(" (")[0] for name in one.waits_for} for one in waiting.values()))
        everybody = len(waiting) == self.group.world_size
        who = f"all {len(waiting)} ranks" if everybody else _ranks(waiting)
        owners = f" and wait for {', '.join(sorted(shared))}" if shared else ", and it is under way"
        sentence = (
            f"nobody is behind: {who} {_have(waiting)} called {call.collective} #{seq} of {self._where}"
            f"{_details(call)}{owners}, since {self._since(waiting)}"
        )
        return self._says("waiting", waiting, seq, sentence)

    def _pairs(self) -> Verdict | None:
        """A send or a receive whose other end has not come."""
        found = [
            (self._pair(rank, call), rank)
            for rank, view in sorted(self.views.items())
            for call in view.pairs
            if call.under_way
        ]
        others = [verdict for verdict, rank in found if verdict.ranks != (rank,)]
        return next(iter(others or [verdict for verdict, _ in found]), None)

    def _pair(self, rank: int, call: Call) -> Verdict:
        receives = call.to == rank
        peer = call.source if receives else call.to
        what = f"{'recv' if receives else 'send'} {call.text.split('(', 1)[1].rstrip(')')}"
        whom = f"{'from' if receives else 'to'} {'any rank' if peer is None else self._name(peer)}"
        number = f", its #{call.seq}" if call.seq is not None else ""
        sentence = (
            f"{self._name(rank)} waits since {self.views[rank].since(call):.1f} s in {what} {whom}, tag {call.tag}"
            f"{number}, in {self._where}"
        )
        if peer is None or call.seq is None:
            return self._says("sending", [rank], call.seq, sentence)
        verb = "sent" if receives else "received"
        if peer not in self.views:
            return self._says("sending", [peer], call.seq, sentence + self._no_dump())
        same = (call.source, call.to, call.tag, call.seq)
        there = [c for c in self.views[peer].pairs if (c.source, c.to, c.tag, c.seq) == same]
        if not there:
            return self._says("sending", [peer], call.seq, f"{sentence}, which {self._name(peer)} has not {verb}")
        sentence += f", which {self._name(peer)} has {'in hand' if there[0].under_way else there[0].state}"
        return self._says("sending", [rank], call.seq, sentence)

    def _failed(self) -> Verdict | None:
        """The last collective that failed: nothing is under way."""
        for seq in reversed(self.numbers):
            calls = self._call_at(seq)
            failed = {rank: call for rank, call in calls.items() if call.state == "failed"}
            if not failed:
                continue
            behind = [rank for rank, view in self.views.items() if view.called <= seq]
            if behind:
                return self._behind("failed", behind, failed, seq)
            rank = min(failed)
            sentence = (
                f"{failed[rank].collective} #{seq} of {self._where}{_details(failed[rank])} failed on "
                f"{_ranks(failed)}: {failed[rank].error}"
            )
            return self._says("failed", self.absent or failed, seq, sentence + self._no_dump())
        return None

    def _fine(self) -> Verdict:
        called = {view.called for view in self.views.values()}
        if len(called) == 1:
            count = called.pop()
            call = self._call_at(count - 1)
            last = f"#{count - 1}, {next(iter(call.values())).text}" if call else f"#{count - 1}"
            have = f"done {last}, and called nothing since" if count else "called no collective"
            who = f"all {len(self.views)} ranks" if not self.absent else _ranks(self.views)
            sentence = f"nobody is behind in {self._where}: {who} {_have(self.views)} {have}"
        else:
            sentence = (
                f"nobody waits in {self._where}: its ranks have called {min(called)} to {max(called)} collectives "
                "(their dumps are of different moments)"
            )
        return self._says("fine", self.views, None, sentence + self._no_dump())


def tables(dumps: Iterable[Dump]) -> list[Table]:
    """A table for each group: how far every rank is. Raises as `blame`."""
    all_tables = []
    for views in views_of(dumps).values():
        case = _Case(views)
        table = Table("rank", "host", "called", "last", "state", "for", "waits for", title=Text(case.group.name))
        for rank in range(case.group.world_size):
            table.add_row(str(rank), *map(Text, case.row(rank)))
        all_tables.append(table)
    return all_tables
