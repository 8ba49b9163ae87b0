"""One run of netlab: a cluster is made, contenders start on it, take turns, and their rows are printed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import netlab_cluster
from netlab_cluster import Cluster, NetlabError
from netlab_contender import Contender, stop_all
from netlab_line import line_rate
from netlab_report import Row, Samples, draw, make_json, make_rows, make_table
from netlab_scenarios import Competitor, Shape
from netlab_worker import Turn
from rich.console import Console
from rich.progress import Progress

from reducer._bench.machine import cpu_seconds
from reducer._bench.units import parse_rate

# So much at a time between two checks of the results: little enough to hold, and enough to time a job at work
# instead of TCP's slow start after the others' turns.
_TURN_BYTES_MAX = 512 << 20
_TURN_COUNT_MIN, _TURN_COUNT_MAX = 4, 40
# Slow NICs: less of it, or three rounds of all contenders take minutes.
_TURN_SECONDS_MAX = 3.0
_ROUNDS_MIN = 3
_FOREIGN_SECONDS = 0.5
_FOREIGN_MAX = 0.1


@dataclass(frozen=True)
class Setting:
    """What a run was asked to do; sizes in bytes. `name` is that of the files that it writes into `output`."""

    name: str
    shape: Shape
    sizes: tuple[int, ...]
    contenders: tuple[Competitor, ...]
    rounds: int | None
    budget_s: float
    threads: int
    congestion_control: str
    host_congestion_control: str | None
    output: Path


@dataclass(frozen=True)
class RunResult:
    """What a run measured, and what failed in it."""

    rows: list[Row]
    failures: dict[str, str]

    @property
    def ok(self) -> bool:
        return not self.failures and not any(row.wrong for row in self.rows)


def turn_count(nbytes: int, shape: Shape) -> int:
    """How many all-reduces of `nbytes` a contender runs before the next one has its turn."""
    by_time = int(_TURN_SECONDS_MAX * _slowest(shape) / (2 * 8 * nbytes))  # 2 S is about what a ring sends
    return max(_TURN_COUNT_MIN, min(_TURN_COUNT_MAX, _TURN_BYTES_MAX // (4 * nbytes), by_time))


def _slowest(shape: Shape) -> float:
    """The rate of the slowest NIC in bit/s; 1 Gbit/s where there are no limits."""
    return 1e9 if shape.rate is None else min(shape.bits(label) for label in shape.labels)


def turn_seconds_max(nbytes: int, count: int, shape: Shape) -> float:
    """The deadline of a turn: ten times what a ring's bytes take, and never under 60 s."""
    return 60.0 + 10 * 2 * shape.world_size * 8 * nbytes * count / _slowest(shape)


def size_budgets(sizes: Sequence[int], budget_s: float) -> dict[int, float]:
    """Seconds for each size: large ones need more, small ones still get their share."""
    weights = {size: 1.0 + (size / (1 << 20)) ** 0.5 for size in sizes}
    whole = sum(weights.values())
    return {size: budget_s * weight / whole for size, weight in weights.items()}


def server_binary() -> Path:
    """The standalone reducer's binary, in the package. NetlabError if it has not been built."""
    import reducer

    path = Path(reducer.__path__[0]) / "bin" / "reducer-server"
    if not os.access(path, os.X_OK):
        raise NetlabError(f"{path} is missing: build it first with `make setup`")
    return path


def start_contenders(setting: Setting, cluster: Cluster, started: list[Contender], note: Callable[[str], None]) -> None:
    """Starts every contender, with processes of its own. One that fails is noted and left out."""
    shape = setting.shape
    for competitor in setting.contenders:
        contender = Contender(competitor, cluster)
        started.append(contender)
        note(f"starting {competitor.name}")
        try:
            if competitor.uses_reducers and shape.reducers:
                contender.start_reducers(
                    server_binary(), shape.reducer_labels, setting.threads, setting.congestion_control
                )
            settings = {"REDUCER_CONGESTION_CONTROL": setting.congestion_control}
            contender.start_workers(shape.rank_hosts, settings, shape.bandwidths)
            contender.freeze()
        except NetlabError as error:
            _fail(contender, error, note)


def _fail(contender: Contender, error: NetlabError, note: Callable[[str], None]) -> None:
    contender.failure = str(error)
    note(f"[red]{error}[/red]")
    contender.stop()


def foreign_share() -> float:
    """The part of the machine's processors that others keep busy, now that every contender stands still."""
    busy, total = cpu_seconds()
    time.sleep(_FOREIGN_SECONDS)
    busy_after, total_after = cpu_seconds()
    return (busy_after - busy) / max(total_after - total, 1e-9)


def measure(setting: Setting, contenders: Sequence[Contender], progress: Progress) -> tuple[list[Samples], float]:
    """Runs the contenders in turns, size by size, until the size's share of the budget is spent or all have failed.
    With the samples comes the largest `foreign_share` seen before and after a size.
    """
    foreign = foreign_share()
    budgets = size_budgets(setting.sizes, setting.budget_s)
    everything: list[Samples] = []
    task = progress.add_task("measuring", total=setting.budget_s)
    spent = 0.0
    for nbytes in setting.sizes:
        samples = {each.name: Samples(nbytes, each.name) for each in contenders}
        everything.extend(samples.values())
        begin = time.monotonic()
        done = 0
        while True:
            for contender in contenders:
                if contender.failure is None:
                    _one_turn(setting, contender, samples[contender.name], done == 0, progress)
                elapsed = min(time.monotonic() - begin, budgets[nbytes])
                progress.update(task, completed=spent + elapsed)
            if all(contender.failure is not None for contender in contenders):
                return everything, foreign
            done += 1
            if done > (setting.rounds or _ROUNDS_MIN) - 1 and (
                setting.rounds is not None or time.monotonic() - begin >= budgets[nbytes]
            ):
                break
        foreign = max(foreign, foreign_share())
        spent += budgets[nbytes]
        progress.update(task, completed=spent)
    return everything, foreign


def _one_turn(setting: Setting, contender: Contender, into: Samples, is_warm_up: bool, progress: Progress) -> None:
    count = turn_count(into.nbytes, setting.shape)
    seconds_max = turn_seconds_max(into.nbytes, count, setting.shape)
    busy, total = cpu_seconds()
    try:
        if is_warm_up:
            into.wrong += contender.run(Turn(into.nbytes, 1), seconds_max).wrong
            busy, total = cpu_seconds()
        result = contender.run(Turn(into.nbytes, count), seconds_max)
    except NetlabError as error:
        _fail(contender, error, lambda text: progress.console.print(text))
        return
    busy_after, total_after = cpu_seconds()
    into.seconds.extend(result.seconds)
    into.wrong += result.wrong
    into.cpu_own += result.cpu_s
    into.cpu_busy += busy_after - busy
    into.cpu_total += total_after - total


def efficiency(cluster: Cluster, shape: Shape) -> float | None:
    """The part of a NIC's rate that one TCP stream between the first host and the last one has; None without limits."""
    ends = shape.labels[0], shape.labels[-1]
    if shape.rate is None:
        return None
    return line_rate(cluster, *ends) / min(shape.bits(label) for label in ends)


def run(setting: Setting, console: Console) -> RunResult:
    """The whole run. Everything that it made is gone when it returns or raises."""
    for name in netlab_cluster.remove_leftovers():
        console.print(f"removed {name}, left over from a run that was killed")
    shape = setting.shape
    contenders: list[Contender] = []
    rates = {label: shape.rate_of(label) or "" for label in shape.labels}
    with Cluster(shape.labels, None if shape.rate is None else rates, setting.host_congestion_control) as cluster:
        share = efficiency(cluster, shape)
        console.print(str(shape))
        try:
            start_contenders(setting, cluster, contenders, console.print)
            with Progress(console=console, transient=True) as progress:
                samples, foreign = measure(setting, contenders, progress)
        except BaseException as error:
            for contender in contenders:
                contender.failure = contender.failure or f"{contender.name}: {error!r}"
            raise
        finally:
            stop_all(contenders, console.print)
        if share is not None:
            # What else the machine does can slow one of the two down; nothing can speed one up.
            share = max(share, efficiency(cluster, shape) or 0.0)
    rows = make_rows(samples, shape, share)
    result = RunResult(rows, {each.name: each.failure for each in contenders if each.failure is not None})
    _write(setting, result, share, console)
    if foreign > _FOREIGN_MAX:
        console.print(
            f"[red]disturbed:[/red] others kept up to {foreign:.0%} of the processors busy while every contender stood "
            "still; these figures say little"
        )
    return result


def _write(setting: Setting, result: RunResult, share: float | None, console: Console) -> None:
    shape, rows = setting.shape, result.rows
    line = None if share is None or shape.rate is None else share * parse_rate(shape.rate)
    if line is not None:
        console.print(f"the line: {line / 1e9:.3f} Gbit/s (the better of two TCP streams, before and after)")
    title = f"all-reduce, {shape}"
    console.print(make_table(rows, title))
    facts = {
        "workers": shape.hosts,
        "ranks_per_host": shape.ranks_per_host,
        "reducers": shape.reducers,
        "rate": shape.rate,
        "rates": dict(shape.rates),
        "line_bit_s": line,
        "failures": result.failures,
    }
    setting.output.mkdir(parents=True, exist_ok=True)
    figures = setting.output / f"{setting.name}.json"
    figures.write_text(json.dumps(make_json(rows, facts), indent=1) + "\n")
    if rows:
        picture = setting.output / f"{setting.name}.png"
        draw(rows, title, picture)
        console.print(f"wrote {picture} and {figures}")
    for failure in result.failures.values():
        console.print(f"[red]failed:[/red] {failure}")
