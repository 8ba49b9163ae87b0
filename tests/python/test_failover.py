"""Standalone reducers that die in the middle of training: nobody fails, and no bit changes (docs/protocol.md)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, init_group, ready_address, start_reducer
from test_backend_answer import contribution

import reducer


@contextlib.contextmanager
def killable_reducers(count: int) -> Iterator[tuple[list[subprocess.Popen[str]], str]]:
    """`count` reducers, and REDUCER_SERVERS."""
    processes = [start_reducer() for _ in range(count)]
    try:
        yield processes, ",".join(ready_address(process) for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def reduce_and_check(seconds: float, counts: list[int]) -> tuple[int, float]:
    """All-reduces in place, several under way, each checked to the bit; how many, and the longest pause."""
    n = dist.get_world_size()
    expected = {}
    for count in counts:
        total = contribution(0, count, count, torch.float32)
        for rank in range(1, n):
            total = total + contribution(rank, count, count, torch.float32)
        expected[count] = total
    mine = {count: contribution(dist.get_rank(), count, count, torch.float32) for count in counts}
    done = 0
    longest = 0.0
    going = torch.ones(1)
    end = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        tensors = {count: mine[count].clone() for count in counts}
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors.values()]:
            work.wait()
        for count, tensor in tensors.items():
            assert torch.equal(tensor, expected[count]), f"{count} elements after {done} rounds"
        done += 1
        going.fill_(1.0 if time.monotonic() < end else 0.0)
        dist.all_reduce(going, op=dist.ReduceOp.MIN)  # all stop at the same round
        longest = max(longest, time.monotonic() - began)
        if not going.item():
            return done, longest


@pytest.mark.parametrize(
    ("algorithm", "servers", "transport"),
    [
        ("server", 3, "auto"),
        ("server", 3, "grpc"),
        ("mixed", 2, "auto"),
        ("auto", 2, "auto"),
    ],
)
def test_reducers_die_one_after_the_other_and_the_training_goes_on(
    algorithm: str, servers: int, transport: str
) -> None:
    with killable_reducers(servers) as (processes, addresses):
        env = [
            {
                "REDUCER_SERVERS": addresses,
                "REDUCER_ALGORITHM": algorithm,
                "REDUCER_TRANSPORT": transport,
                "REDUCER_CHUNK_BYTES": "16KiB",
                "REDUCER_TEST_PLACE": f"host{rank}",
            }
            for rank in range(3)
        ]
        with Ranks(3, env) as ranks:
            ranks.call(reduce_and_check, 0.2, [1000])
            ranks.start([0, 1, 2], reduce_and_check, 1.0 + 0.7 * servers, [7, 5_000, 300_000, 1_000_003])
            for process in processes:
                time.sleep(0.7)
                process.kill()
            rounds = [outcome.value for outcome in ranks.answers([0, 1, 2], 60.0)]
            logs = ranks.logs()
    assert len({done for done, _ in rounds}) == 1
    assert max(longest for _, longest in rounds) < 10.0, rounds
    assert logs.count("reducer: warning") == servers, logs
    assert "by the workers themselves from now on" in logs


def servers_taking_part() -> int:
    """After one more collective, so that nothing is on its way to this rank."""
    dist.all_reduce(torch.ones(1))
    return int(dist.group.WORLD._get_backend(torch.device("cpu")).counters()["servers"])


def wait_for_servers(count: int, seconds: float) -> float:
    """Small collectives until all ranks have `count` standalone reducers; how long that took."""
    began = time.monotonic()
    while True:
        there = torch.tensor([float(servers_taking_part() == count), float(time.monotonic() - began < seconds)])
        dist.all_reduce(there, op=dist.ReduceOp.MIN)
        if there[0].item():
            return time.monotonic() - began
        assert there[1].item(), f"not {count} standalone reducers within {seconds} s"
        time.sleep(0.01)


HEARTBEAT_S = 1.0


def steady(addresses: str, **more: str) -> dict[str, str]:
    return {"REDUCER_SERVERS": addresses, "REDUCER_ALGORITHM": "server", "REDUCER_HEARTBEAT": str(HEARTBEAT_S)} | more


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_a_reducer_that_stops_is_missed_after_a_heartbeat_and_taken_in_when_it_goes_on(transport: str) -> None:
    with (
        killable_reducers(2) as (processes, addresses),
        Ranks(3, steady(addresses, REDUCER_TRANSPORT=transport)) as ranks,
    ):
        ranks.call(reduce_and_check, 0.2, [300_000])
        ranks.start([0, 1, 2], reduce_and_check, 3.0, [7, 300_000])
        time.sleep(0.5)
        processes[0].send_signal(signal.SIGSTOP)
        rounds = [outcome.value for outcome in ranks.answers([0, 1, 2], 60.0)]
        assert ranks.call(servers_taking_part) == [1, 1, 1]
        processes[0].send_signal(signal.SIGCONT)
        ranks.call(wait_for_servers, 2, 20.0)
        ranks.call(reduce_and_check, 0.5, [7, 300_000])
        logs = ranks.logs()
    longest = max(longest for _, longest in rounds)
    assert HEARTBEAT_S * 0.7 < longest < HEARTBEAT_S + 2.0, rounds
    assert "silent for 1 s" in logs
    assert f"{addresses.split(',')[0]} is back, and takes part again" in logs
    assert logs.count("reducer: warning") == 2, logs


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])  # a name is looked up anew
def test_a_reducer_that_is_started_again_is_taken_in(host: str) -> None:
    with (
        killable_reducers(2) as (processes, addresses),
        Ranks(4, steady(addresses.replace("127.0.0.1", host), REDUCER_ALGORITHM="mixed")) as ranks,
    ):
        ranks.call(reduce_and_check, 0.2, [1000])  # all have met at the reducers before these go
        for _ in range(2):
            ranks.start([0, 1, 2, 3], reduce_and_check, 1.0, [7, 300_000])
            time.sleep(0.3)
            for process in processes:  # the workers' own reducers go on alone
                process.kill()
                process.wait()
            ranks.answers([0, 1, 2, 3], 60.0)
            assert ranks.call(servers_taking_part) == [0] * 4
            processes[:] = [start_reducer(listen=address) for address in addresses.split(",")]
            for process in processes:
                ready_address(process)
            ranks.call(wait_for_servers, 2, 20.0)
            ranks.call(reduce_and_check, 0.3, [7, 300_000])
        logs = ranks.logs()
    assert logs.count("is back, and takes part again") == 4, logs


def test_a_reducer_that_is_not_there_yet_is_waited_for_no_longer_than_a_heartbeat() -> None:
    with killable_reducers(2) as (processes, addresses):
        absent = addresses.split(",")[1]
        processes[1].kill()
        processes[1].wait()
        with Ranks(3, steady(addresses)) as ranks:
            began = time.monotonic()
            ranks.call(reduce_and_check, 0.2, [7, 300_000])
            assert time.monotonic() - began < HEARTBEAT_S + 5.0
            assert ranks.call(servers_taking_part) == [1, 1, 1]
            processes[1] = start_reducer(listen=absent)
            ready_address(processes[1])
            ranks.call(wait_for_servers, 2, 20.0)
            ranks.call(reduce_and_check, 0.2, [7, 300_000])
            logs = ranks.logs()
    assert f"lost the reducer at {absent}" in logs and "did not answer within 1.0 s" in logs, logs


def test_a_reducer_that_is_told_to_stop_hands_over_at_once() -> None:
    with killable_reducers(2) as (processes, addresses), Ranks(3, steady(addresses)) as ranks:
        ranks.start([0, 1, 2], reduce_and_check, 1.5, [7, 300_000])
        time.sleep(0.5)
        processes[0].terminate()
        assert processes[0].wait(10) == 0
        rounds = [outcome.value for outcome in ranks.answers([0, 1, 2], 60.0)]
        logs = ranks.logs()
        assert processes[0].stdout is not None
        assert "reducer stopped\n" in processes[0].stdout.read()
    assert max(longest for _, longest in rounds) < 2.0, rounds
    assert "the reducer was told to stop" in logs


def end_and_begin_again(pid: int) -> float:
    """How long the end of the default group takes when a reducer has just been stopped, which nobody has noticed;
    then that goes on, and there is another group."""
    dist.barrier()
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    if rank == 0:
        os.kill(pid, signal.SIGSTOP)
        store.set("stopped", "")
    store.wait(["stopped"])
    began = time.monotonic()
    dist.destroy_process_group()
    took = time.monotonic() - began
    if rank == 0:
        os.kill(pid, signal.SIGCONT)
    init_group("again")
    return took


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_a_reducer_that_is_silent_does_not_hold_up_the_end_of_a_group(transport: str) -> None:
    with (
        killable_reducers(2) as (processes, addresses),
        Ranks(3, steady(addresses, REDUCER_TRANSPORT=transport, REDUCER_HEARTBEAT="30")) as ranks,
    ):
        ranks.call(reduce_and_check, 0.2, [7, 300_000])
        took = ranks.call(end_and_begin_again, processes[0].pid)
        assert max(took) < 1.0, took
        ranks.call(reduce_and_check, 0.2, [7, 300_000])
        assert ranks.call(servers_taking_part) == [2, 2, 2]
        logs = ranks.logs()
    assert "reducer: warning" not in logs, logs


def test_a_worker_that_stops_is_missed_after_a_heartbeat() -> None:
    with killable_reducers(2) as (_, addresses), Ranks(4, steady(addresses)) as ranks:
        ranks.call(reduce_and_check, 0.2, [1000])
        os.kill(ranks.pid(2), signal.SIGSTOP)
        began = time.monotonic()
        outcomes = ranks.try_call(reduce_and_check, 1.0, [1000], only=[0, 1, 3])
        took = time.monotonic() - began
        os.kill(ranks.pid(2), signal.SIGCONT)
    assert took < HEARTBEAT_S + 4.0
    for outcome in outcomes:
        assert outcome.kind == "DistBackendError", outcome
        assert "rank 2" in outcome.trace and "silent for 1 s" in outcome.trace, outcome.trace


def test_without_failover_a_lost_reducer_ends_the_group_and_nothing_is_kept() -> None:
    with killable_reducers(2) as (processes, addresses), Ranks(2, steady(addresses, REDUCER_FAILOVER="0")) as ranks:
        ranks.call(reduce_and_check, 0.2, [1000])
        processes[0].kill()
        outcomes = ranks.try_call(reduce_and_check, 5.0, [1000])
        for outcome in outcomes:
            assert outcome.kind == "DistBackendError"
            assert f"the reducer at {addresses.split(',')[0]} is gone" in outcome.trace


_followed: dist.ProcessGroup | None = None


def test_a_group_that_follows_another_knows_who_is_away() -> None:
    with killable_reducers(2) as (processes, addresses), Ranks(3) as ranks:
        ranks.call(be_followed, addresses)
        processes[0].kill()
        ranks.call(sum_in_first_group, 20)
        # It would wait for REDUCER_CONNECT_TIMEOUT.
        assert max(ranks.call(follow, addresses)) < 10.0


def be_followed(addresses: str) -> None:
    global _followed
    _followed = dist.new_group(pg_options=reducer.Options(servers=addresses, algorithm="server"))
    sum_in_first_group(1)


def sum_in_first_group(times: int) -> None:
    for _ in range(times):
        dist.all_reduce(torch.ones(300_000), group=_followed)


def follow(addresses: str) -> float:
    """The next group is made, and the first destroyed before the next has looked around; how long its first call is."""
    group = dist.new_group(pg_options=reducer.Options(servers=addresses, algorithm="server"))
    dist.destroy_process_group(_followed)
    began = time.monotonic()
    dist.all_reduce(torch.ones(1_000_003), group=group)
    return time.monotonic() - began


def test_a_reducer_that_two_groups_use() -> None:
    with killable_reducers(2) as (processes, addresses):
        env = {"REDUCER_SERVERS": addresses, "REDUCER_ALGORITHM": "server"}
        with Ranks(4, env) as ranks:
            ranks.start([0, 1, 2, 3], two_groups, 2.0)
            time.sleep(0.8)
            os.kill(processes[0].pid, signal.SIGKILL)
            assert all(outcome.value > 0 for outcome in ranks.answers([0, 1, 2, 3], 60.0))


def two_groups(seconds: float) -> int:
    rank = dist.get_rank()
    halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = halves[rank % 2]
    done = 0
    end = time.monotonic() + seconds
    going = torch.ones(1)
    while going.item():
        for group, size, value in ((mine, 2, 100_000), (dist.group.WORLD, 4, 50_000)):
            tensor = torch.full((value,), float(rank + 1))
            dist.all_reduce(tensor, group=group)
            total = sum(range(1, 5)) if size == 4 else 2 * (rank % 2 + 1) + 2
            assert torch.equal(tensor, torch.full((value,), float(total)))
        done += 1
        going.fill_(1.0 if time.monotonic() < end else 0.0)
        dist.all_reduce(going, op=dist.ReduceOp.MIN)
    return done
