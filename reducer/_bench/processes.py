"""Child processes that end with their parent, and whose words are kept for error messages."""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

#: Lines of a dead process' output that an error message quotes.
_QUOTED_LINES = 15


class ChildError(RuntimeError):
    """A child process died or did not answer in time; the text says which, and quotes it."""


class Child:
    """One process, with stdout and stderr kept in a temporary file unless stdout is asked for.

    Not thread safe. `stop()` is idempotent and always ends the process.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        inherit: Sequence[int] = (),
        capture_stdout: bool = False,
    ) -> None:
        self.name = name
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        stdout = subprocess.PIPE if capture_stdout else self._log
        try:
            self.process = subprocess.Popen(
                [*_die_with_parent(), *command],
                env=dict(os.environ, **(environment or {})),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=self._log,
                pass_fds=tuple(inherit),
            )
        except OSError:
            self._log.close()
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    def fail(self, what: str) -> ChildError:
        """The error for `what`, with how the process ended and the last lines that it wrote."""
        try:
            code: int | None = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            code = None
        if code is None:
            how = "it is still running"
        elif code < 0:
            how = f"it was ended by {signal.Signals(-code).name}"
        else:
            how = f"it ended with exit code {code}"
        words = self.output()
        said = f"; its last words:\n{words}" if words else "; it wrote nothing"
        return ChildError(f"{self.name} {what}: {how}{said}")

    def output(self, lines: int = _QUOTED_LINES) -> str:
        """The last lines written to stderr (and to stdout, unless captured)."""
        if self._log.closed:
            return ""
        # Not by seek() and read(): the child writes at the offset that both share.
        number = self._log.fileno()
        size = os.fstat(number).st_size
        nbytes_max = 200 * lines + 20_000
        written = os.pread(number, nbytes_max, max(0, size - nbytes_max)).decode(errors="replace").splitlines()
        return "\n".join(written[-lines:])

    def read_line(self, deadline: float) -> str:
        """The next line of the captured stdout; ChildError at its end or at the deadline."""
        stdout = self.process.stdout
        assert stdout is not None, "stdout is not captured"
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise self.fail("said nothing by its deadline")
                piece = os.read(stdout.fileno(), 1)
                if not piece:
                    raise self.fail("closed its output")
                line += piece
        return line.decode(errors="replace").strip()

    def stop(self, grace_s: float = 5.0) -> None:
        """Asks the process to end (SIGTERM), and makes it after the grace period."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=grace_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()


def stop_all(children: Sequence[Child]) -> None:
    """Ends all of them, at the same time."""
    for child in children:
        if child.process.poll() is None:
            child.process.terminate()
    for child in children:
        child.stop()


def python_path() -> str:
    """PYTHONPATH under which a child finds this very package, installed or not."""
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


def _die_with_parent() -> list[str]:
    # A benchmark that is killed outright must not leave its ranks behind.
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
