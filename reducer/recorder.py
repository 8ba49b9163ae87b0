"""The flight recorder: the last calls of a process, as it keeps them in memory and writes them to files.

docs/flight-recorder.md says what is in it and how it is asked for. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from reducer.errors import InvalidArgumentError, UnavailableError

FORMAT = 1

# How long a process may take to write its file. It is a thread's work of milliseconds, but hosts can be busy.
_WRITE_S_MAX = 10.0
_LOOK_AGAIN_S = 0.02

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of one rank. Times are seconds since 1970 by the clock of its host; None: it did not come to that."""

    number: int  # of all calls of this process that were recorded
    group: int  # the `id` of its Group
    kind: str  # "collective", "second step" (of a collective: its seq is that one's), "send/recv"
    seq: int | None = None  # of its kind in its group; of send/recv of its (from, to, tag)
    source: int | None = None  # of send/recv; None: a receive that does not know its sender yet
    to: int | None = None
    tag: int | None = None
    collective: str
    op: str | None = None
    dtype: str
    count: int  # elements, as the ranks compare them
    bytes: int
    root: int | None = None
    algorithm: str
    two_levels: bool
    state: str  # "queued", "started", "done", "failed", "passed on" (to the network, where it is another Call)
    code: str | None = None  # of a failed one
    queued: float
    started: float | None = None
    answered: float | None = None  # the first answer; over the network only
    ended: float | None = None
    error: str | None = None
    late: str | None = None  # who was missing after a third of the timeout
    waits_for: tuple[str, ...] = ()  # owners, or in shared memory ranks

    @property
    def text(self) -> str:
        """ "all_reduce(sum, float32, 1000 elements)", as in errors."""
        if self.collective == "barrier":
            return "barrier()"
        parts = [self.op] if self.op else []
        parts += [self.dtype, f"{self.count} element{'' if self.count == 1 else 's'}"]
        if self.root is not None:
            parts.append(f"root {self.root}")
        return f"{self.collective}({', '.join(parts)})"

    @property
    def under_way(self) -> bool:
        return self.state in ("queued", "started")


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group that this process is or was in."""

    id: int
    job: str  # equal on all ranks of this instance of the group, and of no other
    name: str
    rank: int
    world_size: int
    hosts: tuple[str, ...]  # "hostname:pid" by rank
    open: bool
    called: int | None = None  # collectives that this rank has called; None: the group has ended


@dataclass(frozen=True, kw_only=True)
class Dump:
    """What one process had recorded."""

    format: int
    reason: str
    time: float
    host: str
    pid: int
    job: str  # of the folder
    rank: int
    entries: int  # that it keeps
    recorded: int  # calls so far
    groups: tuple[Group, ...]
    calls: tuple[Call, ...]  # the oldest first


def _made(kind: type[T], entry: Mapping[str, Any], **parts: Any) -> T:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in entry.items() if name in known}, **parts)


def _call(entry: dict[str, Any]) -> Call:
    waits_for = tuple(entry.pop("waits_for"))
    return _made(Call, entry, source=entry.get("from"), waits_for=waits_for)


def _group(entry: dict[str, Any]) -> Group:
    return _made(Group, entry, hosts=tuple(entry.pop("hosts")))


def parse(text: str, source: str) -> Dump:
    """Raises InvalidArgumentError that names the source."""
    try:
        entry = json.loads(text)
        if entry["format"] != FORMAT:
            raise InvalidArgumentError(f"{source} has format {entry['format']}; this version of reducer reads {FORMAT}")
        groups = tuple(_group(group) for group in entry.pop("groups"))
        calls = tuple(_call(call) for call in entry.pop("calls"))
        return _made(Dump, entry, groups=groups, calls=calls)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InvalidArgumentError(f"{source} is no dump of the flight recorder: {error!r}") from None


def read(path: Path) -> Dump:
    """Raises UnavailableError, InvalidArgumentError."""
    try:
        return parse(path.read_text(), str(path))
    except OSError as error:
        raise UnavailableError(f"{path}: {error.strerror}") from None


def dump() -> Dump | None:
    """The calls of this process, now. None: it has made no group yet, or records nothing (REDUCER_RECORDER_ENTRIES=0).

    Cheap enough to be called at any time, from any thread.
    """
    from reducer import _core

    text = _core.recorded("reducer.dump()")
    return parse(text, "this process") if text else None


# ---------------------------------------------------------------- files


def default_folder(environ: Mapping[str, str] | None = None) -> Path:
    environ = os.environ if environ is None else environ
    return Path(environ.get("REDUCER_RECORDER_DIR") or environ.get("TMPDIR") or "/tmp")


def find(paths: Iterable[Path]) -> list[Path]:
    """The files of dumps: `paths` themselves, or what is in these folders; of folders of jobs the newest one's."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        files = sorted(path.glob("rank*.json"))
        jobs: dict[Path, float] = {}
        for file in path.glob("reducer-*/rank*.json"):
            jobs[file.parent] = max(jobs.get(file.parent, 0.0), file.stat().st_mtime)
        if not files and jobs:
            files = sorted(max(jobs, key=lambda job: jobs[job]).glob("rank*.json"))
        found += files
    return found


# ---------------------------------------------------------------- other processes


@dataclass(frozen=True, kw_only=True)
class Process:
    """A running process of this host that has a flight recorder."""

    pid: int
    signal: int  # at which it writes; 0: none
    folder: Path  # of the jobs' folders


def process(pid: int) -> Process | None:
    """By its announcement, which csrc/recorder/dumper.h describes; None: it has none, or is another user's."""
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return None
    for descriptor in descriptors:
        try:
            if not os.readlink(descriptor).startswith("/memfd:reducer-recorder"):
                continue
            told = json.loads(descriptor.read_text())
        except (OSError, json.JSONDecodeError):
            continue
        if told["pid"] == pid:  # else it was inherited
            return Process(pid=pid, signal=told["signal"], folder=Path(told["folder"]))
    return None


def processes() -> list[Process]:
    """All of this user."""
    pids = sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [found for found in map(process, pids) if found is not None]


def _catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal: else it would be killed by it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def request(target: Process) -> Callable[[], Path]:
    """Has a process write its dump; what is returned waits for the file. Both raise UnavailableError."""
    pid, number = target.pid, target.signal
    if number == 0 or not _catches(pid, number):
        raise UnavailableError(f"process {pid} writes no dump at a signal (REDUCER_RECORDER_SIGNAL)")
    asked_at = time.time()
    try:
        os.kill(pid, number)
    except OSError as error:
        raise UnavailableError(f"process {pid} cannot be asked: {error.strerror}") from None

    def wait() -> Path:
        deadline = time.monotonic() + _WRITE_S_MAX
        while True:
            for file in target.folder.glob("reducer-*/rank*.json"):
                # A file system's clock may lag behind by a tick.
                if file.stat().st_mtime > asked_at - 0.05 and read(file).pid == pid:
                    return file
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"process {pid} wrote no dump below {target.folder} within {_WRITE_S_MAX:g} s: it is stopped, or "
                    f"a later handler of signal {number} has taken the place of its own"
                )
            time.sleep(_LOOK_AGAIN_S)

    return wait
