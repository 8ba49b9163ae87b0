"""What works: every collective, dtype and operation on reducer and on Gloo, found out by calling them.

    python tests/python/matrix.py [--write]     # prints docs/matrix.md, or writes it

A cell is one call in three processes, and its results are compared with what they must be, which plain Python computes.
Numbers are small, so that every dtype has them exactly in whatever order they are added; unsigned integers have their
highest bit set where an operation orders or combines bits.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ranks
import torch
import torch.distributed as dist
from matrix_rows import (
    BACKENDS,
    CALL_S,
    DOCUMENT,
    DTYPES,
    FAILS,
    GROUP_S,
    MOVING,
    OPS,
    PLAIN,
    REFUSED,
    ROWS,
    WITH_OP,
    WORKS,
    WORLD,
    WRONG,
    Work,
    ops_of,
)
from ranks import Ranks


@dataclass(frozen=True)
class Cell:
    """One call. `dtype` and `op` are names, empty where the call takes none."""

    row: str
    dtype: str = ""
    op: str = ""


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
            timeout=timedelta(seconds=GROUP_S),
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

    def __init__(self, backend: str, call: Callable[[str, Cell], Verdict] = call_cell, limit_s: float = CALL_S) -> None:
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
