"""`make torch-suite`: PyTorch's own distributed suite on Gloo and on reducer, side by side.

A table has the counts, and below it is every test that Gloo passes and the backend does not, with its error's line.
The tests that want 8 ranks run with 8, all with 3 and with 4. Those that Gloo skips and that a backend with all_to_all
can pass run as well ("beyond Gloo"). All results go to out/torch-suite.json.
Ends with 1 if a test that Gloo passes does not pass on the backend and is not in EXCUSED.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
REFERENCE = "gloo"
LARGE = 8
OUTCOMES = ("passed", "failed", "hung", "crashed", "skipped")

# Tests that no backend can pass whose name is not built into torch, and why.
EXCUSED = {
    "test_ddp_logging_data_cpu": "it wants DDP's logging data to have get_backend()'s name, where torch's C++ has "
    "'custom' for every backend that is not built in",
}


@dataclass
class Run:
    """One backend at one world size."""

    backend: str
    world_size: int
    seen_as: str
    results: list[dict[str, Any]] = field(default_factory=list)

    def counts(self) -> Counter[str]:
        return Counter(result["outcome"] for result in self.results)

    def passed(self) -> set[str]:
        return {result["name"] for result in self.results if result["outcome"] == "passed"}

    def __str__(self) -> str:
        return f"{self.backend}, {self.world_size} ranks" + ("" if self.seen_as == REFERENCE else ", beyond Gloo")


@dataclass(frozen=True)
class Known:
    """A test, as the decorators have it when Gloo is the backend."""

    name: str
    needs_8: bool
    skip: str

    @property
    def beyond(self) -> bool:
        return self.skip.startswith("Only MPI supports")


def known_tests(world_size: int) -> list[Known]:
    """The suite's tests. In a process of its own, since the suite is for one world size."""
    code = (
        "import json, suite\n"
        f"case = suite.load('gloo', {world_size})\n"
        "names = suite.names_of(case)\n"
        "print(json.dumps([(n, suite.needs_8_ranks(case, n), suite.skipped_at_once(case, n)) for n in names]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the suite could not be read:\n{done.stderr}")
    return [Known(*entry) for entry in json.loads(done.stdout.splitlines()[-1])]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def results_of(run: Run, names: Sequence[str], limit_s: float) -> Iterator[dict[str, Any]]:
    """Runs the tests; each result as soon as it is there. A test that ends the runner itself has crashed."""
    left = list(names)
    while left:
        command = [sys.executable, str(HERE / "runner.py"), run.backend, run.seen_as, str(run.world_size), str(limit_s)]
        runner = subprocess.Popen([*command, *left], env=environment(), stdout=subprocess.PIPE, text=True)
        assert runner.stdout is not None
        try:
            for line in runner.stdout:
                result = json.loads(line)
                left.remove(result["name"])
                yield result
            code = runner.wait(60)
        finally:
            runner.kill()
            runner.wait(60)
        if left:
            yield {
                "name": left.pop(0),
                "outcome": "crashed",
                "seconds": 0.0,
                "line": f"the runner ended with {code}",
                "detail": "",
            }


def carry_out(run: Run, names: Sequence[str], limit_s: float) -> Run:
    start = time.monotonic()
    for count, result in enumerate(results_of(run, names, limit_s), 1):
        run.results.append(result)
        if result["outcome"] != "skipped":
            text = f"  {result['line']}" if result["line"] else ""
            print(
                f"[{count}/{len(names)}] {result['outcome']:7} {result['seconds']:6.1f} s  {result['name']}{text}",
                flush=True,
            )
    counts = ", ".join(f"{run.counts()[outcome]} {outcome}" for outcome in OUTCOMES)
    print(f"-- {run}: {counts}, {time.monotonic() - start:.0f} s\n", flush=True)
    return run


def plan(backends: Sequence[str], world_sizes: Sequence[int], pattern: str) -> Iterator[tuple[Run, list[str]]]:
    for world_size in world_sizes:
        known = [test for test in known_tests(world_size) if pattern in test.name]
        for beyond in (False, True):
            names = [
                test.name
                for test in known
                if test.beyond == beyond and (test.needs_8 if world_size >= LARGE else not (beyond and test.needs_8))
            ]
            for backend in backends if names else ():
                yield Run(backend, world_size, "mpi" if beyond else REFERENCE), names


def lacking(reference: Run, run: Run) -> list[dict[str, Any]]:
    """What the reference passes and `run` does not."""
    return [result for result in run.results if result["name"] in reference.passed() - run.passed()]


def table(runs: Sequence[Run]) -> str:
    lines = [
        f"| backend | ranks | tests | {' | '.join(OUTCOMES)} | passed of what Gloo passes |",
        f"|---|---|---|{'---|' * len(OUTCOMES)}---|",
    ]
    for run in runs:
        reference = reference_of(run, runs)
        both = f"{len(reference.passed() & run.passed())} of {len(reference.passed())}" if reference else ""
        name = run.backend if run.seen_as == REFERENCE else f"{run.backend}, beyond Gloo"
        counts = run.counts()
        cells = [name, str(run.world_size), str(len(run.results)), *(str(counts[o]) for o in OUTCOMES), both]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def reference_of(run: Run, runs: Sequence[Run]) -> Run | None:
    for other in runs:
        if other.backend == REFERENCE and (other.world_size, other.seen_as) == (run.world_size, run.seen_as):
            return other
    return None


def conclude(runs: Sequence[Run]) -> int:
    """Prints what came out; how many results are wrong."""
    print(table(runs))
    wrong = 0
    for run in runs:
        reference = reference_of(run, runs)
        if run.backend == REFERENCE:
            continue
        if reference:
            missing, text = lacking(reference, run), "passes on Gloo and not here"
        else:
            missing = [result for result in run.results if result["outcome"] not in ("passed", "skipped")]
            text = "does not pass (Gloo was not asked)"
        for result in missing:
            excuse = EXCUSED.get(result["name"])
            wrong += excuse is None
            print(f"\n{run}: {result['name']} {text}: {result['outcome']}\n  {result['line']}")
            if excuse:
                print(f"  excused: {excuse}")
        more = sorted(run.passed() - reference.passed()) if reference else []
        if more:
            print(f"\n{run}: passed here and not on Gloo: {', '.join(more)}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default=f"{REFERENCE},reducer", help="with commas between")
    parser.add_argument("--world-size", default=f"3,4,{LARGE}", help="with commas between")
    parser.add_argument("-k", dest="pattern", default="", help="only tests with this in their name")
    parser.add_argument("--limit", type=float, default=150, help="seconds for one test")
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "torch-suite.json")
    parser.add_argument("--list", action="store_true", help="only say which tests would run")
    asked = parser.parse_args()
    backends = asked.backend.split(",")
    runs = []
    for run, names in plan(backends, [int(size) for size in asked.world_size.split(",")], asked.pattern):
        if asked.list:
            print(f"{run}:", *names, sep="\n  ")
            continue
        runs.append(carry_out(run, names, asked.limit))
    if asked.list:
        return 0
    if not runs:
        raise SystemExit("there is no such test")
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    found = [
        {"backend": r.backend, "world_size": r.world_size, "seen_as": r.seen_as, "results": r.results} for r in runs
    ]
    asked.json.write_text(json.dumps(found, indent=1) + "\n")
    wrong = conclude(runs)
    print(f"\n{asked.json.relative_to(ROOT) if asked.json.is_relative_to(ROOT) else asked.json} has every result.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
