"""`reducer bench`: its arithmetic and exact inputs, its fairness, and real runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from reducer._bench import formulas, patterns, programs, statistics, units
from reducer._bench.cases import Case, CaseKey
from reducer._bench.contest import Budget, Contender, Outcome, run_case
from reducer._bench.memory_mode import Finding, run_memory
from reducer._bench.processes import Child, ChildError, python_path
from reducer._bench.report import bench_table, complaints, ratio_to
from reducer._bench.servers import server_binary
from reducer._bench.team import LocalTeam, TeamError, raise_errors
from reducer.bench import all_fine, reducers_used
from reducer.cli import app

CPU = torch.device("cpu")
MEMORY_SLACK_BYTES = 6 << 20


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4", 4),
        ("64KiB", 65536),
        ("1MiB", 1 << 20),
        ("1.5GB", 1_500_000_000),
        (" 2 kb ", 2000),
        ("1GiB", 1 << 30),
    ],
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert units.parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "12parsecs", "-4", "1.5", "0x10", "1 2"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|whole number") as raised:
        units.parse_size(text)
    assert repr(text) in str(raised.value)


def test_ranges_rates_and_figures() -> None:
    assert units.size_range(4, 256, 4) == [4, 16, 64, 256]
    assert units.size_range(4, 255, 4) == [4, 16, 64]
    with pytest.raises(ValueError, match="factor"):
        units.size_range(4, 256, 1)
    assert units.parse_rate("1gbit") == 1e9 and units.parse_rate("250mbit") == 2.5e8
    with pytest.raises(ValueError, match="fast"):
        units.parse_rate("fast")
    assert [units.format_size(n) for n in (4, 65536, 1 << 30)] == ["4 B", "64 KiB", "1 GiB"]
    assert [units.format_seconds(s) for s in (4.2e-6, 0.0123, 2.5)] == [
        "4.20 us",
        "12.3 ms",
        "2.50 s",
    ]


def test_bus_factors_are_those_of_nccl_tests() -> None:
    assert formulas.bus_factor("all_reduce", 8) == 1.75
    assert formulas.bus_factor("all_gather", 4) == formulas.bus_factor("reduce_scatter", 4) == 0.75
    assert formulas.bus_factor("broadcast", 4) == 1.0
    with pytest.raises(ValueError, match="all_deduce"):
        formulas.bus_factor("all_deduce", 2)


def test_bounds_are_those_of_the_docs() -> None:
    ring = formulas.all_reduce_bound("ring", 8, 0)
    assert ring == formulas.all_reduce_bound("mixed", 8, 0) == pytest.approx(8 / 14)
    assert formulas.all_reduce_bound("mixed", 8, 4) / ring == pytest.approx(1.375)
    assert formulas.all_reduce_bound("mixed", 8, 8) / ring == pytest.approx(1.75)
    assert formulas.all_reduce_bound("server", 8, 4) == 0.5
    assert formulas.all_reduce_bound("server", 8, 16) == 1.0
    with pytest.raises(ValueError, match="two workers"):
        formulas.all_reduce_bound("ring", 1, 0)


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("k", [0, 1, 2, 8, 9])
def test_shares_give_the_bound_of_mixed(n: int, k: int) -> None:
    own, standalone = formulas.owner_shares("mixed", n, k)
    assert n * own + k * standalone == pytest.approx(1.0)
    # What the busiest NIC sends for a byte of the tensor: a worker and owner, or a reducer.
    sent = max((1 - own) + (n - 1) * own, n * standalone)
    assert 1 / sent == pytest.approx(formulas.all_reduce_bound("mixed", n, k))


def test_an_iteration_counts_as_its_slowest_rank() -> None:
    assert statistics.slowest_per_iteration([[1_000, 5_000], [2_000, 3_000]]) == [2e-6, 5e-6]
    assert statistics.median([3.0, 1.0, 2.0]) == 2.0
    assert statistics.percentile([float(i) for i in range(1, 201)], 99) == 198.0
    assert statistics.percentile([1.0, 2.0], 99) == 2.0


@pytest.mark.parametrize("dtype", patterns.DTYPES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 20])
def test_sums_are_exact_in_any_order(dtype: str, world_size: int) -> None:
    rows = [patterns.period(dtype, "sum", rank, world_size) for rank in range(world_size)]
    expected = patterns.reduced(dtype, "sum", world_size)
    for order in (rows, rows[::-1]):
        total = torch.zeros_like(expected)
        for row in order:
            # Rounded after each step. float64 holds each of these numbers, and torch adds no float8 and no uint16.
            total = (total.to(torch.float64) + row.to(torch.float64)).to(total.dtype)
        assert patterns.first_difference(total, expected) is None
    assert expected.to(torch.float64).unique().numel() > 1, "a constant would hide chunks in wrong places"


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_other_operations_are_exact(world_size: int) -> None:
    def rows(op: str, dtype: str) -> torch.Tensor:
        return torch.stack([patterns.period(dtype, op, rank, world_size) for rank in range(world_size)])

    for dtype in patterns.DTYPES:
        for op, name in {"max": "amax", "min": "amin", "product": "prod"}.items():
            wide = getattr(rows(op, dtype).to(torch.float64), name)(0)
            assert torch.equal(patterns.reduced(dtype, op, world_size).to(torch.float64), wide), (dtype, op)
    mean = patterns.reduced("bfloat16", "avg", world_size).to(torch.float64)
    assert torch.equal(mean, rows("avg", "bfloat16").to(torch.float64).mean(0))
    assert torch.equal(mean, mean.round())
    folded = rows("bxor", "int32")
    expected = folded[0]
    for row in folded[1:]:
        expected = expected ^ row
    assert torch.equal(patterns.reduced("int32", "bxor", world_size), expected)


def test_a_wrong_result_is_found_and_placed() -> None:
    case = Case(CaseKey("all_reduce", "float32", "sum", 4096), 0, 2, 3, CPU)
    case.fill()
    wrong, difference = case.difference(3)
    assert wrong == 3 and difference is not None and "of 1024 is" in difference
    actual = patterns.tiled(patterns.reduced("float32", "sum", 2), 5000)
    expected = actual.clone()
    actual[4097] += 1
    assert patterns.first_difference(expected, expected) is None
    found = patterns.first_difference(actual, expected)
    assert found is not None and found.startswith("element 4097 of 5000 is")


class FakeTeam:
    """Two ranks that take a millisecond and remember who was measured in which order."""

    world_size = 2

    def __init__(self, fails: str = "") -> None:
        self.asked: list[tuple[str, int]] = []
        self.fails = fails

    def call(self, command: dict[str, Any], timeout_s: float) -> list[dict[str, Any]]:
        if command["group"] == self.fails:
            raise TeamError("rank 1: no")
        self.asked.append((command["group"], command["iterations"]))
        reply = {
            "wrong": 0,
            "difference": None,
            "nbytes": command["nbytes"],
            "cpu_busy_s": 1.0,
            "cpu_total_s": 4.0,
        }
        return [reply | {"times_ns": [1_000_000 * (rank + 1)] * command["iterations"]} for rank in range(2)]

    def close(self) -> None:
        return


CASE = {"collective": "all_reduce", "dtype": "float32", "op": "sum", "nbytes": 4096}


def test_contenders_take_turns_and_another_is_first_each_round() -> None:
    team = FakeTeam()
    contenders = [Contender(name, "gloo", team) for name in ("a", "b")]
    outcomes = run_case(contenders, CASE, Budget(seconds=0.06, rounds=3))
    # Warm-up: 2, and 10 more where calls are short. Then 0.06 s of 2 ms in 3 rounds.
    assert team.asked == [("a", 2), ("a", 10), ("b", 2), ("b", 10)] + [
        (name, 10) for name in ("a", "b", "b", "a", "a", "b")
    ]
    assert [len(outcome.seconds) for outcome in outcomes] == [30, 30]
    assert outcomes[0].median_s == pytest.approx(0.002) and outcomes[0].algbw == pytest.approx(4096 / 0.002)
    assert outcomes[0].cpu_share == 0.25 and outcomes[0].ok


def test_a_contender_that_fails_leaves_the_others_their_figures() -> None:
    contenders = [Contender(name, "gloo", FakeTeam(fails="b")) for name in ("a", "b")]
    good, bad = run_case(contenders, CASE, Budget(seconds=0.01))
    assert good.ok and not bad.measured and bad.error == "rank 1: no"
    assert complaints([[good, bad]]) == ["b (from 4 KiB): rank 1: no"]
    assert ratio_to("a", good, [good, bad]) == 1.0 and ratio_to("b", good, [good, bad]) is None
    table = bench_table("title", "all_reduce", 2, [[good, bad]])
    assert table.row_count == 2


def test_a_wrong_result_is_never_ok() -> None:
    outcome = Outcome("a", 4, seconds=[0.1], wrong=1, difference="rank 0: element 3")
    assert outcome.measured and not outcome.ok
    assert complaints([[outcome]]) == ["a (from 4 B): rank 0: element 3"]


def test_a_run_in_which_a_contender_breaks_is_not_fine() -> None:
    good, broken = Outcome("a", 4, seconds=[0.1]), Outcome("b", 4, seconds=[0.1], error="rank 1: no")
    assert all_fine([[good], [good]])
    assert not all_fine([[good, broken], [good]]) and not all_fine([[]])


class ChoosingTeam(FakeTeam):
    """Says which algorithm a contender's group has."""

    def call(self, command: dict[str, Any], timeout_s: float) -> list[dict[str, Any]]:
        algorithms = {"reducer auto": "local", "reducer direct": "direct", "reducer mixed": "0-1MiB:direct,1MiB-:mixed"}
        return [{"algorithm": algorithms[command["group"]], "ways": []}]


def test_reducers_that_nobody_uses_are_not_counted() -> None:
    names = ("reducer auto", "reducer direct", "reducer mixed")
    contenders = [Contender(name, "reducer", ChoosingTeam()) for name in names]
    gloo = Contender("gloo", "gloo", FakeTeam())
    assert reducers_used([gloo, *contenders], 2) == 2
    assert reducers_used([gloo, *contenders[:2]], 2) == 0 and reducers_used(contenders, 0) == 0
    contenders[2].failed = "no"
    assert reducers_used(contenders, 2) == 0


def test_memory_bounds_follow_the_window() -> None:
    window = 2 << 20
    counters = {"window_bytes": window}
    direct = Finding("reducer direct", 4, 0, counters=counters)
    assert direct.worker_bound == 3 * window and direct.reducer_bound is None
    server = Finding("reducer server", 4, 2, reducer_extra=[1, 2], counters=counters)
    assert server.worker_bound == window and server.reducer_bound == 4 * window
    assert Finding("gloo", 4, 2, reducer_extra=[1, 2]).reducer_bound is None
    local = Finding("reducer local", 4, 2, reducer_extra=[1, 2], counters=counters)
    assert local.worker_bound is None and local.reducer_bound is None


def test_memory_counts_reducers_that_run_elsewhere() -> None:
    class Measured(FakeTeam):
        def call(self, command: dict[str, Any], timeout_s: float) -> list[dict[str, Any]]:
            return [{"extra_bytes": 1, "wrong": 0, "counters": {"window_bytes": 1 << 20}}] * self.world_size

    finding = run_memory(Contender("reducer server", "reducer", Measured()), 4096, 2, [], 1.0)
    assert finding.ok and finding.worker_bound == 1 << 20 and finding.reducer_bound is None


def test_errors_name_the_ranks_that_have_them() -> None:
    raise_errors([{}, {}])
    with pytest.raises(TeamError, match=r"^every rank: broken$"):
        raise_errors([{"error": "broken"}, {"error": "broken"}])
    with pytest.raises(TeamError, match=r"^rank 1, 2: gone$"):
        raise_errors([{}, {"error": "gone"}, {"error": "gone"}])


def test_a_dead_child_is_quoted() -> None:
    child = Child(
        "reducer 7",
        [sys.executable, "-c", "import sys; sys.exit('the port is taken')"],
        capture_stdout=True,
    )
    try:
        with pytest.raises(ChildError, match=r"reducer 7 closed its output.*exit code 1(.|\n)*the port is taken"):
            child.read_line(time.monotonic() + 30)
    finally:
        child.stop()


def test_a_lost_rank_is_named_at_once() -> None:
    team = LocalTeam("gloo", 2)
    try:
        team.meet("127.0.0.1", 60.0)
        os.kill(team.pids[1], 9)
        begin = time.monotonic()
        with pytest.raises(ChildError, match=r"gloo: rank 1 ended: it was ended by SIGKILL"):
            team.call({"do": "close"}, 60.0)
        assert time.monotonic() - begin < 20
    finally:
        team.close()


def test_a_late_answer_is_not_the_next_commands() -> None:
    team = LocalTeam("gloo", 1)
    try:
        with pytest.raises(ChildError, match="did not answer within 0 s"):
            team.call({"do": "nothing"}, 0.0)
        assert team.call({"do": "close"}, 60.0) == [{}]
    finally:
        team.close()


def test_every_collective_is_checked_on_real_ranks() -> None:
    team = LocalTeam("gloo", 3, environment={"GLOO_SOCKET_IFNAME": "lo"})
    try:
        team.meet("127.0.0.1", 60.0)
        contender = Contender("gloo", "gloo", team)
        contender.open(60.0)
        assert contender.failed is None
        for collective in formulas.COLLECTIVES:
            case = {**CASE, "collective": collective, "nbytes": 120_000}
            [outcome] = run_case([contender], case, Budget(seconds=0.01, rounds=1))
            assert outcome.ok, (collective, outcome.error or outcome.difference)
        # Gloo knows no 16-bit integers: an error on every rank, and the next case goes on.
        [refused] = run_case([contender], {**CASE, "dtype": "int16"}, Budget(seconds=0.01))
        assert not refused.measured and refused.error is not None and refused.error.startswith("every rank")
        [again] = run_case([contender], CASE, Budget(seconds=0.01))
        assert again.ok
    finally:
        team.close()


def run_bench(*arguments: str, module: tuple[str, ...] = ("-m", "reducer")) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("REDUCER_")}
    return subprocess.run(
        [sys.executable, *module, "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment | {"PYTHONPATH": python_path(), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--backend", "gloo,mpi"), "mpi"),
        (("--algorithm", "fastest"), "fastest"),
        (("--collective", "all_deduce"), "all_deduce"),
        (("--max", "12parsecs"), "12parsecs"),
        (("--min", "1MiB", "--max", "1KiB"), "1048576"),
        (("--algorithm", "server"), "--reducers"),
        (("--memory", "--png", "f.png"), "draws no --png"),
    ],
)
def test_bad_options_are_refused_with_a_reason(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDUCER_SERVERS", raising=False)
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert said in done.output


def test_a_run_writes_its_figures_and_says_who_cannot_take_part(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("NCCL may be able to run on this machine, which has a GPU")
    files = ("--json", str(tmp_path / "deep" / "f.json"), "--png", str(tmp_path / "f.png"))
    sizes = ("--min", "4", "--max", "64KiB", "--factor", "128", "--seconds", "0.02")
    done = run_bench("--backend", "gloo,nccl", *sizes, *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nccl does not take part" in done.stdout and "64 KiB" in done.stdout
    data = json.loads((tmp_path / "deep" / "f.json").read_text())
    assert [row["bytes"] for row in data["results"]] == [4, 512, 65536]
    assert all(row["correct"] and row["iterations"] >= 5 for row in data["results"])
    assert data["absent"].keys() == {"nccl"}
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_no_contender_at_all_is_a_failure() -> None:
    if torch.cuda.is_available():
        pytest.skip("NCCL may be able to run on this machine, which has a GPU")
    done = run_bench("--backend", "nccl", "--max", "4", "--seconds", "0.02")
    assert done.returncode == 1 and "nccl does not take part" in done.stdout


@pytest.fixture(name="_native", scope="module")
def fixture_native() -> None:
    pytest.importorskip("reducer._torch", reason="the native module is not built")
    try:
        server_binary()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("_native")
def test_tune_ends_with_why_a_rank_was_lost(tmp_path: Path) -> None:
    from reducer import tune

    class Dying(FakeTeam):
        def call(self, command: dict[str, Any], timeout_s: float) -> list[dict[str, Any]]:
            if command["do"] == "measure":
                raise ChildError("rank 1 ended")
            return [{"place": "here"}] * self.world_size

    ways = [("direct", 0, 0), ("direct", 65536, 0)]
    with pytest.raises(ChildError, match="rank 1 ended"):
        tune._tune(Console(), Dying(), "", ways, (4, 1024), Budget(0.01), 1.0, tmp_path / "table.json")


@pytest.mark.usefixtures("_native")
def test_every_algorithm_beside_gloo(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    algorithms = ("--algorithm", "auto,direct,server,mixed,ring", "--ranks", "3", "--reducers", "2")
    sizes = ("--min", "4", "--max", "256KiB", "--factor", "65536", "--seconds", "0.02")
    done = run_bench(*algorithms, *sizes, "--dtype", "bfloat16", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(path.read_text())
    assert data["absent"] == {} and len(data["results"]) == 2 * 6 and "2 standalone reducers" in data["title"]
    assert all(row["correct"] and row["speed_over_gloo"] > 0 for row in data["results"])


@pytest.mark.usefixtures("_native")
def test_memory_keeps_to_the_windows_and_little_more(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    done = run_bench(
        *(
            "--memory",
            "--memory-size",
            "128MiB",
            "--backend",
            "reducer",
            "--algorithm",
            "direct,server",
        ),
        *("--reducers", "1", "--json", str(path)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    direct, server = json.loads(path.read_text())["results"]
    for finding in (direct, server):
        assert finding["wrong_elements"] == 0 and finding["error"] is None
        # The bound counts payload; what threads, sockets and the allocator add must stay small.
        assert finding["worker_extra_bytes"] < finding["worker_bound_bytes"] + MEMORY_SLACK_BYTES
        assert finding["counters"]["outstanding_bytes_max"] <= finding["counters"]["window_bytes"]
    assert server["reducer_extra_bytes"][0] < server["reducer_bound_bytes"] + MEMORY_SLACK_BYTES


def test_it_joins_a_torchrun_job() -> None:
    # Without the two dashes torchrun would take --max for its own --max-restarts.
    job = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "reducer")
    sizes = ("--max", "4KiB", "--factor", "64", "--seconds", "0.02")
    done = run_bench("--backend", "gloo", *sizes, module=job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("2 ranks, 0 standalone reducers, under torchrun") == 1
    assert "yes" in done.stdout
    assert "wrong" not in done.stdout


@pytest.mark.usefixtures("_native")
def test_each_contender_for_memory_has_a_team_of_its_own_in_a_torchrun_job() -> None:
    job = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "reducer")
    backends = ("--backend", "gloo,reducer", "--algorithm", "direct")
    done = run_bench("--memory", "--memory-size", "4MiB", *backends, module=job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("yes") == 2 and "failed" not in done.stdout


def test_programs_beside_the_backends(tmp_path: Path) -> None:
    """OpenMPI where it is installed; where it is not, one line says so."""
    path = tmp_path / "figures.json"
    sizes = ("--min", "4", "--max", "64KiB", "--factor", "16384", "--seconds", "0.02")
    backends = "reducer,core,openmpi"
    done = run_bench("--backend", backends, "--algorithm", "local,direct", *sizes, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["results"]
    expected = ["reducer local", "reducer direct", "core"]
    if shutil.which("mpicc") and shutil.which("mpirun"):
        expected.append("openmpi")
    else:
        assert "openmpi does not take part: no mpicc" in done.stdout
    assert [row["contender"] for row in rows] == expected * 2
    assert all(row["correct"] for row in rows)


def test_without_a_folder_for_its_program_openmpi_does_not_take_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    contender = Contender("openmpi", "openmpi", programs.openmpi(2, "auto"))
    contender.open(1.0)
    assert contender.failed is not None and contender.failed.startswith("no folder for its compiled program")


def test_programs_measure_times_of_one_machine_only() -> None:
    done = run_bench("--backend", "core", "--memory")
    assert done.returncode == 2
    assert "--backend core starts its ranks on this machine, and only takes times" in done.stdout
