"""`reducer simulate`: its options, its table and its figures; and the comparison's parts that need no cluster."""

from __future__ import annotations

import importlib
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reducer import cli
from reducer._simulate import model
from reducer.errors import InvalidArgumentError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
COMMAND = [sys.executable, "-m", "reducer", "simulate"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, check=False, text=True, timeout=60)


def test_a_run_prints_a_table_and_writes_its_figures(tmp_path: Path) -> None:
    figures, picture = tmp_path / "out" / "simulation.json", tmp_path / "out" / "simulation.png"
    done = run(
        *("--workers", "4,8", "--reducers", "0,n/2,n", "--bandwidth", "1gbit", "--latency", "50us"),
        *("--size", "64KiB,4MiB", "--algorithm", "auto,direct,server,ring", "--check"),
        *("--json", str(figures), "--png", str(picture)),
    )
    assert done.returncode == 0, done.stderr
    assert "NICs of 1 Gbit/s, latency 50.0 us" in done.stdout
    assert "every result was compared with the sum, and equal" in done.stdout
    rows = json.loads(figures.read_text())["results"]
    jobs = {(row["workers"], row["reducers"], row["algorithm"]) for row in rows}
    assert jobs == {
        *((n, 0, name) for n in (4, 8) for name in ("direct", "ring")),
        *((n, k, name) for n in (4, 8) for k in (n // 2, n) for name in ("server", "mixed")),
    }
    assert len(rows) == 2 * len(jobs)
    large = {(row["workers"], row["algorithm"]): row for row in rows if row["bytes"] == 4 << 20 and not row["reducers"]}
    # The line of 1 Gbit/s, and the bound of 8 workers.
    assert math.isclose(large[8, "direct"]["bound_bit_s"], 1e9 * 1448 / 1514 * 8 / 14)
    assert 0.9 < large[8, "direct"]["bound_share"] <= 1.0
    assert large[8, "direct"]["limit"].startswith("NICs of workers")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_same_run_gives_the_same_figures() -> None:
    jittered = network_of(jitter_s=30e-6)
    written = [
        [row.as_json() for row in model.simulate(model.Job(6, 3, "mixed"), jittered, [4, 1 << 20], 2)] for _ in range(2)
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--workers", "many"), "is no number of workers"),
        (("--reducers", "n/0"), "is no number of reducers"),
        (("--reducers", "0", "--algorithm", "server"), "server and mixed need reducers"),
        (("--algorithm", "best"), "'best' is no algorithm: choose from auto, direct"),
        (("--bandwidth", "25"), "is not a rate"),
        (("--latency", "20"), "is not a time"),
        (("--size", "big"), "is not a size"),
        (("--shared-cores",), "--shared-cores needs --cores"),
    ],
)
def test_wrong_options_end_with_2_and_say_what_is_wrong(arguments: tuple[str, ...], complaint: str) -> None:
    done = CliRunner().invoke(cli.app, ["simulate", *arguments])
    assert done.exit_code == 2
    assert complaint in " ".join(done.stderr.replace("│", " ").split())


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    done = CliRunner().invoke(cli.app, ["simulate", "--png", "f.png"])
    assert done.exit_code == 2 and "matplotlib" in done.stderr


def test_a_job_that_cannot_be_ends_with_1_and_one_line() -> None:
    done = run("--workers", "5000", "--algorithm", "direct")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "reducer: a group has 1 to 4096 workers, not 5000\n"


def test_help_says_what_it_is() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "Usage: reducer simulate" in done.stdout
    assert "--shared-cores" in done.stdout


def heed_ctrl_c() -> None:
    """A shell has what it starts in the background ignore it, the whole test run included."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_it_at_once() -> None:
    with subprocess.Popen(
        [*COMMAND, "--workers", "64", "--size", "256MiB", "--iterations", "1000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c,
    ) as process:  # fmt: skip
        try:
            time.sleep(3)  # it runs for minutes: whatever it does now, it is to end
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            process.wait(20)
        finally:
            process.kill()
    assert process.returncode != 0


def network_of(**changes: Any) -> model.Network:
    return model.Network(**{"bandwidth": 1e9, "latency_s": 50e-6} | changes)


def test_rows_know_their_bound_and_what_limits_them() -> None:
    (row,) = model.simulate(model.Job(8, 8, "server"), network_of(), [16 << 20], 2)
    assert row.algorithm == "server"
    assert math.isclose(row.bound or 0, row.network.line)
    assert 0.85 < (row.bound_share or 0) <= 1.0
    assert row.limit.startswith("NICs of reducers")
    (small,) = model.simulate(model.Job(8, 8, "server"), network_of(latency_s=1e-3), [4], 2)
    assert small.limit == "latency"
    assert 2e-3 < small.seconds < 2.1e-3
    (busy,) = model.simulate(model.Job(4, 4, "server"), network_of(cores=1, byte_s=20e-9), [1 << 20], 2)
    assert busy.limit.startswith("cores of ")
    shared = network_of(cores=2, shared_cores=True, byte_s=20e-9)
    (shared_row,) = model.simulate(model.Job(4, 4, "server"), shared, [1 << 20], 2)
    assert shared_row.limit == "the shared cores"
    assert shared_row.seconds > 1.5 * busy.seconds
    (unequal,) = model.simulate(model.Job(8, 4, "server"), network_of(reducer_bandwidth=2e9), [16 << 20], 2)
    assert unequal.bound == row.bound
    assert unequal.seconds < 1.1 * row.seconds


def test_counts_and_times_are_read_as_written() -> None:
    assert model.parse_counts("0,n/4,n/2,n,3", 64) == [0, 16, 32, 64, 3]
    assert model.parse_counts("n, 8", 8) == [8]
    assert model.parse_duration("20us") == pytest.approx(20e-6)
    assert model.parse_duration("1.5 ms") == pytest.approx(1.5e-3)
    jobs = model.jobs_of([4], "0,2", ["auto", "direct", "mixed", "ring"], 0, 0)
    assert [(job.reducers, job.algorithm) for job in jobs] == [(0, "direct"), (0, "ring"), (2, "mixed")]


def test_unknown_things_are_refused_by_the_native_part() -> None:
    with pytest.raises(InvalidArgumentError, match="no algorithm"):
        model.simulate(model.Job(2, 0, "best"), network_of(), [4], 1)


def test_the_comparisons_parts() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    check: Any = importlib.import_module("sim_check")
    job = check.parse_job("mixed:8+4")
    assert (job.algorithm, job.workers, job.reducers) == ("mixed", 8, 4)
    for wrong in ("mixed", "mixed:8", "best:8+4", "direct:a+0"):
        with pytest.raises(ValueError, match="is no job"):
            check.parse_job(wrong)
    # What the model takes from a job's CPU time is what went into it.
    job = model.Job(4, 0, "direct")
    sizes = [1 << 10, 1 << 20]
    cpu = {}
    for row in model.simulate(job, network_of(), sizes, 4):
        cpu[row.nbytes] = 30e-6 * row.found["all_frames"] + 2e-9 * row.found["all_bytes"] * model.PAYLOAD_SHARE
    case = check.Case(job, {}, cpu, {})
    found = check.calibrated(network_of(), case, 1 << 20)
    assert found.frame_s == pytest.approx(30e-6)
    assert found.byte_s == pytest.approx(2e-9)
