"""After a worker's death: the others agree on who is left and go on in the same processes, or torchrun starts anew."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Outcome, Ranks, here, standalone_reducers

import reducer
from reducer import _agreement, _door

N = 4
# For a death to be noticed, and for the agreement on it, on a busy machine.
SOON_S = 20.0


@contextmanager
def team(env: dict[str, str] | None = None, *, init: bool = True) -> Iterator[Ranks]:
    """N ranks, of which a test may kill some."""
    ranks = Ranks(N, env, init=init)
    try:
        yield ranks
    finally:
        ranks.kill()


def values(of: int) -> torch.Tensor:
    return torch.randn(50_000, generator=torch.Generator().manual_seed(of))


def use(group: dist.ProcessGroup | None = None) -> list[int]:
    """Who is in the group, in order, by the first numbers; all of it must work, and sums be those of rank order."""
    left: list[int] = [-1] * dist.get_world_size(group)
    dist.all_gather_object(left, here().rank, group=group)
    tensor = values(here().rank)
    dist.all_reduce(tensor, group=group)
    expected = values(left[0])
    for one in left[1:]:
        expected = expected + values(one)
    assert torch.equal(tensor, expected)
    dist.barrier(group)
    return left


def notice() -> None:
    """Calls until a call fails."""
    began = time.monotonic()
    with pytest.raises(dist.DistBackendError, match="lost|gone|left|abort|died"):
        while True:
            dist.all_reduce(torch.ones(10_000))
    assert time.monotonic() - began < SOON_S


def shrink_and_use(timeout: float = SOON_S) -> list[int]:
    """Notices a death, goes on without the dead, with sub-groups."""
    notice()
    group = reducer.shrink(timeout=timeout)
    assert group is dist.group.WORLD
    assert dist.get_rank() == group.rank()
    left = use()
    assert left[dist.get_rank()] == here().rank
    last = dist.get_world_size() - 1
    if last > 0:
        ends = dist.new_group([0, last])
        if dist.get_rank() in (0, last):
            assert use(ends) == [left[0], left[last]]
        dist.broadcast(tensor := torch.full((3,), float(dist.get_rank())), src=last)
        assert tensor[0] == last
    return left


@pytest.mark.parametrize("algorithm", ["local", "direct"])
def test_survivors_go_on_and_again(algorithm: str) -> None:
    with team({"REDUCER_ALGORITHM": algorithm}) as ranks:
        ranks.call(use)
        left = [0, 1, 2, 3]
        for dead in (1, 3, 0):
            ranks.kill_rank(dead)
            left.remove(dead)
            assert ranks.call(shrink_and_use, only=left) == [left] * len(left)


@pytest.mark.parametrize("dead", [[0], [1, 2], [0, 3]])
def test_several_at_once_and_the_first(dead: list[int]) -> None:
    with team({"REDUCER_ALGORITHM": "direct"}) as ranks:
        ranks.call(use)
        left = [rank for rank in range(N) if rank not in dead]
        ranks.start(left, shrink_and_use)
        for rank in dead:
            ranks.kill_rank(rank)
        assert [outcome.value or outcome.trace for outcome in ranks.answers(left, 60.0)] == [left] * len(left)


def test_with_standalone_reducers() -> None:
    """The dead rank's connections do not disturb the new group, which goes through the same reducers."""
    with standalone_reducers(2) as addresses:
        env = {"REDUCER_SERVERS": ",".join(addresses), "REDUCER_ALGORITHM": "server"}
        with team(env) as ranks:
            ranks.call(use)
            ranks.kill_rank(2)
            assert ranks.call(shrink_and_use, only=[0, 1, 3]) == [[0, 1, 3]] * 3
            time.sleep(1.5)  # a reducer closes what the dead rank's group had in it after a second
            assert ranks.call(use, only=[0, 1, 3]) == [[0, 1, 3]] * 3
            # The reducers are not lost: not a word of it.
            assert "reducer: warning" not in ranks.logs(), ranks.logs()


def init_with_own_store(folder: str) -> None:
    """In a rank: the default group by a store that rank 0 holds."""
    at = Path(folder) / "port"
    if here().rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (Path(folder) / "new").write_text(str(store.port))
        (Path(folder) / "new").rename(at)
    else:
        end = time.monotonic() + SOON_S
        while not at.exists():
            assert time.monotonic() < end
            threading.Event().wait(0.01)
        store = dist.TCPStore("127.0.0.1", int(at.read_text()), is_master=False, wait_for_workers=False)
    dist.init_process_group("reducer", store=store, rank=here().rank, world_size=N, timeout=timedelta(seconds=60))
    use()


def test_rank_0_dies_with_the_store(tmp_path: Path) -> None:
    """The new rank 0 holds a new one, and if that dies the next does."""
    with team({"REDUCER_ALGORITHM": "direct"}, init=False) as ranks:
        ranks.call(init_with_own_store, str(tmp_path))
        ranks.kill_rank(0)
        assert ranks.call(shrink_and_use, only=[1, 2, 3]) == [[1, 2, 3]] * 3
        ranks.kill_rank(1)
        assert ranks.call(shrink_and_use, only=[2, 3]) == [[2, 3]] * 2


def make_half() -> None:
    mine = dist.new_group([0, 1, 3])
    if here().rank != 2:
        use(mine)


def use_half() -> list[int]:
    (mine,) = [g for g in dist.distributed_c10d._world.pg_map if g is not dist.group.WORLD]
    with pytest.raises(dist.DistBackendError):
        while True:
            dist.all_reduce(torch.ones(10_000), group=mine)
    smaller = reducer.shrink(mine, timeout=SOON_S)
    assert dist.get_process_group_ranks(smaller) == [0, 1]
    assert dist.get_group_rank(smaller, here().rank) == smaller.rank()
    return use(smaller)


def test_a_group_beside_the_default_one() -> None:
    with team({"REDUCER_ALGORITHM": "direct"}) as ranks:
        ranks.call(make_half)
        ranks.kill_rank(3)
        assert ranks.call(use_half, only=[0, 1]) == [[0, 1]] * 2


def shrink_late(late_s: float, timeout: float) -> list[int]:
    time.sleep(late_s)
    reducer.shrink(timeout=timeout)
    return use()


def test_all_live_and_come_at_different_times() -> None:
    with team() as ranks:
        ranks.call(use)
        for rank in range(N):
            ranks.start([rank], shrink_late, 0.4 * rank, 10.0)
        assert [outcome.value for outcome in ranks.answers([0, 1, 2, 3], 40.0)] == [[0, 1, 2, 3]] * N


def test_a_rank_that_does_not_come_is_left_behind() -> None:
    with team() as ranks:
        ranks.call(use)
        ranks.start([0, 1, 2], shrink_late, 0.0, 4.0)
        assert [o.value or o.trace for o in ranks.answers([0, 1, 2], 40.0)] == [[0, 1, 2]] * 3
        (late,) = ranks.try_call(shrink_late, 0.0, 4.0, only=[3])
        assert late.kind == "AbortedError", late.trace
        assert "went on without it" in late.error


def test_no_majority_goes_on_by_itself() -> None:
    with team() as ranks:
        ranks.call(use)
        began = time.monotonic()
        outcomes: list[Outcome] = ranks.try_call(shrink_late, 0.0, 2.5, only=[0, 3])
        assert [outcome.kind for outcome in outcomes] == ["UnavailableError"] * 2
        assert "ranks 1, 2 did not come within 2.5 s and may be alive" in outcomes[0].error, outcomes[0].error
        assert "[rank 3, group" in outcomes[1].error
        assert time.monotonic() - began < SOON_S
        # The others hear of it when they come; then all of them try again.
        outcomes = ranks.try_call(shrink_late, 0.0, 2.5, only=[1, 2])
        assert {outcome.kind for outcome in outcomes} <= {"AbortedError", "UnavailableError"}
        assert ranks.call(shrink_late, 0.0, SOON_S) == [[0, 1, 2, 3]] * N


# ---------------------------------------------------------------- the agreement itself


def meet(doors: list[_door.Door], late: dict[int, float], timeout: float) -> dict[int, object]:
    """What each rank in `late` finds, when it comes so late; a door that is closed is a dead rank's."""
    addresses = [door.address for door in doors]
    found: dict[int, object] = {}

    def come(rank: int) -> None:
        time.sleep(late[rank])
        try:
            found[rank] = _agreement.agree("test", rank, addresses, doors[rank], timeout).all
        except reducer.ReducerError as error:
            found[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in late]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON_S)
        assert not thread.is_alive()
    return found


def test_a_rank_that_dies_in_the_middle_of_the_agreement() -> None:
    """Its door closes at every phase of the others' meeting: all that are left find the same."""
    for delay in (0.0, 0.02, 0.1, 0.3):
        doors = [_door.Door("127.0.0.1") for _ in range(5)]
        doors[0].close()
        timer = threading.Timer(delay, doors[4].close)
        timer.start()
        found = meet(doors, {1: 0.0, 2: 0.1, 3: 0.25}, 5.0)
        timer.join()
        for door in doors:
            door.close()
        assert found == {rank: {0, 4} for rank in (1, 2, 3)}


class Died(Exception):
    """A rank of random_meeting() is to be dead from here on."""


def random_meeting(seed: int) -> tuple[set[int], set[int], list[object]]:
    """Ranks of which some are dead, some die between two steps of their meeting; the dead before, those that live to
    its end, and what these found."""
    chance = random.Random(seed)
    count = chance.randint(2, 6)
    doors = [_door.Door("127.0.0.1") for _ in range(count)]
    addresses = dict(enumerate(door.address for door in doors))
    dead = {rank for rank in range(count) if chance.random() < 0.25}
    healthy: set[int] = set()
    found: dict[int, object] = {}

    def come(rank: int, late_s: float, steps: int) -> None:
        time.sleep(late_s)
        with _door.Calls[int]() as calls:
            calls.watch({other: address for other, address in addresses.items() if other != rank})
            step, left = calls.step, iter(range(steps))

            def counted(wait_s: float, door: _door.Door | None = None) -> None:
                if next(left, None) is None:
                    raise Died
                step(wait_s, door)

            calls.step = counted  # type: ignore[method-assign]
            try:
                found[rank] = _agreement._Meeting("random", rank, count, calls, doors[rank], 10.0).run().all
            except Died:
                doors[rank].close()

    for rank in dead:
        doors[rank].close()
    threads = []
    for rank in set(range(count)) - dead:
        steps = 10_000
        if chance.random() < 0.35:
            steps = chance.choice((1, 2, 3, 4, 6, 8))
        else:
            healthy.add(rank)
        threads.append(threading.Thread(target=come, args=(rank, chance.choice((0.0, 0.05, 0.2)), steps)))
        threads[-1].start()
    for thread in threads:
        thread.join(SOON_S)
        assert not thread.is_alive()
    assert healthy <= set(found)
    for rank in found:
        doors[rank].close()
    return dead, set(found), list(found.values())


@pytest.mark.parametrize("seed", range(20))
def test_whoever_dies_and_when_the_others_find_the_same(seed: int) -> None:
    dead, alive, found = random_meeting(seed)
    for one in found:
        assert isinstance(one, frozenset)
        assert one == found[0]
        assert dead <= one
        assert not one & alive


def test_strangers_at_the_door_change_nothing() -> None:
    doors = [_door.Door("127.0.0.1") for _ in range(3)]
    strangers = []
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100_000, b'{"topic": "test", "rank": "x"}\n', b"[1]\n", b""):
        stranger = socket.create_connection(_door.split_address(doors[1].address))
        stranger.sendall(words)
        strangers.append(stranger)
    lie = b'{"topic": "test", "meeting": 1, "rank": 7, "round": 0, "dead": [0, 1, 2], "silent": [], "decided": true}\n'
    strangers[-1].sendall(lie)
    found = meet(doors, {0: 0.0, 1: 0.0, 2: 0.0}, 5.0)
    assert found == {0: set(), 1: set(), 2: set()}
    for one in [*strangers, *doors]:
        one.close()


# ---------------------------------------------------------------- torchrun's restart


def test_torchrun_starts_a_killed_worker_again(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        import torch
        import torch.distributed as dist

        folder = Path(sys.argv[1])
        dist.init_process_group("reducer")
        rank, restarts = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        for step in range(200):
            if step == 50 and rank == 1 and restarts == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            tensor = torch.full((1000,), float(step + rank))
            try:
                dist.all_reduce(tensor)
            except dist.DistBackendError as error:
                (folder / f"error-{rank}").write_text(str(error))
                dist.distributed_c10d._get_default_group().abort()
                raise
            assert torch.equal(tensor, torch.full((1000,), 2.0 * step + 1.0))
        (folder / f"done-{rank}").write_text(str(restarts))
        dist.destroy_process_group()
        """)
    )
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"done-{rank}").read_text() for rank in range(2)] == ["1"] * 2
    assert "Signal 9 (SIGKILL)" in done.stderr or "exitcode: -9" in done.stderr, done.stderr
