"""examples/accelerate_train.py: Accelerator(cpu=True) in a group that is there; and why the group is made first."""

from __future__ import annotations

import subprocess
import sys

import jobs
import pytest

EXAMPLE = jobs.under_torchrun("accelerate_train.py", workers=2)


def test_two_workers() -> None:
    job = jobs.run(*EXAMPLE)
    jobs.check(job, "direct")


def test_through_a_standalone_reducer() -> None:
    with jobs.standalone_reducer() as server:
        job = jobs.run(*EXAMPLE, servers=server.address)
        jobs.check(job, "mixed")
        jobs.check_pushes(server, job)


# One rank is enough: what is tested is decided before ranks meet.
_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
_ALONE |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # 0: any that is free


_BY_NAME = "Accelerator(cpu={cpu}, kwargs_handlers=[InitProcessGroupKwargs(backend='reducer')])"


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ("(dist.init_process_group('reducer'), Accelerator(cpu=True))[1]", "reducer, DistributedDataParallel"),
        # If one of these fails with another version, then the example and the docs have to change.
        (_BY_NAME.format(cpu=True), "Your assigned backend reducer is not available, please use gloo"),
        (_BY_NAME.format(cpu=False), "reducer, Linear"),
    ],
    ids=["group-first", "by-name", "by-name-without-cpu"],
)
def test_what_accelerate_wraps_a_model_into(made: str, expected: str) -> None:
    program = f"""
import torch, torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
accelerator = {made}
print(dist.get_backend(), type(accelerator.prepare(torch.nn.Linear(2, 2))).__name__, sep=", ")
dist.destroy_process_group()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=jobs.environment() | _ALONE,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=jobs.RUN_S_MAX,
        check=False,
    )
    assert expected in done.stdout + done.stderr
