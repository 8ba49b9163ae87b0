"""perf-check: a loss fails, noise does not, what cannot run is said; and a core's throughput, by synthetic figures."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

perf: Any = importlib.import_module("perf_check")
throughput: Any = importlib.import_module("reducer_throughput")


def source(*runs: dict[str, float | None], why_not: str | None = None) -> Any:
    """Gives the figures of one run after the other, and fails if it is asked more often."""
    left: Iterator[dict[str, float | None]] = iter(runs)
    return perf.Source("row", lambda: next(left), lambda: why_not)


def table_of(findings: Any) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(perf.make_table(findings))
    return capture.get()


def test_a_loss_in_every_attempt_is_lost() -> None:
    (finding,) = perf.compare([source({"row, a": 1.6}, {"row, a": 1.69}, {"row, a": 1.5})], {"row, a": 2.0})
    assert finding.lost and finding.attempts == [1.6, 1.69, 1.5]
    text = table_of([finding])
    assert "lost" in text and "1.60, 1.69, 1.50" in text and "-16%" in text


def test_noise_is_tried_again_and_what_is_fine_is_not() -> None:
    (finding,) = perf.compare([source({"row, a": 1.0}, {"row, a": 1.71})], {"row, a": 2.0})
    assert not finding.lost and finding.attempts == [1.0, 1.71]
    (finding,) = perf.compare([source({"row, a": 1.71})], {"row, a": 2.0})
    assert not finding.lost


def test_one_lost_row_among_others_is_named() -> None:
    low = {"row, a": 3.0, "row, b": 0.5}
    findings = {each.name: each for each in perf.compare([source(low, low, low)], {"row, a": 3.0, "row, b": 1.0})}
    assert findings["row, b"].lost and not findings["row, a"].lost


def test_a_row_that_is_measured_no_longer_is_lost() -> None:
    findings = perf.compare([source({}, {}, {})], {"row, a": 2.0, "of no source": 1.0})
    assert [each.lost for each in findings] == [True, True]
    assert "missing" in table_of(findings)


def test_a_contender_that_failed_has_no_ratio_and_is_lost() -> None:
    right = {"contender": "reducer auto", "bytes": 4, "correct": True, "speed_over_gloo": 2.0}
    wrong = {**right, "bytes": 1024, "correct": False}
    broken = {"contender": "reducer auto", "bytes": 1 << 20, "correct": False, "error": "rank 1: no"}
    ratios = perf.bench_ratios("row", {"results": [right, wrong, broken]})
    assert ratios == {"row, 4 B": 2.0, "row, 1 KiB": None, "row, 1 MiB": None}
    gloo = {"contender": "gloo", "nbytes": 4, "gloo_ratio": 1.0, "wrong": 0}
    emulated = {"setting": {"failures": {"auto": "it died"}}, "rows": [gloo]}
    assert perf.netlab_ratios("row", emulated) == {"row, auto, 4 B": None}
    findings = perf.compare([source(ratios, ratios, ratios)], {"row, 4 B": 2.0, "row, 1 MiB": 3.0})
    assert [each.name for each in findings if each.lost] == ["row, 1 MiB", "row, 1 KiB"]
    with pytest.raises(perf.PerfError, match="row, 1 KiB"):
        perf.collect([source(ratios)])


def test_what_cannot_run_is_said_and_not_judged() -> None:
    (finding,) = perf.compare([source(why_not="needs root")], {"row, a": 2.0})
    assert not finding.lost and finding.skipped == "needs root" and "not run" in table_of([finding])


def test_a_row_without_baseline_is_new() -> None:
    (finding,) = perf.compare([source({"row, a": 2.0})], {})
    assert not finding.lost and "new" in table_of([finding])


def test_a_command_that_takes_too_long_may_clean_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import pathlib, signal, time\n"
        "def end(*_):\n"
        "    time.sleep(0.5)\n"
        f"    pathlib.Path({str(tmp_path / 'clean')!r}).touch()\n"
        "    raise SystemExit(1)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(perf, "_COMMAND_SECONDS_MAX", 3)
    with pytest.raises(subprocess.TimeoutExpired):
        perf._figures_of([str(script)], tmp_path / "none.json", {})
    assert (tmp_path / "clean").exists()


def test_a_baseline_is_the_median_of_three_and_lacks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "baseline.toml"
    ratios = perf.collect([source({"row, a": 9.0}, {"row, a": 2.0}, {"row, a": 1.0})])
    perf.write_baseline(path, {"cores": 2, "processor": 'a "quoted" one'}, ratios)
    assert perf.read_baseline(path) == ({"cores": 2, "processor": 'a "quoted" one'}, {"row, a": 2.0})
    with pytest.raises(perf.PerfError, match="needs root"):
        perf.collect([source(why_not="needs root")])


@pytest.mark.parametrize("text", ["", "[ratios]", "ratios = 3", '[ratios]\n"a" = "fast"', '[ratios]\n"a" = 0.0', "{"])
def test_what_is_no_baseline_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "baseline.toml"
    path.write_text(text)
    with pytest.raises(perf.PerfError, match="--update"):
        perf.read_baseline(path)


def test_the_checked_in_baseline_has_a_row_for_every_source_and_no_other() -> None:
    _, ratios = perf.read_baseline(perf.BASELINE)
    names = [each.name for each in perf.sources()]
    assert all(any(row.startswith(f"{name}, ") for row in ratios) for name in names)
    assert all(any(row.startswith(f"{name}, ") for name in names) for row in ratios)


def test_a_core_of_a_reducer_beside_iperf3() -> None:
    def turns(*seconds: float) -> list[Any]:
        return [throughput.Turn(6_000_000_000, each / 4, each * 3 / 4) for each in seconds]

    table, fine = throughput.make_table({"reducer": turns(2.0, 1.0, 1.5), "iperf3": turns(1.0)}, "a title")
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    assert fine and "4.00" in capture.get() and "0.67" in capture.get() and "met" in capture.get()
    assert not throughput.make_table({"reducer": turns(2.0), "iperf3": turns(1.0)}, "a title")[1]
