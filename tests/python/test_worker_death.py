"""A worker that dies or does not come: every other rank says who it is, how it went, and what it joined last."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from ranks import Outcome, Ranks

WORKERS = 4
WITHIN_S = 5.0

Reducers = Callable[..., list[str]]


def environment(way: str, reducers: Reducers) -> list[dict[str, str]]:
    """By rank. "local": shared memory; "two levels": pairs of ranks on each of two hosts; "grpc": direct, by gRPC."""
    if way == "local":
        return [{}] * WORKERS
    env = {"REDUCER_ALGORITHM": way if way in ("direct", "server", "mixed") else "direct"}
    if way == "grpc":
        env["REDUCER_TRANSPORT"] = "grpc"
    if way in ("server", "mixed"):
        env["REDUCER_SERVERS"] = ",".join(reducers(2))
    per_host = 2 if way == "two levels" else 1
    return [{**env, "REDUCER_TEST_PLACE": f"host{rank // per_host}"} for rank in range(WORKERS)]


def reduce_often(times: int, count: int) -> None:
    for _ in range(times):
        dist.all_reduce(torch.ones(count))


def reduce_once(count: int) -> tuple[str, float]:
    """The error of one more all-reduce, and when it came."""
    try:
        dist.all_reduce(torch.ones(count))
    except dist.DistBackendError as error:
        return str(error), time.monotonic()
    return "", time.monotonic()


def check_errors(outcomes: list[Outcome], killed_at: float, dead: str, last: str) -> None:
    for outcome in outcomes:
        assert not outcome.kind, outcome.trace
        text, ended_at = outcome.value
        assert ended_at - killed_at < WITHIN_S
        assert dead in text
        assert "was lost (" in text
        assert f"; the last collective it joined was {last}" in text


@contextlib.contextmanager
def mortal_ranks(way: str, reducers: Reducers) -> Iterator[Ranks]:
    ranks = Ranks(WORKERS, environment(way, reducers))
    try:
        yield ranks
    finally:
        ranks.kill()


def name_of(ranks: Ranks, rank: int) -> str:
    return f"rank {rank} ({socket.gethostname()}:{ranks.pid(rank)})"


@pytest.mark.parametrize("victim", [0, 2, 3])
@pytest.mark.parametrize("way", ["direct", "server", "local"])
def test_every_survivor_names_the_dead_rank_and_its_last_collective(way: str, victim: int, reducers: Reducers) -> None:
    """The others wait for it in their next call."""
    survivors = [rank for rank in range(WORKERS) if rank != victim]
    with mortal_ranks(way, reducers) as ranks:
        ranks.call(reduce_often, 5, 1000)
        ranks.start(survivors, reduce_once, 1000)
        killed_at = time.monotonic()
        dead = name_of(ranks, victim)
        ranks.kill_rank(victim)
        outcomes = ranks.answers(survivors, 30.0)
        check_errors(outcomes, killed_at, dead, "#4, all_reduce(sum, float32, 1000 elements)")
        # It stays so.
        for outcome in ranks.try_call(reduce_once, 1000, only=survivors):
            assert dead in outcome.value[0]


@pytest.mark.parametrize("way", ["mixed", "two levels", "grpc"])
def test_a_death_in_the_other_ways(way: str, reducers: Reducers) -> None:
    count = 500_000  # enough for two levels
    with mortal_ranks(way, reducers) as ranks:
        ranks.call(reduce_often, 3, count)
        ranks.start([0, 2, 3], reduce_once, count)
        killed_at = time.monotonic()
        dead = name_of(ranks, 1)
        ranks.kill_rank(1)
        outcomes = ranks.answers([0, 2, 3], 30.0)
        check_errors(outcomes, killed_at, dead, f"#2, all_reduce(sum, float32, {count} elements)")


def stay_away(seconds: float) -> None:
    """Alive, and not arriving."""
    time.sleep(seconds)
    dist.all_reduce(torch.ones(2))


def wait_for_others() -> None:
    dist.all_reduce(torch.ones(2))


LATE = re.compile(r"reducer: warning: (.*)")


@pytest.mark.parametrize("way", ["direct", "server", "mixed", "local", "two levels"])
def test_who_does_not_come_is_named_once_long_before_the_timeout(way: str, reducers: Reducers) -> None:
    with Ranks(WORKERS, environment(way, reducers), group_timeout_s=6.0) as ranks:
        ranks.call(reduce_often, 4, 1)
        ranks.start([0, 1, 3], wait_for_others)
        ranks.start([2], stay_away, 3.0)
        outcomes = ranks.answers([0, 1, 2, 3], 30.0)
        warnings = LATE.findall(ranks.logs())
        late = name_of(ranks, 2)
    assert not any(outcome.kind for outcome in outcomes), "it came in time"
    assert len(warnings) == 1, warnings
    assert re.fullmatch(
        rf"group 'default', collective #4, all_reduce\(sum, float32, 2 elements\): {re.escape(late)} has not arrived "
        r"for 2\.\d s \(timeout 6 s\)",
        warnings[0],
    )


def send_late(seconds: float) -> None:
    if dist.get_rank() == 0:
        time.sleep(seconds)
        dist.send(torch.ones(3), 1)
    elif dist.get_rank() == 1:
        dist.recv(torch.empty(3), 0)


@pytest.mark.parametrize(("level", "expected"), [("warning", 1), ("error", 0), ("off", 0)])
def test_a_receive_warns_too_unless_warnings_are_off(level: str, expected: int) -> None:
    with Ranks(2, {"REDUCER_LOG": level}, group_timeout_s=3.0) as ranks:
        ranks.call(send_late, 1.5)
        warnings = LATE.findall(ranks.logs())
    assert len(warnings) == expected, warnings
    if expected:
        assert "send/recv from rank 0 to rank 1 tag 0 #0" in warnings[0]
        assert "rank 0 (" in warnings[0]
