"""Every collective on every dtype and operation, against results that are known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
COMPLEX = [torch.complex64, torch.complex128]
DTYPES = [*FLOATS, *INTEGERS, torch.bool, *COMPLEX]
Op = dist.ReduceOp
SUMS = [Op.SUM, Op.PRODUCT, Op.AVG]
ORDERS = [Op.MIN, Op.MAX]
BITS = [Op.BAND, Op.BOR, Op.BXOR]

# Ranks, algorithm, standalone reducers.
WORLDS = [
    (1, "direct", 0),
    (1, "local", 0),
    (2, "direct", 0),
    (2, "local", 0),
    (3, "local", 0),
    (2, "server", 1),
    (3, "mixed", 1),
    (3, "ring", 0),
    (4, "direct", 0),
    (4, "server", 3),
    (4, "mixed", 2),
    (4, "ring", 0),
    (3, "0-1KiB:server,1KiB-10KiB:ring,10KiB-:mixed", 2),
]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: "{}-{}-{}".format(*world))
def world(request: pytest.FixtureRequest, module_reducers: Callable[..., list[str]]) -> Iterator[Ranks]:
    n, algorithm, count = request.param
    env = {
        "REDUCER_ALGORITHM": algorithm,
        "REDUCER_SERVERS": ",".join(module_reducers(count)),
        "REDUCER_CHUNK_BYTES": "4KiB",
    }
    with Ranks(n, env) as ranks:
        yield ranks


def ops_of(dtype: torch.dtype) -> list[Any]:
    if dtype in COMPLEX:
        return SUMS
    return [*SUMS, *ORDERS] if dtype in FLOATS else [*SUMS, *ORDERS, *BITS]


def sample(rank: int, dtype: torch.dtype, count: int, shift: int = 0) -> torch.Tensor:
    """Small whole numbers, so that no order of summing and no rounding of a part can change the result."""
    base = (torch.arange(count) * 7 + rank * 3 + shift) % 5
    if dtype == torch.bool:
        return base % 2 == 0
    if dtype in COMPLEX:
        return torch.complex((base + 1).double() % 3, base.double() % 2).to(dtype)
    signed = dtype not in (torch.uint8,)
    return (base - 2 if signed else base).to(dtype)


def combined(op: Any, inputs: list[torch.Tensor]) -> torch.Tensor:
    """The definition: from left to right in an accumulator that is wide enough, rounded once."""
    dtype = inputs[0].dtype
    if dtype == torch.bool:
        bits = torch.stack(inputs)
        if op in (Op.SUM, Op.MAX, Op.BOR):
            return bits.any(0)
        return bits.sum(0) % 2 == 1 if op == Op.BXOR else bits.all(0)
    wide = torch.complex128 if dtype in COMPLEX else torch.float64 if dtype in FLOATS else torch.int64
    total = inputs[0].to(wide)
    steps: dict[Any, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        Op.SUM: torch.add,
        Op.AVG: torch.add,
        Op.PRODUCT: torch.mul,
        Op.MIN: torch.minimum,
        Op.MAX: torch.maximum,
        Op.BAND: torch.bitwise_and,
        Op.BOR: torch.bitwise_or,
        Op.BXOR: torch.bitwise_xor,
    }
    for other in inputs[1:]:
        total = steps[op](total, other.to(wide))
    if op == Op.AVG:
        if dtype in INTEGERS:
            return torch.div(total, len(inputs), rounding_mode="trunc").to(dtype)
        narrow = {torch.float64: torch.float64, torch.complex64: torch.complex64, torch.complex128: torch.complex128}
        total = total.to(narrow.get(dtype, torch.float32)) / len(inputs)
    return total.to(dtype)


def group() -> Any:
    return dist.distributed_c10d._get_default_group()


def same(actual: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    assert actual.dtype == expected.dtype, what
    assert torch.equal(actual, expected), f"{what}: {actual} is not {expected}"


def check_all_reduce(count: int) -> None:
    n, rank = dist.get_world_size(), dist.get_rank()
    for dtype in DTYPES:
        inputs = [sample(r, dtype, count) for r in range(n)]
        for op in ops_of(dtype):
            tensor = inputs[rank].clone()
            # Below dist.all_reduce, which refuses some pairs for all backends and turns complex into real.
            options = dist.AllreduceOptions()
            options.reduceOp = op
            group().allreduce([tensor], options).wait()
            expected = combined(op, inputs)
            if dtype in COMPLEX and op == Op.AVG:
                assert torch.allclose(tensor, expected, rtol=1e-6), (dtype, op)
            else:
                same(tensor, expected, (dtype, op, count))
    tensor = sample(rank, torch.complex64, count)
    dist.all_reduce(tensor)
    same(tensor, combined(Op.SUM, [sample(r, torch.complex64, count) for r in range(n)]), "all_reduce of complex")


@pytest.mark.parametrize("count", [0, 1, 5, 3001])
def test_all_reduce(world: Ranks, count: int) -> None:
    world.call(check_all_reduce, count)


def check_all_reduce_coalesced() -> None:
    n, rank = dist.get_world_size(), dist.get_rank()
    dtypes = [torch.float32, torch.int64, torch.float32]
    tensors = [sample(rank, dtype, 100 + i, i) for i, dtype in enumerate(dtypes)]
    # torch's Python function wants one dtype; the backend does not.
    group().allreduce_coalesced(tensors, dist.AllreduceCoalescedOptions()).wait()
    for i, dtype in enumerate(dtypes):
        same(tensors[i], combined(Op.SUM, [sample(r, dtype, 100 + i, i) for r in range(n)]), i)


def test_all_reduce_coalesced(world: Ranks) -> None:
    world.call(check_all_reduce_coalesced)


def check_reduce_and_broadcast(count: int) -> None:
    n, rank = dist.get_world_size(), dist.get_rank()
    for dtype in DTYPES:
        inputs = [sample(r, dtype, count) for r in range(n)]
        for root in range(n):
            tensor = inputs[rank].clone()
            dist.broadcast(tensor, root)
            same(tensor, inputs[root], ("broadcast", dtype, root))
            tensor = inputs[rank].clone()
            dist.reduce(tensor, root)
            if rank == root:
                same(tensor, combined(Op.SUM, inputs), ("reduce", dtype, root))
            else:
                same(tensor, inputs[rank], ("reduce leaves the others alone", dtype, root))


@pytest.mark.parametrize("count", [0, 3, 2050])
def test_reduce_and_broadcast(world: Ranks, count: int) -> None:
    world.call(check_reduce_and_broadcast, count)


def check_all_gather() -> None:
    n, rank = dist.get_world_size(), dist.get_rank()
    for dtype in DTYPES:
        for count in (0, 3, 1500):
            inputs = [sample(r, dtype, count) for r in range(n)]
            outputs = [torch.empty_like(x) for x in inputs]
            dist.all_gather(outputs, inputs[rank])
            for r in range(n):
                same(outputs[r], inputs[r], ("all_gather", dtype, r))
            whole = torch.empty(n * count, dtype=dtype)
            dist.all_gather_into_tensor(whole, inputs[rank])
            same(whole, torch.cat(inputs), ("all_gather_into_tensor", dtype))
            # In place: the input is the rank's own part of the output.
            whole = torch.empty(n * count, dtype=dtype)
            whole[rank * count : (rank + 1) * count] = inputs[rank]
            dist.all_gather_into_tensor(whole, whole[rank * count : (rank + 1) * count])
            same(whole, torch.cat(inputs), ("all_gather_into_tensor in place", dtype))
    uneven = [sample(r, torch.float32, 10 * r + 1) for r in range(n)]
    outputs = [torch.empty_like(x) for x in uneven]
    dist.all_gather(outputs, uneven[rank])
    for r in range(n):
        same(outputs[r], uneven[r], ("uneven all_gather", r))


def test_all_gather(world: Ranks) -> None:
    world.call(check_all_gather)


def check_reduce_scatter() -> None:
    n, rank = dist.get_world_size(), dist.get_rank()
    for dtype in DTYPES:
        op = Op.MAX if dtype == torch.bool else Op.SUM
        for count in (0, 3, 1500):
            inputs = [sample(r, dtype, n * count) for r in range(n)]
            expected = combined(op, inputs)[rank * count : (rank + 1) * count]
            output = torch.empty(count, dtype=dtype)
            dist.reduce_scatter_tensor(output, inputs[rank], op)
            same(output, expected, ("reduce_scatter_tensor", dtype, count))
            output = torch.empty(count, dtype=dtype)
            dist.reduce_scatter(output, list(inputs[rank].chunk(n) if count else [output.clone()] * n), op)
            same(output, expected, ("reduce_scatter", dtype, count))
    average = torch.empty(4)
    dist.reduce_scatter_tensor(average, torch.full((4 * n,), float(rank)), Op.AVG)
    assert torch.allclose(average, torch.full((4,), (n - 1) / 2))


def test_reduce_scatter(world: Ranks) -> None:
    world.call(check_reduce_scatter)


def check_coalesced() -> None:
    n, rank = dist.get_world_size(), dist.get_rank()
    inputs = [sample(rank, torch.float32, 8, i) for i in range(3)]
    outputs = [torch.empty(8 * n) for _ in range(3)]
    with dist._coalescing_manager():
        for output, tensor in zip(outputs, inputs, strict=True):
            dist.all_gather_into_tensor(output, tensor)
    for i in range(3):
        same(outputs[i], torch.cat([sample(r, torch.float32, 8, i) for r in range(n)]), i)
    wide = [sample(rank, torch.float32, 8 * n, i) for i in range(3)]
    narrow = [torch.empty(8) for _ in range(3)]
    with dist._coalescing_manager():
        for output, tensor in zip(narrow, wide, strict=True):
            dist.reduce_scatter_tensor(output, tensor)
    for i in range(3):
        total = combined(Op.SUM, [sample(r, torch.float32, 8 * n, i) for r in range(n)])
        same(narrow[i], total[8 * rank : 8 * rank + 8], i)
    lists = [[torch.empty(8) for _ in range(3)] for _ in range(n)]
    group().allgather_coalesced(lists, inputs).wait()
    for r in range(n):
        for i in range(3):
            same(lists[r][i], sample(r, torch.float32, 8, i), (r, i))


def test_coalesced(world: Ranks) -> None:
    world.call(check_coalesced)


def check_gather_and_scatter() -> None:
    n, rank = dist.get_world_size(), dist.get_rank()
    for dtype in (torch.float32, torch.int16, torch.complex64):
        for count in (0, 3, 1500):
            parts = [sample(r, dtype, count) for r in range(n)]
            for root in range(n):
                outputs = [torch.empty_like(x) for x in parts] if rank == root else None
                dist.gather(parts[rank], outputs, dst=root)
                for r, output in enumerate(outputs or []):
                    same(output, parts[r], ("gather", dtype, root, r))
                tensor = torch.empty_like(parts[rank])
                dist.scatter(tensor, parts if rank == root else None, src=root)
                same(tensor, parts[rank], ("scatter", dtype, root))


def test_gather_and_scatter(world: Ranks) -> None:
    world.call(check_gather_and_scatter)


def check_all_to_all() -> None:
    n, rank = dist.get_world_size(), dist.get_rank()

    def part(source: int, target: int) -> torch.Tensor:
        return torch.full((source + 2 * target + 1, 2), float(10 * source + target))

    inputs = [part(rank, r) for r in range(n)]
    outputs = [torch.empty_like(part(r, rank)) for r in range(n)]
    dist.all_to_all(outputs, inputs)
    for r in range(n):
        same(outputs[r], part(r, rank), ("all_to_all", r))
    whole = torch.cat([torch.empty_like(x) for x in outputs])
    dist.all_to_all_single(whole, torch.cat(inputs), [len(x) for x in outputs], [len(x) for x in inputs])
    same(whole, torch.cat(outputs), "all_to_all_single with splits")
    even = torch.empty(n * 700)
    dist.all_to_all_single(even, torch.arange(n * 700.0) + 10_000 * rank)
    expected = torch.cat([torch.arange(rank * 700.0, (rank + 1) * 700.0) + 10_000 * r for r in range(n)])
    same(even, expected, "all_to_all_single")


def test_all_to_all(world: Ranks) -> None:
    world.call(check_all_to_all)


def check_send_recv() -> None:
    n, rank = dist.get_world_size(), dist.get_rank()
    for dtype in DTYPES:
        for count in (0, 1, 5000):
            operations, received = [], {}
            for r in range(n):
                if r == rank:
                    continue
                received[r] = torch.empty(count, dtype=dtype)
                operations.append(dist.P2POp(dist.isend, sample(rank, dtype, count, r), r))
                operations.append(dist.P2POp(dist.irecv, received[r], r))
            for work in dist.batch_isend_irecv(operations) if operations else []:
                work.wait()
            for r, tensor in received.items():
                same(tensor, sample(r, dtype, count, rank), (dtype, r, count))
    # Tags keep messages between the same ranks apart, whatever the order.
    if n > 1 and rank == 0:
        works = [dist.isend(torch.tensor([float(tag)]), 1, tag=tag) for tag in (3, 4)]
        for work in works:
            assert work is not None
            work.wait()
    elif rank == 1:
        for tag in (4, 3):
            tensor = torch.zeros(1)
            assert dist.recv(tensor, 0, tag=tag) == 0
            assert tensor.item() == tag


def test_send_recv(world: Ranks) -> None:
    world.call(check_send_recv)


def check_strides() -> None:
    n, rank = dist.get_world_size(), dist.get_rank()
    total = sum(range(n))
    base = torch.zeros(20, 30)
    view = base.t()[3:9, 2:14:3]
    view.fill_(float(rank))
    assert not view.is_contiguous()
    dist.all_reduce(view)
    assert torch.equal(view, torch.full_like(view, float(total)))
    assert base.sum() == view.sum(), "nothing outside of the view may change"
    offset = torch.zeros(1001)[7:900]
    offset.fill_(float(rank))
    dist.all_reduce(offset)
    assert torch.equal(offset, torch.full_like(offset, float(total)))
    turned = torch.full((4, 6), float(rank)).t()
    dist.broadcast(turned, n - 1)
    assert torch.equal(turned, torch.full((6, 4), float(n - 1)))
    wide = torch.full((2 * n, 3), -1.0)
    outputs = [wide[2 * r : 2 * r + 2, 1] for r in range(n)]
    dist.all_gather(outputs, torch.full((3, 2), float(rank))[1])
    assert torch.equal(wide[:, 1], torch.arange(float(n)).repeat_interleave(2))
    assert torch.equal(wide[:, 0], torch.full((2 * n,), -1.0))
    with torch.inference_mode():
        inference = torch.full((4, 4), float(rank)).t()[:, 1:3]
        dist.all_reduce(inference)
        assert torch.equal(inference, torch.full((4, 2), float(total)))
    leaf = torch.full((3,), float(rank), requires_grad=True)
    with torch.no_grad():
        dist.all_reduce(leaf)
    assert torch.equal(leaf.detach(), torch.full((3,), float(total)))
    scalar = torch.tensor(float(rank))
    dist.all_reduce(scalar)
    assert scalar.item() == total


def test_strides_offsets_and_views(world: Ranks) -> None:
    world.call(check_strides)


def check_objects() -> None:
    n, rank = dist.get_world_size(), dist.get_rank()
    gathered: list[Any] = [None] * n
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * (rank * 1000)})
    assert [item["rank"] for item in gathered] == list(range(n))
    assert [len(item["text"]) for item in gathered] == [1000 * r for r in range(n)]
    objects = [rank, "from", rank] if rank == n - 1 else [None, None, None]
    dist.broadcast_object_list(objects, src=n - 1)
    assert objects == [n - 1, "from", n - 1]
    at_root: list[Any] | None = [None] * n if rank == 0 else None
    dist.gather_object(("rank", rank), at_root, dst=0)
    assert at_root is None or at_root == [("rank", r) for r in range(n)]
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, [f"for {r}" for r in range(n)] if rank == 0 else None, src=0)
    assert mine == [f"for {rank}"]
    dist.barrier()


def test_objects_and_barrier(world: Ranks) -> None:
    world.call(check_objects)
