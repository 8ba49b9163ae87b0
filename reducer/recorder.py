"""The flight recorder: the last calls of a process, as it keeps them in memory and writes them to files.

docs/flight-recorder.md says what is in it and how it is asked for. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import os
import signal
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from reducer.errors import InvalidArgumentError, ReducerError, UnavailableError

FORMAT = 1

# How long a process may take to write its file. It is a thread's work of milliseconds, but hosts can be busy.
_WRITE_S_MAX = 10.0
_LOOK_AGAIN_S = 0.02

# A file of a million calls, the most that a process keeps, has some 500 MB.
_FILE_BYTES_MAX = 1 << 30
_ANNOUNCEMENT_BYTES_MAX = 1 << 20
_RANKS_MAX = 4096  # as in csrc/common/limits.h

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


# ---------------------------------------------------------------- from text


def printable(text: str) -> str:
    """With escapes for what a terminal would act on, or could not show."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _wrong(what: str) -> TypeError:
    return TypeError(f"{what} is missing, or is not what it should be")


def _int(value: Any) -> int:
    if type(value) is int and -(1 << 63) <= value < 1 << 63:
        return value
    raise TypeError


def _count(value: Any) -> int:
    if _int(value) < 0:
        raise TypeError
    return int(value)


def _float(value: Any) -> float:
    if type(value) is float and math.isfinite(value):
        return value
    return float(_int(value))


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise TypeError


def _str(value: Any) -> str:
    if isinstance(value, str):
        return printable(value)
    raise TypeError


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, list):
        return tuple(map(_str, value))
    raise TypeError


_READERS: dict[str, Callable[[Any], Any]] = {
    "int": _int,
    "float": _float,
    "bool": _bool,
    "str": _str,
    "tuple[str, ...]": _texts,
}
_COUNTS = ("number", "seq", "count", "bytes", "called", "recorded", "entries", "rank", "world_size", "source", "to")


def _fields_of(kind: type) -> list[tuple[str, str, bool, bool, Callable[[Any], Any]]]:
    """Of each field that a file has as it is: its name, that in files, whether it must be there, may be null, and what
    makes of its value what the field says, or raises TypeError."""
    found = []
    for one in fields(kind):
        required = one.default is MISSING
        text = str(one.type).removesuffix(" | None")
        if text in _READERS:
            read = _count if one.name in _COUNTS else _READERS[text]
            told = "from" if one.name == "source" else one.name
            found.append((one.name, told, required, text != one.type, read))
    return found


def _made(kind: type[T], entry: Any, known: list[tuple[str, str, bool, bool, Callable[[Any], Any]]], **parts: Any) -> T:
    if not isinstance(entry, dict):
        raise _wrong(kind.__name__)
    for name, told, required, may_be_null, read in known:
        if told in entry:
            value = entry[told]
            try:
                parts[name] = None if value is None and may_be_null else read(value)
            except TypeError:
                raise _wrong(f"{kind.__name__}.{told}") from None
        elif required:
            raise _wrong(f"{kind.__name__}.{told}")
    return kind(**parts)


_CALL = _fields_of(Call)
_GROUP = _fields_of(Group)
_DUMP = _fields_of(Dump)


def _group(entry: Any) -> Group:
    group = _made(Group, entry, _GROUP)
    if not group.rank < group.world_size <= _RANKS_MAX or len(group.hosts) > group.world_size:
        raise _wrong("Group.world_size")
    return group


def _list(entry: Any, name: str) -> list[Any]:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, list):
        raise _wrong(name)
    return value


def parse(text: str | bytes, source: str) -> Dump:
    """Raises InvalidArgumentError that names the source. Texts are `printable`."""
    source = printable(source)
    try:
        entry = json.loads(text)
        if isinstance(entry, dict) and _count(entry.get("format")) != FORMAT:
            raise InvalidArgumentError(f"{source} has format {entry['format']}; this version of reducer reads {FORMAT}")
        groups = tuple(map(_group, _list(entry, "groups")))
        calls = tuple(_made(Call, call, _CALL) for call in _list(entry, "calls"))
        sizes = {group.id: group.world_size for group in groups}
        for call in calls:
            size = sizes.get(call.group, _RANKS_MAX)
            if (call.source or 0) >= size or (call.to or 0) >= size:
                raise _wrong("Call.to")
        return _made(Dump, entry, _DUMP, groups=groups, calls=calls)
    except InvalidArgumentError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{source} is no dump of the flight recorder: {error}") from None


def _contents(path: Path, bytes_max: int) -> bytes:
    """Of a regular file, at most so many bytes. Raises OSError, ValueError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would be waited for
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("is no regular file")
        if found.st_size > bytes_max:
            raise ValueError(f"has {found.st_size} bytes, and is no dump: none is larger than {bytes_max}")
        return file.read(bytes_max)


def read(path: Path) -> Dump:
    """Raises UnavailableError, InvalidArgumentError."""
    try:
        text = _contents(path, _FILE_BYTES_MAX)
    except OSError as error:
        raise UnavailableError(f"{printable(str(path))}: {error.strerror}") from None
    except ValueError as error:
        raise InvalidArgumentError(f"{printable(str(path))} {error}") from None
    return parse(text, str(path))


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
            with suppress(OSError):  # it has gone meanwhile, or its folder is another user's
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
    job: str  # of its folder there
    groups: tuple[tuple[str, str], ...]  # that are open: the numbers of their jobs, and their names

    def fits(self, job: str) -> bool:
        """`job`: how the number of its job, or of a group's, begins, or a group's name."""
        number = job.lower()
        return self.job.startswith(number) or any(own.startswith(number) or name == job for own, name in self.groups)


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
            told = _announced(_contents(descriptor, _ANNOUNCEMENT_BYTES_MAX))
        except (OSError, ValueError):
            continue
        if told is not None and told.pid == pid:  # else it was inherited
            return told
    return None


def _announced(text: bytes) -> Process | None:
    """What a process says of itself; None: nothing that one of ours says."""
    try:
        told = json.loads(text)
        pid, number, folder = _count(told["pid"]), _count(told["signal"]), told["folder"]
        job, groups = told["job"], tuple((group["job"], group["name"]) for group in told["groups"])
    except (TypeError, ValueError, KeyError, RecursionError):
        return None
    texts = [folder, job, *(text for group in groups for text in group)]
    if number > signal.SIGRTMAX or not all(isinstance(text, str) and text.isprintable() for text in texts):
        return None
    return Process(pid=pid, signal=number, folder=Path(folder), job=job, groups=groups)


def processes() -> list[Process]:
    """All of this user."""
    pids = sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [found for found in map(process, pids) if found is not None]


def _listed(found: list[Process]) -> str:
    """Their jobs, a text for each."""
    texts = []
    for job in sorted({one.job for one in found}):
        mine = [one for one in found if one.job == job]
        names = dict.fromkeys(name for one in mine for _, name in one.groups)
        groups = ", ".join(f"'{name}'" for name in names)
        texts.append(f"{job} ({len(mine)} process{'es' if len(mine) > 1 else ''}, groups {groups})")
    return "; ".join(texts)


def of_job(job: str) -> list[Process]:
    """This user's processes of one job: how its number begins, as in reducer-JOB or `reducer stats`, or a group's name.

    Raises UnavailableError if there is none, InvalidArgumentError if it fits several jobs.
    """
    everybody = processes()
    found = [one for one in everybody if job and one.fits(job)]
    if not found:
        here = f"; there are: {_listed(everybody)}" if everybody else ""
        raise UnavailableError(f"no process of yours on this host is of the job '{job}'{here}")
    if len({one.job for one in found}) > 1:
        raise InvalidArgumentError(
            f"'{job}' fits several jobs; say more of the number of one: {_listed(found)}",
        )
    return found


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
            files: list[Path] = []
            with suppress(OSError):  # the process may have told anything
                files += target.folder.glob("reducer-*/rank*.json")
            for file in files:
                with suppress(OSError, ReducerError):  # another's, which is being replaced or is no dump
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
