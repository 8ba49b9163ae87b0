"""The rows of matrix.py: every collective as one call, with what its results must be.

Numbers are small, so that every dtype has them exactly in whatever order they are added; unsigned integers have their
highest bit set where an operation orders or combines bits.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

WORLD = 3
ROOT = 1  # and not 0, which is what everything has that forgets it
BACKENDS = ("reducer", "gloo")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "matrix.md"

WORKS, REFUSED, WRONG, FAILS = "works", "refused", "wrong", "fails"

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.bool,
        torch.complex64,
        torch.complex128,
    )
}
_UNSIGNED = {torch.uint8: np.uint8, torch.uint16: np.uint16, torch.uint32: np.uint32, torch.uint64: np.uint64}
OPS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "PREMUL_SUM")
_FACTOR = 2

# A rank's limit for one call; ranks that have not answered by then are ended. A wait within the group ends sooner.
CALL_S = 15.0
GROUP_S = 8.0

Values = list[Any]
# What a rank has and what it must have, several times.
Results = list[tuple[Values, Values]]


# ---------------------------------------------------------------- values


def given(rank: int, dtype: torch.dtype, op: str, count: int) -> Values:
    """What a rank puts in."""
    numbers = [_number(i * 5 + rank * 3 + i * rank, i, dtype, op) for i in range(count)]
    if dtype.is_complex:
        return [complex(a, b) for a, b in zip(numbers, numbers[1:] + numbers[:1], strict=True)]
    return numbers


def _number(seed: int, index: int, dtype: torch.dtype, op: str) -> Any:
    if dtype == torch.bool:
        # An odd number of trues, a mixture, all true, all false, by index.
        return (seed % 2 == 0, seed % 3 == 0, True, False)[index % 4]
    signed = dtype not in _UNSIGNED
    if op == "PRODUCT":
        return (1 + seed % 2) * (-1 if signed and seed % 3 == 0 else 1)
    if op in ("MIN", "MAX", "BAND", "BOR", "BXOR"):
        if signed:
            return seed % 7 - 3
        return seed % 7 + (1 << (8 * dtype.itemsize - 1) if seed % 2 else 0)
    small = seed % 3 - (1 if signed else 0)
    # Divisible by the number of ranks, so that every dtype has the average.
    return small * WORLD if op == "AVG" else small


def combined(inputs: Sequence[Values], dtype: torch.dtype, op: str) -> Values | None:
    """The operation over the ranks' values, or None if it means nothing on them."""
    if op in ("MIN", "MAX") and dtype.is_complex:
        return None
    if op in ("BAND", "BOR", "BXOR") and (dtype.is_floating_point or dtype.is_complex):
        return None
    if op == "PREMUL_SUM" and dtype == torch.bool:
        return None
    if dtype == torch.bool:
        # As torch itself adds and multiplies them; averages of integers are cut off, which leaves 1 where all are.
        by_name: dict[str, Callable[[Any, Any], Any]] = {
            "SUM": operator.or_,
            "PRODUCT": operator.and_,
            "MIN": operator.and_,
            "MAX": operator.or_,
            "AVG": operator.and_,
        }
    else:
        by_name = {"SUM": operator.add, "PRODUCT": operator.mul, "MIN": min, "MAX": max}
    by_name |= {"BAND": operator.and_, "BOR": operator.or_, "BXOR": operator.xor}
    function = by_name.get(op, operator.add)
    total = [functools.reduce(function, column) for column in zip(*inputs, strict=True)]
    if op == "AVG" and dtype != torch.bool:
        return [value / WORLD for value in total]
    return [value * _FACTOR for value in total] if op == "PREMUL_SUM" else total


def tensor_of(values: Values, dtype: torch.dtype) -> torch.Tensor:
    if dtype in _UNSIGNED:
        return torch.from_numpy(np.array(values, dtype=_UNSIGNED[dtype]))
    if dtype.is_floating_point:
        return torch.tensor(values, dtype=torch.float64).to(dtype)
    return torch.tensor(values, dtype=dtype)


def values_of(tensor: torch.Tensor) -> Values:
    if tensor.dtype == torch.bool:
        # As bytes: a true that is not 1 is no bool.
        return list(tensor.view(torch.uint8).tolist())
    if tensor.dtype.is_floating_point:
        return list(tensor.double().tolist())
    return list(tensor.numpy().tolist())


def blank(count: int, dtype: torch.dtype) -> torch.Tensor:
    """An output, with something in it that no call leaves there."""
    return tensor_of([dtype != torch.bool and 6] * count, dtype)


def ops_of(name: str) -> Iterator[Any]:
    """The operation, or each form of it."""
    if name == "PREMUL_SUM":
        yield dist._make_nccl_premul_sum(float(_FACTOR))
        yield dist._make_nccl_premul_sum(torch.tensor([float(_FACTOR)]))
    else:
        yield getattr(dist.ReduceOp, name)


# ---------------------------------------------------------------- rows: with an operation

COUNT = 12


@dataclass(frozen=True)
class Work:
    """What a row's function is called with, in a rank."""

    rank: int
    dtype: torch.dtype
    op: str  # "" in rows without
    handle: Any  # torch's operation

    def mine(self, count: int = COUNT, rank: int | None = None) -> Values:
        return given(self.rank if rank is None else rank, self.dtype, self.op, count)

    def tensor(self, count: int = COUNT) -> torch.Tensor:
        return tensor_of(self.mine(count), self.dtype)

    def total(self, count: int = COUNT) -> Values:
        found = combined([self.mine(count, rank) for rank in range(WORLD)], self.dtype, self.op)
        return ["no meaning"] * count if found is None else found

    def blank(self, count: int = COUNT) -> torch.Tensor:
        return blank(count, self.dtype)

    def part(self, values: Values, rank: int | None = None) -> Values:
        """A rank's share of values that are scattered."""
        length = len(values) // WORLD
        start = (self.rank if rank is None else rank) * length
        return values[start : start + length]


def all_reduce(work: Work) -> Results:
    tensor = work.tensor()
    dist.all_reduce(tensor, work.handle)
    return [(values_of(tensor), work.total())]


def all_reduce_coalesced(work: Work) -> Results:
    tensors = [work.tensor(COUNT), work.tensor(5)]
    dist.all_reduce_coalesced(tensors, work.handle)
    return [(values_of(tensor), work.total(len(tensor))) for tensor in tensors]


def all_reduce_in_manager(work: Work) -> Results:
    tensors = [work.tensor(COUNT), work.tensor(5)]
    with dist._coalescing_manager():
        for tensor in tensors:
            dist.all_reduce(tensor, work.handle)
    return [(values_of(tensor), work.total(len(tensor))) for tensor in tensors]


def all_reduce_sparse(work: Work) -> Results:
    return _sparse(work, dist.all_reduce)


def all_reduce_sparse_of_group(work: Work) -> Results:
    def call(tensor: torch.Tensor, op: Any) -> None:
        options: Any = dist.AllreduceOptions()
        options.reduceOp = op
        group: Any = dist.group.WORLD
        group.allreduce([tensor], options).wait()

    return _sparse(work, call)


def _sparse(work: Work, call: Callable[[torch.Tensor, Any], Any]) -> Results:
    # Ranks have different indices, some of them in common.
    places = [rank + 2 * i for rank in range(WORLD) for i in range(3)]
    mine = places[3 * work.rank : 3 * work.rank + 3]
    tensor = torch.sparse_coo_tensor(torch.tensor([mine]), work.tensor(3), (COUNT,))
    call(tensor, work.handle)
    zeros: list[list[Any]] = [[False if work.dtype == torch.bool else 0] * COUNT for _ in range(WORLD)]
    for rank in range(WORLD):
        for place, value in zip(places[3 * rank : 3 * rank + 3], work.mine(3, rank), strict=True):
            zeros[rank][place] = value
    # What is not there is nothing, and not 0: only sums do not tell these apart.
    meant = work.op in ("SUM", "AVG", "PREMUL_SUM")
    expected = combined(zeros, work.dtype, work.op) if meant else None
    actual: Values = [0] * COUNT
    for place, value in zip(tensor._indices()[0].tolist(), values_of(tensor._values()), strict=True):
        actual[place] += value
    return [(actual, ["no meaning"] if expected is None else expected)]


def reduce(work: Work) -> Results:
    tensor = work.tensor()
    dist.reduce(tensor, ROOT, work.handle)
    return [(values_of(tensor), work.total())] if work.rank == ROOT else []


def reduce_scatter(work: Work) -> Results:
    output = work.blank(COUNT // WORLD)
    dist.reduce_scatter(output, list(work.tensor().chunk(WORLD)), work.handle)
    return [(values_of(output), work.part(work.total()))]


def reduce_scatter_tensor(work: Work) -> Results:
    output = work.blank(COUNT // WORLD)
    dist.reduce_scatter_tensor(output, work.tensor(), work.handle)
    return [(values_of(output), work.part(work.total()))]


def reduce_scatter_tensor_in_manager(work: Work) -> Results:
    counts = (COUNT, 2 * COUNT)
    outputs = [work.blank(count // WORLD) for count in counts]
    with dist._coalescing_manager():
        for output, count in zip(outputs, counts, strict=True):
            dist.reduce_scatter_tensor(output, work.tensor(count), work.handle)
    return [(values_of(o), work.part(work.total(count))) for o, count in zip(outputs, counts, strict=True)]


# ---------------------------------------------------------------- rows: values only move


def broadcast(work: Work) -> Results:
    tensor = work.tensor()
    dist.broadcast(tensor, ROOT)
    return [(values_of(tensor), work.mine(rank=ROOT))]


def all_gather(work: Work) -> Results:
    outputs = [work.blank() for _ in range(WORLD)]
    dist.all_gather(outputs, work.tensor())
    return [(values_of(output), work.mine(rank=rank)) for rank, output in enumerate(outputs)]


def all_gather_uneven(work: Work) -> Results:
    outputs = [work.blank(3 + rank) for rank in range(WORLD)]
    dist.all_gather(outputs, work.tensor(3 + work.rank))
    return [(values_of(output), work.mine(3 + rank, rank)) for rank, output in enumerate(outputs)]


def all_gather_coalesced(work: Work) -> Results:
    counts = (COUNT, 5)
    outputs = [[work.blank(count) for count in counts] for _ in range(WORLD)]
    dist.all_gather_coalesced(outputs, [work.tensor(count) for count in counts])
    return [(values_of(t), work.mine(len(t), rank)) for rank, list_ in enumerate(outputs) for t in list_]


def all_gather_into_tensor(work: Work) -> Results:
    output = work.blank(WORLD * COUNT)
    dist.all_gather_into_tensor(output, work.tensor())
    return [(values_of(output), _gathered(work, COUNT))]


def all_gather_into_tensor_in_manager(work: Work) -> Results:
    counts = (COUNT, 5)
    outputs = [work.blank(WORLD * count) for count in counts]
    with dist._coalescing_manager():
        for output, count in zip(outputs, counts, strict=True):
            dist.all_gather_into_tensor(output, work.tensor(count))
    return [(values_of(output), _gathered(work, count)) for output, count in zip(outputs, counts, strict=True)]


def _gathered(work: Work, count: int) -> Values:
    return [value for rank in range(WORLD) for value in work.mine(count, rank)]


def gather(work: Work) -> Results:
    outputs = [work.blank() for _ in range(WORLD)] if work.rank == ROOT else None
    dist.gather(work.tensor(), outputs, ROOT)
    return [(values_of(output), work.mine(rank=rank)) for rank, output in enumerate(outputs or [])]


def scatter(work: Work) -> Results:
    output = work.blank(COUNT // WORLD)
    dist.scatter(output, list(work.tensor().chunk(WORLD)) if work.rank == ROOT else None, ROOT)
    return [(values_of(output), work.part(work.mine(rank=ROOT)))]


def all_to_all_single(work: Work) -> Results:
    output = work.blank()
    dist.all_to_all_single(output, work.tensor())
    return [(values_of(output), [v for rank in range(WORLD) for v in work.part(work.mine(rank=rank))])]


def _uneven(giver: int, taker: int) -> slice:
    """Which of the giver's values the taker gets."""
    lengths = [1 + (giver + rank) % WORLD for rank in range(WORLD)]
    start = sum(lengths[:taker])
    return slice(start, start + lengths[taker])


def _lengths(work: Work) -> tuple[list[int], list[int]]:
    def length(giver: int, taker: int) -> int:
        return len(range(COUNT)[_uneven(giver, taker)])

    outgoing = [length(work.rank, rank) for rank in range(WORLD)]
    return outgoing, [length(rank, work.rank) for rank in range(WORLD)]


def all_to_all_single_uneven(work: Work) -> Results:
    outgoing, incoming = _lengths(work)
    output = work.blank(sum(incoming))
    dist.all_to_all_single(output, work.tensor(COUNT)[: sum(outgoing)].clone(), incoming, outgoing)
    expected = [v for rank in range(WORLD) for v in work.mine(rank=rank)[_uneven(rank, work.rank)]]
    return [(values_of(output), expected)]


def all_to_all(work: Work) -> Results:
    outputs = [work.blank(COUNT // WORLD) for _ in range(WORLD)]
    dist.all_to_all(outputs, list(work.tensor().chunk(WORLD)))
    return [(values_of(o), work.part(work.mine(rank=rank))) for rank, o in enumerate(outputs)]


def all_to_all_uneven(work: Work) -> Results:
    outgoing, incoming = _lengths(work)
    outputs = [work.blank(length) for length in incoming]
    dist.all_to_all(outputs, list(work.tensor()[: sum(outgoing)].split(outgoing)))
    return [(values_of(o), work.mine(rank=rank)[_uneven(rank, work.rank)]) for rank, o in enumerate(outputs)]


def send_recv(work: Work) -> Results:
    return _round_trip(work, lambda tensor, source: dist.recv(tensor, source))


def recv_any_source(work: Work) -> Results:
    return _round_trip(work, lambda tensor, source: dist.recv(tensor))


def _round_trip(work: Work, receive: Callable[[torch.Tensor, int], Any]) -> Results:
    """Rank 0's values to each rank, and every rank's values to rank 0, one rank after the other."""
    results: Results = []
    for rank in range(1, WORLD):
        tensor = work.blank()
        if work.rank == 0:
            dist.send(work.tensor(), rank)
            sources = [receive(tensor, rank)]
            results += [(values_of(tensor), work.mine(rank=rank)), (sources, [rank])]
        elif work.rank == rank:
            sources = [receive(tensor, 0)]
            results += [(values_of(tensor), work.mine(rank=0)), (sources, [0])]
            dist.send(work.tensor(), 0)
    return results


def batch_isend_irecv(work: Work) -> Results:
    tensor = work.blank()
    after, before = (work.rank + 1) % WORLD, (work.rank - 1) % WORLD
    operations = [dist.P2POp(dist.isend, work.tensor(), after), dist.P2POp(dist.irecv, tensor, before)]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    return [(values_of(tensor), work.mine(rank=before))]


# ---------------------------------------------------------------- rows: no dtype


def barrier(work: Work) -> Results:
    dist.barrier()
    return []


def monitored_barrier(work: Work) -> Results:
    # dist.monitored_barrier refuses every name but Gloo's before it asks the backend.
    group: Any = dist.group.WORLD
    group.monitored_barrier(timedelta(seconds=GROUP_S), wait_all_ranks=True)
    return []


def _thing(rank: int) -> dict[str, Any]:
    return {"rank": rank, "list": list(range(rank * 100))}


def all_gather_object(work: Work) -> Results:
    found: Values = [None] * WORLD
    dist.all_gather_object(found, _thing(work.rank))
    return [(found, [_thing(rank) for rank in range(WORLD)])]


def gather_object(work: Work) -> Results:
    found: Values | None = [None] * WORLD if work.rank == ROOT else None
    dist.gather_object(_thing(work.rank), found, ROOT)
    return [(found, [_thing(rank) for rank in range(WORLD)])] if found is not None else []


def broadcast_object_list(work: Work) -> Results:
    found = [_thing(work.rank), work.rank]
    dist.broadcast_object_list(found, ROOT)
    return [(found, [_thing(ROOT), ROOT])]


def scatter_object_list(work: Work) -> Results:
    found: Values = [None]
    dist.scatter_object_list(found, [_thing(rank) for rank in range(WORLD)] if work.rank == ROOT else None, ROOT)
    return [(found, [_thing(work.rank)])]


def send_recv_object_list(work: Work) -> Results:
    if work.rank == 0:
        for rank in range(1, WORLD):
            dist.send_object_list([_thing(rank), "word"], rank)
        return []
    found: Values = [None, None]
    dist.recv_object_list(found, 0)
    return [(found, [_thing(work.rank), "word"])]


Row = Callable[[Work], Results]

WITH_OP: dict[str, Row] = {
    "`all_reduce`": all_reduce,
    "`all_reduce_coalesced`": all_reduce_coalesced,
    "`all_reduce` in a coalescing manager": all_reduce_in_manager,
    "`all_reduce` of sparse tensors": all_reduce_sparse,
    "`allreduce` of the group, of sparse tensors": all_reduce_sparse_of_group,
    "`reduce`": reduce,
    "`reduce_scatter`": reduce_scatter,
    "`reduce_scatter_tensor`": reduce_scatter_tensor,
    "`reduce_scatter_tensor` in a coalescing manager": reduce_scatter_tensor_in_manager,
}
MOVING: dict[str, Row] = {
    "`broadcast`": broadcast,
    "`all_gather`": all_gather,
    "`all_gather` of uneven sizes": all_gather_uneven,
    "`all_gather_coalesced`": all_gather_coalesced,
    "`all_gather_into_tensor`": all_gather_into_tensor,
    "`all_gather_into_tensor` in a coalescing manager": all_gather_into_tensor_in_manager,
    "`gather`": gather,
    "`scatter`": scatter,
    "`all_to_all_single`": all_to_all_single,
    "`all_to_all_single` with uneven splits": all_to_all_single_uneven,
    "`all_to_all`": all_to_all,
    "`all_to_all` of uneven sizes": all_to_all_uneven,
    "`send` and `recv`": send_recv,
    "`send` and `recv` from any rank": recv_any_source,
    "`batch_isend_irecv`": batch_isend_irecv,
}
PLAIN: dict[str, Row] = {
    "`barrier`": barrier,
    "`monitored_barrier` of the group": monitored_barrier,
    "`all_gather_object`": all_gather_object,
    "`gather_object`": gather_object,
    "`broadcast_object_list`": broadcast_object_list,
    "`scatter_object_list`": scatter_object_list,
    "`send_object_list` and `recv_object_list`": send_recv_object_list,
}
ROWS = WITH_OP | MOVING | PLAIN
