"""docs/matrix.md is what the calls do, nothing that works on Gloo fails on reducer, and no result is wrong."""

from __future__ import annotations

import difflib
import os
import signal
import time

import matrix
import matrix_rows
import pytest
import ranks
from matrix import BEYOND_BACKENDS, FAILS, HEALTH, REFUSED, WORKS, WRONG, Caller, Cell, Matrix, Verdict


@pytest.fixture(scope="module")
def found() -> Matrix:
    return matrix.generate()


def test_what_works_on_gloo_works_on_reducer(found: Matrix) -> None:
    assert sum(verdicts["gloo"].outcome == WORKS for verdicts in found.values()) > 500, "Gloo was not really asked"
    lacking = [
        f"{matrix.describe(cell)}: {verdicts['reducer']}"
        for cell, verdicts in found.items()
        if verdicts["gloo"].outcome == WORKS and verdicts["reducer"].outcome != WORKS
    ]
    assert not lacking, "\n".join(lacking)


def test_every_result_is_right_or_refused(found: Matrix) -> None:
    bad = {
        cell: f"{matrix.describe(cell)}: {verdicts['reducer']}"
        for cell, verdicts in found.items()
        if verdicts["reducer"].outcome not in (WORKS, REFUSED)
    }
    assert not bad.keys() - BEYOND_BACKENDS.keys(), "\n".join(bad[cell] for cell in bad.keys() - BEYOND_BACKENDS.keys())
    for cell, reason in BEYOND_BACKENDS.items():
        outcomes = {verdict.outcome for verdict in found[cell].values()}
        assert outcomes == {WRONG}, f"{matrix.describe(cell)} is not excused any more: {outcomes}, {reason}"


def test_the_document_is_what_was_found(found: Matrix) -> None:
    written = matrix.DOCUMENT.read_text()
    difference = difflib.unified_diff(
        written.splitlines(), matrix.document(found).splitlines(), "docs/matrix.md", "found", lineterm="", n=0
    )
    lines = list(difference)
    assert not lines, "\n".join([*lines, "", "python tests/python/matrix.py --write writes what was found"])


def pretend(backend: str, cell: Cell) -> Verdict:
    """In a rank: a call that ends in the way that the cell is called."""
    rank = ranks.here().rank
    if cell.row == "kill" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.row == "hang" and rank == 1:
        time.sleep(60)
    if cell.row == "raise":
        raise RuntimeError("no verdict at all")
    if cell.row == "refuse" or (cell.row == "refuse on one rank" and rank == 2):
        return Verdict(REFUSED, "no")
    if cell.row == "wrong on one rank" and rank == 0:
        return Verdict(WRONG, "4 is not 5")
    return Verdict(WORKS)


def test_a_call_that_hangs_or_dies_is_told_and_the_next_one_is_asked() -> None:
    expected = {
        "hang": FAILS,
        "work": WORKS,
        "kill": FAILS,
        "refuse": REFUSED,
        "raise": FAILS,
        "refuse on one rank": FAILS,
        "wrong on one rank": WRONG,
        HEALTH.row: WORKS,
    }
    with Caller("none", pretend, limit_s=3.0) as caller:
        verdicts = {row: caller.verdict(Cell(row)) for row in expected}
    assert {row: verdict.outcome for row, verdict in verdicts.items()} == expected
    assert "rank 1 died" in verdicts["kill"].text
    assert "no answer from rank 1" in verdicts["hang"].text
    assert verdicts["wrong on one rank"].text == "4 is not 5"


def test_the_reference_knows_the_operations() -> None:
    columns = [[3, -4], [6, -1], [0, -4]]
    table = {
        "SUM": [9, -9],
        "AVG": [3, -3],
        "PRODUCT": [0, -16],
        "MIN": [0, -4],
        "MAX": [6, -1],
        "PREMUL_SUM": [18, -18],
    }
    table |= {"BAND": [0, -4], "BOR": [7, -1], "BXOR": [5, -1]}
    for op, expected in table.items():
        assert matrix_rows.combined(columns, matrix.DTYPES["int32"], op) == expected, op
    assert set(table) == set(matrix.OPS)
    assert matrix_rows.combined(columns, matrix.DTYPES["float32"], "BAND") is None
