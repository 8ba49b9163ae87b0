"""The emulated cluster: its formulas and tables, and one tiny real run where namespaces work."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

netlab: Any = importlib.import_module("netlab")
cluster: Any = importlib.import_module("netlab_cluster")
netlab_report: Any = importlib.import_module("netlab_report")

LINE = 0.955e9


def samples(contender: str, nbytes: int, seconds: list[float], wrong: int = 0) -> Any:
    return netlab_report.Samples(nbytes, contender, seconds, wrong, cpu_busy=30.0, cpu_total=120.0, cpu_own=12.0)


def test_rows_give_bandwidth_bound_and_ratio() -> None:
    nbytes = 64 << 20
    at_line = 8 * nbytes / LINE
    measured = [
        samples("gloo", nbytes, [2 * at_line]),
        samples("server", nbytes, [at_line]),
        samples("ring", nbytes, []),
    ]
    gloo, server = netlab_report.make_rows(measured, 8, 8, LINE)
    assert math.isclose(server.algbw, LINE)
    assert math.isclose(server.busbw, 1.75 * LINE)
    assert math.isclose(server.bound_share, 1.0)
    assert math.isclose(server.gloo_ratio, 2.0)
    assert math.isclose(server.cpu_share, 0.25)
    assert math.isclose(server.own_cpu_share, 0.1)
    # A ring's bound is n / (2(n-1)) of the line; Gloo here has half of the line.
    assert math.isclose(gloo.bound_share, 0.5 / (8 / 14))
    assert gloo.gloo_ratio == 1.0


def test_rows_without_limit_or_gloo_have_no_bound_and_no_ratio() -> None:
    (row,) = netlab_report.make_rows([samples("direct", 1024, [0.001])], 4, 0, None)
    assert row.bound is None and row.bound_share is None and row.gloo_ratio is None


def test_p99_is_the_worst_of_few_and_median_the_middle() -> None:
    (row,) = netlab_report.make_rows([samples("ring", 4096, [0.3, 0.1, 0.2])], 2, 0, LINE)
    assert (row.median_s, row.p99_s, row.iterations) == (0.2, 0.3, 3)


def test_table_says_what_was_wrong() -> None:
    rows = netlab_report.make_rows([samples("ring", 1 << 20, [0.1], wrong=3)], 2, 1, LINE)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(netlab_report.make_table(rows, "a title"))
    text = capture.get()
    assert "1 MiB" in text and "ring" in text and "3 wrong" in text and "25%" in text


def test_json_and_picture(tmp_path: Path) -> None:
    measured = [
        samples(name, nbytes, [nbytes / 1e8]) for nbytes in (1 << 10, 1 << 20) for name in ("gloo", "direct", "server")
    ]
    rows = netlab_report.make_rows(measured, 4, 4, LINE)
    data = json.loads(json.dumps(netlab_report.make_json(rows, {"workers": 4})))
    assert data["setting"] == {"workers": 4} and len(data["rows"]) == 6
    netlab_report.draw(rows, LINE, "a title", tmp_path / "deep" / "picture.png")
    assert (tmp_path / "deep" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_turns_are_short_and_never_empty() -> None:
    assert netlab.turn_count(64 << 20) == 4
    assert netlab.turn_count(1024) > netlab.turn_count(16 << 20) > netlab.turn_count(1 << 30) > 1
    assert netlab.turn_seconds_max(64 << 20, 1, 8, "1gbit") > 10 * 8 * (64 << 20) / 1e9


def test_budgets_add_up_and_favour_large_sizes() -> None:
    budgets = netlab.size_budgets([1 << 10, 64 << 20], 100.0)
    assert math.isclose(sum(budgets.values()), 100.0)
    assert budgets[64 << 20] > budgets[1 << 10] > 0


def test_addresses_and_names_are_distinct() -> None:
    labels = [f"w{i}" for i in range(64)] + [f"r{i}" for i in range(64)]
    lab = cluster.Cluster(labels, None)
    assert len({lab.address(label) for label in labels}) == len(labels)
    assert all(str(os.getpid()) in lab.namespace(label) for label in labels)


def run_netlab(output: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> Any:
    command = [
        *prefix,
        sys.executable,
        str(BENCHMARKS / "netlab.py"),
        "--output",
        str(output),
    ]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)


def test_bad_options_are_refused_with_a_reason(tmp_path: Path) -> None:
    for option, value, said in (
        ("--sizes", "12parsecs", "12parsecs"),
        ("--rate", "fast", "fast"),
        ("--contenders", "gloo,quux", "quux"),
    ):
        done = run_netlab(tmp_path, option, value)
        assert done.returncode == 2 and said in done.stderr


def test_without_root_it_says_so(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        reason = subprocess.run(
            [
                sys.executable,
                "-c",
                "import os, netlab_cluster as c; os.setuid(65534); print(c.why_not())",
            ],
            env={**os.environ, "PYTHONPATH": str(BENCHMARKS)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    else:
        done = run_netlab(tmp_path)
        assert done.returncode == netlab.EXIT_NOT_HERE
        reason = done.stderr
    assert "root" in reason


@pytest.fixture
def _namespaces() -> None:
    reason = cluster.why_not()
    if reason is not None:
        pytest.skip(f"no emulated hosts here: {reason}")


@pytest.mark.usefixtures("_namespaces")
@pytest.mark.parametrize("contender", ["gloo", "ring", "direct", "server", "mixed"])
def test_a_tiny_run_of_each_contender(tmp_path: Path, contender: str) -> None:
    done = run_netlab(
        tmp_path, "--workers", "3", "--reducers", "2", "--iterations", "1",
        "--sizes", "1KiB,300KB", "--contenders", contender,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "netlab.json").read_text())
    assert [(row["nbytes"], row["wrong"]) for row in data["rows"]] == [
        (1024, 0),
        (300_000, 0),
    ]
    # The token bucket takes frames with their headers; a loaded machine may be slower than it.
    assert 0.1e9 < data["setting"]["line_bit_s"] < 1e9
    assert (tmp_path / "netlab.png").stat().st_size > 1000


@pytest.mark.usefixtures("_namespaces")
def test_the_hosts_have_the_congestion_control_that_was_asked_for() -> None:
    with cluster.Cluster(["w0"], None, "reno") as lab:
        read = ["ip", "netns", "exec", lab.namespace("w0"), "cat", "/proc/sys/net/ipv4/tcp_congestion_control"]
        assert subprocess.run(read, capture_output=True, text=True, timeout=30, check=True).stdout == "reno\n"
    with (
        pytest.raises(cluster.NetlabError, match="nosuch"),
        cluster.Cluster(["w0"], None, "nosuch"),
    ):
        pass
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=30, check=True).stdout
    assert f"-{os.getpid()}-" not in listed


@pytest.mark.usefixtures("_namespaces")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, str(BENCHMARKS / "netlab.py"), "--output", str(tmp_path)]
    with subprocess.Popen(
        [*command, "--workers", "2", "--reducers", "1", "--contenders", "gloo"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any("starting gloo" in line for line in lines), "it never started"
        mine = [name for name in cluster.namespaces() if f"-{process.pid}-" in name]
        assert len(mine) == 4
        os.killpg(process.pid, number)
        process.wait(60)
    assert process.returncode != 0
    assert not [name for name in cluster.namespaces() if f"-{process.pid}-" in name]


@pytest.mark.usefixtures("_namespaces")
def test_leftovers_of_a_killed_run_are_removed() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait(10)
    name = f"{cluster.PREFIX}-{process.pid}-w0"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=30)
    assert name in cluster.remove_leftovers()
    assert name not in cluster.namespaces()
