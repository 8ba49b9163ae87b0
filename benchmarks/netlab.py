"""An emulated cluster of rate-limited hosts on one machine: Gloo against each of our algorithms.

Each host is a network namespace whose NIC is limited in both directions; reducers have hosts of
their own. All contenders run on the same hosts in one run, in turns, so that noise of the machine
hits them alike; every result is checked exactly. Needs Linux, root, iproute2.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import netlab_cluster
import typer
from netlab_cluster import Cluster, NetlabError
from netlab_contender import CONTENDERS, Contender, stop_all
from netlab_line import line_rate
from netlab_report import Samples, draw, make_json, make_rows, make_table
from netlab_worker import Turn
from rich.console import Console
from rich.progress import Progress

from reducer._bench.units import parse_rate, parse_sizes

EXIT_FAILED = 1
EXIT_NOT_HERE = 2
# So much at a time between two checks of the results: little enough to hold, and enough to time a job at work
# instead of TCP's slow start after the others' turns.
_TURN_BYTES_MAX = 512 << 20
_TURN_COUNT_MIN, _TURN_COUNT_MAX = 4, 40
_ROUNDS_MIN = 3
_LOG_COLUMNS = 110


@dataclass(frozen=True)
class Setting:
    """What a run was asked to do; sizes in bytes, `rate` as `tc` writes it (None: no limit)."""

    workers: int
    reducers: int
    rate: str | None
    sizes: tuple[int, ...]
    contenders: tuple[str, ...]
    rounds: int | None
    budget_s: float
    threads: int
    congestion_control: str
    host_congestion_control: str | None
    output: Path


def cpu_times() -> tuple[float, float]:
    """(busy, all) CPU seconds of the machine since it started, over all its cores."""
    with open("/proc/stat", encoding="ascii") as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
    idle = ticks[3] + ticks[4]
    per_second = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - idle) / per_second, sum(ticks) / per_second


def turn_count(nbytes: int) -> int:
    """How many all-reduces of `nbytes` a contender runs before the next one has its turn."""
    return max(_TURN_COUNT_MIN, min(_TURN_COUNT_MAX, _TURN_BYTES_MAX // (4 * nbytes)))


def turn_seconds_max(nbytes: int, count: int, workers: int, rate: str | None) -> float:
    """The deadline of a turn: ten times what a ring's bytes take, and never under 60 s."""
    rate_bits = 1e9 if rate is None else parse_rate(rate)
    return 60.0 + 10 * 2 * workers * 8 * nbytes * count / rate_bits


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
    workers = [label for label in cluster.labels if label.startswith("w")]
    reducers = [label for label in cluster.labels if label.startswith("r")]
    for name in setting.contenders:
        contender = Contender(name, cluster)
        started.append(contender)
        note(f"starting {name}")
        try:
            if name in ("server", "mixed") and reducers:
                contender.start_reducers(server_binary(), reducers, setting.threads, setting.congestion_control)
            settings = {"REDUCER_CONGESTION_CONTROL": setting.congestion_control}
            contender.start_workers(workers, "gloo" if name == "gloo" else "reducer", settings)
            contender.freeze()
        except NetlabError as error:
            _fail(contender, error, note)


def _fail(contender: Contender, error: NetlabError, note: Callable[[str], None]) -> None:
    contender.failure = str(error)
    note(f"[red]{error}[/red]")
    contender.stop()


def measure(setting: Setting, contenders: Sequence[Contender], progress: Progress) -> list[Samples]:
    """Runs the contenders in turns, size by size, until the size's share of the budget is spent."""
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
            done += 1
            if done > (setting.rounds or _ROUNDS_MIN) - 1 and (
                setting.rounds is not None or time.monotonic() - begin >= budgets[nbytes]
            ):
                break
        spent += budgets[nbytes]
        progress.update(task, completed=spent)
    return everything


def _one_turn(setting: Setting, contender: Contender, into: Samples, is_warm_up: bool, progress: Progress) -> None:
    count = turn_count(into.nbytes)
    seconds_max = turn_seconds_max(into.nbytes, count, setting.workers, setting.rate)
    busy, total = cpu_times()
    try:
        if is_warm_up:
            into.wrong += contender.run(Turn(into.nbytes, 1), seconds_max).wrong
            busy, total = cpu_times()
        result = contender.run(Turn(into.nbytes, count), seconds_max)
    except NetlabError as error:
        _fail(contender, error, lambda text: progress.console.print(text))
        return
    busy_after, total_after = cpu_times()
    into.seconds.extend(result.seconds)
    into.wrong += result.wrong
    into.cpu_own += result.cpu_s
    into.cpu_busy += busy_after - busy
    into.cpu_total += total_after - total


def run(setting: Setting, console: Console) -> int:
    """The whole run; its exit code. Everything that it made is gone when it returns or raises."""
    for name in netlab_cluster.remove_leftovers():
        console.print(f"removed {name}, left over from a run that was killed")
    labels = [f"w{i}" for i in range(setting.workers)] + [f"r{i}" for i in range(setting.reducers)]
    contenders: list[Contender] = []
    limit = setting.rate or "no limit"
    with Cluster(labels, setting.rate, setting.host_congestion_control) as cluster:
        line = line_rate(cluster, labels[0], labels[-1])
        console.print(
            f"{setting.workers} workers and {setting.reducers} reducers ({limit} each); "
            f"a plain TCP stream moves {line / 1e9:.3f} Gbit/s"
        )
        try:
            start_contenders(setting, cluster, contenders, console.print)
            with Progress(console=console, transient=True) as progress:
                samples = measure(setting, contenders, progress)
        except BaseException as error:
            for contender in contenders:
                contender.failure = contender.failure or f"{contender.name}: {error!r}"
            raise
        finally:
            stop_all(contenders, console.print)
        # What else the machine does can slow one of the two down; nothing can speed one up.
        line = max(line, line_rate(cluster, labels[0], labels[-1]))
    console.print(f"the line: {line / 1e9:.3f} Gbit/s (the better of two streams, before and after)")
    rows = make_rows(samples, setting.workers, setting.reducers, line if setting.rate is not None else None)
    title = f"all-reduce, {setting.workers} workers + {setting.reducers} reducers, {limit} per host"
    console.print(make_table(rows, title))
    facts = {
        "workers": setting.workers,
        "reducers": setting.reducers,
        "rate": setting.rate,
        "line_bit_s": line,
        "failures": {each.name: each.failure for each in contenders if each.failure},
    }
    setting.output.mkdir(parents=True, exist_ok=True)
    (setting.output / "netlab.json").write_text(json.dumps(make_json(rows, facts), indent=1) + "\n")
    picture = setting.output / "netlab.png"
    if rows:
        draw(rows, line, title, picture)
        console.print(f"wrote {picture} and {setting.output / 'netlab.json'}")
    for contender in contenders:
        if contender.failure is not None:
            console.print(f"[red]failed:[/red] {contender.failure}")
    failed = any(row.wrong for row in rows) or any(each.failure for each in contenders)
    return EXIT_FAILED if failed else 0


def _terminate(number: int, _: FrameType | None) -> None:
    # The clean-up is bounded by deadlines; an impatient second Ctrl-C must not cut it short.
    for each in netlab_cluster.ENDING_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    # Raised where the main thread stands, so that every `finally` and `with` cleans up.
    raise SystemExit(128 + number)


def main(
    workers: Annotated[int, typer.Option(min=2, max=64, help="Worker hosts.")] = 8,
    reducers: Annotated[int, typer.Option(min=0, max=64, help="Hosts with a reducer.")] = 8,
    rate: Annotated[str, typer.Option(help="Each host's NIC, as tc writes it.")] = "1gbit",
    sizes: Annotated[str, typer.Option(help="Tensors.")] = "1KiB,64KiB,1MiB,16MiB,64MiB",
    contenders: Annotated[str, typer.Option(help="Who runs.")] = ",".join(CONTENDERS),
    iterations: Annotated[int | None, typer.Option(min=1, help="Rounds per size, instead of a time budget.")] = None,
    budget: Annotated[float, typer.Option(min=1, help="Seconds to measure for.")] = 180.0,
    limited: Annotated[bool, typer.Option("--limit/--no-limit", help="Limit the NICs.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a reducer.")] = 1,
    congestion_control: Annotated[
        str, typer.Option(help="Of reducer's connections; `system` is what Gloo has.")
    ] = "auto",
    host_congestion_control: Annotated[
        str | None, typer.Option(help="The emulated hosts' own, as `reno` (default: this machine's).")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where JSON and picture go.")] = Path("out"),
) -> None:
    """Gloo against ring, direct, server and mixed on emulated hosts with limited NICs."""
    # A log file is no terminal, and has room for the whole table.
    console = Console() if sys.stdout.isatty() else Console(width=_LOG_COLUMNS)
    try:
        names = tuple(name.strip() for name in contenders.split(",") if name.strip())
        unknown = [name for name in names if name not in CONTENDERS]
        if unknown or not names:
            raise ValueError(f"contenders are {', '.join(CONTENDERS)}, not {', '.join(unknown)!r}")
        if reducers == 0:
            names = tuple(name for name in names if name not in ("server", "mixed"))
        parse_rate(rate)
        setting = Setting(
            workers=workers,
            reducers=reducers,
            rate=rate if limited else None,
            sizes=tuple(parse_sizes(sizes)),
            contenders=names,
            rounds=iterations,
            budget_s=budget,
            threads=threads,
            congestion_control=congestion_control,
            host_congestion_control=host_congestion_control,
            output=output,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    reason = netlab_cluster.why_not()
    if reason is not None:
        print(f"netlab cannot run here: {reason}", file=sys.stderr)
        raise SystemExit(EXIT_NOT_HERE)
    for each in netlab_cluster.ENDING_SIGNALS:
        signal.signal(each, _terminate)
    try:
        code = run(setting, console)
    except NetlabError as error:
        console.print(f"[red]{error}[/red]")
        code = EXIT_FAILED
    raise SystemExit(code)


if __name__ == "__main__":
    typer.run(main)
