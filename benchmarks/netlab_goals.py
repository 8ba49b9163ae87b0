"""From a scenario's rows to its goals: what was to be reached, what was measured, met or missed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from netlab_report import Row
from netlab_scenarios import RIGHT_CHOICE, UNLIMITED, Goal
from rich.table import Table

from reducer._bench.units import format_size

_MEASURES = {
    "gloo": "x Gloo",
    "line": "of the line",
    "bound": "of its bound",
    "best": "x the best fixed choice's speed",
    "steps": "x Gloo's steps/s",
}


@dataclass(frozen=True)
class Verdict:
    """A goal and the figure at each size where it could be measured. One miss misses it, and so does a contender that
    failed, whatever it reached before; no figure is no verdict.
    """

    scenario: str
    goal: Goal
    figures: dict[int, float]
    failed: bool = False

    @property
    def met(self) -> bool | None:
        """None: not measured."""
        if self.failed:
            return False
        if not self.figures:
            return None
        return all(figure >= self.goal.at_least for figure in self.figures.values())


def judge(scenario: str, goals: Sequence[Goal], rows: Sequence[Row], failed: Collection[str]) -> list[Verdict]:
    """A verdict for each goal; `failed` are contenders. Wrong results reach nothing: their figure is 0."""
    return [Verdict(scenario, goal, _figures(goal, rows), goal.contender in failed) for goal in goals]


def _figures(goal: Goal, rows: Sequence[Row]) -> dict[int, float]:
    figures = {}
    for row in rows:
        if row.contender != goal.contender or not goal.least <= row.nbytes <= goal.most:
            continue
        figure = _figure(goal.measure, row, rows)
        if figure is not None:
            figures[row.nbytes] = 0.0 if row.wrong else figure
    return figures


def _figure(measure: str, row: Row, rows: Sequence[Row]) -> float | None:
    if measure == "gloo":
        return row.gloo_ratio
    if measure == "line":
        return row.line_share
    if measure == "bound":
        return row.bound_share
    assert measure == "best", measure
    fixed = [
        other.median_s
        for other in rows
        if other.nbytes == row.nbytes and other.contender not in ("gloo", row.contender) and not other.wrong
    ]
    return min(fixed) / row.median_s if fixed else None


def _sizes(goal: Goal) -> str:
    if goal.least == goal.most:
        return format_size(goal.least)
    if goal.most < UNLIMITED:
        return f"{format_size(goal.least)} to {format_size(goal.most)}"
    return f"from {format_size(goal.least)}" if goal.least else "all"


def make_goal_table(verdicts: Sequence[Verdict]) -> Table:
    """One line a goal, with the figure at each size."""
    table = Table(title="goals", title_justify="left")
    for name in ("where", "contender", "sizes", "at least", "measured"):
        table.add_column(name)
    table.add_column("", no_wrap=True)
    for verdict in verdicts:
        goal = verdict.goal
        figures = [
            f"{figure:.3f} ({format_size(nbytes)})" if nbytes else f"{figure:.3f}"
            for nbytes, figure in verdict.figures.items()
        ]
        wanted = f"{goal.at_least:.2f} {_MEASURES[goal.measure]}"
        word = {None: "not measured", True: "[green]met", False: "[red]missed"}[verdict.met]
        table.add_row(verdict.scenario, goal.contender, _sizes(goal), wanted, ", ".join(figures), word)
    if any(verdict.goal.at_least == RIGHT_CHOICE for verdict in verdicts):
        table.caption = f"within 10% of the best fixed choice: its time over auto's at least {RIGHT_CHOICE:.2f}"
        table.caption_justify = "left"
    return table
