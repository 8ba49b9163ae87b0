"""growth and netlab's DDP scenario: their arithmetic on synthetic figures, and one short real run of each kind."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_netlab import BENCHMARKS, EFFICIENCY, MIB, samples

growth: Any = importlib.import_module("growth")
picture: Any = importlib.import_module("growth_picture")
ddp: Any = importlib.import_module("netlab_ddp")
ddp_worker: Any = importlib.import_module("netlab_ddp_worker")
timeline: Any = importlib.import_module("netlab_timeline")
cluster: Any = importlib.import_module("netlab_cluster")
report: Any = importlib.import_module("netlab_report")
scenarios: Any = importlib.import_module("netlab_scenarios")


def text_of(table: Any) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def processes(*seconds: tuple[int, float]) -> list[Any]:
    return [growth.Point("processes", "auto", x, MIB, each, None) for x, each in seconds]


def test_growth_by_processes_is_judged_by_the_time_of_a_byte() -> None:
    linear = processes((2, 1.0), (4, 2.0), (16, 8.0), (32, 18.0))
    assert growth.byte_cost(linear[2], linear) == pytest.approx(1.0)
    assert "worse" not in text_of(growth.make_table("processes", linear))
    collapsed = processes((4, 2.0), (16, 20.0))
    assert growth.byte_cost(collapsed[1], collapsed) == pytest.approx(2.5)
    assert "worse than linear" in text_of(growth.make_table("processes", collapsed))
    assert growth.byte_cost(linear[0], processes((2, 1.0))) is None


def test_the_model_is_bytes_over_the_bound_and_a_latency_for_each_hop() -> None:
    rows = report.make_rows(
        [samples("gloo", 1024, [0.02]), samples("direct", 1024, [0.001]), samples("gloo", MIB, [0.05])],
        scenarios.Shape(8, 0),
        EFFICIENCY,
    )
    points = growth.with_model("world", 8, rows, 8)
    ring = 2 * 7 / 8 * 8 * MIB / (EFFICIENCY * 1e9)
    assert points[2].model_s == pytest.approx(ring + 14 * 0.0005)
    assert points[1].model_s == pytest.approx(2 * 7 / 8 * 8 * 1024 / (EFFICIENCY * 1e9) + 0.001)
    assert "over model" in text_of(growth.make_table("world", points))


def test_growth_is_drawn(tmp_path: Path) -> None:
    points = [
        {"part": part, "contender": name, "x": x, "nbytes": MIB, "seconds": x / 8 + 0.1, "model_s": model}
        for part, model in (("size", 0.1), ("reducers", 0.2), ("processes", None))
        for name in ("gloo", "direct")
        for x in (0, 2, 32)
    ]
    picture.draw(points, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def record() -> Any:
    return ddp_worker.Record(
        spans=[ddp_worker.Span("forward", 0.0, 1.0), ddp_worker.Span("layer 0", 1.0, 3.0)],
        buckets=[ddp_worker.Bucket(300, 2.0, 4.0), ddp_worker.Bucket(100, 3.0, 6.0)],
        pushed=[(2.5, 200), (3.5, 310), (5.0, 400)],
        step_s=6.5,
    )


def test_overlap_is_the_part_of_the_communication_in_which_backward_is_at_work() -> None:
    assert record().overlap == pytest.approx(0.25)
    assert timeline.pushed_times(record()) == [3.5, 5.0]
    uncounted = record()
    uncounted.pushed = []
    assert timeline.pushed_times(uncounted) == [None, None]


def test_ddp_is_judged_by_steps_and_losses(tmp_path: Path) -> None:
    gloo = ddp.Run("gloo", [1.0, 1.0], [3.0, 2.0], [0.1], record())
    fast = ddp.Run("auto", [0.6, 0.6], [3.0, 2.0 * (1 + 1e-6)], [], record())
    strange = ddp.Run("other", [0.1], [3.0, 2.1])
    table, fine = ddp.make_ddp_table([gloo, fast], "a title")
    assert fine and "1.67" in text_of(table) and "25%" in text_of(table)
    assert not ddp.make_ddp_table([gloo, strange], "a title")[1]
    assert [each.met for each in ddp.verdicts([gloo, fast, strange])] == [True, False]
    timeline.draw_timelines({"gloo": record(), "auto": record()}, "a title", tmp_path / "ddp.png")
    assert (tmp_path / "ddp.png").read_bytes().startswith(b"\x89PNG")


SHORT_TRAINING = """
import sys
from pathlib import Path
from rich.console import Console
from netlab_ddp import DdpScenario, run_ddp
from netlab_scenarios import Shape
from gpt import GptConfig
scenario = DdpScenario(
    Shape(2, 1), ("gloo", "auto"), GptConfig(16, 32, 2, 3), bucket_mib=0.05, budget_s=0.1
)
print(run_ddp(scenario, Path(sys.argv[1]), Console(width=140), 1, "auto"))
"""


def test_a_short_training_on_emulated_hosts(tmp_path: Path) -> None:
    if cluster.why_not() is not None:
        pytest.skip(f"no emulated hosts here: {cluster.why_not()}")
    done = subprocess.run(
        [sys.executable, "-c", SHORT_TRAINING, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "(True, [" in done.stdout, done.stdout + done.stderr
    runs = {run["name"]: run for run in json.loads((tmp_path / "netlab-ddp.json").read_text())["runs"]}
    assert len(runs["gloo"]["losses"]) == len(runs["auto"]["losses"]) > 5 and runs["gloo"]["alone"]
    buckets, spans = runs["auto"]["record"]["buckets"], runs["auto"]["record"]["spans"]
    assert len(buckets) > 1 and all(bucket["done_s"] > bucket["ready_s"] for bucket in buckets)
    assert {span["name"] for span in spans} == {"forward", "layer 0", "layer 1", "layer 2"}
    assert (tmp_path / "netlab-ddp.png").is_file()
