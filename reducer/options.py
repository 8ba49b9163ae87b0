"""Settings of a group: from ``reducer.Options``, and from the environment where an option is not set."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, TypeVar

from reducer import _core
from reducer.errors import InvalidArgumentError

# Neither torchrun nor the usual job managers use it, which do use USR1 and USR2.
RECORDER_SIGNAL = "RTMIN+5"
_RECORDER_ENTRIES_MAX = 1_000_000
LOG_LEVELS = ("off", "error", "warning", "info", "debug")
_SWITCHES = {"1": True, "true": True, "on": True, "yes": True}
_SWITCHES |= {"0": False, "false": False, "off": False, "no": False}

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The ``pg_options`` of ``init_process_group`` and ``new_group``.

    What is None comes from the environment variable ``REDUCER_<NAME IN CAPITALS>``, and if that is unset too, from
    the default.

    servers: addresses of the standalone reducers, "host:port,host:port" or a list; a name with several addresses
            counts as
        several. Default: none.
    bandwidth: of this worker's NIC, "25gbit"; to be given on all ranks, and for all servers as "host:port@25gbit", or
        nowhere. The shares of the bytes follow it. Default: all NICs are as fast.
    algorithm: "auto", "local", "direct", "server", "mixed" or "ring", or one for each range of sizes, in bytes of the
        call, the end of a range not in it: "0-64KiB:direct,64KiB-:mixed". Default: "auto" (docs/tuning.md; "local"
        where all ranks share a host).
    tuning: a table of `reducer tune` that "auto" goes by, read by rank 0; "off": by nothing measured. Default: what a
        group on several hosts measures itself when it is made, in under a second, and keeps in the cache.
    transport: "auto" (shared memory within a host, between processes the faster of TCP and gRPC that both have),
        "grpc", "tcp", or
        "shm" (as "auto", but an error where ranks of a host cannot share memory). Default: "auto".
    chunk_bytes: the largest chunk, 4096 or "4KiB" to "16MiB". Default: chosen from the number of owners.
    window_bytes: the most bytes that a worker has under way, 2097152 or "2MiB". Default: chosen by the library.
    interface: name or address of the interface on which other workers reach this one. Default: the one with the
    route to the
        store's host.
    congestion_control: of this worker's TCP connections: "auto" (reno where the kernel permits it), "system" (the
    host's own), or a
        name that the kernel has, as "bbr". Default: "auto".
    connect_timeout: how long to wait for a reducer that does not answer; seconds or a timedelta. Default: 60.
    heartbeat: the silence of another process after which it counts as lost (stopped, its host or cable out); seconds
        or a timedelta, 0: however long it is silent. Default: 10.
    failover: whether the group goes on when a standalone reducer is lost; off, nothing is kept for that, and its loss
        ends the group. Default: True.
    checksum: whether payloads carry a CRC32C. Default: False.
    recorder_entries: how many calls the flight recorder of this process keeps (docs/flight-recorder.md); 0: none.
        Default: 1000.
    recorder_dir: where it writes reducer-JOB/rankR.json after an error or at a signal. Default: $TMPDIR, or /tmp.
    recorder_signal: that makes it write: "USR1", "USR2", "RTMIN+0" to "RTMIN+30", or "off". Default: "RTMIN+5".
    tls_cert, tls_key, tls_ca: files in PEM: this worker's certificate, its key, and the authorities of all others'.
        With them everything that crosses hosts is TLS, by gRPC. All three on all ranks, or none. Default: none.
    token_file: a file with the job's secret, which workers and reducers of the job know each other by. Default: none.
    log: "off", "error", "warning", "info" or "debug". Default: "warning".

    docs/security.md has TLS and tokens.
    """

    servers: str | Sequence[str] | None = None
    bandwidth: int | str | None = None
    algorithm: str | None = None
    tuning: str | os.PathLike[str] | None = None
    transport: str | None = None
    chunk_bytes: int | str | None = None
    window_bytes: int | str | None = None
    interface: str | None = None
    congestion_control: str | None = None
    connect_timeout: float | str | timedelta | None = None
    heartbeat: float | str | timedelta | None = None
    failover: bool | str | None = None
    checksum: bool | str | None = None
    recorder_entries: int | str | None = None
    recorder_dir: str | os.PathLike[str] | None = None
    recorder_signal: str | None = None
    tls_cert: str | os.PathLike[str] | None = None
    tls_key: str | os.PathLike[str] | None = None
    tls_ca: str | os.PathLike[str] | None = None
    token_file: str | os.PathLike[str] | None = None
    log: str | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options as they were read: every one has a value. 0 bytes: the library chooses."""

    servers: tuple[str, ...] = ()
    #: Bits a second of each server's NIC; empty if they are not given.
    server_bandwidths: tuple[int, ...] = ()
    bandwidth: int = 0
    algorithm: str = "auto"
    tuning: str = ""
    transport: str = "auto"
    chunk_bytes: int = 0
    window_bytes: int = 0
    interface: str = ""
    congestion_control: str = "auto"
    connect_timeout: timedelta = timedelta(seconds=60)
    heartbeat: timedelta = timedelta(seconds=10)
    failover: bool = True
    checksum: bool = False
    recorder_entries: int = 1000
    recorder_dir: str = ""
    recorder_signal: str = RECORDER_SIGNAL
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    token_file: str = ""
    log: str = "warning"

    @property
    def tls(self) -> bool:
        """Whether what crosses hosts is TLS."""
        return bool(self.tls_cert or self.tls_key or self.tls_ca)

    @property
    def shared(self) -> dict[str, str]:
        """Those that must be equal on all ranks, as text, by the names of their variables."""
        return {
            "REDUCER_SERVERS": ",".join(
                f"{server}@{bandwidth}bit" if bandwidth else server
                for server, bandwidth in itertools.zip_longest(self.servers, self.server_bandwidths)
            ),
            "REDUCER_ALGORITHM": self.algorithm,
            "REDUCER_TRANSPORT": self.transport,
            "REDUCER_CHUNK_BYTES": str(self.chunk_bytes),
            "REDUCER_WINDOW_BYTES": str(self.window_bytes),
            "REDUCER_HEARTBEAT": f"{self.heartbeat.total_seconds():g}",
            "REDUCER_FAILOVER": "on" if self.failover else "off",
            "REDUCER_CHECKSUM": "on" if self.checksum else "off",
            # Where the files are is each rank's own affair.
            "TLS (REDUCER_TLS_CERT, _KEY and _CA)": "on" if self.tls else "off",
            "REDUCER_TOKEN_FILE": "set" if self.token_file else "not set",
        }


def _read_servers(value: Any) -> dict[str, int]:
    """The bandwidth of each server, 0 where none is given: all have one or none has."""
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(item, str) for item in value):
        value = ",".join(value)
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{value!r} is neither text nor a list of texts; write host:port,host:port")
    items = [item.partition("@") for item in value.split(",")]
    addresses = _core.parse_servers(",".join(address for address, _, _ in items))
    bandwidths = []
    for address, mark, bandwidth in items[: len(addresses)]:
        try:
            bandwidths.append(_core.parse_bandwidth(bandwidth) if mark else 0)
        except ValueError as error:
            raise InvalidArgumentError(f"'{address.strip()}@{bandwidth.strip()}': {error}") from None
    if any(bandwidths) and not all(bandwidths):
        without = addresses[bandwidths.index(0)]
        raise InvalidArgumentError(f"'{without}' has no bandwidth and others have; write {without}@10gbit, or none")
    return dict(zip(addresses, bandwidths, strict=True))


def _read_bandwidth(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InvalidArgumentError(f"{value!r} is no bandwidth; write 10gbit, 2.5gbit or 800mbit")
    if isinstance(value, int):
        value = f"{value}bit"
    return _core.parse_bandwidth(value)


def _read_size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InvalidArgumentError(f"{value!r} is no size; write bytes or a unit, as in 65536, 64KiB, 4MiB")
    if isinstance(value, int):
        if value < 0:
            raise InvalidArgumentError(f"{value} is negative")
        return value
    return _core.parse_size(value)


def _read_chunk(value: Any) -> int:
    nbytes = _read_size(value)
    if nbytes != 0 and not _core.min_chunk_bytes <= nbytes <= _core.max_chunk_bytes:
        raise InvalidArgumentError(f"{value} is outside of 4KiB to 16MiB")
    return nbytes


def _read_seconds(value: Any) -> timedelta:
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    else:
        try:
            seconds = float(value)
        except (TypeError, ValueError):
            seconds = -1.0
    if not 0 < seconds <= 86_400:
        raise InvalidArgumentError(f"{value!r} is no number of seconds from 0 to 86400; write 60 or 2.5")
    return timedelta(seconds=seconds)


def _read_heartbeat(value: Any) -> timedelta:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    try:
        if float(seconds) == 0:
            return timedelta(0)
    except (TypeError, ValueError):
        pass
    heartbeat = _read_seconds(value)
    if heartbeat < timedelta(seconds=0.5):
        raise InvalidArgumentError(
            f"{value!r} is less than 0.5 s, in which a busy process may say nothing; write 10 or 0"
        )
    return heartbeat


def _read_switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    known = _SWITCHES.get(str(value).strip().lower())
    if known is None:
        raise InvalidArgumentError(f"{value!r} is neither on nor off; write 1 or 0")
    return known


def _read_algorithm(value: Any) -> str:
    return _core.parse_algorithm(str(value))


def _read_transport(value: Any) -> str:
    return _core.parse_transport(str(value))


def _read_path(value: Any) -> str:
    """An absolute path: the file is read again later, wherever the process is then."""
    path = _read_text(os.fspath(value))
    return os.path.abspath(os.path.expanduser(path)) if path else ""


def _one_of(known: tuple[str, ...]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        text = str(value).strip().lower()
        if text not in known:
            raise InvalidArgumentError(f"{value!r} is not among {', '.join(known)}")
        return text

    return read


def _read_entries(value: Any) -> int:
    try:
        entries = -1 if isinstance(value, bool) else int(value)
    except (TypeError, ValueError):
        entries = -1
    if not 0 <= entries <= _RECORDER_ENTRIES_MAX:
        raise InvalidArgumentError(f"{value!r} is no number of calls from 0 (nothing is recorded) to 1000000")
    return entries


def signal_number(name: str) -> int:
    """Of "USR1", "SIGUSR2", "RTMIN+5"; 0 for "off". ValueError."""
    plain = name.strip().upper().removeprefix("SIG")
    if plain == "OFF":
        return 0
    if plain in ("USR1", "USR2"):
        return int(signal.Signals[f"SIG{plain}"])
    base, _, offset = plain.partition("+")
    most = int(signal.SIGRTMAX) - int(signal.SIGRTMIN)
    if base == "RTMIN" and offset.isdigit() and int(offset) <= most:
        return int(signal.SIGRTMIN) + int(offset)
    raise InvalidArgumentError(f"{name!r} is none of USR1, USR2, RTMIN+0 to RTMIN+{most}, off")


def _read_signal(value: Any) -> str:
    text = _read_text(value)
    signal_number(text)
    return text


def _read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{value!r} is no text")
    return value.strip()


_READERS: dict[str, Callable[[Any], Any]] = {
    "servers": _read_servers,
    "bandwidth": _read_bandwidth,
    "algorithm": _read_algorithm,
    "tuning": lambda value: _read_text(os.fspath(value)),
    "transport": _read_transport,
    "chunk_bytes": _read_chunk,
    "window_bytes": _read_size,
    "interface": _read_text,
    "congestion_control": _read_text,
    "connect_timeout": _read_seconds,
    "heartbeat": _read_heartbeat,
    "failover": _read_switch,
    "checksum": _read_switch,
    "recorder_entries": _read_entries,
    "recorder_dir": lambda value: _read_text(os.fspath(value)),
    "recorder_signal": _read_signal,
    "tls_cert": _read_path,
    "tls_key": _read_path,
    "tls_ca": _read_path,
    "token_file": _read_path,
    "log": _one_of(LOG_LEVELS),
}


def resolve(options: Options | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Reads all settings. Raises InvalidArgumentError (a ValueError) that names the option or the variable."""
    if options is not None and not isinstance(options, Options):
        raise InvalidArgumentError(
            f"pg_options is a {type(options).__name__}; the backend 'reducer' takes reducer.Options"
        )
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for field in fields(Options):
        variable = f"REDUCER_{field.name.upper()}"
        given = getattr(options, field.name) if options is not None else None
        source = f"reducer.Options({field.name})"
        if given is None:
            # An empty variable is as good as none.
            given, source = environ.get(variable, "").strip() or None, variable
        if given is None:
            continue
        try:
            values[field.name] = _READERS[field.name](given)
        except ValueError as error:
            raise InvalidArgumentError(f"{source}: {error}") from None
    servers: dict[str, int] = values.pop("servers", {})
    values["servers"] = tuple(servers)
    values["server_bandwidths"] = tuple(filter(None, servers.values()))
    settings = Settings(**values)
    needing = [item for item in settings.algorithm.split(",") if item.split(":")[-1].split("/")[0] == "server"]
    if needing and not settings.servers:
        raise InvalidArgumentError(
            f"REDUCER_ALGORITHM: '{needing[0]}' needs standalone reducers, and REDUCER_SERVERS is empty; start some "
            "with `reducer serve` and name them there, or use 'direct'"
        )
    if settings.tls and settings.transport == "tcp":
        raise InvalidArgumentError(
            "REDUCER_TRANSPORT is 'tcp', which has no TLS, and REDUCER_TLS_* asks for it; use 'auto' or 'grpc'"
        )
    if settings.algorithm == "local" and settings.transport not in ("auto", "shm"):
        raise InvalidArgumentError(
            "REDUCER_ALGORITHM: the algorithm 'local' is shared memory, and REDUCER_TRANSPORT is "
            f"'{settings.transport}'; use 'auto' or 'shm' there"
        )
    return settings
