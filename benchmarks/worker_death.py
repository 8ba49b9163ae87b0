"""How soon every other worker knows that one has died: kill -9 of a random worker of a fresh job, again and again.

Each job has its workers in a loop of all-reduces, as if each had a host of its own. The time is from the kill to the
error on the last of the survivors, on one machine and so by one clock. Every error must name the dead rank, its host
and its last collective: a text that does not ends the run with exit status 1.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch._C._distributed_c10d import TCPStore

from reducer._bench.servers import start_servers
from reducer._bench.statistics import median, percentile
from reducer._bench.units import format_seconds

WAYS = ("server", "direct", "local")
_START_S = 60.0
# The issue is how soon; this is when it is over.
_GIVE_UP_S = 60.0
# In which the kill comes at a random moment, of one of many calls.
_RUN_S = 0.3

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed"])


class DeathError(Exception):
    """A worker did not do what it should."""


def _work(rank: int, world_size: int, port: int, env: dict[str, str], count: int, pipe: Connection) -> None:
    """Sums until it fails, and tells when and how."""
    os.environ.update(env)
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    dist.init_process_group("reducer", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
    tensor = torch.zeros(count)
    dist.all_reduce(tensor)
    pipe.send("ready")
    try:
        while True:
            dist.all_reduce(tensor)
    except dist.DistBackendError as error:
        pipe.send((time.monotonic(), str(error)))


@contextmanager
def _job(world_size: int, env: list[dict[str, str]], count: int) -> Iterator[tuple[list[int], list[Connection]]]:
    """The workers' process ids and pipes."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    try:
        for rank in range(world_size):
            ours, theirs = _context.Pipe()
            arguments = (rank, world_size, store.port, env[rank], count, theirs)
            processes.append(_context.Process(target=_work, args=arguments))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        yield [process.pid or 0 for process in processes], pipes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _gather(pipes: dict[int, Connection], seconds: float) -> dict[int, object]:
    """What each rank says, within the time."""
    deadline = time.monotonic() + seconds
    said: dict[int, object] = {}
    while len(said) < len(pipes):
        pending = {pipe: rank for rank, pipe in pipes.items() if rank not in said}
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise DeathError(f"ranks {sorted(pending.values())} said nothing within {seconds:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pending[pipe]
            try:
                said[rank] = pipe.recv()
            except (EOFError, ConnectionError):
                raise DeathError(f"rank {rank} ended unasked") from None
    return said


def _kill_one(world_size: int, env: list[dict[str, str]], count: int, chance: random.Random) -> tuple[float, str, int]:
    """Seconds to the last error, one of the texts, and the rank that was killed."""
    with _job(world_size, env, count) as (pids, pipes):
        _gather(dict(enumerate(pipes)), _START_S)
        victim = chance.randrange(world_size)
        time.sleep(chance.uniform(0.0, _RUN_S))
        killed_at = time.monotonic()
        os.kill(pids[victim], signal.SIGKILL)
        survivors = {rank: pipe for rank, pipe in enumerate(pipes) if rank != victim}
        last = 0.0
        text = ""
        for rank, said in _gather(survivors, _GIVE_UP_S).items():
            assert isinstance(said, tuple)
            ended_at, text = said
            last = max(last, ended_at - killed_at)
            wanted = (f"rank {victim} ({socket.gethostname()}:{pids[victim]})", "; the last collective it joined was #")
            if not all(part in text for part in wanted):
                raise DeathError(f"rank {rank} was not told who died, or where it was: {text}")
        return last, text, victim


def _environments(way: str, world_size: int, servers: str) -> list[dict[str, str]]:
    if way == "local":
        return [{}] * world_size
    env = {"REDUCER_ALGORITHM": way, "REDUCER_SERVERS": servers}
    return [{**env, "REDUCER_TEST_PLACE": f"host{rank}"} for rank in range(world_size)]


def main(
    kills: Annotated[int, typer.Option(min=1, help="Workers to kill for each way, each in a job of its own.")] = 50,
    workers: Annotated[int, typer.Option(min=2)] = 4,
    reducers: Annotated[int, typer.Option(min=1, help="Of `server`.")] = 2,
    ways: Annotated[str, typer.Option(help=f"Some of {','.join(WAYS)}.")] = "server,direct",
    count: Annotated[int, typer.Option(min=0, help="Elements (float32) of the all-reduces.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of who is killed, and when.")] = 1,
) -> None:
    """Prints median, p99 and the longest time from kill -9 to the error on the last rank, and one error."""
    console = Console() if sys.stdout.isatty() else Console(width=125)
    unknown = [way for way in ways.split(",") if way not in WAYS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is no way: choose from {', '.join(WAYS)}")
    table = Table("way", "kills", "median", "p99", "longest", title=f"{workers} workers, kill -9 to the last error")
    text = ""
    for way in ways.split(","):
        chance = random.Random(seed)
        seconds = []
        for _ in range(kills):
            # Fresh ones, too: what one job leaves behind is no business of the next.
            servers = start_servers(reducers if way == "server" else 0)
            try:
                addresses = ",".join(server.address for server in servers)
                took, text, _ = _kill_one(workers, _environments(way, workers, addresses), count, chance)
                seconds.append(took)
            except DeathError as error:
                console.print(f"{way}, kill {len(seconds) + 1}: {error}", style="red")
                raise SystemExit(1) from None
            finally:
                for server in servers:
                    server.child.stop()
        times = [median(seconds), percentile(seconds, 99), max(seconds)]
        table.add_row(way, str(kills), *(format_seconds(each) for each in times))
    console.print(table)
    console.print(f"One of the errors: {text}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
