"""A part of PyTorch's own distributed suite on reducer (`make torch-suite` runs all of it), and the runner's duties."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SUITE = Path(__file__).resolve().parents[1] / "torch_suite"

# One of each kind: what takes seconds upstream, or says again what another says, is left to `make torch-suite`.
REPRESENTATIVE = (
    "test_Backend_enum_class",
    "test_DistributedDataParallelCPU_grad_is_view",
    "test_accumulate_gradients_no_sync_allreduce_with_then_hook",
    "test_all_gather_coalesced_with_empty",
    "test_all_gather_complex",
    "test_all_gather_object_subgroup",
    "test_all_reduce_coalesced_full_group_sum",
    "test_all_reduce_coalesced_max_complex_unsupported",
    "test_all_reduce_complex_unsupported_ops",
    "test_all_reduce_product",
    "test_all_reduce_sum_async",
    "test_barrier_timeout_full_group",
    "test_batch_isend_irecv_gloo_tags",
    "test_broadcast",
    "test_ddp_create_graph",
    "test_destroy_group",
    "test_gather_checks",
    "test_get_future",
    "test_grads_same_across_ranks_with_no_sync",
    "test_isend_torch_profiler",
    "test_monitored_barrier_gloo",
    "test_reduce_sum_twice",
    "test_scatter_object_list",
    "test_send_recv_any_source_autograd_profiler",
    "test_send_recv_with_tag",
    "test_sparse_all_reduce_sum",
    "test_static_graph_api_cpu",
)


def run_suite(seen_as: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
    command = [sys.executable, str(SUITE / "runner.py"), "reducer", seen_as, "3", "40", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_all_pass(names: tuple[str, ...], results: list[dict[str, Any]]) -> None:
    assert [result["name"] for result in results] == list(names)
    wrong = [
        f"{result['name']} {result['outcome']}: {result['line']}\n{result['detail']}"
        for result in results
        if result["outcome"] != "passed"
    ]
    assert not wrong, "\n".join(wrong)


def test_a_part_of_pytorchs_suite_passes() -> None:
    assert_all_pass(REPRESENTATIVE, run_suite("gloo", REPRESENTATIVE))


def test_the_suites_all_to_all_passes_in_both_forms() -> None:
    names = ("test_all_to_all", "test_all_to_all_complex", "test_all_to_all_single_unequal_split")
    assert_all_pass(names, run_suite("mpi", names))


# A TestCase in place of the suite's, whose tests end in each of the ways that there are.
_CASE = """
import dataclasses, json, multiprocessing, os, signal, sys, time, unittest
sys.path.insert(0, sys.argv[1])
import runner

class Case(unittest.TestCase):
    def test_passes(self): pass
    def test_fails(self): self.fail("for a reason")
    def test_skips(self): self.skipTest("no wish")
    def test_dies(self): os.kill(os.getpid(), signal.SIGKILL)
    def test_hangs_with_ranks(self):
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        process.start()
        print("rank", process.pid, flush=True)
        process.join()
    def test_leaves_a_rank_behind(self):
        if os.fork() == 0:
            time.sleep(600)

print(json.dumps([dataclasses.asdict(runner.run_test(Case, name, 3.0)) for name in sys.argv[2:]]))
"""


def test_the_runner_tells_every_end_apart_and_leaves_no_process() -> None:
    expected = {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_skips": "skipped",
        "test_dies": "crashed",
        "test_hangs_with_ranks": "hung",
        "test_leaves_a_rank_behind": "passed",
    }
    # The processes of the runner are told from others by a word in their environment.
    word = f"TORCH_SUITE_TEST={os.getpid()}-{time.monotonic_ns()}"
    name, value = word.split("=")
    done = subprocess.run(
        [sys.executable, "-c", _CASE, str(SUITE), *expected],
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = {result["name"]: result for result in json.loads(done.stdout)}
    assert {test: result["outcome"] for test, result in results.items()} == expected
    assert results["test_fails"]["line"] == "AssertionError: for a reason"
    assert results["test_skips"]["line"] == "no wish"
    # Where it hung is part of what is reported.
    detail = results["test_hangs_with_ranks"]["detail"]
    assert "in test_hangs_with_ranks" in detail, detail
    assert processes_with(word) == []


def processes_with(word: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if word.encode() in environment.split(b"\0") and state != "Z":
                found.append(int(entry.name))
    return found
