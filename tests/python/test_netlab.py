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
import typer
from rich.console import Console
from typer.testing import CliRunner

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

netlab: Any = importlib.import_module("netlab")
netlab_run: Any = importlib.import_module("netlab_run")
netlab_goals: Any = importlib.import_module("netlab_goals")
scenarios: Any = importlib.import_module("netlab_scenarios")
cluster: Any = importlib.import_module("netlab_cluster")
netlab_ddp: Any = importlib.import_module("netlab_ddp")
netlab_report: Any = importlib.import_module("netlab_report")

LINE = 0.955e9
EFFICIENCY = 0.955
MIB = 1 << 20


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
    gloo, server = netlab_report.make_rows(measured, scenarios.Shape(8, 8), EFFICIENCY)
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
    (row,) = netlab_report.make_rows([samples("direct", 1024, [0.001])], scenarios.Shape(4, 0), None)
    assert row.bound is None and row.bound_share is None and row.gloo_ratio is None


def test_p99_is_the_worst_of_few_and_median_the_middle() -> None:
    (row,) = netlab_report.make_rows([samples("ring", 4096, [0.3, 0.1, 0.2])], scenarios.Shape(2, 0), EFFICIENCY)
    assert (row.median_s, row.p99_s, row.iterations) == (0.2, 0.3, 3)


def test_table_says_what_was_wrong() -> None:
    rows = netlab_report.make_rows([samples("ring", MIB, [0.1], wrong=3)], scenarios.Shape(2, 1), EFFICIENCY)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(netlab_report.make_table(rows, "a title"))
    text = capture.get()
    assert "1 MiB" in text and "ring" in text and "3 wrong" in text and "25%" in text


def test_bounds_of_shared_and_of_unequal_nics() -> None:
    def bound(shape: Any, name: str) -> float:
        return float(shape.bound(scenarios.Competitor(name), 1.0)) / 1e9

    two_a_host = scenarios.Shape(4, 4, ranks_per_host=2)
    assert two_a_host.rank_hosts == ["w0", "w0", "w1", "w1", "w2", "w2", "w3", "w3"]
    # Two levels: a host moves what one worker would. Flat: its NIC carries both ranks' bytes.
    assert bound(two_a_host, "server") == pytest.approx(1.0)
    assert bound(two_a_host, "server:grpc") == pytest.approx(0.5)
    assert bound(two_a_host, "direct") == pytest.approx(4 / 6)
    assert bound(two_a_host, "direct:tcp") == pytest.approx(8 / (2 * 2 * 6))
    # A ring of 8 ranks enters and leaves each host once.
    assert bound(two_a_host, "gloo") == pytest.approx(8 / 14)
    assert bound(two_a_host, "auto") == pytest.approx(1.0)
    # Two reducers with twice the NIC are worth four.
    fast = scenarios.Shape(8, 2, rates={"r": "2gbit"})
    assert bound(fast, "mixed") == pytest.approx(bound(scenarios.Shape(8, 4), "mixed"))
    one_slow = scenarios.Shape(8, 8, rates={"w3": "100mbit"})
    assert bound(one_slow, "mixed") == pytest.approx(0.1) and bound(one_slow, "server") == pytest.approx(0.1)
    assert bound(one_slow, "ring") == pytest.approx(0.1 * 8 / 14)


def test_goals_are_judged_by_every_size_and_wrong_results_reach_none() -> None:
    measured = [
        samples("gloo", MIB, [2.0]), samples("server", MIB, [1.0]), samples("auto", MIB, [1.05]),
        samples("gloo", 4 * MIB, [2.0]), samples("server", 4 * MIB, [1.0]), samples("auto", 4 * MIB, [1.5]),
    ]  # fmt: skip
    rows = netlab_report.make_rows(measured, scenarios.Shape(8, 8), EFFICIENCY)

    def verdict(*goal: Any, of: Any = rows, failed: Any = ()) -> Any:
        return netlab_goals.judge("here", [scenarios.Goal(*goal)], of, failed)[0]

    assert verdict("server", "gloo", 2.0).met is True
    assert verdict("server", "gloo", 2.0, failed=["server"]).met is False
    assert verdict("server", "gloo", 2.0, failed=["auto"]).met is True
    assert verdict("mixed", "gloo", 2.0, failed=["mixed"]).met is False
    assert verdict("server", "gloo", 2.1).met is False
    assert verdict("auto", "best", scenarios.RIGHT_CHOICE, 0, MIB).met is True
    missed = verdict("auto", "best", scenarios.RIGHT_CHOICE)
    assert missed.met is False and missed.figures[4 * MIB] == pytest.approx(1 / 1.5)
    assert verdict("server", "gloo", 1.0, 16 * MIB).met is None
    assert verdict("mixed", "gloo", 1.0).met is None
    wrong = netlab_report.make_rows(
        [samples("gloo", MIB, [2.0]), samples("server", MIB, [0.1], wrong=1)], scenarios.Shape(8, 8), EFFICIENCY
    )
    assert verdict("server", "gloo", 1.0, of=wrong).met is False
    console = Console(width=120)
    with console.capture() as capture:
        console.print(netlab_goals.make_goal_table([missed, verdict("mixed", "line", 0.9)]))
    text = capture.get()
    assert "missed" in text and "0.667 (4 MiB)" in text and "not measured" in text


def test_losses_that_are_no_numbers_are_far_from_all() -> None:
    reference = netlab_ddp.Run("gloo", losses=[4.0, 2.0])
    assert netlab_ddp.loss_distance(netlab_ddp.Run("auto", losses=[4.0, 2.5, math.nan]), reference) == 0.25
    for loss in (math.nan, math.inf):
        assert netlab_ddp.loss_distance(netlab_ddp.Run("auto", losses=[4.0, loss]), reference) == math.inf


def test_the_hosts_of_ddp_have_the_congestion_control_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refused(*arguments: Any) -> None:
        asked.extend(arguments)
        raise cluster.NetlabError("no cluster")

    monkeypatch.setattr(netlab_ddp, "Cluster", refused)
    monkeypatch.setattr(cluster, "remove_leftovers", list)
    monkeypatch.setattr(netlab_ddp, "standard_library_text", lambda _: "a text")
    with pytest.raises(cluster.NetlabError, match="no cluster"):
        netlab_ddp.run_ddp(netlab_ddp.DdpScenario(), Path("out"), Console(), 1, "auto", "reno")
    assert asked[2] == "reno"


def test_every_goal_is_about_somebody_who_runs_at_a_size_that_runs() -> None:
    for scenario in scenarios.SCENARIOS.values():
        names = [scenarios.Competitor(name).name for name in scenario.contenders]
        for goal in scenario.goals:
            assert goal.contender in names and "gloo" in names
            assert any(goal.least <= nbytes <= goal.most for nbytes in scenario.sizes)


def test_what_a_build_does_not_have_is_left_out_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    known = netlab._known("gloo,server:grpc,mixed/63KiB/2MiB:tcp", notes.append)
    assert [each.name for each in known] == ["gloo", "server:grpc", "mixed/63KiB/2MiB:tcp"] and not notes
    assert known[2].environment == {"REDUCER_ALGORITHM": "0-:mixed/63KiB/2MiB", "REDUCER_TRANSPORT": "tcp"}

    def older(text: str) -> str:
        raise ValueError(f"{text!r} is not among auto, grpc")

    monkeypatch.setattr("reducer.options._core.parse_transport", older)
    assert [each.name for each in netlab._known("gloo,direct:tcp", notes.append)] == ["gloo"]
    assert notes == ["direct:tcp is left out: reducer.Options(transport): 'tcp' is not among auto, grpc"]


def test_json_and_picture(tmp_path: Path) -> None:
    measured = [
        samples(name, nbytes, [nbytes / 1e8]) for nbytes in (1 << 10, 1 << 20) for name in ("gloo", "direct", "server")
    ]
    rows = netlab_report.make_rows(measured, scenarios.Shape(4, 4), EFFICIENCY)
    data = json.loads(json.dumps(netlab_report.make_json(rows, {"workers": 4})))
    assert data["setting"] == {"workers": 4} and len(data["rows"]) == 6
    netlab_report.draw(rows, "a title", tmp_path / "deep" / "picture.png")
    assert (tmp_path / "deep" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_turns_are_short_and_never_empty() -> None:
    shape = scenarios.Shape(8, 8)
    counts = [netlab_run.turn_count(nbytes, shape) for nbytes in (1024, 16 << 20, 64 << 20, 1 << 30)]
    assert counts == [40, 8, 4, 4]
    assert netlab_run.turn_count(4 << 20, shape) == 32
    assert 4 <= netlab_run.turn_count(4 << 20, scenarios.Shape(8, 8, rate="200mbit")) < 10
    assert netlab_run.turn_seconds_max(64 << 20, 1, scenarios.Shape(8, 8)) > 10 * 8 * (64 << 20) / 1e9


def test_a_run_ends_when_all_have_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        name, failure = "auto", None

        def run(self, *_: Any) -> None:
            raise cluster.NetlabError("it died")

        def stop(self) -> None:
            pass

    monkeypatch.setattr(netlab_run, "_FOREIGN_SECONDS", 0.0)
    setting = netlab_run.Setting(
        "netlab", scenarios.Shape(2, 0), (1024, 4096), (), None, 1e6, 1, "auto", None, Path("out")
    )
    with netlab_run.Progress(console=Console(), disable=True) as progress:
        (measured,), _ = netlab_run.measure(setting, [Failing()], progress)
    assert measured.nbytes == 1024 and not measured.seconds


def test_others_at_work_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(10.0, 100.0), (10.4, 101.0)])
    monkeypatch.setattr(netlab_run, "cpu_seconds", lambda: next(readings))
    monkeypatch.setattr(netlab_run, "_FOREIGN_SECONDS", 0.0)
    assert netlab_run.foreign_share() == pytest.approx(0.4)


def test_budgets_add_up_and_favour_large_sizes() -> None:
    budgets = netlab_run.size_budgets([1 << 10, 64 << 20], 100.0)
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


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--sizes", "12parsecs", "12parsecs"),
        ("--sizes", "1KiB,0", "at least 1 byte"),
        ("--rate", "fast", "fast"),
        ("--contenders", "gloo,quux", "quux"),
        ("--contenders", "server:pigeon", "pigeon"),
        ("--contenders", "gloo,server/63KiBB", "63KiBB"),
        ("--contenders", "gloo,server/63KiB/2MiB/1", "no contender"),
        ("--contenders=server,mixed", "--reducers=0", "nobody is left"),
        ("--rates", "w99=1gbit", "w99"),
        ("--rates", "w0=fast", "fast"),
        ("--scenario", "9+9", "9+9"),
        ("--scenario=ddp", "--contenders=auto,gloo", "compared"),
        ("--scenario=8+8", "--workers=4", "takes no --workers"),
        ("--scenario=8+8", "--no-limit", "takes no --no-limit"),
        ("--scenario=8+8", "--rates=r=2gbit", "takes no --rates"),
        ("--scenario=ddp", "--ranks-per-host=2", "takes no --ranks-per-host"),
        ("--scenario=ddp", "--sizes=1KiB", "takes no --sizes"),
        ("--scenario=ddp", "--iterations=1", "takes no --iterations"),
    ],
)
def test_bad_options_are_refused_with_a_reason(option: str, value: str, said: str) -> None:
    app = typer.Typer()
    app.command()(netlab.main)
    done = CliRunner().invoke(app, [option, value])
    assert done.exit_code == 2 and said in done.output


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
def test_ranks_share_hosts_and_hosts_have_rates_of_their_own(tmp_path: Path) -> None:
    done = run_netlab(
        tmp_path, "--workers", "2", "--ranks-per-host", "2", "--reducers", "1", "--rates", "r0=2gbit",
        "--iterations", "1", "--sizes", "300KB", "--contenders", "gloo,auto,mixed:grpc",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "netlab.json").read_text())["rows"]
    assert [(row["contender"], row["wrong"]) for row in rows] == [("gloo", 0), ("auto", 0), ("mixed:grpc", 0)]
    with cluster.Cluster(["w0", "r0"], {"w0": "1gbit", "r0": "2gbit"}) as lab:
        for label, rate in (("w0", "1Gbit"), ("r0", "2Gbit")):
            shown = subprocess.run(
                ["tc", "-n", lab.namespace(label), "qdisc", "show", "dev", cluster.INTERFACE],
                capture_output=True, text=True, timeout=30, check=True,
            )  # fmt: skip
            assert f"rate {rate}" in shown.stdout


@pytest.mark.usefixtures("_namespaces")
def test_a_scenario_ends_with_its_goals(tmp_path: Path) -> None:
    done = run_netlab(
        tmp_path, "--scenario", "8+0", "--iterations", "1", "--sizes", "1KiB", "--contenders", "gloo,direct"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5.00 x Gloo" in done.stdout and "not measured" in done.stdout
    assert (tmp_path / "netlab-8+0.json").is_file()


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
