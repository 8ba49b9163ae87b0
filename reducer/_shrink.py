"""A new group of the ranks that are left, in the same processes, after some have died: `reducer.shrink`."""

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import distributed_c10d as c10d

from reducer import _agreement, _door, errors
from reducer._store import hold_store
from reducer.backend import load_native

if TYPE_CHECKING:
    from reducer import _torch

log = logging.getLogger("reducer")

# How long a store may take to answer, and the ranks of a new group their first call.
_STORE_S = 10.0
_ADDRESS_BYTES = 256


def shrink(group: dist.ProcessGroup | None = None, *, timeout: float | timedelta = 30.0) -> dist.ProcessGroup:
    """Aborts a group in which ranks have died, and gives those that live a new one without them.

    All ranks of `group` (default: the default group) whose processes live must call it, whatever each of them knows of
    the dead: they agree, from worker to worker, on who is left. A rank whose process has ended is out at once; one that
    lives and does not call within `timeout` (seconds, counted on each rank from its call) is out after that, if more
    than half of those that may be alive are there. The ranks keep their order and are numbered anew. A shrunk default
    group is the new default group, and all other groups are destroyed, as by `torch.distributed.shrink_group`.
    If everybody lives, the new group has the ranks of the old one.

    The new group's store is the old one's, if it still answers; if it died with the rank that held it, the new rank 0
    holds a new one, for groups that are made later.

    Blocks. Thread safety: one call at a time, while no other thread uses `group`. Raises TypeError (not a group of
    this backend), UnavailableError (too few came to be sure that no other part of the group goes on by itself),
    AbortedError (the others went on without this rank), TimeoutError. After an error the group is aborted; all
    ranks that live may call it again.
    """
    old: Any = group if group is not None else c10d._get_default_group()
    patience = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    backend: Any = _native_of(old)
    backend.abort()
    said = f"[rank {backend.rank()}, group {backend.options.group_name}] shrink: "
    ranks = list(range(backend.size()))  # of the old group
    store = c10d._world.pg_map[old][1]
    for _ in range(backend.size()):
        try:
            left = _survivors(backend, patience)
        except errors.ReducerError as error:
            raise type(error)(said + str(error)) from None
        gone = [rank for rank in range(backend.size()) if rank not in left]
        smaller: Any = backend.shrink(gone, 1, None)
        ranks = [ranks[rank] for rank in left]
        try:
            store = _common_store(smaller, store)
        except (dist.DistBackendError, dist.DistNetworkError) as error:
            # Another death, now: the same again, among those. All of them come here, since none can use that group.
            log.debug("%s%s", said, error)
            smaller.abort()
            backend = smaller
            continue
        return _publish(old, smaller, ranks, store)
    raise errors.UnavailableError(f"{said}ranks were lost faster than the others could agree on who is left")


def _native_of(group: Any) -> _torch.ReducerBackend:
    backend = group._get_backend(group._device_types[0])
    backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL
    if not isinstance(backend, load_native().ReducerBackend):
        raise TypeError(f"shrink wants a group of the backend 'reducer', and this one's is '{backend.name()}'")
    return backend  # type: ignore[no-any-return]


def _natives() -> list[_torch.ReducerBackend]:
    """Of all groups that this rank is in."""
    found = []
    for group in c10d._world.pg_map:
        with suppress(TypeError, RuntimeError, IndexError):  # another backend's
            found.append(_native_of(group))
    return found


def _topic(backend: _torch.ReducerBackend) -> str:
    return f"shrink/{backend.job.hex()}"


def _survivors(backend: _torch.ReducerBackend, patience: float) -> list[int]:
    doors = _door.doors_of(backend.workers)
    host, _ = _door.split_address(doors[backend.rank()])
    door = _door.door_at(host)
    _door.renew_token()
    # Others may have gone on to another group of this process already.
    door.expect({_topic(one) for one in (backend, *_natives())})
    outside = _agreement.agree(_topic(backend), backend.rank(), doors, door, patience)
    return [rank for rank in range(backend.size()) if rank not in outside.all]


def _common_store(backend: Any, old: Any) -> Any:
    """A store that all ranks of the new group reach: the old one, or one in rank 0. Raises if a rank is lost."""
    kept = None
    told = torch.zeros(_ADDRESS_BYTES, dtype=torch.uint8)
    if backend.rank() == 0 and not _answers(old):
        host, _ = _door.split_address(_door.doors_of(backend.workers)[0])
        kept, address = hold_store(f"[{host}]:0" if ":" in host else f"{host}:0")
        told[: len(address)] = torch.frombuffer(bytearray(address.encode()), dtype=torch.uint8)
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.timeout = timedelta(seconds=_STORE_S)
    backend.broadcast([told], options).wait()
    address = bytes(told.tolist()).rstrip(b"\0").decode()
    if not address:
        kept = old
    elif kept is None:
        host, port = _door.split_address(address)
        kept = TCPStore(host, port, is_master=False, wait_for_workers=False)
    # Names of groups begin anew, and what was under them is of other ranks.
    return PrefixStore(f"shrunk/{backend.job.hex()}", kept)


def _answers(store: Any) -> bool:
    """Whether a store can be used, and soon."""
    patience = store.timeout
    try:
        store.set_timeout(timedelta(seconds=_STORE_S / 2))
        store.add("reducer/asked", 1)  # which waits for an answer, as set() does not
        store.set_timeout(patience)
    except RuntimeError:  # each kind of store has its own
        return False
    return True


def _publish(old: Any, backend: Any, ranks: list[int], store: Any) -> dist.ProcessGroup:
    """Puts the new group in the old one's place. `ranks`: what its members were in the old group, in order."""
    world = c10d._world
    default = old is c10d._get_default_group()
    devices = list(old._device_types)
    config = world.pg_backend_config.get(old, "")
    if default:
        global_ranks = list(range(len(ranks)))
        dist.destroy_process_group()
        name = c10d._process_group_name([], use_hashed_name=False)
    else:
        of_old = dist.get_process_group_ranks(old)
        global_ranks = [of_old[rank] for rank in ranks]
        dist.destroy_process_group(old)
        name = c10d._process_group_name(global_ranks, use_hashed_name=True)
    prefixed = PrefixStore(f"{name}/", store)
    group: Any = dist.ProcessGroup(prefixed, backend.rank(), backend.size())
    kind = dist.ProcessGroup.BackendType.CUSTOM
    for device in devices:
        group._register_backend(device, kind, backend)
    group._set_default_backend(kind)
    group._set_group_name(name)
    group._set_group_desc("default_pg" if default else f"{old.group_name}:shrunk")
    backend._set_sequence_number_for_group()
    if default:
        c10d._update_default_pg(group)
    c10d._register_pg_in_world(
        pg=group,
        backend_name="reducer",
        store=prefixed,
        group_name=name,
        backend_config=config,
        rank_mapping={rank: index for index, rank in enumerate(global_ranks)},
    )
    return group  # type: ignore[no-any-return]
