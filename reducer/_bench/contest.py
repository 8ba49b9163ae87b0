"""Contenders side by side: in rounds, in turn, so that the machine's noise meets all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reducer._bench.processes import ChildError
from reducer._bench.statistics import median, percentile, slowest_per_iteration
from reducer._bench.team import Message, Team, TeamError

#: What can end a contender without ending the benchmark.
CONTENDER_ERRORS = (ChildError, TeamError)


@dataclass
class Contender:
    """One way to do the collective. `failed` says why it no longer takes part."""

    name: str
    backend: str
    team: Team
    environment: dict[str, str] = field(default_factory=dict)
    failed: str | None = None

    def open(self, timeout_s: float) -> None:
        """Makes its group on every rank; what goes wrong is kept in `failed`."""
        command = {
            "do": "open",
            "name": self.name,
            "backend": self.backend,
            "environment": self.environment,
            "timeout_s": timeout_s,
        }
        try:
            self.team.call(command, 2 * timeout_s)
        except CONTENDER_ERRORS as error:
            self.failed = str(error)


@dataclass(frozen=True)
class Budget:
    """How much is measured: rounds of equal length that take about `seconds` in all."""

    seconds: float
    rounds: int = 3
    iterations_min: int = 5
    iterations_max: int = 2000
    timeout_s: float = 120.0


@dataclass
class Outcome:
    """What one contender did with one case. Times in seconds, one per iteration (slowest rank)."""

    contender: str
    nbytes: int
    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    difference: str | None = None
    error: str | None = None
    cpu_busy_s: float = 0.0
    cpu_total_s: float = 0.0

    @property
    def measured(self) -> bool:
        return bool(self.seconds) and self.error is None

    @property
    def ok(self) -> bool:
        return self.measured and self.wrong == 0

    @property
    def median_s(self) -> float:
        return median(self.seconds)

    @property
    def p99_s(self) -> float:
        return percentile(self.seconds, 99)

    @property
    def algbw(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.median_s

    @property
    def cpu_share(self) -> float:
        """Busy part of all cores while this contender ran, 0 to 1."""
        return self.cpu_busy_s / self.cpu_total_s if self.cpu_total_s else 0.0


def run_case(
    contenders: Sequence[Contender],
    case: Message,
    budget: Budget,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Outcome]:
    """Measures one case (the arguments of "measure" without group and iterations).

    Each contender warms up, which also tells how many iterations fit its budget; then all go in
    rounds, another one first in each. Those that failed before are left out.
    """
    contenders = [contender for contender in contenders if contender.failed is None]
    outcomes = [Outcome(contender.name, case["nbytes"]) for contender in contenders]
    counts = []
    for contender, outcome in zip(contenders, outcomes, strict=True):
        progress(f"{contender.name}: warm-up")
        counts.append(_iterations_per_round(contender, case, budget, outcome))
    for round_number in range(budget.rounds):
        for turn in range(len(contenders)):
            index = (turn + round_number) % len(contenders)
            progress(f"{contenders[index].name}: round {round_number + 1} of {budget.rounds}")
            _measure(contenders[index], case, counts[index], budget, outcomes[index])
    return outcomes


def _iterations_per_round(contender: Contender, case: Message, budget: Budget, outcome: Outcome) -> int:
    trial = Outcome(contender.name, 0)
    _measure(contender, case, 2, budget, trial)
    if trial.measured and trial.median_s < 0.02:
        _measure(contender, case, 10, budget, trial)
    outcome.wrong += trial.wrong
    outcome.difference = trial.difference
    outcome.error = trial.error
    if not trial.measured:
        return 1
    fitting = int(budget.seconds / trial.median_s)
    total = min(budget.iterations_max, max(budget.iterations_min, fitting))
    return max(1, round(total / budget.rounds))


def _measure(contender: Contender, case: Message, iterations: int, budget: Budget, outcome: Outcome) -> None:
    if contender.failed is not None or outcome.error is not None:
        outcome.error = outcome.error or contender.failed
        return
    command = {**case, "do": "measure", "group": contender.name, "iterations": iterations}
    try:
        replies = contender.team.call(command, budget.timeout_s)
    except TeamError as error:
        outcome.error = str(error)
        return
    except ChildError as error:
        outcome.error = contender.failed = str(error)
        return
    _add_replies(outcome, replies)


def _add_replies(outcome: Outcome, replies: Sequence[dict[str, Any]]) -> None:
    outcome.nbytes = replies[0]["nbytes"]
    outcome.cpu_busy_s += replies[0]["cpu_busy_s"]
    outcome.cpu_total_s += replies[0]["cpu_total_s"]
    outcome.seconds += slowest_per_iteration([reply["times_ns"] for reply in replies])
    outcome.wrong += sum(reply["wrong"] for reply in replies)
    for rank, reply in enumerate(replies):
        if reply["difference"] is not None and outcome.difference is None:
            outcome.difference = f"rank {rank}: {reply['difference']}"
