"""Accelerator tensors through the generic stream and event interfaces, on an accelerator that is made to be late.

What waits for what, whose memory it is, and what a program does with all this; test_accelerator_collectives.py has
the collectives. The gates are deadlocks for a backend that makes the host wait where only a stream may.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import accelerator
import pytest
import torch
import torch.distributed as dist
from accelerator.worlds import (
    COUNT,
    SMALL,
    World,
    blank,
    join,
    mine,
    produce,
    produce_at_once,
    sample,
    slow_copies,
    stays_busy,
    total,
    verify,
)
from ranks import Ranks

MIB = 1 << 20


# ---------------------------------------------------------------- what waits for what


def call_behind_a_closed_gate() -> None:
    with torch.fake.gate() as gate:
        tensor = produce_at_once(sample(dist.get_rank()))
        work = dist.all_reduce(tensor, async_op=True)
        assert not work.is_completed()
        time.sleep(0.05)  # for what does not wait for the producer to go wrong
        assert not work.is_completed()
        gate.open()
        work.wait()
    verify([(tensor, total())])


def test_a_call_returns_before_its_input_is_there(accelerator_world: World) -> None:
    accelerator_world.call(call_behind_a_closed_gate)


def wait_behind_a_closed_gate() -> None:
    tensor = produce(sample(dist.get_rank()))
    work = dist.all_reduce(tensor, async_op=True)
    with torch.fake.gate() as gate:  # in the way of later kernels, not of the producer
        work.wait()
        got = tensor + 0
        assert stays_busy(torch.fake.current_stream())
        gate.open()
    assert torch.equal(got.cpu(), total())


def test_wait_does_not_wait_for_the_stream(accelerator_world: World) -> None:
    accelerator_world.call(wait_behind_a_closed_gate)


def wait_while_uploads_are_held(synchronous: bool) -> None:
    tensor = produce(sample(dist.get_rank(), SMALL))
    stream = torch.fake.current_stream()
    with torch.fake.uploads_held():
        if synchronous:
            dist.all_reduce(tensor)
        else:
            dist.all_reduce(tensor, async_op=True).wait()
        got = tensor + 0
        assert stays_busy(stream), "the stream went past a wait() whose result is not on the device yet"
    assert torch.equal(got.cpu(), total(SMALL))


@pytest.mark.parametrize("synchronous", [True, False])
def test_wait_blocks_the_stream_and_not_the_host(accelerator_world: World, synchronous: bool) -> None:
    accelerator_world.call(wait_while_uploads_are_held, synchronous)


def wait_in_another_stream() -> None:
    tensor = produce(sample(dist.get_rank(), SMALL))
    first, other = torch.fake.current_stream(), torch.Stream(mine())
    with torch.fake.uploads_held():
        work = dist.all_reduce(tensor, async_op=True)
        with torch.fake.stream(other):
            work.wait()
            got = tensor + 0
            tensor.record_stream(other)
        assert stays_busy(other)
        # Nobody waited here.
        first.synchronize()
    with torch.fake.stream(other):
        assert torch.equal(got.cpu(), total(SMALL))


def test_wait_blocks_the_stream_that_is_current_then(accelerator_world: World) -> None:
    accelerator_world.call(wait_in_another_stream)


def use_the_other_device() -> None:
    rank = dist.get_rank()
    device = torch.device("fake", 1 - rank)
    assert torch.accelerator.current_device_index() == rank
    tensor = produce(sample(rank), device)
    with slow_copies():
        dist.all_reduce(tensor)
    got = tensor + 0
    assert got.device == device
    assert torch.equal(got.cpu(), total())
    assert torch.accelerator.current_device_index() == rank


def test_a_tensor_on_a_device_that_is_not_current(accelerator_world: World) -> None:
    accelerator_world.call(use_the_other_device)


def wait_for_many() -> None:
    rank, counts = dist.get_rank(), [1, COUNT, 10, SMALL, 3 * COUNT] * 4
    with slow_copies():
        tensors = [produce_at_once(sample(rank, count)) for count in counts]
        works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        host = sample(rank)
        works.append(dist.all_reduce(host, async_op=True))
        for work in reversed(works):
            work.wait()
    verify([(tensor, total(count)) for tensor, count in zip(tensors, counts, strict=True)])
    assert torch.equal(host, total())


def test_many_outstanding_on_both_devices(accelerator_world: World) -> None:
    accelerator_world.call(wait_for_many)


# ---------------------------------------------------------------- futures


def chain_a_callback() -> None:
    tensor = produce(sample(dist.get_rank(), SMALL))
    here_now, seen = torch.fake.current_stream(), []

    def double(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        seen.append(torch.fake.current_stream(mine()))
        return done.value()[0] * 2

    with torch.fake.uploads_held():
        work = dist.all_reduce(tensor, async_op=True)
        doubled = work.get_future().then(double).wait()
        got = doubled + 0
        assert seen[0] != here_now
        assert stays_busy(seen[0]), "the callback's stream does not wait for the result"
        assert stays_busy(here_now), "this stream does not wait for the callback's"
    assert torch.equal(got.cpu(), 2 * total(SMALL))


def test_a_callback_has_a_stream_that_waits(accelerator_world: World) -> None:
    accelerator_world.call(chain_a_callback)


def wait_for_the_future(early: bool) -> None:
    tensor = produce(sample(dist.get_rank(), SMALL))
    with torch.fake.uploads_held():
        work = dist.all_reduce(tensor, async_op=True)
        if early:
            future = work.get_future()
            result = future.wait()
        else:
            work.wait()
            other = torch.Stream(mine())
            with torch.fake.stream(other):
                result = work.get_future().wait()
                got = result[0] + 0
            assert stays_busy(other)
            torch.fake.current_stream().wait_stream(other)
        got = result[0] + 0
        assert stays_busy(torch.fake.current_stream())
    assert result[0].data_ptr() == tensor.data_ptr()
    assert torch.equal(got.cpu(), total(SMALL))


@pytest.mark.parametrize("early", [True, False])
def test_a_future_blocks_the_stream(accelerator_world: World, early: bool) -> None:
    accelerator_world.call(wait_for_the_future, early)


# ---------------------------------------------------------------- memory


def free_inputs_at_once(operation: str) -> None:
    rank = dist.get_rank()
    output = blank(COUNT if operation == "reduce_scatter" else 2 * COUNT)
    with slow_copies(), torch.fake.gate() as gate:
        if operation == "reduce_scatter":
            tensor = produce_at_once(torch.cat([sample(rank), sample(rank) + 1]))
            work = dist.reduce_scatter_tensor(output, tensor, async_op=True)
            expected = total() + 2 * rank
        else:
            tensor = produce_at_once(sample(rank))
            work = dist.all_gather_into_tensor(output, tensor, async_op=True)
            expected = torch.cat([sample(0), sample(1)])
        del tensor
        gate.open()
        work.wait()
    verify([(output, expected)])


@pytest.mark.parametrize("operation", ["all_gather", "reduce_scatter"])
def test_inputs_freed_right_after_the_call(accelerator_world: World, operation: str) -> None:
    accelerator_world.call(free_inputs_at_once, operation)


def free_everything_and_never_wait() -> None:
    tensor = produce(sample(dist.get_rank(), SMALL))
    torch.accelerator.synchronize()
    with torch.fake.uploads_held():
        work = dist.all_reduce(tensor, async_op=True)
        del work, tensor
        taken = []
        end = time.monotonic() + 0.2
        while time.monotonic() < end:  # the collective gets as far as the upload in this time
            taken.append(torch.full((SMALL,), 5.0, device=mine()))
            time.sleep(0.005)
        torch.fake.current_stream().synchronize()
    dist.barrier()
    torch.accelerator.synchronize()
    for number, other in enumerate(taken):
        assert bool((other.cpu() == 5).all()), f"an upload wrote into tensor {number}, which is not its own"


def test_outputs_freed_before_they_are_there(accelerator_world: World) -> None:
    accelerator_world.call(free_everything_and_never_wait)


def keep_nothing() -> None:
    rank = dist.get_rank()

    def once() -> None:
        tensor = produce_at_once(sample(rank))
        dist.all_reduce(tensor)
        tensor.cpu()

    once()
    torch.accelerator.synchronize()
    device_bytes = torch.fake.device_bytes()
    for _ in range(10):
        once()
    end = time.monotonic() + 5.0
    while torch.fake.device_bytes() > device_bytes and time.monotonic() < end:
        time.sleep(0.01)
    assert torch.fake.device_bytes() <= device_bytes


def test_memory_comes_back(accelerator_world: World) -> None:
    accelerator_world.call(keep_nothing)


def reduce_a_large_tensor() -> dict[str, float]:
    rank = dist.get_rank()
    count = 64 * MIB // 4
    tensor = produce(torch.full((count,), rank + 1.0))
    torch.accelerator.synchronize()
    torch.fake.take_copies()
    torch.fake.reset_pinned_bytes_max()
    pinned_before = torch.fake.pinned_bytes_max()
    with torch.fake.slow(0.5):
        work = dist.all_reduce(tensor, async_op=True)
        work.wait()
    tensor += 1
    torch.accelerator.synchronize()
    copies = torch.fake.take_copies()
    assert bool((tensor.cpu() == 4).all())
    ups, downs = ([copy for copy in copies if copy.upload == upload] for upload in (True, False))
    return {
        "pageable": sum(not copy.pinned for copy in copies),
        "staging": torch.fake.pinned_bytes_max() - min(pinned_before, torch.fake.pinned_bytes()),
        "up": sum(copy.nbytes for copy in ups),
        "down": sum(copy.nbytes for copy in downs),
        "overlap": max(copy.end for copy in downs) - min(copy.begin for copy in ups),
    }


def test_a_large_tensor_goes_chunk_by_chunk(accelerator_pair: World) -> None:
    for figures in accelerator_pair.call(reduce_a_large_tensor):
        assert figures["pageable"] == 0, "a copy from or to pageable memory makes the host wait"
        assert figures["up"] == figures["down"] == 64 * MIB
        # 16 MiB, and what an allocator holds back until the work that was queued when it was freed is done.
        assert figures["staging"] <= 32 * MIB
        assert figures["overlap"] > 0, "the first result went up only when all of the input had come down"


def reduce_different_sizes() -> None:
    """12 MiB on one rank, 4 on the other: not the first slices alone must agree."""
    tensor = produce(torch.ones((3 if dist.get_rank() == 0 else 1) << 20))
    with pytest.raises(dist.DistBackendError, match="ranks made different calls.*3145728 elements.*1048576 elements"):
        dist.all_reduce(tensor)
    # They are out of step, and so the group is at its end: rank 0 knows it, and leaves.
    with pytest.raises(dist.DistBackendError, match=r"ranks made different calls|rank 0 .*left the group"):
        dist.all_reduce(produce(torch.ones(10)))


def test_ranks_with_different_sizes_get_an_error(accelerator_world: World) -> None:
    try:
        accelerator_world.call(reduce_different_sizes)
    finally:
        accelerator_world.renew()


def exchange_large() -> None:
    """Both ranks receive first: what they have to send must not wait for the memory of what they receive."""
    received = torch.empty(3 << 20, device=mine())
    peer = 1 - dist.get_rank()
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.irecv, received, peer),
            dist.P2POp(dist.isend, produce(torch.full((3 << 20,), float(peer))), peer),
        ]
    )
    for work in works:
        work.wait()
    verify([(received, torch.full((3 << 20,), float(dist.get_rank())))])


def test_large_tensors_both_ways(accelerator_world: World) -> None:
    accelerator_world.call(exchange_large)


# ---------------------------------------------------------------- what else may be passed


def reduce_dtypes() -> None:
    rank = dist.get_rank()
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.complex64):
        tensor = produce(sample(rank, SMALL, dtype))
        dist.all_reduce(tensor)
        verify([(tensor, sample(0, SMALL, dtype) + sample(1, SMALL, dtype))])
    flags = produce(sample(rank, SMALL) > 8)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    assert torch.equal(flags.cpu(), (sample(0, SMALL) > 8) | (sample(1, SMALL) > 8))


def test_dtypes(accelerator_world: World) -> None:
    accelerator_world.call(reduce_dtypes)


def reduce_odd_layouts() -> None:
    rank = dist.get_rank()
    empty = torch.empty(0, device=mine())
    dist.all_reduce(empty)
    gathered = torch.empty(0, device=mine())
    dist.all_gather_into_tensor(gathered, empty)
    flat = produce(sample(rank, 100))
    dist.all_reduce(flat[10:20])
    expected = sample(rank, 100)
    expected[10:20] = total(100)[10:20]
    verify([(flat, expected)])
    square = produce(sample(rank, 600).reshape(20, 30).t())
    assert not square.is_contiguous()
    dist.all_reduce(square)
    verify([(square, total(600).reshape(20, 30).t())])
    number = produce(torch.tensor(rank + 1.0))
    dist.all_reduce(number)
    verify([(number, torch.tensor(3.0))])
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        dist.all_reduce(torch.ones(1, device=mine()).expand(5))


def test_odd_layouts(accelerator_world: World) -> None:
    accelerator_world.call(reduce_odd_layouts)


def mix_devices() -> None:
    there, host = torch.ones(4, device=mine()), torch.ones(4)
    refusal = pytest.raises((ValueError, TypeError, RuntimeError), match=rf"(?s)cpu.*{mine()}|{mine()}.*cpu")
    with refusal:
        dist.all_reduce_coalesced([there, host])
    with refusal:
        dist.all_gather_into_tensor(torch.ones(8), there)
    with refusal:
        dist.all_gather([torch.ones(4, device=mine()), torch.ones(4)], there)
    with refusal:
        dist.reduce_scatter_tensor(there, torch.ones(8))
    with refusal:
        dist.all_to_all([torch.ones(4, device=mine()), torch.ones(4)], [there, there])
    # Nothing of these calls is left behind.
    verify([(there, torch.ones(4))])
    dist.all_reduce(there)
    dist.all_reduce(host)
    verify([(there, torch.full((4,), 2.0))])
    assert torch.equal(host, torch.full((4,), 2.0))


def test_cpu_and_accelerator_tensors_in_one_call(accelerator_world: World) -> None:
    accelerator_world.call(mix_devices)


def disagree() -> None:
    rank = dist.get_rank()
    tensor = produce(sample(rank, 10 + rank))
    work = dist.all_reduce(tensor, async_op=True)
    with pytest.raises(dist.DistBackendError, match="all_reduce"):
        work.wait()
    with pytest.raises(RuntimeError, match="all_reduce"):
        work.get_future().wait()
    verify([(tensor, sample(rank, 10 + rank))])  # as it was
    good = produce(sample(rank))
    dist.all_reduce(good)
    verify([(good, total())])


def test_an_error_reaches_all_and_the_group_goes_on(accelerator_world: World) -> None:
    accelerator_world.call(disagree)


def time_out() -> None:
    tensor = produce(torch.ones(SMALL))
    if dist.get_rank() == 0:
        options = dist.AllreduceOptions()
        options.timeout = timedelta(seconds=0.5)
        work = dist.group.WORLD.allreduce([tensor], options)
        with pytest.raises(dist.DistBackendError, match="rank 1"):
            work.wait()
    else:
        time.sleep(1.0)
        with pytest.raises(dist.DistBackendError):
            dist.all_reduce(tensor)
    verify([(tensor, torch.ones(SMALL))])
    dist.barrier()


def test_a_rank_that_does_not_come(accelerator_world: World) -> None:
    accelerator_world.call(time_out)


# ---------------------------------------------------------------- programs


def use_a_group_for_the_accelerator_alone() -> None:
    rank = dist.get_rank()
    group = dist.new_group(backend="fake:reducer")
    tensor = produce(sample(rank))
    dist.all_reduce(tensor, group=group)
    verify([(tensor, total())])
    dist.barrier(group=group)
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, {"rank": rank}, group=group)
    assert objects == [{"rank": 0}, {"rank": 1}]
    with pytest.raises(RuntimeError, match="cpu"):
        dist.all_reduce(torch.ones(1), group=group)
    dist.destroy_process_group(group)


def test_a_group_for_the_accelerator_alone(accelerator_pair: World) -> None:
    accelerator_pair.call(use_a_group_for_the_accelerator_alone)


def batch_and_coalesce() -> None:
    rank = dist.get_rank()
    mine_now, theirs = produce(sample(rank)), blank()
    operations = [dist.P2POp(dist.isend, mine_now, 1 - rank), dist.P2POp(dist.irecv, theirs, 1 - rank)]
    with slow_copies():
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    verify([(theirs, sample(1 - rank))])
    tensors = [produce(sample(rank, count)) for count in (SMALL, 3)]
    with slow_copies(), dist._coalescing_manager(async_ops=True) as manager:
        for tensor in tensors:
            dist.all_reduce(tensor)
    manager.wait()
    verify([(tensors[0], total(SMALL)), (tensors[1], total(3))])


def test_batches(accelerator_pair: World) -> None:
    accelerator_pair.call(batch_and_coalesce)


def train() -> list[torch.Tensor]:
    """Gradients of a step of DDP, and beside it what they should be."""
    rank = dist.get_rank()

    def made() -> torch.nn.Module:
        torch.manual_seed(5)
        return torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 4))

    batches = [torch.randn(6, 20, generator=torch.Generator().manual_seed(r)) for r in range(2)]
    plain = made()
    (sum(plain(batch).square().sum() for batch in batches) / 2).backward()
    model = torch.nn.parallel.DistributedDataParallel(made().to(mine()), bucket_cap_mb=0.001)
    for _ in range(2):  # the buckets are made anew after the first
        model.zero_grad()
        with torch.fake.slow(2):
            model(batches[rank].to(mine())).square().sum().backward()
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None
        assert parameter.grad.device == mine()
        torch.testing.assert_close(parameter.grad.cpu(), expected.grad, rtol=1e-4, atol=1e-4)
    return [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]


def test_ddp(accelerator_pair: World) -> None:
    first, second = accelerator_pair.call(train)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def leave_work_behind() -> None:
    join()
    tensor = produce(sample(dist.get_rank()))
    with torch.fake.slow(100):
        dist.all_reduce(tensor, async_op=True)


def test_ranks_end_with_work_under_way() -> None:
    accelerator.build()
    with Ranks(2, init=False) as ranks:
        ranks.call(leave_work_behind)
        assert ranks.end() == [0, 0]
