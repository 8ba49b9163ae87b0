"""Work objects under load: many at once, groups that overlap, threads, and the interpreter's lock."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

MIB = 2**20


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(4) as all_ranks:
        yield all_ranks


def resident() -> int:
    """This process' resident bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------- a thousand outstanding

MEMBERS = ([0, 1, 2, 3], [0, 1, 2], [1, 2, 3])
OPERATIONS = 1000


def plan() -> list[tuple[int, int]]:
    """Which group and how many elements, call by call; the same on all ranks."""
    dice = random.Random(6)
    sizes = [0, 1, 7, 100, 1000, 5000, 20_000, 100_000]
    return [(dice.randrange(3), dice.choice(sizes) + dice.randrange(3)) for _ in range(OPERATIONS)]


def thousand() -> tuple[int, int, int]:
    """In a rank: bytes of its tensors, growth of resident memory with all under way, and what a second turn leaves."""
    rank = dist.get_rank()
    groups = [dist.new_group(members) for members in MEMBERS]

    def turn() -> tuple[int, int]:
        mine = [(g, count, i) for i, (g, count) in enumerate(plan()) if rank in MEMBERS[g]]
        tensors = [torch.full((count,), float(rank + i % 5)) for _, count, i in mine]
        before = peak = resident()
        works = []
        for (g, _, _), tensor in zip(mine, tensors, strict=True):
            works.append(dist.all_reduce(tensor, group=groups[g], async_op=True))
            if len(works) % 50 == 0:
                peak = max(peak, resident())
        for index, work in enumerate(reversed(works)):
            assert work is not None
            work.wait()
            if index % 50 == 0:
                peak = max(peak, resident())
        for (g, _, i), tensor in zip(mine, tensors, strict=True):
            expected = float(sum(member + i % 5 for member in MEMBERS[g]))
            assert torch.equal(tensor, torch.full_like(tensor, expected)), (g, i)
        return sum(tensor.nbytes for tensor in tensors), max(peak, resident()) - before

    nbytes, growth = turn()
    between = resident()
    turn()
    return nbytes, growth, resident() - between


def test_a_thousand_outstanding_over_three_overlapping_groups(ranks: Ranks) -> None:
    for nbytes, growth, lasting in ranks.call(thousand, timeout_s=120.0):
        assert nbytes > 40 * MIB, "the tensors are too small to tell anything"
        # Windows bound what is in flight: a copy of what is outstanding would be larger than this.
        assert growth < 32 * MIB, f"{growth / MIB:.1f} MiB for tensors of {nbytes / MIB:.1f} MiB"
        assert lasting < 16 * MIB, f"a second turn left {lasting / MIB:.1f} MiB behind"


# ---------------------------------------------------------------- the interpreter's lock


def count_while(block: Any) -> int:
    """How often another Python thread runs while `block` waits."""
    turns, stop = 0, threading.Event()

    def spin() -> None:
        nonlocal turns
        while not stop.wait(0.001):
            turns += 1

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        block()
    finally:
        stop.set()
        thread.join(20)
    return turns


def check_lock() -> None:
    """While a rank waits for rank 0, which comes half a second later, its other threads go on."""
    rank = dist.get_rank()

    def late(call: Any) -> None:
        dist.barrier()
        if rank == 0:
            time.sleep(0.5)  # the lateness itself, not a wait for something
            call()
            return
        began = time.monotonic()
        turns = count_while(call)
        took = time.monotonic() - began
        assert took > 0.3, "nothing was waited for"
        assert turns > 20, f"another thread ran {turns} times in {took:.2f} s"

    def asynchronous(wait: Any) -> None:
        work = dist.all_reduce(torch.ones(10), async_op=True)
        assert work is not None
        wait(work)

    late(lambda: dist.all_reduce(torch.ones(10)))
    late(dist.barrier)
    late(lambda: asynchronous(lambda work: work.wait()))
    late(lambda: asynchronous(lambda work: work.wait(timedelta(seconds=20))))
    late(lambda: asynchronous(lambda work: work.get_future().wait()))
    late(lambda: dist.distributed_c10d._get_default_group().monitored_barrier(timedelta(seconds=20)))
    late(lambda: dist.broadcast(torch.ones(10), 0))


def test_other_threads_run_while_one_waits(ranks: Ranks) -> None:
    ranks.call(check_lock)


# ---------------------------------------------------------------- threads and callbacks


def check_shared_groups() -> None:
    """Three threads, each with a group that shares ranks with the others', and a callback on every result."""
    rank = dist.get_rank()
    groups = [dist.new_group(members) for members in MEMBERS]
    failures: list[BaseException] = []
    called = [0] * len(groups)

    def run(index: int) -> None:
        try:
            futures = []
            for i in range(40):
                tensor = torch.full((300 * i + 1,), float(rank + index))
                work = dist.all_reduce(tensor, group=groups[index], async_op=True)
                assert work is not None

                def check(future: Any, i: int = i) -> int:
                    expected = float(sum(member + index for member in MEMBERS[index]))
                    assert torch.equal(future.value()[0], torch.full((300 * i + 1,), expected))
                    called[index] += 1
                    return i

                futures.append(work.get_future().then(check))
            assert [future.wait() for future in futures] == list(range(40))
        except BaseException as error:  # for the main thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i, members in enumerate(MEMBERS) if rank in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
        assert not thread.is_alive()
    assert not failures, failures
    assert called == [40 if rank in members else 0 for members in MEMBERS]


def test_overlapping_groups_in_threads(ranks: Ranks) -> None:
    ranks.call(check_shared_groups)


def check_failed_callback() -> None:
    """An exception in a callback goes to whoever waits for it, and the group goes on."""
    work = dist.all_reduce(torch.ones(3), async_op=True)
    assert work is not None

    def broken(future: Any) -> None:
        raise ValueError("the callback does not like it")

    with pytest.raises(Exception, match="the callback does not like it"):
        work.get_future().then(broken).wait()
    assert work.is_success()
    tensor = torch.ones(3)
    dist.all_reduce(tensor)
    assert torch.equal(tensor, torch.full((3,), float(dist.get_world_size())))


def test_a_callback_that_raises(ranks: Ranks) -> None:
    ranks.call(check_failed_callback)


def check_titles() -> set[str]:
    """In a rank: the titles of what the existing test of the profiler does not call."""
    n, rank = dist.get_world_size(), dist.get_rank()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dist.reduce(torch.ones(4), 0)
        dist.all_gather([torch.empty(2) for _ in range(n)], torch.ones(2))
        dist.all_gather_into_tensor(torch.empty(2 * n), torch.ones(2))
        dist.reduce_scatter(torch.empty(2), [torch.ones(2) for _ in range(n)])
        dist.reduce_scatter_tensor(torch.empty(2), torch.ones(2 * n))
        dist.gather(torch.ones(2), [torch.empty(2) for _ in range(n)] if rank == 0 else None)
        dist.scatter(torch.empty(2), [torch.ones(2) for _ in range(n)] if rank == 0 else None)
        dist.all_to_all_single(torch.empty(n), torch.ones(n))
        dist.all_to_all([torch.empty(1) for _ in range(n)], [torch.ones(1) for _ in range(n)])
        if rank == 0:
            dist.send(torch.ones(1), 1)
        elif rank == 1:
            dist.recv(torch.ones(1), 0)
    return {event.key for event in profile.key_averages() if event.key.startswith("reducer:")}


def test_profiler_titles(ranks: Ranks) -> None:
    results = ranks.call(check_titles)
    wanted = {"reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "gather"}
    wanted |= {"scatter", "all_to_all_single", "all_to_all"}
    for rank, names in enumerate(results):
        expected = wanted | ({"send"} if rank == 0 else {"recv"} if rank == 1 else set())
        assert {f"reducer:{name}" for name in expected} <= names, names
