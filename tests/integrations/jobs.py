"""Runs an example of a framework as a user does, and reads what its ranks say at the end."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from servers import Server, serving

from reducer.serve import query_stats

ROOT = Path(__file__).resolve().parents[2]
# Two workers that train for a second or two. The rest is imports and, with Ray, a cluster's start: 28 s on 2 cores.
RUN_S_MAX = 150.0
_END_S = 10.0

# The line that examples/training_job.py makes.
_LINE = re.compile(
    r"^rank (?P<rank>\d+) of (?P<world>\d+): backend (?P<backend>\w+) \((?P<algorithm>\w+)\), (?P<steps>\d+) steps, "
    r"loss (?P<first>[\d.]+) -> (?P<last>[\d.]+), (?P<operations>\d+) operations, (?P<pushed>\d+) bytes pushed, "
    r"weights (?P<weights>[0-9a-f]{64})$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Rank:
    """What one rank says of itself."""

    backend: str
    algorithm: str
    steps: int
    first_loss: float
    last_loss: float
    operations: int
    pushed_bytes: int
    weights: str


@dataclass(frozen=True)
class Job:
    """A training run that came to its end; the ranks by rank."""

    ranks: list[Rank]
    output: str


def environment() -> dict[str, str]:
    """The variables of a job: this process', without those that would say how to run it."""
    ours = ("REDUCER_", "RAY_", "ACCELERATE_", "PL_", "MASTER_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    # On the CPU, with one thread for each worker, and nothing leaves the machine.
    chosen = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return inherited | chosen | {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}


def run(*command: str, servers: str = "") -> Job:
    """Runs `command` in the repository, to its end. AssertionError, with its output, if it fails or has no end."""
    with _scratch() as folder:
        # Ray and Lightning write below these. The path of Ray's sockets has to be short.
        variables = environment() | {"HOME": folder, "RAY_TMPDIR": folder, "TMPDIR": folder}
        if servers:
            variables["REDUCER_SERVERS"] = servers
        # In a session of its own, so that the processes that the frameworks start end with it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=RUN_S_MAX)
        except subprocess.TimeoutExpired:
            process.terminate()  # launchers and Ray then end what they started
            try:
                output, _ = process.communicate(timeout=_END_S)
            except subprocess.TimeoutExpired:
                _kill(process)
                output, _ = process.communicate(timeout=_END_S)
            raise AssertionError(f"no end within {RUN_S_MAX} s; it printed:\n{output}") from None
        finally:
            _kill(process)
    assert process.returncode == 0, f"exit status {process.returncode}; it printed:\n{output}"
    return Job(_ranks(output), output)


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="job-", dir="/tmp")
    try:
        yield folder
    finally:
        # Ray's processes may still be writing their last lines.
        shutil.rmtree(folder, ignore_errors=True)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _ranks(output: str) -> list[Rank]:
    found = {int(line["rank"]): line for line in _LINE.finditer(output)}
    worlds = {int(line["world"]) for line in found.values()}
    assert worlds == {len(found)} and sorted(found) == list(range(len(found))), f"ranks are missing in:\n{output}"
    return [
        Rank(
            backend=line["backend"],
            algorithm=line["algorithm"],
            steps=int(line["steps"]),
            first_loss=float(line["first"]),
            last_loss=float(line["last"]),
            operations=int(line["operations"]),
            pushed_bytes=int(line["pushed"]),
            weights=line["weights"],
        )
        for _, line in sorted(found.items())
    ]


def script(name: str) -> list[str]:
    """The command that runs an example that starts its workers itself."""
    return [sys.executable, str(ROOT / "examples" / name)]


def under_torchrun(name: str, workers: int) -> list[str]:
    """The command that runs an example once for each worker, with the port that is free."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    return [*launcher, str(ROOT / "examples" / name)]


def standalone_reducer() -> contextlib.AbstractContextManager[Server]:
    """`reducer serve` on a free port."""
    return serving(command=[sys.executable, "-m", "reducer", "serve"])


def check(job: Job, algorithm: str) -> None:
    """That two workers trained together, over this backend."""
    assert len(job.ranks) == 2, job.output
    for rank in job.ranks:
        assert rank.backend == "reducer" and rank.algorithm == algorithm
        assert rank.operations >= rank.steps > 10
        # A gradient of four bytes at each step for each weight, of which there are more than a hundred thousand.
        assert rank.pushed_bytes > rank.steps * 4 * 100_000
        assert rank.last_loss < 0.75 * rank.first_loss
    # Each has half of the data, and with it losses of its own; but the same weights.
    first, second = job.ranks
    assert (first.first_loss, first.last_loss) != (second.first_loss, second.last_loss)
    assert first.weights == second.weights


def check_pushes(server: Server, job: Job) -> None:
    """That the standalone reducer summed its share: half, beside two workers (docs/algorithms.md)."""
    stats = query_stats(server.address)
    pushed = sum(rank.pushed_bytes for rank in job.ranks)
    assert 0.4 * pushed < stats["pushed_bytes"] < 0.6 * pushed
    assert stats["slots_done"] > 0 and stats["slots_failed"] == 0
