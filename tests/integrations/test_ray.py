"""examples/ray_train.py: TorchConfig(backend="reducer")."""

from __future__ import annotations

import jobs


def test_two_workers() -> None:
    job = jobs.run(*jobs.script("ray_train.py"))
    jobs.check(job, "direct")


def test_through_a_standalone_reducer() -> None:
    with jobs.standalone_reducer() as server:
        job = jobs.run(*jobs.script("ray_train.py"), servers=server.address)
        jobs.check(job, "mixed")
        jobs.check_pushes(server, job)
