"""Standalone reducers as processes, for tests that speak to them from outside. Nothing here needs torch."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

WAIT_S = 30.0
READY = "reducer ready on "


def server_binary() -> Path:
    """The binary of the package in this tree; REDUCER_SERVER_BINARY names another."""
    named = os.environ.get("REDUCER_SERVER_BINARY")
    return Path(named) if named else Path(__file__).resolve().parents[2] / "reducer" / "bin" / "reducer-server"


class Server:
    """One reducer: its process and its output, both streams together. Every wait ends after WAIT_S."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.output = ""
        self.address = ""

    def read_until(self, text: str) -> str:
        """Reads output until `text` and the end of its line are in it, or there is no more; all of it so far."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + WAIT_S
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while "\n" not in self.output[self.output.find(text) :] or text not in self.output:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise AssertionError(f"no {text!r} within {WAIT_S} s; the reducer printed: {self.output}")
                read = os.read(self.process.stdout.fileno(), 65536)
                if not read:
                    break
                self.output += read.decode()
        return self.output

    def wait_ready(self) -> str:
        """The address in the line that tells of readiness."""
        line = self.read_until(READY)
        assert READY in line, f"the reducer did not start: {line}"
        self.address = line.split(READY, 1)[1].split()[0]
        return self.address

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit status; the rest of the output is in `output`."""
        self.read_until("\0")
        return self.process.wait(WAIT_S)

    def end(self) -> None:
        """Ends it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextlib.contextmanager
def started(*options: str, listen: str = "127.0.0.1:0", command: list[str] | None = None) -> Iterator[Server]:
    """A reducer that may still be starting, or fail to; gone afterwards."""
    server = Server([*(command or [str(server_binary())]), "--listen", listen, *options])
    try:
        yield server
    finally:
        server.end()


@contextlib.contextmanager
def serving(*options: str, listen: str = "127.0.0.1:0", command: list[str] | None = None) -> Iterator[Server]:
    """A reducer that is ready, on a port of its own choice if none is asked for; gone afterwards."""
    with started(*options, listen=listen, command=command) as server:
        server.wait_ready()
        yield server
