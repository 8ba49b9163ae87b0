"""What goes beyond plain collectives: PREMUL_SUM, receive from any rank, sparse tensors, coalescing, hooks, options,
split, shrink."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

WORLD = 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["local", "direct"])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with Ranks(WORLD, {"REDUCER_ALGORITHM": request.param}) as team:
        yield team


def backend() -> Any:
    return dist.group.WORLD._get_backend(CPU)


def premultiplied(factor: Any, dtype: torch.dtype) -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    op = dist._make_nccl_premul_sum(factor)
    scale = float(factor)
    expected = scale * n * (n + 1) / 2
    tensor = torch.full((5,), rank + 1, dtype=dtype)
    kept = tensor.clone()
    dist.all_reduce(tensor, op)
    assert torch.equal(tensor.to(torch.complex128), torch.full((5,), expected, dtype=dtype).to(torch.complex128))
    if dtype.itemsize == 1:
        return  # torch compares no more of float8
    out = torch.empty(2, dtype=dtype)
    source = kept[:1].repeat(2 * n)
    dist.reduce_scatter_tensor(out, source, op)
    assert torch.equal(out, torch.full((2,), expected, dtype=dtype))
    assert torch.equal(source, kept[:1].repeat(2 * n)), "the input was scaled in place"
    tensor = kept.clone()
    dist.reduce(tensor, 1, op)
    assert torch.equal(tensor, torch.full((5,), expected, dtype=dtype) if rank == 1 else kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn])
def test_premul_sum(ranks: Ranks, dtype: torch.dtype) -> None:
    ranks.call(premultiplied, 0.5, dtype)
    ranks.call(premultiplied, torch.tensor([2.0]), dtype)


def from_any() -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    each = 20
    if rank != 0:
        for i in range(each):
            dist.send(torch.tensor([rank, i]), 0, tag=4)
        return
    last = [-1] * n
    for i in range(each * (n - 1)):
        message = torch.empty(2, dtype=torch.int64)
        if i % 2:
            source = dist.recv(message, tag=4)
        else:
            work = dist.irecv(message, tag=4)
            work.wait()
            source = work._source_rank()
        assert message[0] == source
        assert message[1] == last[source] + 1, "a sender's messages changed places"
        last[source] += 1
    assert last == [-1] + [each - 1] * (n - 1)


def test_receive_from_any_rank(ranks: Ranks) -> None:
    ranks.call(from_any)


def nobody_sends() -> None:
    if dist.get_rank() != 0:
        return
    pg = dist.group.WORLD
    pg.set_timeout(timedelta(seconds=1))
    try:
        with pytest.raises(dist.DistBackendError, match=r"from any rank, tag 77.* timeout after 1\.0 s"):
            dist.recv(torch.empty(1), tag=77)
    finally:
        pg.set_timeout(timedelta(seconds=60))


def test_a_receive_that_nobody_sends_to_says_so(ranks: Ranks) -> None:
    ranks.call(nobody_sends)


def sparse_sum(dtype: torch.dtype, dense_dim: int) -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    tensors = []
    for entries in (0, 1, 5 + rank, 0 if rank == 1 else 40):
        where = torch.randint(0, 9, (2, entries), generator=generator)
        values = torch.randint(-9, 9, (entries, *[3] * dense_dim), generator=generator).to(dtype)
        tensors.append(torch.sparse_coo_tensor(where, values, (9, 9, *[3] * dense_dim), check_invariants=True))
    expected = []
    for tensor in tensors:
        dense = tensor.to_dense()
        dist.all_reduce(dense)
        expected.append(dense)
    # All at once, so that their second steps overlap.
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work, tensor, dense in zip(works, tensors, expected, strict=True):
        work.wait()
        assert tensor.is_sparse
        assert torch.equal(tensor.to_dense(), dense)
        assert torch.equal(work.get_future().wait()[0].to_dense(), dense)
    assert n == WORLD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("dense_dim", [0, 1])
def test_sparse_all_reduce(ranks: Ranks, dtype: torch.dtype, dense_dim: int) -> None:
    ranks.call(sparse_sum, dtype, dense_dim)


def sparse_mistakes() -> None:
    rank = dist.get_rank()
    with pytest.raises(dist.DistBackendError, match=r"rank 0 \(.*called all_reduce of sparse tensors.*all_reduce\(sum"):
        dist.all_reduce(torch.eye(3).to_sparse() if rank == 0 else torch.eye(3))
    with pytest.raises(dist.DistBackendError, match=r"rank 0 has the sizes \(3, 3\).* rank 1 has \(4, 4\)"):
        dist.all_reduce(torch.eye(3 if rank == 0 else 4).to_sparse())
    tensor = torch.eye(3).to_sparse()
    dist.all_reduce(tensor)
    assert torch.equal(tensor.to_dense(), torch.eye(3) * WORLD)


def test_sparse_tensors_that_do_not_fit_get_an_error_on_every_rank(ranks: Ranks) -> None:
    ranks.call(sparse_mistakes)


def coalesced() -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    tensors = [torch.full((4,), float(rank + k)) for k in range(3)]
    with dist._coalescing_manager(device=CPU, async_ops=True) as manager:
        for tensor in tensors:
            dist.broadcast(tensor, 0, async_op=True)
    manager.wait()
    assert [int(tensor[0]) for tensor in tensors] == [0, 1, 2]

    received = torch.empty(2)
    operations = [
        dist.P2POp(dist.isend, torch.full((2,), float(rank)), (rank + 1) % n),
        dist.P2POp(dist.irecv, received, (rank - 1) % n),
    ]
    works = dist.batch_isend_irecv(operations)
    assert len(works) == 1
    works[0].wait()
    assert works[0].is_completed()
    assert received[0] == (rank - 1) % n

    pg = dist.group.WORLD
    pg._start_coalescing(CPU)
    first, second = torch.ones(2), torch.ones(3)
    pg.allreduce([first])
    pg.broadcast(second, 0)
    work = pg._end_coalescing(CPU)
    results = work.get_future().wait()
    assert [tuple(result.shape) for result in results] == [(2,), (3,)]
    assert first[0] == n
    with pytest.raises(RuntimeError, match="startCoalescing was not called on this thread"):
        pg._end_coalescing(CPU)


def test_coalescing(ranks: Ranks) -> None:
    ranks.call(coalesced)


def hooked() -> None:
    pg = dist.new_group()
    seen: list[Any] = []
    pg._register_on_completion_hook(seen.append)
    works = [dist.all_reduce(torch.ones(1000), async_op=True, group=pg) for _ in range(5)]
    dist.barrier(pg)
    pg._wait_for_pending_works()
    seen.sort(key=lambda info: info.seq)
    assert [str(info.op_type).rsplit(".")[-1] for info in seen] == ["ALLREDUCE"] * 5 + ["BARRIER"]
    assert [info.seq for info in seen] == list(range(6))
    assert all(info.time_finished >= info.time_started for info in seen)
    assert all(work._get_duration() > 0 for work in works)
    dist.destroy_process_group(pg)


def test_completion_hook(ranks: Ranks) -> None:
    ranks.call(hooked)


def split_in_two() -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    options = copy.deepcopy(backend().options)
    assert options.algorithm == os.environ["REDUCER_ALGORITHM"]
    assert options.global_ranks_in_group == list(range(n))
    options.algorithm = "ring"
    assert backend().options.algorithm == os.environ["REDUCER_ALGORITHM"], "a copy was asked for"
    before = backend().comm_split_count()
    mine = [r for r in range(n) if r % 2 == rank % 2]
    pg = dist.group.WORLD
    child = pg.split_group(mine, opts=options, group_name=f"half{rank % 2}")
    assert child._get_backend(CPU).algorithm == "ring"
    assert backend().comm_split_count() == before + 1
    tensor = torch.tensor([rank + 1.0])
    child.allreduce([tensor]).wait()
    assert tensor[0] == sum(r + 1 for r in mine)
    # The parent goes on, and so does the child without it being asked.
    dist.all_reduce(tensor)
    child.shutdown()
    with pytest.raises(dist.DistBackendError, match="was shut down"):
        child.allreduce([tensor])
    again = pg.split_group(mine, group_name=f"third{rank % 2}")
    again.allreduce([tensor]).wait()
    again.shutdown()


def test_split(ranks: Ranks) -> None:
    ranks.call(split_in_two)


def survive() -> None:
    """Rank 1 is gone; the others go on, with the default group that shrink_group leaves them."""
    pg = dist.shrink_group([1], shrink_flags=dist.SHRINK_ABORT if hasattr(dist, "SHRINK_ABORT") else 1)
    assert pg.size() == WORLD - 1
    assert dist.get_world_size() == WORLD - 1
    tensor = torch.ones(1000)
    dist.all_reduce(tensor)
    assert tensor[0] == WORLD - 1


def test_shrink_after_a_death() -> None:
    team = Ranks(WORLD)
    try:
        team.call(dist.barrier)
        team.kill_rank(1)
        team.call(survive, only=[0, 2])
        assert team.end() == [0, -9, 0]
    finally:
        team.kill()


def give_up() -> None:
    """Rank 0 waits for what the others have not called, and gives it up; they learn of it when they come."""
    if dist.get_rank() == 0:
        work = dist.all_reduce(torch.ones(1000), async_op=True)
        backend().abort_work(work)
        with pytest.raises(dist.DistBackendError, match="abort.. of its Work was called on rank 0"):
            work.wait()
        for rank in range(1, WORLD):
            dist.send(torch.ones(1), rank)
    else:
        dist.recv(torch.ones(1), 0)
        with pytest.raises(dist.DistBackendError, match="abort.. of its Work was called on rank 0"):
            dist.all_reduce(torch.ones(1000))
    tensor = torch.ones(3)
    dist.all_reduce(tensor)
    assert tensor[0] == WORLD


def test_work_abort(ranks: Ranks) -> None:
    ranks.call(give_up)


def float8(dtype: torch.dtype) -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    values = [torch.randn(1000, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(n)]
    expected = values[0].float()
    for value in values[1:]:
        expected = expected + value.float()
    tensor = values[rank].clone()
    dist.all_reduce(tensor)
    assert torch.equal(tensor.view(torch.uint8), expected.to(dtype).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_summed_in_float32(ranks: Ranks, dtype: torch.dtype) -> None:
    ranks.call(float8, dtype)


def unsigned(dtype: torch.dtype) -> None:
    tensor = torch.full((9,), dist.get_rank() + 1).to(dtype)
    dist.all_reduce(tensor)
    assert torch.equal(tensor.to(torch.int64), torch.full((9,), WORLD * (WORLD + 1) // 2))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_integers(ranks: Ranks, dtype: torch.dtype) -> None:
    ranks.call(unsigned, dtype)


def give_up_receiving() -> None:
    if dist.get_rank() == 0:
        given_up = dist.irecv(torch.empty(1), tag=31)
        backend().abort_work(given_up)
        with pytest.raises(dist.DistBackendError, match="abort.. of its Work was called on rank 0"):
            given_up.wait()
        message = torch.empty(1)
        work = dist.irecv(message, tag=31)
        dist.send(torch.ones(1), 1)
        work.wait()
        assert message[0] == 7
        assert work._source_rank() == 1
    elif dist.get_rank() == 1:
        dist.recv(torch.ones(1), 0)
        dist.send(torch.full((1,), 7.0), 0, tag=31)


def test_a_receive_that_was_given_up_takes_no_message(ranks: Ranks) -> None:
    ranks.call(give_up_receiving)


def sends_itself_more() -> None:
    memory = torch.zeros(8)
    out = memory[:WORLD]
    mine = [1] * WORLD
    mine[dist.get_rank()] = 3
    with pytest.raises(ValueError, match="sends itself 3 elements and expects 1 from itself"):
        dist.all_to_all_single(out, torch.ones(WORLD + 2), [1] * WORLD, mine)
    assert not memory.any()
    with pytest.raises(ValueError, match="sends itself 3 elements and expects 1 from itself"):
        dist.all_to_all([torch.empty(1)] * WORLD, [torch.ones(size) for size in mine])
    dist.barrier()


def test_all_to_all_compares_what_a_rank_sends_itself(ranks: Ranks) -> None:
    ranks.call(sends_itself_more)


def hook_raises() -> None:
    pg = dist.new_group()

    def hook(_: Any) -> None:
        raise RuntimeError("this hook is broken")

    pg._register_on_completion_hook(hook)
    dist.all_reduce(torch.ones(3), group=pg)
    pg._wait_for_pending_works()
    dist.all_reduce(torch.ones(3), group=pg)
    dist.destroy_process_group(pg)


def test_a_hook_that_raises_harms_nobody(ranks: Ranks) -> None:
    ranks.call(hook_raises)


def coalescing_survives() -> None:
    rank, n = dist.get_rank(), dist.get_world_size()

    def exchange(tag: int, group: Any = None) -> None:
        received = torch.empty(1000)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, torch.full((1000,), float(rank)), (rank + 1) % n, group, tag),
                dist.P2POp(dist.irecv, received, (rank - 1) % n, group, tag),
            ]
        )
        for work in works:
            work.wait()
        assert received[0] == (rank - 1) % n

    with pytest.raises(ValueError, match="tag is -1"):
        exchange(-1)
    exchange(0)
    dist.barrier()


def test_coalescing_goes_on_after_an_exception(ranks: Ranks) -> None:
    ranks.call(coalescing_survives)


def late_once() -> None:
    """Rank 1 misses one barrier; those that follow work."""
    pg = dist.group.WORLD
    rank = dist.get_rank()
    short, usual = timedelta(seconds=1), timedelta(seconds=30)
    if rank == 0:
        with pytest.raises(dist.DistBackendError, match="Rank 1 failed to pass monitoredBarrier in 1000 ms"):
            pg.monitored_barrier(short)
    elif rank == 2:
        with pytest.raises(dist.DistBackendError, match="Rank 2 successfully reached monitoredBarrier, but"):
            pg.monitored_barrier(short)
    dist.barrier()
    if rank == 1:  # it comes to the barrier that the others gave up
        with pytest.raises(dist.DistBackendError, match="Rank 1 successfully reached monitoredBarrier, but"):
            pg.monitored_barrier(short)
    dist.barrier()
    for _ in range(3):
        pg.monitored_barrier(usual)
        pg.monitored_barrier(usual, wait_all_ranks=True)


def test_monitored_barriers_after_a_failed_one(ranks: Ranks) -> None:
    ranks.call(late_once)


def other_bindings() -> None:
    own = backend()
    assert own.uid != 0
    assert own._is_initialized()
    own.perform_nocolor_split(CPU)
    assert own.get_error() == dist.distributed_c10d.ErrorType.SUCCESS if hasattr(own, "get_error") else True
    own._add_ephemeral_timeout(timedelta(seconds=5))
    longer = dist.all_reduce(torch.ones(1), async_op=True)
    usual = dist.all_reduce(torch.ones(1), async_op=True)
    longer.wait()
    usual.wait()
    timeout = own.options._timeout
    assert own._verify_work_timeout(longer, timeout + timedelta(seconds=5))
    assert own._verify_work_timeout(usual, timeout)
    dist.barrier()


def test_what_nccl_binds(ranks: Ranks) -> None:
    ranks.call(other_bindings)


def moved(dtype: torch.dtype) -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    mine = torch.full((7,), rank, dtype=torch.uint8).view(torch.uint8).repeat(8).view(dtype)
    parts = [torch.empty_like(mine) for _ in range(n)]
    dist.all_gather(parts, mine)
    for r, part in enumerate(parts):
        assert torch.equal(part.view(torch.uint8), torch.full((56,), r, dtype=torch.uint8))
    dist.broadcast(mine, 2)
    assert int(mine.view(torch.uint8)[0]) == 2


@pytest.mark.parametrize("name", ["float8_e4m3fnuz", "float8_e8m0fnu", "complex32"])
def test_dtypes_that_are_only_moved(ranks: Ranks, name: str) -> None:
    ranks.call(moved, getattr(torch, name))


def callback_waits() -> None:
    """A callback waits for another call's Future, three deep."""
    n = dist.get_world_size()

    def then(depth: int) -> Any:
        def callback(future: Any) -> int:
            assert future.value()[0][0] == n
            if depth == 0:
                return 0
            inner = dist.all_reduce(torch.ones(1 << 16), async_op=True).get_future().then(then(depth - 1))
            return 1 + int(inner.wait())

        return callback

    for _ in range(10):
        outer = dist.all_reduce(torch.ones(1 << 16), async_op=True).get_future().then(then(3))
        assert outer.wait() == 3


def test_a_callback_may_wait_for_another_calls_future(ranks: Ranks) -> None:
    ranks.call(callback_waits)
