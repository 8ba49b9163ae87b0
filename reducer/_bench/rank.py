"""One rank of a benchmark: opens groups, times collectives and checks results, on command.

A command is a JSON object {"do": NAME, ...}, and so is its answer; an error is answered as
{"error": TEXT} and leaves the rank ready for the next command. Started as

    python -m reducer._bench.rank --control FD

it reads commands line by line from an inherited socket and ends when that closes; each has a
"number", and its answer has the same.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from reducer._bench import memory
from reducer._bench.cases import Case, CaseKey
from reducer._bench.machine import cpu_seconds

Message = dict[str, Any]


class Rank:
    """The state of one rank: its store, its groups, and the buffers of the last case."""

    def __init__(self) -> None:
        self._store: Store | None = None
        self._rank = 0
        self._world_size = 1
        self._local_rank = 0
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._devices: dict[str, torch.device] = {}
        self._case: Case | None = None
        self._case_id: tuple[object, ...] = ()

    def handle(self, command: Message) -> Message:
        """Answers one command; never raises."""
        try:
            handler: Callable[..., Message] = getattr(self, "_do_" + command["do"])
            return handler(**{key: value for key, value in command.items() if key != "do"})
        except Exception as error:  # whatever it is, the report shows it
            if os.environ.get("REDUCER_BENCH_TRACEBACK"):
                traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}

    def adopt(self, store: Store, rank: int, world_size: int, local_rank: int) -> None:
        """Uses a store made elsewhere (torchrun's)."""
        self._store, self._rank, self._world_size = store, rank, world_size
        self._local_rank = local_rank

    def _do_host_store(self, host: str, world_size: int) -> Message:
        """Rank 0: makes the store that all ranks will meet at, on a free port."""
        store = TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False, timeout=_seconds(60))
        self.adopt(store, 0, world_size, 0)
        return {"port": store.port}

    def _do_join_store(self, host: str, port: int, rank: int, world_size: int) -> Message:
        store = TCPStore(host, port, world_size, is_master=False, timeout=_seconds(60))
        self.adopt(store, rank, world_size, rank)
        return {}

    def _do_open(self, name: str, backend: str, environment: dict[str, str], timeout_s: float) -> Message:
        """Makes the group `name`. The environment holds while it is made: backends read it then."""
        device = self._device_for(backend)
        with _environment(environment):
            if backend == "reducer":
                import reducer  # noqa: F401 - registers the backend
            if not dist.is_initialized():
                assert self._store is not None, "open before a store"
                dist.init_process_group(
                    backend,
                    store=PrefixStore(name, self._store),
                    rank=self._rank,
                    world_size=self._world_size,
                    timeout=_seconds(timeout_s),
                )
                group = dist.group.WORLD
            else:
                group = dist.new_group(backend=backend, timeout=_seconds(timeout_s))
            assert group is not None
            # Connections are made at the first call: with it a wrong setting shows here.
            dist.all_reduce(torch.zeros(1, device=device), group=group)
        self._groups[name] = group
        self._devices[name] = device
        return {}

    def _do_measure(
        self,
        group: str,
        collective: str,
        dtype: str,
        op: str,
        nbytes: int,
        iterations: int,
    ) -> Message:
        """Times every iteration on its own and compares every result.

        Within a block nothing stands between two calls, no barrier either: as in nccl-tests a rank
        that is late shows in the others' times. A block begins with an untimed small call, so that
        filling the buffers, which takes each rank a different time, is in nobody's figures.
        """
        key = CaseKey(collective, dtype, op, nbytes)
        case = self._prepare(key, iterations, self._devices[group])
        process_group = self._groups[group]
        call = case.call(process_group)
        aligner = torch.zeros(1, device=self._devices[group])
        times: list[int] = []
        wrong, first = 0, None
        busy, total = 0.0, 0.0
        cuda = self._devices[group].type == "cuda"
        while len(times) < iterations:
            used = min(case.slots, iterations - len(times))
            case.fill()
            with _no_collection():
                dist.all_reduce(aligner, group=process_group)
                busy_before, total_before = cpu_seconds()
                for slot in range(used):
                    begin = time.perf_counter_ns()
                    call(slot)
                    if cuda:
                        torch.cuda.synchronize()
                    times.append(time.perf_counter_ns() - begin)
                busy_after, total_after = cpu_seconds()
            busy += busy_after - busy_before
            total += total_after - total_before
            if case.checks:
                bad, difference = case.difference(used)
                wrong += bad
                first = first or difference
        return {
            "times_ns": times,
            "wrong": wrong,
            "difference": first,
            "nbytes": case.nbytes,
            "cpu_busy_s": busy,
            "cpu_total_s": total,
        }

    def _do_explain(self, group: str, sizes: list[int]) -> Message:
        """The algorithms by size, and what `auto` expects at each of the sizes."""
        native: Any = self._groups[group]._get_backend(self._devices[group])
        return {"algorithm": native.algorithm, "ways": [native.explain(nbytes) for nbytes in sizes]}

    def _do_place(self) -> Message:
        """This rank's host, as a text that its other ranks have, too."""
        from reducer import _core

        return {"place": _core.host_identity()}

    def _do_memory(self, group: str, nbytes: int) -> Message:
        """Peak extra resident memory of one large all-reduce."""
        self._case, self._case_id = None, ()
        return memory.measure_worker(self._groups[group], nbytes, self._rank, self._world_size)

    def _do_close(self) -> Message:
        """Ends all groups; the rank may be told to open others afterwards."""
        self._groups.clear()
        if dist.is_initialized():
            dist.destroy_process_group()
        return {}

    def _prepare(self, key: CaseKey, iterations: int, device: torch.device) -> Case:
        # Contenders of one process measure the same case one after another: on the same buffers.
        case_id = (key, iterations, device)
        if self._case is None or self._case_id != case_id:
            self._case = None
            self._case = Case(key, self._rank, self._world_size, iterations, device)
            self._case_id = case_id
        return self._case

    def _device_for(self, backend: str) -> torch.device:
        if backend != "nccl":
            return torch.device("cpu")
        if not dist.is_nccl_available():
            raise RuntimeError(f"this torch ({torch.__version__}) was built without NCCL")
        if not torch.cuda.is_available():
            raise RuntimeError("NCCL needs a CUDA GPU and this machine has none")
        if self._local_rank >= torch.cuda.device_count():
            raise RuntimeError(
                f"NCCL needs a GPU for every rank: this machine has {torch.cuda.device_count()}, and more ranks"
            )
        device = torch.device("cuda", self._local_rank)
        torch.cuda.set_device(device)
        return device


def _seconds(value: float) -> timedelta:
    return timedelta(seconds=value)


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """Sets variables for a while; an empty value unsets one."""
    before = {name: os.environ.get(name) for name in changes}
    try:
        for name, value in changes.items():
            _set_variable(name, value or None)
        yield
    finally:
        for name, old in before.items():
            _set_variable(name, old)


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the garbage collector out of the timed part."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def main(rank: Rank | None = None) -> None:
    """Serves a rank, of this class or of one with more commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--control", type=int, required=True, help="inherited socket's number")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    torch.set_num_threads(1)
    rank = rank or Rank()
    with socket.socket(fileno=arguments.control) as control, control.makefile("rwb") as lines:
        for line in lines:
            command = json.loads(line)
            number = command.pop("number")
            lines.write(json.dumps({**rank.handle(command), "number": number}).encode() + b"\n")
            lines.flush()
    # The parent is gone or has had what it wanted: a group that hangs must not keep the process.
    os._exit(0)


if __name__ == "__main__":
    main()
