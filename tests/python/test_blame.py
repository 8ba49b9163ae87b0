"""Who is behind: sentences from made-up dumps, in which clocks may lie and files may be missing."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from reducer import recorder
from reducer.blame import Verdict, blame, tables

JOB = "00112233445566778899aabbccddeeff"


def call(seq: int, state: str = "done", **more: Any) -> dict[str, Any]:
    entry = {
        "kind": "collective",
        "seq": seq,
        "collective": "all_reduce",
        "op": "sum",
        "dtype": "float32",
        "count": 1000,
        "bytes": 4000,
        "algorithm": "direct",
        "two_levels": False,
        "state": state,
        "queued": -31.2 if state in ("queued", "started") else -40.0,
        "waits_for": [],
        **more,
    }
    if entry["collective"] in ("broadcast", "barrier"):
        del entry["op"]
    return entry


def pair(source: int | None, to: int, seq: int | None, state: str) -> dict[str, Any]:
    entry = call(0, state, kind="send/recv", to=to, tag=7, collective="send/recv", count=3)
    del entry["op"], entry["seq"]
    if source is not None:
        entry |= {"from": source, "seq": seq}
    return entry


def dump(
    rank: int,
    calls: list[dict[str, Any]],
    *,
    clock: float = 1e9,
    world_size: int = 4,
    called: int | None = None,
    job: str = JOB,
) -> recorder.Dump:
    """A rank's dump, as its file says it; the times of calls are given from the dump on."""
    entries = []
    for number, one in enumerate(calls, 1):
        entries.append({"group": 0, "number": number, **one, "queued": clock + one["queued"]})
        if "ended" in one:
            entries[-1]["ended"] = clock + one["ended"]
    collectives = [one["seq"] for one in calls if one["kind"] == "collective"]
    group = {
        "id": 0,
        "job": job,
        "name": "default",
        "rank": rank,
        "world_size": world_size,
        "hosts": [f"h{r}:{90 + r}" for r in range(world_size)],
        "open": True,
        "called": max(collectives, default=-1) + 1 if called is None else called,
    }
    whole = {
        "format": 1,
        "reason": "signal",
        "time": clock,
        "host": f"h{rank}",
        "pid": 90 + rank,
        "job": job[:8],
        "rank": rank,
        "entries": 1000,
        "recorded": len(entries),
        "groups": [group],
        "calls": entries,
    }
    return recorder.parse(json.dumps(whole), f"rank{rank}.json")


def only(dumps: list[recorder.Dump]) -> Verdict:
    (verdict,) = blame(dumps)
    return verdict


def done(count: int) -> list[dict[str, Any]]:
    return [call(seq) for seq in range(count)]


def test_a_rank_that_has_not_come() -> None:
    # A clock that is an hour ahead, and one that stands in 1970.
    clocks = [1e9, 1e9 + 3600, 1e9, 0.0]
    waiting = [*done(118), call(118, "started")]
    dumps = [dump(rank, done(118) if rank == 2 else waiting, clock=clocks[rank]) for rank in range(4)]
    random.Random(1).shuffle(dumps)
    verdict = only(dumps)
    assert (verdict.kind, verdict.ranks, verdict.seq, verdict.group) == ("behind", (2,), 118, "default")
    assert verdict.sentence == (
        "rank 2 (h2:92) is behind: it has not called all_reduce #118 of group 'default' (sum, float32, 1000 elements), "
        "which ranks 0, 1 and 3 wait in since 31.2 s; its last was #117, all_reduce(sum, float32, 1000 elements), done"
    )


def test_several_that_have_not_come_and_one_that_left_no_dump() -> None:
    verdict = only([dump(0, [*done(3), call(3, "started")]), dump(1, done(3)), dump(3, [])])
    assert (verdict.kind, verdict.ranks) == ("behind", (1, 3))
    assert verdict.sentence.startswith(
        "rank 1 (h1:91), rank 3 (h3:93) are behind: they have not called all_reduce #3 of group 'default' "
        "(sum, float32, 1000 elements), which rank 0 waits in since 31.2 s"
    )
    assert "; rank 2 of 4 left no dump (rank 2 (h2:92): " in verdict.sentence


def test_a_rank_that_is_still_in_what_others_have_done() -> None:
    slow = [*done(2), call(2, "started", waits_for=["rank 0 at 10.0.0.1:7000 (3 chunks)"])]
    verdict = only([dump(0, done(3)), dump(1, slow), dump(2, done(3)), dump(3, done(3))])
    assert (verdict.kind, verdict.ranks, verdict.seq) == ("stuck", (1,), 2)
    assert verdict.sentence == (
        "rank 1 (h1:91) is behind: it is still in all_reduce #2 of group 'default' (sum, float32, 1000 elements) since "
        "31.2 s, waiting for rank 0 at 10.0.0.1:7000 (3 chunks), which ranks 0, 2 and 3 have done"
    )


def test_different_calls() -> None:
    odd = call(5, "started", collective="broadcast", count=10, root=0)
    dumps = [dump(rank, [*done(5), odd if rank == 1 else call(5, "started")]) for rank in range(4)]
    verdict = only(dumps)
    assert (verdict.kind, verdict.ranks, verdict.seq) == ("mismatch", (1,), 5)
    assert verdict.sentence == (
        "rank 1 called broadcast(float32, 10 elements, root 0) as #5 of group 'default', where ranks 0, 2 and 3 called "
        "all_reduce(sum, float32, 1000 elements)"
    )


def test_the_first_difference_counts_and_not_what_follows_from_it() -> None:
    calls = [call(0), call(1, "failed", collective="barrier", count=0, error="different calls")]
    dumps = [dump(0, [call(0), call(1, "failed"), call(2, "started")], world_size=2), dump(1, calls, world_size=2)]
    verdict = only(dumps)
    assert (verdict.kind, verdict.seq) == ("mismatch", 1)


def test_a_difference_that_all_have_gone_beyond_is_over() -> None:
    first = [call(0, "failed"), call(0, "failed", count=1)]
    dumps = [dump(rank, [first[rank], call(1), call(2)], world_size=2) for rank in range(2)]
    assert only(dumps).kind == "failed"


def test_a_missing_dump_is_not_taken_for_a_rank_that_is_behind() -> None:
    late = "group 'default', collective #3: rank 2 (h2:92) has not arrived for 10.1 s (timeout 30 s)"
    dumps = [dump(rank, [*done(3), call(3, "started", late=late)]) for rank in (0, 1, 3)]
    verdict = only(dumps)
    assert (verdict.kind, verdict.ranks, verdict.seq) == ("missing", (2,), 3)
    assert "all ranks that left a dump wait in all_reduce #3" in verdict.sentence
    assert "rank 2 of 4 left no dump (rank 2 (h2:92): " in verdict.sentence
    assert verdict.sentence.endswith(late)


def test_all_wait_for_a_reducer() -> None:
    waits_for = ["the reducer at 10.0.0.9:7000 (2 chunks)"]
    more = ["the reducer at 10.0.0.8:7000 (1 chunk)", "the reducer at 10.0.0.9:7000 (1 chunk)"]
    dumps = [
        dump(rank, [call(0, "started", waits_for=more if rank == 2 else waits_for)], world_size=3) for rank in range(3)
    ]
    verdict = only(dumps)
    assert (verdict.kind, verdict.ranks) == ("waiting", (0, 1, 2))
    assert verdict.sentence == (
        "nobody is behind: all 3 ranks have called all_reduce #0 of group 'default' (sum, float32, 1000 elements) and "
        "wait for the reducer at 10.0.0.9:7000, since 31.2 s"
    )


def test_after_an_error_the_rank_that_never_called_is_named() -> None:
    failed = call(4, "failed", error="timeout after 30.0 s, waiting for rank 2", ended=-1.0)
    dumps = [dump(rank, [*done(4), failed] if rank != 2 else done(4)) for rank in range(4)]
    verdict = only(dumps)
    assert (verdict.kind, verdict.ranks) == ("behind", (2,))
    assert "which ranks 0, 1 and 3 have given up after 39.0 s" in verdict.sentence


def test_an_error_of_all_is_quoted() -> None:
    failed = call(1, "failed", error="rank 3 (h3:93) was lost (its process ended)")
    verdict = only([dump(rank, [call(0), failed]) for rank in range(3)])
    assert (verdict.kind, verdict.ranks) == ("failed", (3,))
    assert verdict.sentence.startswith(
        "all_reduce #1 of group 'default' (sum, float32, 1000 elements) failed on ranks 0, 1 and 2: rank 3 (h3:93) was "
        "lost (its process ended); rank 3 of 4 left no dump"
    )


@pytest.mark.parametrize(
    ("other", "kind", "ranks", "end"),
    [
        ([], "sending", (0,), "which rank 0 (h0:90) has not sent"),
        ([pair(0, 1, 3, "started")], "sending", (0,), "which rank 1 (h1:91) has in hand"),
        ([pair(0, 1, 2, "done"), pair(1, 0, 0, "started")], "sending", (1,), "which rank 1 (h1:91) has not sent"),
        (None, "sending", (0,), "or its file is not here)"),
    ],
)
def test_a_receive_without_its_send(
    other: list[dict[str, Any]] | None, kind: str, ranks: tuple[int, ...], end: str
) -> None:
    dumps = [dump(1, [call(0), pair(0, 1, 3, "started")], world_size=2)]
    if other is not None:
        dumps.append(dump(0, [call(0), *other], world_size=2))
    verdict = blame(sorted(dumps, key=lambda one: -one.rank))[0]
    assert (verdict.kind, verdict.ranks) == (kind, ranks)
    assert verdict.sentence.endswith(end)
    if other == []:
        assert verdict.sentence.startswith(
            "rank 1 (h1:91) waits since 31.2 s in recv float32, 3 elements from rank 0 (h0:90), tag 7, its #3, in "
            "group 'default'"
        )


def test_a_receive_from_any_rank() -> None:
    verdict = only([dump(0, [], world_size=2), dump(1, [pair(None, 1, None, "queued")], world_size=2)])
    assert "recv float32, 3 elements from any rank, tag 7, in group 'default'" in verdict.sentence


def test_nobody_is_behind() -> None:
    verdict = only([dump(rank, done(118)) for rank in range(4)])
    assert (verdict.kind, verdict.sentence) == (
        "fine",
        "nobody is behind in group 'default': all 4 ranks have done #117, all_reduce(sum, float32, 1000 elements), and "
        "called nothing since",
    )
    nothing = only([dump(rank, []) for rank in range(4)])
    assert nothing.sentence.endswith("all 4 ranks have called no collective")
    moments = only([dump(rank, done(3 + rank)) for rank in range(4)])
    assert moments.kind == "fine"
    assert "3 to 6 collectives" in moments.sentence


def test_what_was_overwritten_still_counts() -> None:
    """A small ring: rank 1 has called far more than its dump still has, of other groups."""
    dumps = [dump(0, [call(117), call(118, "started")], world_size=2), dump(1, [], called=118, world_size=2)]
    verdict = only(dumps)
    assert (verdict.kind, verdict.ranks) == ("behind", (1,))
    assert verdict.sentence.endswith("; its last was #117")


def test_groups_are_apart_and_the_latest_dump_of_a_rank_counts() -> None:
    other = "ff" * 16
    dumps = [
        dump(0, done(1), clock=2e9, world_size=2),
        dump(0, [call(0, "started")], clock=1e9, world_size=2),
        dump(1, done(1), world_size=2),
        dump(0, [call(0, "started")], job=other, world_size=2),
        dump(1, [], job=other, world_size=2),
    ]
    assert [(verdict.job, verdict.kind) for verdict in blame(dumps)] == [(other, "behind"), (JOB, "fine")]


def test_the_table_shows_every_rank() -> None:
    dumps = [dump(0, [*done(2), call(2, "started", waits_for=["rank 1 (h1:91)"])], world_size=3)]
    dumps.append(dump(1, done(2), world_size=3))
    (table,) = tables(dumps)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    text = console.export_text()
    assert "#2 all_reduce(sum, float32, 1000 elements)" in text
    assert "rank 1 (h1:91)" in text
    assert "no dump" in text


def test_of_a_folder_with_several_jobs_the_newest_is_read(tmp_path: Path) -> None:
    for age, job in enumerate(("reducer-new", "reducer-old")):
        folder = tmp_path / job
        folder.mkdir()
        for rank in range(2):
            path = folder / f"rank{rank}.json"
            path.write_text("{}")
            stamp = path.stat().st_mtime - 100 * age
            os.utime(path, (stamp, stamp))
    new = [tmp_path / "reducer-new" / f"rank{rank}.json" for rank in range(2)]
    assert recorder.find([tmp_path]) == new
    assert recorder.find([tmp_path / "reducer-new", new[0]]) == [*new, new[0]]
    assert recorder.find([tmp_path / "reducer-old"])[0].parent.name == "reducer-old"
