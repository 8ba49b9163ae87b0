"""Emulated hosts: a network namespace each, a veth each to one bridge, a rate limit on both ends.

The bridge lives in a namespace of its own, so nothing of the machine's own network is touched.
Names carry the owner's process id: what a dead run left behind is known by it, and removed.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from reducer._bench.units import parse_rate

PREFIX = "rnetlab"
INTERFACE = "eth0"
_NETNS_DIRECTORY = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_COMMAND_SECONDS_MAX = 30
# A larger burst lets small messages pass unlimited, a smaller one breaks up the kernel's large
# segments. NICs faster than 1 Gbit/s get as many microseconds of it.
_LIMIT = "tbf rate {rate} burst {burst} latency 100ms"
_BURST_BYTES = 128 << 10
_BURST_RATE = 1e9

_libc = ctypes.CDLL(None, use_errno=True)
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class NetlabError(Exception):
    """Why the emulated cluster cannot be made or used, in a sentence for the terminal."""


def die_with_parent() -> None:
    """Has the kernel kill this process when the one that started it ends, however it ends."""
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def enter_namespace(name: str) -> None:
    """Moves the calling thread into the network namespace `name`. OSError if it cannot."""
    with (_NETNS_DIRECTORY / name).open("rb") as handle:
        if _libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"cannot enter network namespace {name}: {os.strerror(code)}")


@contextmanager
def signals_held() -> Iterator[None]:
    """Holds back what ends this process while it forks.

    Python drops an exception, a signal's too, that is raised in its handlers around a fork.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def become_child(namespace: str) -> None:
    """Makes a forked child live in `namespace`, die with its parent, and take SIGTERM at once."""
    die_with_parent()
    enter_namespace(namespace)
    # Ctrl-C reaches the whole terminal; the parent ends its children itself, in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)


def _command(arguments: list[str], text: str | None = None) -> str:
    try:
        done = subprocess.run(
            arguments,
            input=text,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise NetlabError(f"`{' '.join(arguments)}` took over {error.timeout} s") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise NetlabError(f"`{' '.join(arguments)}` failed: {said}")
    return done.stdout


def why_not() -> str | None:
    """Why an emulated cluster cannot be made here, or None if nothing is known against it."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root: run it as root, for example by `sudo make netlab`"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"`{tool}` is missing: install iproute2 (`apt-get install iproute2`)"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    try:
        _command(["ip", "netns", "add", probe])
    except NetlabError as error:
        return f"this machine does not let root make network namespaces: {error}"
    _command(["ip", "netns", "del", probe])
    return None


def namespaces() -> list[str]:
    """The names of this machine's named network namespaces that any netlab run made."""
    if not _NETNS_DIRECTORY.is_dir():
        return []
    pattern = re.compile(rf"^{PREFIX}-\d+-\w+$")
    return sorted(path.name for path in _NETNS_DIRECTORY.iterdir() if pattern.match(path.name))


def _is_live_run(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    # A process id is used again one day: only a Python process can be a netlab run.
    return any(b"python" in word or b"pytest" in word or b"netlab" in word for word in words[:2])


def remove_leftovers() -> list[str]:
    """Removes namespaces and files of netlab runs that no longer live, and returns their names."""
    removed = []
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}-*"):
        owner = directory.name.removeprefix(f"{PREFIX}-")
        if owner.isdigit() and (int(owner) == os.getpid() or not _is_live_run(int(owner))):
            shutil.rmtree(directory, ignore_errors=True)
            removed.append(str(directory))
    for name in namespaces():
        pid = int(name.split("-")[1])
        if pid != os.getpid() and not _is_live_run(pid):
            _command(["ip", "netns", "del", name])
            removed.append(name)
    return removed


class Cluster:
    """Hosts on one switch. A context manager: leaving it removes every namespace that it made."""

    def __init__(
        self, labels: list[str], rate: str | Mapping[str, str] | None, congestion_control: str | None = None
    ) -> None:
        """Hosts named by `labels` (letters, digits); `rate` as `tc` writes it, of all or by label, None: unlimited;
        `congestion_control` of the hosts' TCP, None: this machine's.
        """
        self._owner = os.getpid()
        self._rates = dict.fromkeys(labels, rate) if isinstance(rate, str) else rate
        self._congestion_control = congestion_control
        self.labels = labels
        self._made: list[str] = []
        self.directory = Path(tempfile.gettempdir()) / f"{PREFIX}-{self._owner}"

    def namespace(self, label: str) -> str:
        """The network namespace of the host `label`."""
        return f"{PREFIX}-{self._owner}-{label}"

    def address(self, label: str) -> str:
        """The IPv4 address of the host `label` on the emulated network."""
        index = self.labels.index(label) + 1
        return f"10.77.{index // 250}.{index % 250 + 1}"

    def __enter__(self) -> Cluster:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, name: str) -> None:
        _command(["ip", "netns", "add", name])
        self._made.append(name)

    def _build(self) -> None:
        self.directory.mkdir(mode=0o700)
        switch = self.namespace("switch")
        for name in [switch, *map(self.namespace, self.labels)]:
            self._add(name)
        lines = ["link set lo up", "link add br0 type bridge", "link set br0 up"]
        for index, label in enumerate(self.labels):
            port = f"port{index}"
            host = self.namespace(label)
            lines.append(f"link add {port} type veth peer name {INTERFACE} netns {host}")
            lines.append(f"link set {port} master br0")
            lines.append(f"link set {port} up")
        _command(["ip", "-n", switch, "-batch", "-"], "\n".join(lines) + "\n")
        for label in self.labels:
            lines = [
                "link set lo up",
                f"addr add {self.address(label)}/16 dev {INTERFACE}",
                f"link set {INTERFACE} up",
            ]
            _command(
                ["ip", "-n", self.namespace(label), "-batch", "-"],
                "\n".join(lines) + "\n",
            )
        if self._congestion_control is not None:
            write = [
                "sh",
                "-c",
                'echo "$1" > /proc/sys/net/ipv4/tcp_congestion_control',
                "sh",
                self._congestion_control,
            ]
            for label in self.labels:
                _command(["ip", "netns", "exec", self.namespace(label), *write])
        # A switch has no packet filter: where the kernel would ask it for every frame, it need not.
        setting = "/proc/sys/net/bridge/bridge-nf-call-iptables"
        unfiltered = f"if [ -w {setting} ]; then echo 0 > {setting}; fi"
        _command(["ip", "netns", "exec", switch, "sh", "-c", unfiltered])
        if self._rates is not None:
            self._limit(self._rates)

    def _limit(self, rates: Mapping[str, str]) -> None:
        disciplines = [_discipline(rates[label]) for label in self.labels]
        ports = [f"qdisc add dev port{i} root {discipline}" for i, discipline in enumerate(disciplines)]
        switch = self.namespace("switch")
        _command(["tc", "-n", switch, "-batch", "-"], "\n".join(ports) + "\n")
        for label, discipline in zip(self.labels, disciplines, strict=True):
            host = f"qdisc add dev {INTERFACE} root {discipline}\n"
            _command(["tc", "-n", self.namespace(label), "-batch", "-"], host)

    def close(self) -> None:
        """Removes what this process made; a forked child that gets here removes nothing."""
        if os.getpid() != self._owner:
            return
        while self._made:
            name = self._made.pop()
            if (_NETNS_DIRECTORY / name).exists():
                _command(["ip", "netns", "del", name])
        shutil.rmtree(self.directory, ignore_errors=True)


def _discipline(rate: str) -> str:
    burst = _BURST_BYTES * max(1.0, parse_rate(rate) / _BURST_RATE)
    return _LIMIT.format(rate=rate, burst=round(burst))
