"""Trains a small GPT through standalone reducers, and the same run on Gloo beside it.

Everything is on this machine: 2 reducers (native processes without Python) and 4 workers that train
by DistributedDataParallel on the source text of Python's standard library. At the end the weights
of all workers must have the same hash.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer
from demo_picture import draw
from demo_rank import Progress, RankFailure, RankPlan, RunResult, run_rank
from gpt import GptConfig
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

_READY_SECONDS_MAX = 30.0
_STOP_SECONDS_MAX = 5.0
# The first steps pay for connections, loader processes and page faults.
_WARM_UP_STEPS = 5


class DemoError(Exception):
    """Why the demo ends early, in a sentence."""


def start_reducers(count: int, stack: ExitStack) -> list[str]:
    """Starts `count` standalone reducers on free loopback ports and returns their addresses."""
    import reducer

    binary = Path(reducer.__path__[0]) / "bin" / "reducer-server"
    if not os.access(binary, os.X_OK):
        raise DemoError(f"{binary} is missing: build it first with `make setup`")
    command = [str(binary), "--listen", "127.0.0.1:0", "--threads", "1"]
    processes = []
    for _ in range(count):
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        stack.callback(_stop_reducer, process)
        processes.append(process)
    deadline = time.monotonic() + _READY_SECONDS_MAX
    return [_ready_address(process, deadline) for process in processes]


def _ready_address(process: subprocess.Popen[str], deadline: float) -> str:
    assert process.stdout is not None
    if not wait([process.stdout.fileno()], timeout=max(0.0, deadline - time.monotonic())):
        raise DemoError(f"a reducer did not get ready in {_READY_SECONDS_MAX:.0f} s")
    line = process.stdout.readline()
    words = line.split()
    if words[:3] != ["reducer", "ready", "on"] or len(words) < 4:
        raise DemoError(f"a reducer did not start: it said {line.strip()!r}")
    return words[3]


def _stop_reducer(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_STOP_SECONDS_MAX)
    if process.stdout is not None:
        process.stdout.close()


def _stop_worker(process: BaseProcess) -> None:
    process.join(0.5)
    if process.is_alive():
        process.terminate()
        process.join(_STOP_SECONDS_MAX)
    if process.is_alive():
        process.kill()
        process.join(_STOP_SECONDS_MAX)


def start_workers(plans: Sequence[RankPlan], stack: ExitStack) -> list[Connection]:
    """Starts a process per rank and returns the connections on which they report, by rank."""
    # Forked from here, where torch is loaded already and no thread runs yet: it saves each rank its import.
    context = multiprocessing.get_context("fork")
    connections = []
    processes = []
    for plan in plans:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=run_rank, args=(plan, theirs))
        process.start()
        theirs.close()
        processes.append(process)
        connections.append(ours)
    for process in processes:
        stack.callback(_stop_worker, process)
    for process in processes:
        # Ends all of them before waiting for any: a rank alone waits for the others.
        stack.callback(process.terminate)
    return connections


class Watcher:
    """Follows the ranks: shows their progress, and raises on the first error or at the deadline."""

    def __init__(self, bars: Bars, steps: int, backends: Sequence[str], tokens: int) -> None:
        """`tokens` are those of one step on all ranks together."""
        self._bars = bars
        self._tokens = tokens
        self._tasks: dict[str, TaskID] = {
            name: bars.add_task(name, total=steps, start=False, loss="", rate="") for name in backends
        }
        self._began: dict[str, tuple[float, int]] = {}
        self.results: dict[str, dict[int, RunResult]] = {name: {} for name in backends}

    def follow(self, connections: Sequence[Connection], deadline: float) -> None:
        """Returns when every rank has reported all its runs. DemoError on a failure."""
        waiting = {connection: rank for rank, connection in enumerate(connections)}
        runs = len(self.results)
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                ranks = ", ".join(map(str, sorted(waiting.values())))
                raise DemoError(f"the deadline passed while rank {ranks} was still at work")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting[connection]
                try:
                    message = connection.recv()
                except EOFError:
                    raise DemoError(f"rank {rank} died without a word") from None
                self._take(rank, message)
                if sum(rank in ranks for ranks in self.results.values()) == runs:
                    del waiting[connection]

    def _take(self, rank: int, message: object) -> None:
        if isinstance(message, RankFailure):
            what = f"rank {message.rank} failed on {message.backend}: {message.message}"
            raise DemoError(f"{what}\n\n{message.traceback.strip()}")
        if isinstance(message, RunResult):
            self.results[message.backend][rank] = message
        elif isinstance(message, Progress):
            self._show(message)

    def _show(self, progress: Progress) -> None:
        task = self._tasks[progress.backend]
        now = time.monotonic()
        if progress.backend not in self._began:
            self._bars.start_task(task)
            self._began[progress.backend] = (now, progress.step)
        begin, first = self._began[progress.backend]
        done = progress.step - first
        rate = f"{done * self._tokens / (now - begin):,.0f} tokens/s" if done else ""
        self._bars.update(
            task,
            completed=progress.step + 1,
            loss=f"loss {progress.loss:.3f}",
            rate=rate,
        )


def tokens_per_second(result: RunResult, tokens: int) -> float:
    """Tokens of all ranks per second, over the steps after the warm-up where there are enough."""
    seconds = result.step_seconds
    if len(seconds) > 2 * _WARM_UP_STEPS:
        seconds = seconds[_WARM_UP_STEPS:]
    return float(tokens * len(seconds) / sum(seconds))


def mean_losses(ranks: dict[int, RunResult]) -> list[float]:
    """The loss of each step, averaged over the ranks."""
    columns = zip(*(result.losses for result in ranks.values()), strict=True)
    return [sum(column) / len(column) for column in columns]


def report(results: dict[str, dict[int, RunResult]], tokens: int, console: Console) -> tuple[Table, bool]:
    """The table of all runs, and whether every run's ranks ended with the same weights."""
    table = Table(title="the same training on each backend", title_justify="left")
    for name in (
        "backend",
        "loss, first",
        "loss, last 10",
        "tokens/s",
        "all-reduce, median",
    ):
        table.add_column(name, justify="right" if name != "backend" else "left")
    table.add_column("weights of all ranks (sha256)")
    all_equal = True
    for backend, ranks in results.items():
        losses = mean_losses(ranks)
        hashes = {result.weights_sha256 for result in ranks.values()}
        all_equal = all_equal and len(hashes) == 1
        if len(hashes) > 1:
            for rank, result in sorted(ranks.items()):
                console.print(f"[red]{backend} rank {rank}: {result.weights_sha256}[/red]")
        times = sorted(seconds for _, seconds in ranks[0].collectives)
        tail = losses[-10:]
        table.add_row(
            backend,
            f"{losses[0]:.3f}",
            f"{sum(tail) / len(tail):.3f}",
            f"{tokens_per_second(ranks[0], tokens):,.0f}",
            f"{times[len(times) // 2] * 1e3:.2f} ms",
            f"{hashes.pop()[:16]} equal" if len(hashes) == 1 else "[red]NOT EQUAL[/red]",
        )
    return table, all_equal


def _terminate(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def run(
    backends: Sequence[str],
    workers: int,
    reducers: int,
    steps: int,
    batch: int,
    algorithm: str,
    seed: int,
    loader_workers: int,
    seconds_max: float,
    output: Path,
    console: Console,
) -> bool:
    """The demo; whether all ranks' weights were equal in every run. DemoError if one failed."""
    tokens = workers * batch * GptConfig().context
    deadline = time.monotonic() + seconds_max
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="reducer-demo-"))
        servers: list[str] = []
        if "reducer" in backends and reducers:
            servers = start_reducers(reducers, stack)
            console.print(f"reducers at {', '.join(servers)}; {workers} workers on this machine")
        plans = [
            RankPlan(
                rank=rank,
                world_size=workers,
                steps=steps,
                batch=batch,
                seed=seed,
                loader_workers=loader_workers,
                timeout_s=min(60.0, seconds_max),
                servers=",".join(servers),
                algorithm=algorithm,
                interface="lo",
                stores={name: str(Path(directory) / name) for name in backends},
            )
            for rank in range(workers)
        ]
        connections = start_workers(plans, stack)
        columns = ("{task.description:8}", "{task.fields[loss]}", "{task.fields[rate]}")
        head, loss, rate = (TextColumn(text) for text in columns)
        bars = Bars(
            head, BarColumn(), MofNCompleteColumn(), loss, rate, TimeElapsedColumn(),
            console=console,
        )  # fmt: skip
        with bars:
            watcher = Watcher(bars, steps, backends, tokens)
            watcher.follow(connections, deadline)
    table, all_equal = report(watcher.results, tokens, console)
    console.print(table)
    first = watcher.results[backends[0]][0]
    console.print(f"{first.parameters:,} parameters; a sample after {steps} steps:")
    console.print(first.sample, style="dim", markup=False, highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    rates = {name: tokens_per_second(ranks[0], tokens) for name, ranks in watcher.results.items()}
    curves = {name: mean_losses(ranks) for name, ranks in watcher.results.items()}
    collectives = {name: ranks[0].collectives for name, ranks in watcher.results.items()}
    draw(curves, collectives, rates, output / "demo.png")
    data = {"losses": curves, "tokens_per_second": rates, "collectives": collectives}
    (output / "demo.json").write_text(json.dumps(data) + "\n")
    console.print(f"wrote {output / 'demo.png'} and {output / 'demo.json'}")
    return all_equal


def main(
    backends: Annotated[str, typer.Option(help="Runs, one after the other.")] = "reducer,gloo",
    workers: Annotated[int, typer.Option(min=2)] = 4,
    reducers: Annotated[int, typer.Option(min=0, help="Standalone reducers.")] = 2,
    steps: Annotated[int, typer.Option(min=1)] = 150,
    batch: Annotated[int, typer.Option(min=1, help="Windows per rank and step.")] = 8,
    algorithm: Annotated[str, typer.Option(help="REDUCER_ALGORITHM.")] = "server",
    seed: Annotated[int, typer.Option()] = 1,
    loader_workers: Annotated[int, typer.Option(min=0, help="Loader processes per rank.")] = 2,
    seconds_max: Annotated[float, typer.Option(min=1, help="Deadline of the whole demo.")] = 600,
    output: Annotated[Path, typer.Option(help="Where picture and JSON go.")] = Path("out"),
) -> None:
    """Trains a small GPT through standalone reducers, and the same run on Gloo beside it."""
    console = Console() if sys.stdout.isatty() else Console(width=110)
    signal.signal(signal.SIGTERM, _terminate)
    names = [name.strip() for name in backends.split(",") if name.strip()]
    if not names or len(set(names)) != len(names):
        raise typer.BadParameter("give each backend once, as in reducer,gloo")
    if reducers == 0 and algorithm in ("server", "mixed"):
        algorithm = "direct"
    try:
        equal = run(
            names, workers, reducers, steps, batch, algorithm, seed, loader_workers, seconds_max,
            output, console,
        )  # fmt: skip
    except DemoError as error:
        console.print(f"the demo failed: {error}", style="red", markup=False)
        raise SystemExit(1) from None
    if not equal:
        console.print("[red]the weights differ between ranks: this must never happen[/red]")
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
