"""Hosts with NICs of a limited rate, out of network namespaces on one machine.

Each host is a namespace with one veth to a bridge, which is in a namespace of its own; the machine's own
network is not touched. Both ends of each veth have a token bucket (tc-tbf), so a host sends and receives
at most the rate, each way. All names carry this process' id: what a dead run left behind is recognized and
removed by the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

#: The interface's name inside each host.
INTERFACE = "eth0"

_NAME = re.compile(r"reducer-lab-(\d+)-\w+")
#: A larger bucket lets whole small messages pass unlimited; a smaller one breaks the kernel's large
#: segments and saturates the machine.
_BURST = "128kb"
_LATENCY = "100ms"


class ClusterError(RuntimeError):
    """The namespaces cannot be made here; the text says why and what to do."""


@dataclass(frozen=True)
class Host:
    """One emulated host."""

    namespace: str
    address: str

    @property
    def prefix(self) -> list[str]:
        """What to put before a command so that it runs on this host."""
        return ["ip", "netns", "exec", self.namespace]


class Cluster:
    """`count` hosts on one bridge; a context manager that removes them. Not thread safe."""

    def __init__(self, count: int, rate: str | None) -> None:
        """`rate` as `tc` writes it ("1gbit"), None for no limit."""
        check_machine()
        remove_leftovers()
        base = f"reducer-lab-{os.getpid()}"
        self._switch = f"{base}-switch"
        # 198.18.0.0/15 is set aside for benchmarks of networks (RFC 2544).
        self.hosts = [
            Host(f"{base}-host{number}", f"198.18.{number // 250}.{number % 250 + 1}")
            for number in range(count)
        ]
        try:
            self._build(rate)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes the namespaces, and with them their interfaces. Idempotent."""
        ours = {host.namespace for host in self.hosts} | {self._switch}
        for name in ours & set(_namespaces()):
            _remove(name)

    def _build(self, rate: str | None) -> None:
        _run(["ip", "netns", "add", self._switch])
        _run(["ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge"])
        _run(["ip", "-n", self._switch, "link", "set", "bridge", "up"])
        for number, host in enumerate(self.hosts):
            port = f"port{number}"
            _run(["ip", "netns", "add", host.namespace])
            peer = ["peer", "name", INTERFACE, "netns", host.namespace]
            _run(["ip", "-n", self._switch, "link", "add", port, "type", "veth", *peer])
            _run(["ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up"])
            inside = ["ip", "-n", host.namespace]
            _run([*inside, "link", "set", "lo", "up"])
            _run([*inside, "addr", "add", f"{host.address}/15", "dev", INTERFACE])
            _run([*inside, "link", "set", INTERFACE, "up"])
            if rate is not None:
                _limit(host.namespace, INTERFACE, rate)
                _limit(self._switch, port, rate)


def check_machine() -> None:
    """ClusterError unless this process may make namespaces here."""
    if os.geteuid() != 0:
        raise ClusterError("network namespaces need root: run it with sudo, or as root")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise ClusterError(f"{' and '.join(missing)} not found: install the package iproute2")


def remove_leftovers() -> list[str]:
    """Removes namespaces of runs that are no more; their names."""
    removed = []
    for name in _namespaces():
        match = _NAME.fullmatch(name)
        if match is not None and not _runs(int(match[1])):
            _remove(name)
            removed.append(name)
    return removed


def _runs(pid: int) -> bool:
    """Whether that process is there and is a Python program (ids come back in time)."""
    if pid == os.getpid():
        return True
    try:
        return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _namespaces() -> list[str]:
    listed = _run(["ip", "-json", "netns", "list"])
    return [item["name"] for item in json.loads(listed or "[]")]


def _remove(namespace: str) -> None:
    for pid in _run(["ip", "netns", "pids", namespace]).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _run(["ip", "netns", "delete", namespace])


def _limit(namespace: str, interface: str, rate: str) -> None:
    bucket = ["tbf", "rate", rate, "burst", _BURST, "latency", _LATENCY]
    _run(["tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", *bucket])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise ClusterError(
            f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}; "
            "this machine may not allow network namespaces, veth, bridges or tc-tbf"
        )
    return done.stdout
