"""netlab's DDP scenario: a GPT trains on the emulated hosts, on Gloo and on reducer in turns, from the same weights.

It shows steps per second, how far the loss curves lie apart, what a step takes without communication, and how much of
the communication backward hides, as a table and as timelines.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import netlab_cluster
from netlab_cluster import Cluster
from netlab_contender import Contender, seconds_between, stop_all
from netlab_goals import Verdict
from netlab_run import server_binary
from netlab_scenarios import Competitor, Goal, Shape
from rich.console import Console
from rich.table import Table

from reducer._bench.units import format_seconds, format_size

# The model is an example's.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from gpt import GptConfig, standard_library_text
from netlab_ddp_worker import Record, Steps, StepsResult, Training, serve_training
from netlab_timeline import draw_timelines

GOAL = 1.5
# Sums in another order differ in the last bit of a float32, and AdamW divides by what may be as small.
LOSS_NOISE = 1e-4
_TURN_STEPS = 5
_ALONE_STEPS = 4
_RECORDED_STEPS = 3
_TURN_SECONDS_MAX = 120.0
_SEED = 7


@dataclass(frozen=True)
class DdpScenario:
    """Which model on which cluster. The NICs are slow enough that the job waits for them: all workers' arithmetic
    shares the few cores of one machine, and on hosts of its own would take a fraction of what it takes here.
    """

    shape: Shape = field(default_factory=lambda: Shape(8, 8, rate="250mbit"))
    contenders: tuple[str, ...] = ("gloo", "auto")
    model: GptConfig = field(default_factory=lambda: GptConfig(context=32, width=256, heads=8, layers=8))
    batch: int = 1
    bucket_mib: float = 2.0
    budget_s: float = 100.0


@dataclass
class Run:
    """One contender: seconds of each step, mean loss of each step, seconds without network, and the record of a step
    (of several the one with the middle overlap).
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    record: Record | None = None


def loss_distance(run: Run, reference: Run) -> float:
    """The largest difference of the loss curves, as a part of the reference's loss, over the steps that both made.

    Infinite where a loss is not finite: max() passes NaNs over.
    """
    pairs = zip(run.losses, reference.losses, strict=False)
    distances = [abs(mine - other) / other for mine, other in pairs]
    return max(distances, default=0.0) if all(map(math.isfinite, distances)) else math.inf


def run_ddp(
    scenario: DdpScenario,
    output: Path,
    console: Console,
    threads: int,
    congestion_control: str,
    host_congestion_control: str | None = None,
) -> tuple[bool, list[Verdict]]:
    """The whole run: whether all losses are close, and the goal's verdicts. NetlabError if anything failed."""
    for name in netlab_cluster.remove_leftovers():
        console.print(f"removed {name}, left over from a run that was killed")
    shape = scenario.shape
    rates = {label: shape.rate_of(label) or "" for label in shape.labels}
    contenders: list[Contender] = []
    runs = {name: Run(name) for name in scenario.contenders}
    text = standard_library_text(1 << 20)
    training = Training(scenario.model, text, scenario.batch, scenario.bucket_mib, 1e-3, _SEED)
    with Cluster(shape.labels, None if shape.rate is None else rates, host_congestion_control) as cluster:
        try:
            for name in scenario.contenders:
                console.print(f"starting {name}")
                contender = Contender(Competitor(name), cluster, serve=partial(serve_training, training))
                contenders.append(contender)
                if contender.competitor.uses_reducers and shape.reducers:
                    contender.start_reducers(server_binary(), shape.reducer_labels, threads, congestion_control)
                contender.start_workers(shape.rank_hosts, {"REDUCER_CONGESTION_CONTROL": congestion_control})
                contender.freeze()
            _train(scenario, contenders, list(runs.values()))
        except BaseException as error:
            for contender in contenders:
                contender.failure = contender.failure or repr(error)
            raise
        finally:
            stop_all(contenders, console.print)
    return _report(scenario, list(runs.values()), output, console), verdicts(list(runs.values()))


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """Steps per second over Gloo's, for each contender but Gloo. Losses that are not Gloo's reach nothing."""
    found = []
    for run in runs[1:]:
        ratio = median(runs[0].seconds) / median(run.seconds)
        close = loss_distance(run, runs[0]) < LOSS_NOISE
        found.append(Verdict("ddp", Goal(run.name, "steps", GOAL), {0: ratio if close else 0.0}))
    return found


def _train(scenario: DdpScenario, contenders: Sequence[Contender], runs: Sequence[Run]) -> None:
    begin = time.monotonic()
    while True:
        for contender, run in zip(contenders, runs, strict=True):
            results = _steps(contender, Steps(_TURN_STEPS))
            # A group's first steps make its connections, and DDP its buckets.
            if run.losses:
                run.seconds += seconds_between([result.done_s for result in results])
            run.losses += [sum(each) / len(each) for each in zip(*(result.losses for result in results), strict=True)]
        if time.monotonic() - begin > scenario.budget_s and runs[0].seconds:
            break
    for contender, run in zip(contenders, runs, strict=True):
        records = _steps(contender, Steps(1 + _RECORDED_STEPS, recorded=True))[0].records
        run.record = sorted(records, key=lambda record: record.overlap)[_RECORDED_STEPS // 2]
        if run is runs[0]:
            # The same arithmetic for all.
            alone = _steps(contender, Steps(_ALONE_STEPS, alone=True))
            run.alone = seconds_between([result.done_s for result in alone])


def _steps(contender: Contender, steps: Steps) -> list[StepsResult]:
    return contender.ask(steps, _TURN_SECONDS_MAX)


def _report(scenario: DdpScenario, runs: Sequence[Run], output: Path, console: Console) -> bool:
    parameters = 4 * _parameter_count(scenario.model)
    title = f"DDP, GPT of {format_size(parameters)} of gradients, {scenario.shape}"
    table, fine = make_ddp_table(runs, title)
    console.print(table)
    output.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"title": title, "runs": [asdict(run) for run in runs]}
    (output / "netlab-ddp.json").write_text(json.dumps(content, indent=1) + "\n")
    recorded = {run.name: run.record for run in runs if run.record is not None}
    picture = output / "netlab-ddp.png"
    draw_timelines(recorded, title, picture)
    console.print(f"wrote {picture} and {output / 'netlab-ddp.json'}")
    return fine


def _parameter_count(config: GptConfig) -> int:
    from gpt import Gpt

    return sum(parameter.numel() for parameter in Gpt(config).parameters())


def make_ddp_table(runs: Sequence[Run], title: str) -> tuple[Table, bool]:
    """The table, and whether every loss curve is that of the first run within float noise."""
    table = Table(title=title, title_justify="left")
    headings = ("contender", "steps", "step, median", "steps/s", "x Gloo", "goal", "alone", "hidden", "loss, last")
    for name in (*headings, "from Gloo's"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    reference = runs[0]
    fine = True
    for run in runs:
        middle = median(run.seconds)
        ratio = median(reference.seconds) / middle
        distance = loss_distance(run, reference)
        close = distance < LOSS_NOISE
        fine = fine and close
        goal = "" if run is reference else f"{GOAL}: {'[green]met' if ratio >= GOAL else '[red]missed'}"
        table.add_row(
            run.name,
            str(len(run.seconds)),
            format_seconds(middle),
            f"{1 / middle:.3g}",
            f"{ratio:.2f}",
            goal,
            format_seconds(median(run.alone)) if run.alone else "-",
            f"{run.record.overlap:.0%}" if run.record is not None and run.record.buckets else "-",
            f"{run.losses[-1]:.4f}",
            f"{distance:.1e}" if close else f"[red]{distance:.1e}",
        )
    table.caption = (
        "alone: a step without communication; hidden: of the time from the first bucket ready to the last one done, "
        "the part in which backward was still at work; from Gloo's: the largest relative difference of the losses"
    )
    table.caption_justify = "left"
    return table, fine
