"""How a group comes to be: settings are read, ranks find each other through the store, the native backend takes over.

Every rank writes one entry into the store, with its address and settings or with what went wrong. Rank 0 reads all
entries,
compares them, and writes a verdict, which all ranks read: the list of addresses, or one text that every rank raises.
"""

from __future__ import annotations

import atexit
import ipaddress
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from reducer import _core, _door, errors, tuning
from reducer.options import Options, Settings, resolve, signal_number

if TYPE_CHECKING:
    from types import ModuleType

    from reducer import _torch

log = logging.getLogger("reducer")

# How much longer the others wait for rank 0's verdict than rank 0 for the others: its text says who is missing.
_VERDICT_GRACE = timedelta(seconds=5)
# How long rank 0, whose process often holds the store, stays so that the others can read why it failed.
_FAREWELL = timedelta(seconds=5)

# What a rank tries to have of shared memory before it promises the others of its host to share some.
_MEMORY_NEEDED = 1 << 20

_native: ModuleType | None = None
# While a group is made, for who can tell: the ranks whose processes have ended, and their hosts.
_ended: Callable[[], dict[int, str]] | None = None


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def load_native() -> ModuleType:
    """The module `reducer._torch`. Raises VersionError if it was built for another minor version of torch."""
    global _native
    if _native is None:
        if _minor(_core.torch_version) != _minor(torch.__version__):
            raise errors.VersionError(
                f"reducer was built for torch {_core.torch_version}, and this is torch {torch.__version__}, whose C++ "
                "interface differs; build it again with `pip install --no-build-isolation --force-reinstall .` in its "
                f"source folder, or install torch {_minor(_core.torch_version)}"
            )
        from reducer import _torch

        # Before the interpreter goes: threads that wait for its lock would never get it.
        atexit.register(_torch.shutdown_all)
        _native = _torch
    return _native


@contextmanager
def watching(ended: Callable[[], dict[int, str]]) -> Iterator[None]:
    """A group that is made inside does not wait for ranks whose processes have `ended`: their hosts by rank.

    Thread safety: one thread at a time.
    """
    global _ended
    _ended = ended
    try:
        yield
    finally:
        _ended = None


@dataclass(frozen=True)
class _Place:
    """A rank's place in a group that is being made."""

    store: Any
    rank: int
    world_size: int
    name: str
    timeout: timedelta
    host: str
    prefix: str  # of this instance's keys

    @classmethod
    def of(cls, options: Any) -> _Place:
        # A group destroyed and made again has the same store and name. Each rank counts its own attempts.
        rank = int(options.group_rank)
        attempt = options.store.add(f"reducer/attempts/{rank}", 1)
        ranks = list(options.global_ranks_in_group)
        return cls(
            store=options.store,
            rank=rank,
            world_size=int(options.group_size),
            name=str(options.group_id) if ranks else "default",
            timeout=_as_timedelta(options.timeout),
            host=_core.host_label(),
            prefix=f"reducer/{attempt}",
        )

    def says(self, text: str) -> str:
        return f"[rank {self.rank}, group {self.name}] {text}"


def _as_timedelta(value: Any) -> timedelta:
    return value if isinstance(value, timedelta) else timedelta(seconds=float(value))


def create(options: Any, backend_options: Options | None = None) -> _torch.ReducerBackend:
    """Makes this rank's backend of a group; what torch calls. All ranks of the group must call it.

    Raises InvalidArgumentError (malformed settings), MismatchError (they differ between ranks), TimeoutError (a
    rank does not
    come), UnavailableError (a name or an address that cannot be used), VersionError. All ranks raise, and soon.
    """
    place = _Place.of(options)
    try:
        settings = resolve(backend_options)
        _set_log_level(settings.log)
        native = load_native()
        bind_host = choose_bind_host(place.store, settings)
        door = _door.door_at(bind_host)
        runtime = native.Runtime(
            bind_host=bind_host,
            congestion_control=settings.congestion_control,
            transport=settings.transport,
            recorder_entries=settings.recorder_entries,
            recorder_dir=settings.recorder_dir,
            recorder_signal=signal_number(settings.recorder_signal),
            warns=_warns(settings),
            tls_cert=settings.tls_cert,
            tls_key=settings.tls_key,
            tls_ca=settings.tls_ca,
            token_file=settings.token_file,
        )
        _door.use_token(settings.token_file)
    except errors.ReducerError as error:
        _publish_failure(place, error)
        raise type(error)(place.says(str(error))) from None
    except Exception as error:
        _publish_failure(place, error)
        raise
    _publish_entry(place, runtime.address, door.address, settings)
    verdict = _conclude(place, settings) if place.rank == 0 else _await_verdict(place)
    if verdict["flat"] and place.rank == 0:
        log.warning(place.says("%s; every rank goes over the network for itself"), verdict["flat"])
    _door.remember(verdict["workers"], verdict["doors"])
    backend: _torch.ReducerBackend = native.ReducerBackend(
        runtime=runtime,
        job=bytes.fromhex(verdict["job"]),
        name=place.name,
        rank=place.rank,
        world_size=place.world_size,
        workers=verdict["workers"],
        servers=verdict["servers"],
        places=verdict["places"],
        hosts=verdict["hosts"],
        samples=[tuning.Sample(*sample) for sample in verdict["samples"]],
        measures=verdict["measures"],
        worker_bandwidths=verdict["worker_bandwidths"],
        server_bandwidths=verdict["server_bandwidths"],
        algorithm=settings.algorithm,
        transport="tcp" if verdict["flat"] else settings.transport,
        chunk_bytes=settings.chunk_bytes,
        window_bytes=settings.window_bytes,
        checksum=settings.checksum,
        warns=_warns(settings),
        connect_timeout=settings.connect_timeout,
        heartbeat=settings.heartbeat,
        failover=settings.failover,
        timeout=place.timeout,
        global_ranks=list(options.global_ranks_in_group) or list(range(place.world_size)),
    )
    if verdict["measures"]:
        _measure(place, backend, settings, verdict)
    log.info(
        place.says("%s over %d workers and %d reducers (%s), here at %s"),
        backend.algorithm,
        place.world_size,
        len(verdict["servers"]),
        ", ".join(verdict["servers"]) or "none",
        runtime.address,
    )
    return backend


def _measure(place: _Place, backend: _torch.ReducerBackend, settings: Settings, verdict: dict[str, Any]) -> None:
    """What `auto` will go by, here and in later groups of these hosts: all ranks at once, before the first call."""
    began = time.monotonic()
    samples = [tuning.Sample(*sample) for sample in backend.measure()]
    if place.rank == 0:
        tuning.remember(_ground(settings, verdict), samples)
    log.info(place.says("measured %d all-reduces in %.2f s"), len(samples), time.monotonic() - began)


def _ground(settings: Settings, verdict: dict[str, Any]) -> tuning.Ground:
    conditions: dict[str, Any] = {
        "transport": f"{settings.transport}+tls" if settings.tls else settings.transport,
        "checksum": settings.checksum,
        "chunk": settings.chunk_bytes,
        "window": settings.window_bytes,
        "workers": sorted(set(verdict["worker_bandwidths"])),
        "servers": verdict["server_bandwidths"],
    }
    return tuning.Ground.of(verdict["places"], verdict["servers"], conditions)


def _warns(settings: Settings) -> bool:
    """Whether the native code may write warnings, for which it must not wait for Python's loggers."""
    return settings.log not in ("off", "error")


def _set_log_level(level: str) -> None:
    log.setLevel(logging.CRITICAL + 1 if level == "off" else level.upper())
    if not log.handlers and not logging.getLogger().handlers and level in ("info", "debug"):
        log.addHandler(logging.StreamHandler())


def choose_bind_host(store: Any, settings: Settings) -> str:
    """This process' address for others: on the interface that was asked for, or towards the store's host.

    Raises InvalidArgumentError.
    """
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    peer = getattr(store, "host", None) or os.environ.get("MASTER_ADDR") or "127.0.0.1"
    try:
        return _core.choose_bind_host(settings.interface, str(peer))
    except ValueError as error:
        raise errors.InvalidArgumentError(f"REDUCER_INTERFACE: {error}") from None


# ---------------------------------------------------------------- what ranks tell each other


def _publish_entry(place: _Place, address: str, door: str, settings: Settings) -> None:
    shared = {"reducer": _core.version, "protocol": str(_core.protocol_version), **settings.shared}
    entry = {
        "address": address,
        "door": door,
        "host": place.host,
        # Tests play several hosts on one machine.
        "place": os.environ.get("REDUCER_TEST_PLACE") or _core.host_identity(),
        "bandwidth": settings.bandwidth,
        "no_memory": _no_shared_memory(),
        "settings": shared,
        "chosen": bool(settings.interface),
    }
    place.store.set(f"{place.prefix}/entry/{place.rank}", json.dumps(entry))


def _no_shared_memory() -> str:
    """Why this process cannot have memory to share; "" if it can."""
    try:
        memory = os.memfd_create("reducer", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(memory, 0, _MEMORY_NEEDED)
        finally:
            os.close(memory)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _publish_failure(place: _Place, error: Exception) -> None:
    entry = {"host": place.host, "error": str(error), "kind": type(error).__name__}
    place.store.set(f"{place.prefix}/entry/{place.rank}", json.dumps(entry))
    if place.rank == 0:
        _publish_verdict(place, {"error": f"rank 0 ({place.host}): {error}", "kind": type(error).__name__})


def _publish_verdict(place: _Place, verdict: dict[str, Any], absent: int = 0) -> None:
    """Rank 0 tells all. With an error it stays until those that are not `absent` have read it, within limits."""
    readers = place.world_size - 1 - absent
    place.store.set(f"{place.prefix}/verdict", json.dumps({**verdict, "readers": readers}))
    if "error" not in verdict or readers <= 0:
        return
    if not _wait(place, "read", _FAREWELL):
        log.debug(place.says("not every rank has read the verdict within %s"), _FAREWELL)


def _wait(place: _Place, key: str, patience: timedelta) -> bool:
    """Whether the key came in time. Raises UnavailableError if the store is gone."""
    try:
        place.store.wait([f"{place.prefix}/{key}"], patience)
    except dist.DistNetworkError as error:
        raise _store_lost(error) from error
    except RuntimeError:  # each kind of store has its own for the end of its patience
        return False
    return True


def _wait_for_rank_0(place: _Place, patience: timedelta) -> bool:
    """Whether its verdict came in time. Raises UnavailableError: it has ended, or the store is gone."""
    if _ended is None:
        return _wait(place, "verdict", patience)
    deadline = time.monotonic() + patience.total_seconds()
    pause = 0.001
    while not _is_there(place, f"{place.prefix}/verdict"):
        if time.monotonic() >= deadline:
            return False
        if 0 in (ended := _ended()):
            raise errors.UnavailableError(f"rank 0 ({ended[0]}) has ended while the group was being made")
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    return True


def _is_there(place: _Place, key: str) -> bool:
    """Raises UnavailableError if the store is gone."""
    try:
        return bool(place.store.check([key]))
    except dist.DistNetworkError as error:
        raise _store_lost(error) from error


def _store_lost(error: Exception) -> errors.UnavailableError:
    return errors.UnavailableError(
        "the store was lost while the group was being made; look at the output of the process that holds it, often "
        f"rank 0 ({error})"
    )


def _await_verdict(place: _Place) -> dict[str, Any]:
    try:
        came = _wait_for_rank_0(place, place.timeout + _VERDICT_GRACE)
    except errors.UnavailableError as error:
        raise errors.UnavailableError(place.says(str(error))) from error
    if not came:
        raise errors.TimeoutError(
            place.says(
                f"rank 0 did not come within {place.timeout.total_seconds():g} s to make the group; look at its "
                f"output, "
                "and make sure that all ranks make the same groups in the same order"
            )
        )
    verdict: dict[str, Any] = json.loads(place.store.get(f"{place.prefix}/verdict"))
    if "error" in verdict:
        # The last reader lets rank 0 go.
        if place.store.add(f"{place.prefix}/reading", 1) >= verdict["readers"]:
            place.store.set(f"{place.prefix}/read", "1")
        raise _exception(verdict["kind"], place.says(verdict["error"]))
    return verdict


def _exception(kind: str, text: str) -> Exception:
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, errors.ReducerError):
        return known(text)
    return errors.InternalError(text)


# ---------------------------------------------------------------- rank 0


def _conclude(place: _Place, settings: Settings) -> dict[str, Any]:
    """Reads every rank's entry and decides. Raises what all ranks raise."""
    absent = 0
    try:
        entries = _collect(place)
        failed = {rank for rank, entry in entries.items() if "error" in entry}
        absent = len(failed) + place.world_size - len(entries)
        _check_failures(entries)
        _check_complete(place, entries)
        _check_settings(entries)
        _check_addresses(entries)
        _check_bandwidths(entries, settings)
        try:
            servers, server_bandwidths = _resolve_servers(settings)
        except errors.ReducerError as error:
            raise type(error)(f"REDUCER_SERVERS: {error}") from None
        verdict: dict[str, Any] = {
            "job": secrets.token_hex(16),
            "workers": [entries[rank]["address"] for rank in range(place.world_size)],
            "hosts": [entries[rank]["host"] for rank in range(place.world_size)],
            "doors": [entries[rank]["door"] for rank in range(place.world_size)],
            "servers": servers,
            "worker_bandwidths": [entry["bandwidth"] for _, entry in sorted(entries.items()) if settings.bandwidth],
            "server_bandwidths": server_bandwidths,
            "places": [entries[rank]["place"] for rank in range(place.world_size)],
        }
        verdict["flat"] = _flat(entries, settings)
        verdict |= _samples(place, settings, verdict)
    except errors.ReducerError as error:
        _publish_verdict(place, {"error": str(error), "kind": type(error).__name__}, absent)
        raise type(error)(place.says(str(error))) from None
    _publish_verdict(place, verdict)
    return verdict


def _flat(entries: dict[int, dict[str, Any]], settings: Settings) -> str:
    """Why ranks of several hosts cannot go in two levels, though some share a host; "" if they can or need not.

    (Ranks that are all on one host find out at their first collective.)
    """
    places = [entry["place"] for entry in entries.values()]
    if settings.transport not in ("auto", "shm") or len(set(places)) in (1, len(places)):
        return ""
    for rank, entry in sorted(entries.items()):
        if entry["no_memory"] and places.count(entry["place"]) > 1:
            why = f"rank {rank} ({entry['host']}) cannot share memory: {entry['no_memory']}"
            if settings.transport == "shm":
                raise errors.UnavailableError(
                    f"REDUCER_TRANSPORT is 'shm', and {why}; mend that, or allow the network with 'auto'"
                )
            return why
    return ""


def _samples(place: _Place, settings: Settings, verdict: dict[str, Any]) -> dict[str, Any]:
    """What `auto` goes by: a table, what was measured before, or what the group is going to measure.

    On one host there is little to choose, and groups come and go in tests: nothing is measured there.
    """
    hosts = len(set(verdict["places"]))
    nothing: dict[str, Any] = {"samples": [], "measures": False}
    if "auto" not in settings.algorithm or settings.tuning == tuning.OFF or place.world_size == 1:
        return nothing
    if settings.tuning:
        try:
            samples = tuning.read_table(settings.tuning)
        except errors.ReducerError as error:
            raise type(error)(f"REDUCER_TUNING: {error}") from None
        shape = (place.world_size, hosts, len(verdict["servers"]))
        if all(sample.shape != shape for sample in samples):
            log.warning(
                place.says(
                    "%s has no measurements of %d ranks on %d hosts with %d standalone reducers: `auto` goes by the "
                    "model that fits those it has; run `reducer tune` there"
                ),
                settings.tuning,
                *shape,
            )
        return {"samples": samples, "measures": False}
    if hosts == 1:
        return nothing
    samples = tuning.recall(_ground(settings, verdict))
    return {"samples": samples, "measures": not samples}


def _collect(place: _Place) -> dict[int, dict[str, Any]]:
    """The ranks' entries: all, or those that are there when one of them has failed or the time is over."""
    deadline = time.monotonic() + place.timeout.total_seconds()
    entries: dict[int, dict[str, Any]] = {}
    missing = list(range(place.world_size))
    pause = 0.001
    while missing:
        # Asked again and again, since any rank may be the next, and the store's own wait is for all (and every one that
        # ends without success leaves two lines of warnings in the log).
        if time.monotonic() >= deadline:
            break
        time.sleep(pause)
        pause = min(0.25, pause * 1.5)
        for rank in list(missing):
            key = f"{place.prefix}/entry/{rank}"
            if not _is_there(place, key):
                continue
            entries[rank] = json.loads(place.store.get(key))
            missing.remove(rank)
        for rank, host in (_ended() if _ended is not None else {}).items():
            if rank in missing:
                entries[rank] = {"error": "its process has ended", "host": host, "kind": "UnavailableError"}
        if any("error" in entry for entry in entries.values()):
            break
    return entries


def _check_failures(entries: dict[int, dict[str, Any]]) -> None:
    failed = {rank: entry for rank, entry in sorted(entries.items()) if "error" in entry}
    if not failed:
        return
    text = "; ".join(f"rank {rank} ({entry['host']}): {entry['error']}" for rank, entry in failed.items())
    raise _exception(next(iter(failed.values()))["kind"], text)


def _check_complete(place: _Place, entries: dict[int, dict[str, Any]]) -> None:
    missing = [str(rank) for rank in range(place.world_size) if rank not in entries]
    if missing:
        raise errors.TimeoutError(
            f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing)} of {place.world_size} did not come within "
            f"{place.timeout.total_seconds():g} s to make the group; look at their output, and make sure that "
            f"all ranks "
            "make the same groups in the same order"
        )


def _check_settings(entries: dict[int, dict[str, Any]]) -> None:
    differences = []
    for name in entries[0]["settings"]:
        ranks_by_value: dict[str, list[int]] = {}
        for rank, entry in sorted(entries.items()):
            ranks_by_value.setdefault(str(entry["settings"].get(name)), []).append(rank)
        if len(ranks_by_value) > 1:
            held = [
                f"'{value}' on rank{'s' if len(ranks) > 1 else ''} "
                + ", ".join(f"{rank} ({entries[rank]['host']})" for rank in ranks)
                for value, ranks in ranks_by_value.items()
            ]
            differences.append(f"{name} is {' and '.join(held)}")
    if differences:
        raise errors.MismatchError(
            "the group is set up differently on its ranks: "
            + "; ".join(differences)
            + ". Make them equal on all ranks."
        )


def _check_addresses(entries: dict[int, dict[str, Any]]) -> None:
    """Ranks on several hosts cannot meet on loopback addresses."""
    hosts = {entry["host"].rsplit(":", 1)[0] for entry in entries.values()}
    unreachable = [
        f"rank {rank} ({entry['host']}) at {entry['address']}"
        for rank, entry in sorted(entries.items())
        if not entry["chosen"] and _is_loopback(entry["address"])
    ]
    if len(hosts) > 1 and unreachable:
        raise errors.InvalidArgumentError(
            "REDUCER_INTERFACE: the ranks are on several hosts, and these would listen on an address that no "
            "other host "
            f"reaches: {', '.join(unreachable)}; set it to the name or the address of the interface towards the others"
        )


def _check_bandwidths(entries: dict[int, dict[str, Any]], settings: Settings) -> None:
    """Shares follow from the bandwidths of all NICs, or of none."""
    given = [rank for rank, entry in sorted(entries.items()) if entry["bandwidth"]]
    missing = [f"{rank} ({entry['host']})" for rank, entry in sorted(entries.items()) if not entry["bandwidth"]]
    if missing and (given or settings.server_bandwidths):
        others = f"rank {given[0]} has it" if given else "REDUCER_SERVERS has bandwidths"
        raise errors.InvalidArgumentError(
            f"REDUCER_BANDWIDTH is not set on rank{'s' if len(missing) > 1 else ''} {', '.join(missing)}, and "
            f"{others}; set it on all ranks to what their NICs carry, as in 10gbit, or give no bandwidth at all"
        )
    if given and settings.servers and not settings.server_bandwidths:
        raise errors.InvalidArgumentError(
            "REDUCER_SERVERS has no bandwidths, and the ranks have REDUCER_BANDWIDTH; write "
            f"{settings.servers[0]}@10gbit for each, or set neither"
        )
    first_at: dict[str, int] = {}
    for rank, entry in sorted(entries.items()):
        first = first_at.setdefault(entry["place"], rank)
        if entry["bandwidth"] != entries[first]["bandwidth"]:
            raise errors.InvalidArgumentError(
                f"REDUCER_BANDWIDTH is {entries[first]['bandwidth']}bit on rank {first} and {entry['bandwidth']}bit on "
                f"rank {rank}, which share a host ({entry['host']}): give both what its NIC carries in all"
            )


def _resolve_servers(settings: Settings) -> tuple[list[str], list[int]]:
    """Addresses, and the bandwidth of each if they are given: every address of a name has the name's.

    An address keeps the name that it was found by, as "name/10.0.0.4:7000": a certificate is the name's, and a reducer
    that comes back may have another address. (Of several addresses of a name it is not known which has moved.)
    """
    _core.resolve_servers(list(settings.servers))  # complains of twins
    found: list[tuple[str, int]] = []
    bandwidths = settings.server_bandwidths or [0] * len(settings.servers)
    for name, bandwidth in zip(settings.servers, bandwidths, strict=True):
        addresses = _core.resolve_servers([name])
        keeps = settings.tls or len(addresses) == 1
        found += [(_named(name, address) if keeps else address, bandwidth) for address in addresses]
    return [address for address, _ in found], [bandwidth for _, bandwidth in found if bandwidth]


def _named(server: str, address: str) -> str:
    """The "host:port" as the settings have it, and one of its addresses: both in one text."""
    host = server.rsplit(":", 1)[0]
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return f"{host}/{address}"
    return address


def _is_loopback(address: str) -> bool:
    host = address.rsplit(":", 1)[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host == socket.gethostname()
