"""`make perf-check`: has anything become slower? Ratios measured now beside those of benchmarks/baseline.toml.

Only ratios are compared, each of two things measured in turns within one run, so that a slower machine or a busy
minute is no loss. A row is lost if it stays below 85% of its baseline in every one of three attempts: noise of a run
passes, a real loss does not. What cannot run here (no root) is named and not judged.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import tomllib
import typer
from rich.console import Console
from rich.table import Table

from reducer._bench.units import format_size

BENCHMARKS = Path(__file__).resolve().parent
BASELINE = BENCHMARKS / "baseline.toml"
LOSS_MAX = 0.15
ATTEMPTS = 3
EXIT_LOST = 1
EXIT_NO_BASELINE = 2
_COMMAND_SECONDS_MAX = 400
_END_SECONDS_MAX = 30
_MIB = 1 << 20


# By the names of the rows; None: what should have it failed, or was wrong.
Ratios = dict[str, float | None]


class PerfError(Exception):
    """Why nothing could be measured or compared, in a sentence."""


@dataclass(frozen=True)
class Source:
    """One command: it gives ratios by name, None where one failed. `why_not` says why it cannot run here, or None."""

    name: str
    measure: Callable[[], Ratios]
    why_not: Callable[[], str | None] = lambda: None


@dataclass
class Finding:
    """A row: its baseline (None: it has none) and all attempts, in their order."""

    name: str
    baseline: float | None
    attempts: list[float] = field(default_factory=list)
    skipped: str | None = None

    @property
    def lost(self) -> bool:
        """Below the baseline by more than the tolerance, however often it was tried; or not there (any more)."""
        if self.skipped is not None:
            return False
        return not any(each >= (self.baseline or 0.0) * (1 - LOSS_MAX) for each in self.attempts)


def compare(
    sources: Sequence[Source], baseline: Mapping[str, float], note: Callable[[str], None] = lambda _: None
) -> list[Finding]:
    """Measures every source, and again, up to three times in all, those with a row that is lost so far."""
    findings: list[Finding] = []
    for source in sources:
        mine = {name: Finding(name, ratio) for name, ratio in baseline.items() if name.startswith(source.name + ", ")}
        reason = source.why_not()
        if reason is not None:
            for finding in mine.values():
                finding.skipped = reason
            findings += mine.values()
            continue
        for attempt in range(ATTEMPTS):
            note(f"{source.name}, attempt {attempt + 1}")
            for name, ratio in source.measure().items():
                finding = mine.setdefault(name, Finding(name, None))
                if ratio is not None:
                    finding.attempts.append(ratio)
            if not any(finding.lost for finding in mine.values()):
                break
        findings += mine.values()
    known = {finding.name for finding in findings}
    # A row of a source that is gone would never be missed otherwise.
    findings += [Finding(name, ratio) for name, ratio in baseline.items() if name not in known]
    return findings


def collect(sources: Sequence[Source], note: Callable[[str], None] = lambda _: None) -> dict[str, float]:
    """A new baseline: of each row the median of three, for one lucky run would be a loss ever after.

    PerfError if a source cannot run or a ratio is missing: a baseline must not lack what another machine then does not
    check.
    """
    ratios: dict[str, list[float]] = {}
    for source in sources:
        reason = source.why_not()
        if reason is not None:
            raise PerfError(f"a baseline needs every row, and {source.name} cannot run here: {reason}")
        for attempt in range(ATTEMPTS):
            note(f"{source.name}, {attempt + 1} of {ATTEMPTS}")
            for name, ratio in source.measure().items():
                if ratio is None:
                    raise PerfError(f"a baseline needs every row, and there is no ratio for {name}: it failed")
                ratios.setdefault(name, []).append(ratio)
    return {name: median(each) for name, each in ratios.items()}


def make_table(findings: Sequence[Finding]) -> Table:
    """A line a row, every attempt in it."""
    table = Table(title=f"ratios beside their baseline; a loss is more than {LOSS_MAX:.0%}", title_justify="left")
    for name in ("what", "baseline", "attempts", "now", ""):
        table.add_column(name, justify="left" if name == "what" else "right")
    for finding in findings:
        attempts = ", ".join(f"{each:.2f}" for each in finding.attempts)
        base = "-" if finding.baseline is None else f"{finding.baseline:.2f}"
        now = "-"
        if finding.attempts and finding.baseline:
            now = f"{max(finding.attempts) / finding.baseline - 1:+.0%}"
        table.add_row(finding.name, base, attempts, now, _word(finding))
    return table


def _word(finding: Finding) -> str:
    if finding.skipped is not None:
        return "[yellow]not run"
    if finding.lost:
        return "[red]lost" if finding.attempts else "[red]missing"
    return "[yellow]new" if finding.baseline is None else "[green]fine"


def read_baseline(path: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """(facts of the machine, ratios by row). PerfError if the file is not there or says something else."""
    try:
        content = tomllib.loads(path.read_text())
        ratios = {name: float(ratio) for name, ratio in content["ratios"].items()}
        facts = dict(content.get("machine", {}))
    except FileNotFoundError:
        raise PerfError(f"{path} is missing: write it with --update, on a quiet machine") from None
    except (tomllib.TOMLDecodeError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise PerfError(f"{path} is no baseline ({error!r}): write it anew with --update") from error
    if not ratios or not all(ratio > 0 for ratio in ratios.values()):
        raise PerfError(f"{path} has no ratios, or some that are not above 0: write it anew with --update")
    return facts, ratios


def write_baseline(path: Path, facts: Mapping[str, Any], ratios: Mapping[str, float]) -> None:
    lines = ["# Of `make perf-check`, written by `benchmarks/perf_check.py --update`, which says what is compared.", ""]
    lines += ["# None of these is compared.", "[machine]"]
    lines += [f"{name} = {json.dumps(value)}" for name, value in facts.items()]
    lines += ["", "[ratios]", *(f"{json.dumps(name)} = {ratio:.3f}" for name, ratio in ratios.items())]
    path.write_text("\n".join(lines) + "\n")


def machine_facts() -> dict[str, Any]:
    """What a reader of the ratios wants to know of the machine; none of it is compared."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    processor = models[0].partition(":")[2].strip() if models else platform.machine()
    return {
        "cores": os.cpu_count(),
        "processor": processor,
        "kernel": platform.release(),
        "congestion_control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _figures_of(command: Sequence[str], output: Path, environment: Mapping[str, str]) -> Any:
    """What the command wrote into `output`, though something in it failed. PerfError if it wrote nothing."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    with subprocess.Popen(
        [sys.executable, *command], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            said, complained = process.communicate(timeout=_COMMAND_SECONDS_MAX)
        except BaseException:
            _end(process)
            raise
    if not output.exists():
        raise PerfError(f"`{' '.join(command)}` failed:\n{said[-2000:]}{complained[-2000:]}")
    return json.loads(output.read_text())


def _end(process: subprocess.Popen[str]) -> None:
    """Lets netlab remove its namespaces, which takes it seconds."""
    process.terminate()
    try:
        process.communicate(timeout=_END_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        process.kill()


def bench_source(name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Source:
    """`reducer bench`: how many times as fast as Gloo, by size."""

    def measure() -> Ratios:
        with tempfile.TemporaryDirectory() as directory:
            output = Path(directory) / "bench.json"
            content = _figures_of(["-m", "reducer", "bench", *arguments, "--json", str(output)], output, environment)
        return bench_ratios(name, content)

    return Source(name, measure)


def bench_ratios(name: str, content: Mapping[str, Any]) -> Ratios:
    """Of what `reducer bench --json` writes."""
    return {
        f"{name}, {format_size(row['bytes'])}": row.get("speed_over_gloo") if row["correct"] else None
        for row in content["results"]
        if row["contender"] != "gloo"
    }


def netlab_ratios(name: str, content: Mapping[str, Any]) -> Ratios:
    """Of netlab's JSON, which has no row where a contender failed."""
    rows = content["rows"]
    found = {(row["contender"], row["nbytes"]): None if row["wrong"] else row["gloo_ratio"] for row in rows}
    sizes = {row["nbytes"] for row in rows}
    wanted = [*found, *((contender, nbytes) for contender in content["setting"]["failures"] for nbytes in sizes)]
    return {
        f"{name}, {contender}, {format_size(nbytes)}": found.get((contender, nbytes))
        for contender, nbytes in dict.fromkeys(wanted)
        if contender != "gloo"
    }


def netlab_source(name: str, arguments: Sequence[str]) -> Source:
    """netlab: how many times as fast as Gloo, by contender and size. Needs root."""

    def measure() -> Ratios:
        with tempfile.TemporaryDirectory() as directory:
            command = [str(BENCHMARKS / "netlab.py"), *arguments, "--output", directory]
            content = _figures_of(command, Path(directory) / "netlab.json", {})
        return netlab_ratios(name, content)

    def why_not() -> str | None:
        import netlab_cluster

        return netlab_cluster.why_not()

    return Source(name, measure, why_not)


def engine_source(name: str) -> Source:
    """The engine's bandwidth over a plain add loop's, in turns."""

    def measure() -> Ratios:
        from reducer import _core

        ratios: Ratios = {}
        for ranks in (2, 8):
            engine, add = _core.EngineProbe(ranks, 256 << 10, 64 * _MIB), _core.AddProbe(64 * _MIB)
            for probe in (engine, add):
                probe.run()
            ratio = median(_bandwidth(engine) / _bandwidth(add) for _ in range(9))
            ratios[f"{name}, {ranks} ranks, 256 KiB chunks"] = ratio
        return ratios

    return Source(name, measure)


def _bandwidth(probe: Any) -> float:
    begin = time.perf_counter()
    moved = probe.run()
    return float(moved) / (time.perf_counter() - begin)


def sources() -> list[Source]:
    """The quick set: about a minute and a half if nothing is tried again."""
    few = ["--sizes", "64KiB,1MiB,16MiB"]
    sizes = ["--min", "4", "--max", "64MiB", "--factor", "64", "--seconds", "0.7"]
    both = ["--ranks", "2", "--backend", "reducer,gloo", *sizes]
    return [
        engine_source("engine over a plain add loop"),
        bench_source("loopback x Gloo, 2 ranks, auto", [*both, "--algorithm", "auto"], {}),
        bench_source(
            "loopback x Gloo, 2 ranks, direct by gRPC",
            [*both, "--algorithm", "direct"],
            {"REDUCER_TRANSPORT": "grpc"},
        ),
        netlab_source(
            "emulated 4 + 4 x Gloo",
            ["--workers", "4", "--reducers", "4", "--contenders", "gloo,auto", *few, "--budget", "20"],
        ),
    ]


def main(
    update: Annotated[bool, typer.Option("--update", help="Measure three times and write the baseline.")] = False,
    baseline: Annotated[Path, typer.Option(help="The file with the ratios.")] = BASELINE,
) -> None:
    """Compare with the checked-in ratios; exit status 1 on a loss of more than 15%."""
    console = Console() if sys.stdout.isatty() else Console(width=120)

    def note(text: str) -> None:
        console.print(text, style="dim")

    try:
        if update:
            write_baseline(baseline, machine_facts(), collect(sources(), note))
            console.print(f"wrote {baseline}")
            return
        facts, ratios = read_baseline(baseline)
        findings = compare(sources(), ratios, note)
    except (PerfError, subprocess.TimeoutExpired) as error:
        console.print(f"[red]error:[/red] {error}")
        raise typer.Exit(EXIT_NO_BASELINE) from None
    console.print(make_table(findings))
    here = machine_facts()
    for name in ("cores", "processor", "kernel", "congestion_control"):
        if facts.get(name) != here[name]:
            console.print(f"[yellow]note:[/yellow] {name} here is {here[name]}, of the baseline {facts.get(name)}")
    for reason in dict.fromkeys(finding.skipped for finding in findings if finding.skipped):
        console.print(f"[yellow]note:[/yellow] not run: {reason}")
    if any(finding.lost for finding in findings):
        raise typer.Exit(EXIT_LOST)


if __name__ == "__main__":
    typer.run(main)
