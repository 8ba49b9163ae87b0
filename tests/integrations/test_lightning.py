"""examples/lightning_train.py: DDPStrategy(process_group_backend="reducer")."""

from __future__ import annotations

import jobs


def test_two_workers() -> None:
    job = jobs.run(*jobs.script("lightning_train.py"))
    jobs.check(job, "direct")
    assert "distributed_backend=reducer" in job.output  # Lightning's own word


def test_through_a_standalone_reducer() -> None:
    with jobs.standalone_reducer() as server:
        job = jobs.run(*jobs.script("lightning_train.py"), servers=server.address)
        jobs.check(job, "mixed")
        jobs.check_pushes(server, job)
