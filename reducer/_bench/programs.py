"""Contenders that are programs of their own: an MPI, and the core's C++ interface without Python.

Both time themselves as `rank.py` does, and print how many results were wrong, then the ns of each
iteration's slowest rank.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from reducer._bench.machine import cpu_seconds
from reducer._bench.team import Message, TeamError

_SOURCE = Path(__file__).with_name("mpi_allreduce.c")
_CORE = Path(__file__).resolve().parents[1] / "bin" / "core-benchmark"
_MEASURES = ("all_reduce", "float32", "sum")

#: The command line for so many bytes and iterations.
CommandLine = Callable[[int, int], Sequence[str]]


class ProgramTeam:
    """Stands for the ranks of a program, which are started anew for each measurement.

    `prepare` gives the command line, or raises TeamError with why the program cannot run here.
    """

    def __init__(self, world_size: int, prepare: Callable[[], CommandLine]) -> None:
        self.world_size = world_size
        self._prepare = prepare
        self._command: CommandLine | None = None

    def call(self, command: Message, timeout_s: float) -> list[Message]:
        if self._command is None:
            self._command = self._prepare()
        if command["do"] != "measure":
            return [{}]
        if (command["collective"], command["dtype"], command["op"]) != _MEASURES:
            raise TeamError(f"{command['group']} only does {', '.join(_MEASURES)}")
        line = self._command(command["nbytes"], command["iterations"])
        busy, total = cpu_seconds()
        lines = _run(line, timeout_s).split()
        busy_after, total_after = cpu_seconds()
        wrong = int(lines[0])
        return [
            {
                "times_ns": [int(ns) for ns in lines[1:]],
                "wrong": wrong,
                "difference": "its results differ from the exact sum" if wrong else None,
                "nbytes": max(4, command["nbytes"] // 4 * 4),
                "cpu_busy_s": busy_after - busy,
                "cpu_total_s": total_after - total,
            }
        ]

    def close(self) -> None:
        return


def openmpi(world_size: int, _transport: str) -> ProgramTeam:
    """OpenMPI's all-reduce, built when first asked for. It chooses its own ways."""

    def prepare() -> CommandLine:
        program = str(_build())
        start = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(world_size), program]
        return lambda nbytes, iterations: [*start, str(nbytes), str(iterations)]

    return ProgramTeam(world_size, prepare)


def core(world_size: int, transport: str) -> ProgramTeam:
    """This library's C++ interface, of which the backend is a user."""

    def prepare() -> CommandLine:
        if not _CORE.exists():
            raise TeamError(f"{_CORE} is not there: build with setup.py")
        start = [str(_CORE), str(world_size), transport]
        return lambda nbytes, iterations: [*start, str(nbytes), str(iterations)]

    return ProgramTeam(world_size, prepare)


BY_NAME: dict[str, Callable[[int, str], ProgramTeam]] = {"core": core, "openmpi": openmpi}


def _build() -> Path:
    """The compiled program, of this version of its source, in the user's own folder for such things."""
    if shutil.which("mpicc") is None or shutil.which("mpirun") is None:
        raise TeamError("no mpicc and mpirun here (on Debian: apt-get install libopenmpi-dev openmpi-bin)")
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reducer"
        cache.mkdir(parents=True, exist_ok=True)
        program = cache / f"mpi_allreduce-{hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]}"
        if not program.exists():
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                made = Path(folder) / "program"
                _run(["mpicc", "-O3", "-march=native", str(_SOURCE), "-o", str(made)], 120.0)
                made.replace(program)
    except TeamError:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise TeamError(f"no folder for its compiled program: {error}") from None
    return program


def _run(command: Sequence[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=True, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise TeamError(f"{command[0]} did not end within {timeout_s:g} s") from None
    except (subprocess.CalledProcessError, OSError) as error:
        output = getattr(error, "stderr", "") or ""
        raise TeamError(f"{command[0]}: {error}; {output.strip()[-500:]}") from None
    return done.stdout
