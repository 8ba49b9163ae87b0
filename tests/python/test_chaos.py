"""The reliability benchmarks: their schedules, sums and verdicts by themselves, and each of them on one small job."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from reducer._bench.team import LocalTeam, TeamError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

chaos: Any = importlib.import_module("chaos")
recovery: Any = importlib.import_module("recovery")
retention: Any = importlib.import_module("retention")
soak: Any = importlib.import_module("soak")
calls: Any = importlib.import_module("reliability_calls")
faults: Any = importlib.import_module("reliability_faults")
ranks: Any = importlib.import_module("reliability_team")
values: Any = importlib.import_module("reliability_values")

WORKERS = 4
REDUCERS = 2
MIB = 1 << 20


# ---------------------------------------------------------------- schedules


def test_a_schedule_is_its_seeds_and_leaves_all_reducers_up() -> None:
    plan = faults.schedule(5, 3, 600.0, 1.5)
    assert plan == faults.schedule(5, 3, 600.0, 1.5) != faults.schedule(6, 3, 600.0, 1.5)
    assert {fault.kind for fault in plan} == set(faults.Kind)
    assert [fault.at for fault in plan] == sorted(fault.at for fault in plan)
    assert plan[-1].at < 600.0
    for reducer in range(3):
        state = "up"
        after = {("up", "KILL"): "dead", ("up", "STOP"): "stopped", ("up", "DRAIN"): "dead"}
        after |= {("stopped", "KILL"): "dead", ("stopped", "GO_ON"): "up", ("dead", "START"): "up"}
        for fault in plan:
            if fault.reducer == reducer:
                state = after[state, fault.kind.name]  # a KeyError: it does not follow from what was before
        assert state == "up"


def test_a_schedule_strikes_several_at_once_and_one_that_has_just_come_back() -> None:
    plan = faults.schedule(5, 3, 600.0, 1.5)
    struck: dict[float, int] = {}
    for fault in plan:
        if fault.kind.takes_away:
            struck[fault.at] = struck.get(fault.at, 0) + 1
    assert {1, 2, 3} == set(struck.values())
    returns = [fault for fault in plan if not fault.kind.takes_away]
    again = [
        strike.at - back.at
        for back in returns
        for strike in plan
        if strike.kind.takes_away and strike.reducer == back.reducer and 0 <= strike.at - back.at < 0.5
    ]
    assert len(again) > 10


def test_every_kind_of_group_has_its_time() -> None:
    plan = chaos.phases(480.0, ["server", "mixed"], ["one", "two"], 60.0)
    assert len(plan) == 8 and sum(phase.seconds for phase in plan) == pytest.approx(480.0)
    assert len({phase.name for phase in plan}) == 8
    assert sum(phase.seconds for phase in plan if phase.levels == "one") == pytest.approx(240.0)
    assert plan[0].places(4) == ["host0", "host1", "host2", "host3"]
    assert plan[2].places(4) == ["host0", "host0", "host1", "host1"]
    assert len(chaos.phases(6.0, ["server"], ["one"], 60.0)) == 1


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize("dtype", list(values.DTYPES.values()), ids=str)
def test_the_sum_follows_the_places_and_scales_to_the_bit(dtype: torch.dtype) -> None:
    parts = [values.contribution(rank, 10_000, dtype) for rank in range(4)]
    apart = values.placed_sum(parts, ["a", "b", "c", "d"])
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    assert values.same_bits(apart, total.to(dtype))
    pairs = [(parts[0].float() + parts[2]).to(dtype), (parts[1].float() + parts[3]).to(dtype)]
    in_pairs = values.placed_sum(parts, ["a", "b", "a", "b"])
    assert values.same_bits(in_pairs, (pairs[0].float() + pairs[1]).to(dtype))
    assert not values.same_bits(in_pairs, apart)
    for number in range(13):
        scale = values.scale_of(number)
        scaled = values.placed_sum([part * scale for part in parts], ["a", "b", "c", "d"])
        assert values.same_bits(scaled, apart * scale)
        assert values.same_bits(scaled, apart * values.scale_of(number + 1)) is False


def test_one_wrong_bit_is_wrong() -> None:
    total = values.contribution(0, 1003, torch.bfloat16)
    other = total.clone()
    other.view(torch.int16)[1002] ^= 1
    started = calls.Started(None, None, lambda: (other, total))
    assert started.check() == (2006, False)
    assert calls.Started(None, None, lambda: (total.clone(), total)).check() == (2006, True)


def test_all_ranks_draw_the_same_calls_and_every_kind() -> None:
    drawn = [calls.draw_calls(random.Random(3), 7, 4) for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0][0].number == 7
    dice = random.Random(3)
    many = [call for _ in range(200) for call in calls.draw_calls(dice, 0, 4)]
    assert {call.kind for call in many} == set(calls._KINDS)
    assert {call.count for call in many} == set(calls._COUNTS)
    assert {call.root for call in many} == {0, 1, 2, 3}


# ---------------------------------------------------------------- verdicts


def test_pauses_are_those_of_batches_that_a_fault_met() -> None:
    kill, start = faults.Fault(0.0, 1, faults.Kind.KILL), faults.Fault(0.0, 1, faults.Kind.START)
    outcome = chaos.Outcome([faults.Done(kill, 10.0, 10.0), faults.Done(start, 12.0, 12.1)])
    outcome.batches = [(9.0, 0.5), (9.9, 0.3), (10.05, 0.7), (10.9, 5.0)]
    assert outcome.pauses() == [0.7]
    outcome.longest = {"seconds": 1.5, "began": 10.9, "call": "#1"}
    assert [str(done) for done in outcome.beside_longest()] == ["reducer 1 kill -9", "reducer 1 started again"]


def test_the_next_round_counts_and_the_one_under_way_does_not() -> None:
    replies = [{"rounds": [(0.9, 1.1), (1.1, 1.4), (1.4, 9.0)]}, {"rounds": [(0.95, 1.2), (1.2, 1.5)]}]
    assert recovery.recovered_after(replies, 1.0) == pytest.approx(0.5)
    with pytest.raises(recovery.RecoveryError, match="rank 1"):
        recovery.recovered_after(replies, 1.3)


def test_memory_that_grows_and_descriptors_that_stay_open_are_faults() -> None:
    flat = soak.Course("worker 0", 1, [300 * MIB] * 10 + [250 * MIB + 4096 * n for n in range(90)], [20, 20])
    assert flat.faults == []
    leaking = soak.Course("worker 1", 1, [250 * MIB + (n * MIB) // 20 for n in range(100)], [20, 21])
    assert len(leaking.faults) == 2 and "grew" in leaking.faults[0] and "21" in leaking.faults[1]
    run = soak.Run("network", 1, 1, [leaking], wrong=3)
    assert [fault.split(":")[0] for fault in run.faults] == ["network"] * 3


def test_the_cost_is_the_median_of_ratios_within_turns() -> None:
    case = retention.Case(MIB)
    case.blocks = {"default": [1.1, 2.2, 3.3], "failover off": [1.0, 2.0, 3.0], "checksum on": [2.2, 2.2, 2.2]}
    assert case.retention_cost == pytest.approx(0.1) and case.checksum_cost == pytest.approx(0.0)
    console = Console(width=132)
    with console.capture() as capture:
        console.print(retention.make_table([case], "title"))
    assert "keeping +10.0%" in capture.get() and "missed" in capture.get()


# ---------------------------------------------------------------- a small job


@pytest.fixture(scope="module")
def team() -> Iterator[LocalTeam]:
    with ranks.started_team("test", WORKERS) as started:
        yield started


@pytest.fixture
def reducers() -> Iterator[Any]:
    started = faults.Reducers.start(REDUCERS)
    yield started
    started.close()


def settings(reducers: Any, **more: str) -> dict[str, str]:
    return {"REDUCER_SERVERS": reducers.addresses, "REDUCER_ALGORITHM": "server", "REDUCER_HEARTBEAT": "1"} | more


def test_a_short_storm(team: LocalTeam, reducers: Any) -> None:
    plan = chaos.phases(6.0, ["server", "mixed"], ["one", "two"], 1.0)
    Fault, Kind = faults.Fault, faults.Kind  # noqa: N806
    storm = faults.Storm(
        reducers,
        [
            Fault(0.3, 0, Kind.KILL),
            Fault(0.6, 0, Kind.START),
            Fault(1.5, 1, Kind.DRAIN),
            Fault(1.6, 0, Kind.KILL),
            Fault(1.8, 0, Kind.START),
            Fault(1.9, 1, Kind.START),
            Fault(2.8, 0, Kind.STOP),
            Fault(4.3, 0, Kind.GO_ON),
        ],
    )
    outcome = chaos.run(team, plan, storm, settings(reducers), Console(quiet=True))
    assert len(outcome.faults) == 8
    assert outcome.wrong == [] and outcome.wrong_results == 0
    assert outcome.collectives > 20 and outcome.nbytes > MIB and outcome.owner_changes >= 2
    console = Console(width=120)
    with console.capture() as capture:
        console.print(chaos.make_table(outcome, team.log(0, lines=10_000), 6.0))
    assert "wrong results" in capture.get() and "longest collective" in capture.get()
    assert "0 losses" not in capture.get()
    team.call({"do": "close_group", "name": plan[-1].name}, 30.0)


def test_a_kill_is_timed_and_so_is_the_return(team: LocalTeam, reducers: Any) -> None:
    places = [f"host{rank}" for rank in range(WORKERS)]
    team.call(ranks.opening(recovery.GROUP, settings(reducers), places, 30.0), 60.0)
    times = recovery.measure(team, reducers, 1, 1 << 16, 1, Console(quiet=True))
    assert 0 < times.recoveries[0] < 5.0 and len(times.returns) == 1 and times.wrong == 0
    team.call({"do": "close_group", "name": recovery.GROUP}, 30.0)


def test_a_soak_counts_what_it_did(team: LocalTeam) -> None:
    team.call(ranks.opening("soak", {"REDUCER_ALGORITHM": "local"}, [], 30.0), 60.0)
    run = soak.Run("shared memory", 0, 0, [soak.Course("worker 0", team.pids[0])])
    for _ in range(2):
        soak.do_block(team, run, 100, 2, 1 << 16)
        run.courses[0].sample()
        run.courses[0].count_descriptors()
    assert (run.small, run.large, run.faults) == (200, 4, [])
    assert run.courses[0].resident[0] > MIB and run.courses[0].descriptors[0] > 2
    team.call({"do": "close_group", "name": "soak"}, 30.0)


def test_variants_take_turns(team: LocalTeam, reducers: Any) -> None:
    contenders = retention.open_all(team, reducers.addresses, "server", "tcp")
    case = retention.measure(contenders, 4096, 2)
    assert case.wrong == 0 and all(len(blocks) == 2 for blocks in case.blocks.values())
    for name in contenders:
        team.call({"do": "close_group", "name": name}, 30.0)


def test_a_rank_that_fails_is_told_with_its_log(team: LocalTeam, reducers: Any) -> None:
    """Without failover chaos must fail: last, since the group is broken then."""
    storm = faults.Storm(reducers, [faults.Fault(0.2, 0, faults.Kind.KILL)])
    plan = chaos.phases(5.0, ["server"], ["one"], 60.0)
    with pytest.raises(TeamError, match="is gone"):
        chaos.run(team, plan, storm, settings(reducers, REDUCER_FAILOVER="0"), Console(quiet=True))
    assert "Traceback" in ranks.logs(team)


def test_a_reducer_that_ends_by_itself_is_told(reducers: Any) -> None:
    reducers.servers[1].child.process.kill()
    reducers.servers[1].child.process.wait(10)
    with pytest.raises(faults.FaultError, match="reducer 1 ended by itself"):
        reducers.do(faults.Fault(0.0, 1, faults.Kind.STOP))
    with pytest.raises(faults.FaultError, match="SIGKILL"):
        reducers.check()
