"""How near the simulation comes to the emulated cluster: the same jobs on both, beside each other.

Each job runs on emulated hosts of its own (benchmarks/netlab.py describes them), then in `reducer simulate`'s model.
The model's parameters are measured in the same run: the line by a plain TCP stream, the latency by a plain TCP
ping-pong. Processors cost nothing in it, so compare at a rate at which they do not limit the emulation (its CPU time
stands beside), or with --processor: then the machine's cores are in the model, all hosts' together, and what a frame
and a byte cost them is taken from the first job's CPU time. Needs Linux, root, iproute2.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import netlab
import netlab_cluster
import typer
from netlab_cluster import Cluster, NetlabError
from netlab_contender import Contender, stop_all
from netlab_line import line_rate, one_way_seconds
from netlab_run import server_binary
from netlab_scenarios import TRANSPORTS, Competitor
from netlab_worker import Turn
from rich.console import Console
from rich.table import Table

from reducer._bench.machine import cpu_seconds
from reducer._bench.statistics import median
from reducer._bench.units import format_seconds, format_size, parse_rate, parse_sizes
from reducer._simulate.model import PAYLOAD_SHARE, Job, Network, simulate

_SMALL_BYTES = 1 << 10
# Of netlab's token buckets.
_BURST_BYTES = 128 << 10
_TOLERANCE = 0.10


@dataclass(frozen=True)
class Case:
    """A job, and what it took on the emulated hosts: median seconds, and CPU seconds of the machine, by size."""

    job: Job
    seconds: dict[int, float]
    cpu_s: dict[int, float]
    cpu_share: dict[int, float]


@dataclass(frozen=True)
class Comparison:
    """One job and size, on both."""

    workers: int
    reducers: int
    algorithm: str
    nbytes: int
    emulated_s: float
    cpu_share: float  #: of the machine's, while emulated
    simulated_s: float

    @property
    def ratio(self) -> float:
        return self.simulated_s / self.emulated_s


def parse_job(text: str, chunk_bytes: int = 0) -> Job:
    """ "mixed:8+4": mixed with 8 workers and 4 reducers. ValueError says what is wrong with it."""
    algorithm, _, counts = text.strip().partition(":")
    workers, _, reducers = counts.partition("+")
    if algorithm not in ("direct", "server", "mixed", "ring") or not (workers.isdigit() and reducers.isdigit()):
        raise ValueError(f"{text!r} is no job: write it like mixed:8+4 (direct, server, mixed or ring)")
    return Job(int(workers), int(reducers), algorithm, chunk_bytes)


def emulate(cluster: Cluster, job: Job, transport: str, sizes: list[int], seconds: float) -> Case:
    """Runs the job on the cluster's hosts, each size for about `seconds`."""
    contender = Contender(Competitor(f"{job.algorithm}:{transport}"), cluster)
    case = Case(job, {}, {}, {})
    try:
        if job.reducers:
            labels = [f"r{i}" for i in range(job.reducers)]
            contender.start_reducers(server_binary(), labels, 1, "auto")
        settings = {"REDUCER_CHUNK_BYTES": str(job.chunk_bytes)} if job.chunk_bytes else {}
        contender.start_workers([f"w{i}" for i in range(job.workers)], settings)
        for nbytes in sizes:
            first = contender.run(Turn(nbytes, 2), 60.0)
            count = max(4, min(400, round(seconds / median(first.seconds))))
            busy, total = cpu_seconds()
            result = contender.run(Turn(nbytes, count), 60.0 + 10 * seconds)
            busy_after, total_after = cpu_seconds()
            if first.wrong or result.wrong:
                raise NetlabError(f"{job.algorithm}: {first.wrong + result.wrong} wrong results")
            case.seconds[nbytes] = median(result.seconds)
            case.cpu_share[nbytes] = (busy_after - busy) / (total_after - total)
            # The machine's share while it ran, of the time that the all-reduces took: what tells a turn to start and
            # prepares tensors is not in it.
            case.cpu_s[nbytes] = case.cpu_share[nbytes] * (os.cpu_count() or 1) * median(result.seconds)
    finally:
        stop_all([contender], print)
    return case


def calibrated(network: Network, case: Case, large: int) -> Network:
    """The network with what frames and bytes cost the machine in this job (at either of their two ends)."""
    (small_row, large_row) = simulate(case.job, network, [_SMALL_BYTES, large], 4)
    # The two sizes' CPU times in frames and bytes: two equations.
    frames = [float(row.found["all_frames"]) for row in (small_row, large_row)]
    nbytes = [PAYLOAD_SHARE * float(row.found["all_bytes"]) for row in (small_row, large_row)]
    cpu = [case.cpu_s[_SMALL_BYTES], case.cpu_s[large]]
    determinant = frames[0] * nbytes[1] - frames[1] * nbytes[0]
    frame_s = max(0.0, (cpu[0] * nbytes[1] - cpu[1] * nbytes[0]) / determinant)
    byte_s = max(0.0, (cpu[1] - frames[1] * frame_s) / nbytes[1])
    cores = os.cpu_count() or 1
    return dataclasses.replace(network, cores=cores, shared_cores=True, frame_s=frame_s, byte_s=byte_s)


def compare(case: Case, network: Network, sizes: list[int]) -> list[Comparison]:
    """The case beside its simulation."""
    job = case.job
    return [
        Comparison(
            job.workers, job.reducers, job.algorithm, row.nbytes,
            case.seconds[row.nbytes], case.cpu_share[row.nbytes], row.seconds,
        )
        for row in simulate(job, network, sizes, 4)
    ]  # fmt: skip


def comparison_table(rows: list[Comparison], title: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for heading in ("workers", "reducers", "algorithm", "size", "emulated", "CPU", "simulated", "ratio"):
        table.add_column(heading, justify="left" if heading == "algorithm" else "right", no_wrap=True)
    for number, row in enumerate(rows):
        near = abs(row.ratio - 1) <= _TOLERANCE
        table.add_row(
            str(row.workers), str(row.reducers), row.algorithm, format_size(row.nbytes),
            format_seconds(row.emulated_s), f"{row.cpu_share:.0%}", format_seconds(row.simulated_s),
            f"{row.ratio:.2f}" if near else f"[red]{row.ratio:.2f}",
            end_section=number + 1 == len(rows) or rows[number + 1].algorithm != row.algorithm,
        )  # fmt: skip
    return table


def run(
    jobs: list[Job],
    rate: str,
    transport: str,
    processor: bool,
    sizes: list[int],
    seconds: float,
    console: Console,
    output: Path,
) -> int:
    """Everything; the exit code."""
    for name in netlab_cluster.remove_leftovers():
        console.print(f"removed {name}, left over from a run that was killed")
    most_workers, most_reducers = max(job.workers for job in jobs), max(job.reducers for job in jobs)
    labels = [f"w{i}" for i in range(most_workers)] + [f"r{i}" for i in range(most_reducers)]
    with Cluster(labels, rate, None) as cluster:
        line = line_rate(cluster, labels[0], labels[-1])
        latency = one_way_seconds(cluster, labels[0], labels[-1])
        cases = []
        for job in jobs:
            console.print(f"emulating {job.algorithm}, {job.workers} + {job.reducers}")
            cases.append(emulate(cluster, job, transport, [_SMALL_BYTES, *sizes], seconds))
    network = Network(bandwidth=line / PAYLOAD_SHARE, latency_s=latency, burst_bytes=_BURST_BYTES)
    console.print(f"the line {line / 1e9:.3f} Gbit/s, latency {format_seconds(latency)}")
    if processor:
        network = calibrated(network, cases[0], max(sizes))
        console.print(
            f"by the first job's CPU time a frame costs {format_seconds(network.frame_s)} and a byte "
            f"{network.byte_s * 1e9:.2f} ns at each end, of {network.cores} cores for all hosts"
        )
    rows = [row for case in cases for row in compare(case, network, [_SMALL_BYTES, *sizes])]
    title = f"emulated and simulated, {rate} per host, transport {transport}"
    console.print(comparison_table(rows, title))
    judged = [row for row in rows if row.nbytes != _SMALL_BYTES]
    near = sum(abs(row.ratio - 1) <= _TOLERANCE for row in judged)
    console.print(f"{near} of {len(judged)} above 1 KiB within {_TOLERANCE:.0%}")
    output.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "rate": rate,
        "transport": transport,
        "network": asdict(network),
        "rows": [asdict(row) | {"ratio": row.ratio} for row in rows],
    }
    output.write_text(json.dumps(facts, indent=1) + "\n")
    console.print(f"wrote {output}")
    return 0 if near == len(judged) else netlab.EXIT_FAILED


def _terminate(number: int, _: FrameType | None) -> None:
    for each in netlab_cluster.ENDING_SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # the clean-up is bounded, and must not be cut short
    raise SystemExit(128 + number)


def main(
    jobs: Annotated[
        str, typer.Option(help="Jobs, as ALGORITHM:WORKERS+REDUCERS.")
    ] = "direct:4+0,direct:8+0,ring:8+0,server:4+4,server:8+8,mixed:8+4",
    rate: Annotated[str, typer.Option(help="Each host's NIC, as tc writes it.")] = "200mbit",
    sizes: Annotated[str, typer.Option(help="Tensors, beside 1 KiB.")] = "1MiB,16MiB",
    seconds: Annotated[float, typer.Option(min=0.1, help="To emulate each job at each size.")] = 3.0,
    transport: Annotated[str, typer.Option(help="As REDUCER_TRANSPORT.")] = "auto",
    processor: Annotated[
        bool, typer.Option("--processor", help="Model the cores, too, at the cost that the first job shows.")
    ] = False,
    chunk: Annotated[str, typer.Option(help="As REDUCER_CHUNK_BYTES; 0: chosen.")] = "0",
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/sim_check.json"),
) -> None:
    """The same jobs on the emulated cluster and in the simulation. Exit status 1 if any differ by more than 10%."""
    console = Console() if sys.stdout.isatty() else Console(width=110)
    try:
        (chunk_bytes,) = parse_sizes(chunk)
        wanted = [parse_job(text, chunk_bytes) for text in jobs.split(",")]
        if transport not in TRANSPORTS:
            raise ValueError(f"{transport!r} is no transport: choose from {', '.join(TRANSPORTS)}")
        parse_rate(rate)
        tensors = parse_sizes(sizes)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    reason = netlab_cluster.why_not()
    if reason is not None:
        print(f"sim_check cannot run here: {reason}", file=sys.stderr)
        raise SystemExit(netlab.EXIT_NOT_HERE)
    for each in netlab_cluster.ENDING_SIGNALS:
        signal.signal(each, _terminate)
    try:
        code = run(wanted, rate, transport, processor, tensors, seconds, console, output)
    except NetlabError as error:
        console.print(f"[red]{error}[/red]")
        code = netlab.EXIT_FAILED
    raise SystemExit(code)


if __name__ == "__main__":
    typer.run(main)
