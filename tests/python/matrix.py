"""What works: every collective, dtype and operation on reducer and on Gloo, found out by calling them.

    python tests/python/matrix.py [--write]     # prints docs/matrix.md, or writes it

A cell is one call in three processes, and its results are compared with what they must be, which plain Python computes.
Numbers are small, so that every dtype has them exactly in whatever order they are added; unsigned integers have their
highest bit set where an operation orders or combines bits.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ranks
import torch
import torch.distributed as dist
from ranks import Ranks

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
_CALL_S = 15.0
_GROUP_S = 8.0

Values = list[Any]
# What a rank has and what it must have, several times.
Results = list[tuple[Values, Values]]


@dataclass(frozen=True)
class Cell:
    """One call. `dtype` and `op` are names, empty where the call takes none."""

    row: str
    dtype: str = ""
    op: str = ""


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
    group.monitored_barrier(timedelta(seconds=_GROUP_S), wait_all_ranks=True)
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


def cells() -> list[Cell]:
    return [
        *(Cell(*names) for names in itertools.product(WITH_OP, DTYPES, OPS)),
        *(Cell(*names) for names in itertools.product(MOVING, DTYPES)),
        *(Cell(row) for row in PLAIN),
    ]


# ---------------------------------------------------------------- calling them


@dataclass(frozen=True)
class Verdict:
    """What became of a call."""

    outcome: str
    text: str = ""


def call_cell(backend: str, cell: Cell) -> Verdict:
    """In a rank."""
    if not dist.is_initialized():
        place = ranks.here()
        dist.init_process_group(
            backend,
            store=ranks.store_of(place),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=_GROUP_S),
        )
    dtype = DTYPES.get(cell.dtype, torch.float32)
    try:
        handles = list(ops_of(cell.op)) if cell.op else [None]
        results = [
            found for handle in handles for found in ROWS[cell.row](Work(dist.get_rank(), dtype, cell.op, handle))
        ]
    except Exception as error:
        return Verdict(REFUSED, f"{type(error).__name__}: {error}".splitlines()[0])
    for actual, expected in results:
        if actual != expected:
            return Verdict(WRONG, f"rank {dist.get_rank()} has {actual}, must have {expected}")
    return Verdict(WORKS)


# Asked after a refusal: whether the group still works.
HEALTH = Cell("`all_reduce`", "float32", "SUM")


class Caller:
    """Calls cells on one backend, in new processes after whatever these may not have survived.

    `call` is what a rank does with a backend and a cell, within `limit_s`.
    """

    def __init__(
        self, backend: str, call: Callable[[str, Cell], Verdict] = call_cell, limit_s: float = _CALL_S
    ) -> None:
        self._backend = backend
        self._call = call
        self._limit_s = limit_s
        self._team: Ranks | None = None

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._end()

    def verdict(self, cell: Cell) -> Verdict:
        found = self._attempt(cell)
        # Once more in new processes: what an earlier cell may have done to the group is not this one's.
        return self._attempt(cell, new=True) if found.outcome in (FAILS, WRONG) else found

    def _attempt(self, cell: Cell, new: bool = False) -> Verdict:
        if new:
            self._end()
        found = self._ask(cell)
        if found.outcome == REFUSED and self._ask(HEALTH).outcome == WORKS:
            return found
        if found.outcome != WORKS:
            self._end()
        return found

    def _ask(self, cell: Cell) -> Verdict:
        if self._team is None:
            self._team = Ranks(WORLD, init=False)
        try:
            outcomes = self._team.try_call(self._call, self._backend, cell, timeout_s=self._limit_s)
        except ranks.RankFailure as error:
            self._team = None  # it has ended them
            return Verdict(FAILS, str(error))
        verdicts = [o.value if isinstance(o.value, Verdict) else Verdict(FAILS, o.trace) for o in outcomes]
        kinds = {verdict.outcome for verdict in verdicts}
        if WRONG in kinds:
            return next(verdict for verdict in verdicts if verdict.outcome == WRONG)
        if len(kinds) > 1:
            # An error on some ranks only: the others got something, or waited in vain.
            return Verdict(FAILS, "; ".join(f"rank {r}: {v.outcome} {v.text}" for r, v in enumerate(verdicts)))
        return verdicts[0]

    def _end(self) -> None:
        if self._team is not None:
            self._team.kill()
            self._team = None


Matrix = dict[Cell, dict[str, Verdict]]

# Cells that no backend can get right, and why.
BEYOND_BACKENDS = {
    Cell("`all_reduce` of sparse tensors", dtype, "SUM"): "torch's dist.all_reduce hands a sparse tensor of complex "
    "numbers to the backend as a new tensor of pairs, where the result stays; the caller's tensor keeps what it had"
    for dtype in ("complex64", "complex128")
}


def generate(only: Callable[[Cell], bool] = lambda cell: True) -> Matrix:
    """Every cell's verdict by backend."""
    found: Matrix = {cell: {} for cell in cells() if only(cell)}
    for backend in BACKENDS:
        with Caller(backend) as caller:
            for cell in found:
                found[cell][backend] = caller.verdict(cell)
    return found


# ---------------------------------------------------------------- the document

_HEAD = """# What works: reducer beside Gloo

Written by `python tests/python/matrix.py --write`, which calls every cell in three processes and compares the results;
`tests/python/test_matrix.py` does so again and fails if this page says otherwise. torch 2.13, CPU tensors.

- **both**: right results on reducer and on Gloo.
- **reducer**: on reducer only; Gloo refuses, with an error on every rank.
- **-**: both refuse: the operation means nothing on the dtype, or torch's Python refuses it before a backend is asked
  (`PRODUCT` of complex numbers in `all_reduce`), or torch itself cannot compute it (sums of some sparse dtypes).
- **wrong**: no error, and not the result that it must be. Gloo adds a bool's bytes, and 2 is no bool. Sparse complex
  tensors: torch's `dist.all_reduce` hands the backend a new tensor, and the caller's keeps what it had.
- **fails**: a hang, a crash, or an error on some of the ranks only.

Averages of integers are cut off towards zero, and a bool's is true where all are.
"""


def describe(cell: Cell) -> str:
    return " ".join(filter(None, (cell.row.replace("`", ""), cell.dtype, cell.op)))


def sign(verdicts: dict[str, Verdict]) -> str:
    ours, theirs = (verdicts[backend].outcome for backend in BACKENDS)
    if ours == theirs:
        return {WORKS: "both", REFUSED: "-"}.get(ours, f"both {ours}")
    text = "reducer" if ours == WORKS else f"reducer {ours}"
    return text if theirs == REFUSED else f"{text}, Gloo {theirs}"


def document(matrix: Matrix) -> str:
    parts = [_HEAD]
    totals = [
        f"{sum(verdicts[backend].outcome == WORKS for verdicts in matrix.values())} on {name}"
        for backend, name in zip(BACKENDS, ("reducer", "Gloo"), strict=True)
    ]
    parts.append(f"Of {len(matrix)} calls work {' and '.join(totals)}.\n")
    parts.append("## Collectives with an operation\n")
    by_table: dict[str, list[str]] = {}
    for row in WITH_OP:
        lines = [[dtype, *(sign(matrix[Cell(row, dtype, op)]) for op in OPS)] for dtype in DTYPES]
        by_table.setdefault(_table(["dtype", *OPS], lines), []).append(row)
    for text, rows in by_table.items():
        parts.append(f"{'; '.join(rows)}:\n\n{text}\n")
    parts.append("## Collectives that only move values\n")
    by_line: dict[tuple[str, ...], list[str]] = {}
    for row in MOVING:
        by_line.setdefault(tuple(sign(matrix[Cell(row, dtype)]) for dtype in DTYPES), []).append(row)
    kinds = list(by_line)
    for number, signs in enumerate(kinds, 1):
        parts.append(f"{number}. {'; '.join(by_line[signs])}")
    lines = [[dtype, *(signs[i] for signs in kinds)] for i, dtype in enumerate(DTYPES)]
    parts.append("")
    parts.append(_table(["dtype", *(str(number) for number in range(1, len(kinds) + 1))], lines) + "\n")
    parts.append("## Without a dtype\n")
    parts.append(_table(["call", "works on"], [[row, sign(matrix[Cell(row)])] for row in PLAIN]))
    return "\n".join(parts) + "\n"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.relative_to(DOCUMENT.parents[1])}")
    parser.add_argument("--why", action="store_true", help="say of each cell that does not work why")
    asked = parser.parse_args()
    matrix = generate()
    if asked.why:
        for cell, verdicts in matrix.items():
            for backend, verdict in verdicts.items():
                if verdict.outcome != WORKS:
                    print(f"{backend}: {describe(cell)}: {verdict.outcome}: {verdict.text}", file=sys.stderr)
    if asked.write:
        DOCUMENT.write_text(document(matrix))
    else:
        print(document(matrix), end="")


if __name__ == "__main__":
    # By its name, so that the ranks find the functions.
    import matrix as itself

    itself.main()
