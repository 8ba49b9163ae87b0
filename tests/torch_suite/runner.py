"""Runs tests of PyTorch's suite one by one, each in processes of its own and within its own time.

    python tests/torch_suite/runner.py BACKEND SEEN_AS WORLD_SIZE LIMIT_S [TEST ...]

One line of JSON for each test goes to the standard output as soon as it is known (see Result); report.py reads them.
This process imports torch once and forks a child for each test, which forks the ranks. What a test leaves behind when
it ends or its time is over, is ended by process id: all of its descendants, and all of its session.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import re
import selectors
import shutil
import signal
import sys
import tempfile
import time
import unittest
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import suite

_LOG_TAIL = 20_000
# A hanging process has this long to write the stacks of its threads.
_STACKS_S = 0.3
# "RuntimeError: text", "torch.distributed.DistBackendError: text"; not a frame of C++, not the words of a traceback
_ERROR_LINE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Failure|Interrupt|Exit)(?:: .*)?$", re.MULTILINE)
_WRAPPING = "exited with error code"


@dataclass(frozen=True)
class Result:
    """What became of a test."""

    name: str
    outcome: str  # passed, failed, skipped, hung (its time was over), crashed (its process died)
    seconds: float = 0.0
    line: str = ""  # why, in one line
    detail: str = ""  # all that is known, unless it passed or was skipped


def first_error_line(text: str) -> str:
    """The line of a failure's text that says most: the first rank's own error, not the suite's wrapping of it."""
    lines = [line for line in _ERROR_LINE.findall(text) if _WRAPPING not in line]
    # The text of a rank ends with what it raised; the exceptions before it are what that one came from.
    first_rank = re.split(r"\nProcess \d+ " + _WRAPPING, text, maxsplit=2)
    if len(first_rank) > 2:
        lines = [line for line in _ERROR_LINE.findall(first_rank[1]) if _WRAPPING not in line] or lines
    if lines:
        return str(lines[-1])
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no text")


def run_test(case: Any, name: str, limit_s: float) -> Result:
    """One test, in a child with a session of its own."""
    reason = suite.skipped_at_once(case, name)
    if reason:
        return Result(name, "skipped", line=reason)
    folder = Path(tempfile.mkdtemp(prefix="torch-suite-"))
    start = time.monotonic()
    try:
        (folder / "barrier").mkdir()
        # Here already: in a child that has not come that far, the signal would be the end of it.
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
        answer, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(answer)
            _life_of_child(case, name, folder, tell)
        os.close(tell)
        try:
            told = _read_until(answer, start + limit_s)
            if told is None:
                _ask_for_stacks(child)
        finally:
            os.close(answer)
            _end(child)
        seconds = round(time.monotonic() - start, 1)
        if told:
            outcome, text = json.loads(told)
            line = text if outcome == "skipped" else first_error_line(text) if text else ""
            detail = text + _tail(folder) if outcome == "failed" else ""
            return Result(name, outcome, seconds, line, detail)
        if told is None:
            return Result(name, "hung", seconds, f"did not end within {limit_s:g} s", _tail(folder))
        return Result(name, "crashed", seconds, "the process that runs the test died", _tail(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _life_of_child(case: Any, name: str, folder: Path, tell: int) -> None:
    """Runs the test, tells its outcome; never returns."""
    os.setsid()
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["TEMP_DIR"] = str(folder)
    # Files that tests leave behind go with the folder.
    tempfile.tempdir = str(folder)
    result = unittest.TestResult()
    case(name).run(result)
    wrong = [text for _, text in result.errors + result.failures]
    if wrong:
        answer = ("failed", "\n".join(wrong))
    elif result.skipped:
        answer = ("skipped", result.skipped[0][1])
    else:
        answer = ("passed", "")
    with os.fdopen(tell, "w") as pipe:
        pipe.write(json.dumps(answer))
    os._exit(0)


def _read_until(pipe: int, deadline: float) -> bytes | None:
    """What comes through the pipe until it is closed; None if the deadline passes first."""
    told = io.BytesIO()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            piece = os.read(pipe, 65536)
            if not piece:
                return told.getvalue()
            told.write(piece)
            with contextlib.suppress(ValueError):
                # Ranks that outlive the test hold the pipe's other end.
                json.loads(told.getvalue())
                return told.getvalue()
    return None


def _family(child: int) -> list[int]:
    """The child, its descendants, and its session's other members."""
    parents: dict[int, int] = {}
    found = {child}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # After the name, which may have any character: state, parent, process group, session.
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents[int(entry.name)] = int(fields[1])
        if int(fields[3]) == child:
            found.add(int(entry.name))
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _ask_for_stacks(child: int) -> None:
    """One process after the other: they write piece by piece into the same log."""
    for pid in _family(child):
        _signal([pid], signal.SIGUSR1)
        time.sleep(_STACKS_S)


def _end(child: int) -> None:
    """Ends the whole family: while it shrinks, it may still fork."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        family = _family(child)
        _signal(family, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, os.WNOHANG)
        if family == [child] and not Path(f"/proc/{child}").exists():
            return
        time.sleep(0.01)


def _tail(folder: Path) -> str:
    log = folder / "log"
    return "\n--- log\n" + log.read_text(errors="replace")[-_LOG_TAIL:] if log.exists() else ""


def main(backend: str, seen_as: str, world_size: str, limit_s: str, *names: str) -> None:
    case = suite.load(backend, int(world_size), seen_as)
    output = os.fdopen(os.dup(1), "w", buffering=1)
    # What torch prints is not a result.
    os.dup2(2, 1)
    for name in names or suite.names_of(case):
        print(json.dumps(asdict(run_test(case, name, float(limit_s)))), file=output)


if __name__ == "__main__":
    main(*sys.argv[1:])
