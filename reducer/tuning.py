"""What `auto` goes by: measured all-reduces, from a table of `reducer tune`, from an earlier group, or from the cache.

A measurement is one way (algorithm, chunk, window) on one shape (ranks, hosts, standalone reducers) at one size. Rank 0
looks them up and tells the others, so that all ranks choose alike (csrc/collective/cost_model.h).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from reducer import _core
from reducer.errors import InvalidArgumentError

if TYPE_CHECKING:
    from typing import TypeGuard

log = logging.getLogger("reducer")

FORMAT = "reducer tuning 1"
#: REDUCER_TUNING for neither a table nor measurements.
OFF = "off"
_CACHE_FORMAT = "reducer costs 1"
_CACHE_FILES_MAX = 64


class Sample(NamedTuple):
    """A measured all-reduce: the median of its slowest rank. 0 bytes of chunk or window: the library's choice."""

    algorithm: str
    chunk_bytes: int
    window_bytes: int
    ranks: int
    hosts: int
    servers: int
    nbytes: int
    nanoseconds: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.ranks, self.hosts, self.servers

    @property
    def way(self) -> tuple[str, int, int]:
        return self.algorithm, self.chunk_bytes, self.window_bytes


def _check(values: Sequence[Any]) -> Sample:
    """A sample of values from a file. ValueError says what is wrong."""
    sample = Sample(*values)
    if sample.algorithm not in ("direct", "server", "mixed", "ring", "local"):
        raise ValueError(f"{sample.algorithm!r} is no algorithm that can be measured")
    for field, value in zip(Sample._fields[1:], sample[1:], strict=True):
        lowest = 0 if field in ("chunk_bytes", "window_bytes", "servers", "nbytes") else 1
        if not _is_whole(value) or not lowest <= value < 1 << 62:
            raise ValueError(f"{field} is {value!r}, which is no number from {lowest} on")
    if sample.hosts > sample.ranks:
        raise ValueError(f"{sample.ranks} ranks cannot be on {sample.hosts} hosts")
    if sample.chunk_bytes and not _core.min_chunk_bytes <= sample.chunk_bytes <= _core.max_chunk_bytes:
        raise ValueError(f"a chunk of {sample.chunk_bytes} bytes is outside of 4KiB to 16MiB")
    return sample


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


# ---------------------------------------------------------------- tables


def read_table(path: str | Path) -> list[Sample]:
    """The measurements of a table. InvalidArgumentError says what is wrong with the file."""
    try:
        table = json.loads(Path(path).read_text())
    except OSError as error:
        raise InvalidArgumentError(f"'{path}' cannot be read: {error.strerror}") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise InvalidArgumentError(f"'{path}' is no table of `reducer tune`: {error}") from None
    form = table.get("format") if isinstance(table, dict) else None
    if form != FORMAT:
        raise InvalidArgumentError(
            f"'{path}' is no table of this version's `reducer tune`: its format is {form!r}, not {FORMAT!r}; make it "
            "again"
        )
    entries = table.get("measured")
    samples = []
    for number, way in enumerate(entries if isinstance(entries, list) else [], 1):
        try:
            head = [way[field] for field in Sample._fields[:-2]]
            samples += [_check([*head, nbytes, nanoseconds]) for nbytes, nanoseconds in way["times"]]
        except KeyError as error:
            raise InvalidArgumentError(f"'{path}': entry {number} has no {error.args[0]}") from None
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(f"'{path}': in entry {number}: {error}") from None
    if not samples:
        raise InvalidArgumentError(f"'{path}' has no measurements; run `reducer tune` again")
    return samples


def write_table(path: Path, samples: Iterable[Sample], about: Sequence[str]) -> None:
    """Writes a table; one that is there already keeps what it has of other shapes. OSError, InvalidArgumentError.

    about: for readers of the file: what was measured, where, when, and what follows from it.
    """
    samples = list(samples)
    shapes = {sample.shape for sample in samples}
    if path.exists():
        samples = [old for old in read_table(path) if old.shape not in shapes] + samples
    entries = []
    for shape, way in dict.fromkeys((sample.shape, sample.way) for sample in samples):
        of_way = [sample for sample in samples if (sample.shape, sample.way) == (shape, way)]
        head = json.dumps(dict(zip(Sample._fields[:-2], (*way, *shape), strict=True)))
        times = ",\n".join(f"      [{sample.nbytes}, {sample.nanoseconds}]" for sample in of_way)
        entries.append(f'    {head[:-1]},\n     "times": [\n{times}]}}')
    _write(
        path,
        f'{{\n  "format": "{FORMAT}",\n  "about": {json.dumps(list(about), indent=4)},\n'
        f'  "times are": "[bytes, nanoseconds]",\n  "measured": [\n' + ",\n".join(entries) + "\n  ]\n}\n",
    )


def _write(path: Path, text: str) -> None:
    """All of it or nothing, even if several processes write."""
    mine = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        mine.write_text(text)
        mine.replace(path)
    finally:
        mine.unlink(missing_ok=True)


# ---------------------------------------------------------------- what was measured before


class Ground(NamedTuple):
    """Where a group is: what its measurements hold for."""

    places: tuple[str, ...]  # of its hosts, sorted
    servers: tuple[str, ...]
    conditions: str  # the settings that change times

    @classmethod
    def of(cls, places: Iterable[str], servers: Iterable[str], conditions: dict[str, Any]) -> Ground:
        told = {"reducer": _core.version, "protocol": _core.protocol_version, **conditions}
        return cls(tuple(sorted(set(places))), tuple(servers), json.dumps(told, sort_keys=True))

    def within(self, other: Ground) -> bool:
        """Whether costs that were measured there hold here."""
        return set(self.places) <= set(other.places) and self[1:] == other[1:]


_measured: dict[Ground, list[Sample]] = {}  # in this process


def _cache_file(ground: Ground) -> Path:
    root = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    name = hashlib.sha256(json.dumps(ground).encode()).hexdigest()[:32]
    return Path(root).expanduser() / "reducer" / f"costs-{name}.json"


def recall(ground: Ground) -> list[Sample]:
    """What is known of these hosts, or of more of which they are a part; [] if nothing is."""
    for known, samples in _measured.items():
        if ground.within(known):
            return samples
    try:
        path = _cache_file(ground)
        cached = json.loads(path.read_text())
        if cached["format"] != _CACHE_FORMAT or cached["ground"] != json.loads(json.dumps(ground)):
            log.info("what %s says was measured elsewhere or by another version; it is ignored", path)
            return []
        samples = [_check(values) for values in cached["samples"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("the measurements in %s cannot be read and are ignored: %s", path, error)
        return []
    except RuntimeError as error:  # there is no home
        log.info("no measurements of other runs are known: %s", error)
        return []
    _measured[ground] = samples
    return samples


def remember(ground: Ground, samples: Sequence[Sample]) -> None:
    """Keeps measurements for this process, and in the cache for later ones if that can be written."""
    _measured[ground] = list(samples)
    content = {"format": _CACHE_FORMAT, "ground": ground, "samples": samples}
    try:
        path = _cache_file(ground)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(content))
        _prune(path.parent)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        log.info("measurements are not kept for later runs: %s", error)


def _prune(folder: Path) -> None:
    """Hosts come and go, in containers above all: the oldest files go."""
    files = sorted(folder.glob("costs-*.json"), key=lambda file: file.stat().st_mtime)
    for old in files[:-_CACHE_FILES_MAX]:
        with contextlib.suppress(FileNotFoundError):
            old.unlink()
