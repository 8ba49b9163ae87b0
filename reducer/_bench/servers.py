"""Standalone reducers, started for a benchmark and stopped after it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from reducer._bench.processes import Child

_READY = re.compile(r"reducer ready on (\S+)")
_START_S = 30.0


def server_binary() -> Path:
    """Where `reducer-server` is. FileNotFoundError says how to build it."""
    binary = Path(__file__).resolve().parents[1] / "bin" / "reducer-server"
    if not os.access(binary, os.X_OK):
        raise FileNotFoundError(f"the standalone reducer is not built: {binary} does not exist; run `make setup`")
    return binary


class Server:
    """One running reducer. Not thread safe."""

    def __init__(
        self,
        name: str,
        listen: str = "127.0.0.1:0",
        *,
        prefix: Sequence[str] = (),
        threads: int = 1,
        memory_limit: str = "1GiB",
    ) -> None:
        command = [
            *prefix,
            str(server_binary()),
            *("--listen", listen),
            *("--threads", str(threads)),
            *("--memory-limit", memory_limit),
        ]
        self.child = Child(name, command, capture_stdout=True)
        try:
            self.address = self._wait_until_ready()
        except BaseException:
            self.child.stop()
            raise

    def _wait_until_ready(self) -> str:
        line = self.child.read_line(time.monotonic() + _START_S)
        match = _READY.match(line)
        if match is None:
            raise self.child.fail(f"said {line!r} instead of where it is ready")
        return match[1]


def start_servers(count: int) -> list[Server]:
    """`count` reducers on this machine's loopback; all or none."""
    servers: list[Server] = []
    try:
        for number in range(count):
            servers.append(Server(f"reducer {number}"))
    except BaseException:
        stop_servers(servers)
        raise
    return servers


def stop_servers(servers: Sequence[Server]) -> None:
    for server in servers:
        server.child.stop()
