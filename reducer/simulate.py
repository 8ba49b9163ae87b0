"""`reducer simulate`: all-reduces of a job of any size, on a model of the network.

What runs is the library's own engine and exchange code, each host's with its connections, windows and frames; only the
network is a model (csrc/transport/sim/nic.h): NICs that their connections share equally, headers, a latency, and, if
asked for, cores that take time for frames and bytes. So it shows what a cluster would do that nobody has at hand, as
far as NICs and processors decide it. Packet loss and TCP's windows are not in it. docs/scaling.md tells how near it
comes to the emulated cluster.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from reducer._bench.report import check_can_draw, write_json
from reducer._bench.units import parse_rate, parse_sizes
from reducer._simulate.model import Job, Network, Row, jobs_of, parse_duration, simulate
from reducer._simulate.report import describe, draw, simulation_table
from reducer.errors import ReducerError

ALGORITHMS = ("auto", "direct", "server", "mixed", "ring")
_EXIT_FAILED = 1
_LOG_COLUMNS = 200


def simulate_command(
    workers: Annotated[str, typer.Option(help="Workers, a host each: a number, or several as in 64,256.")] = "8",
    reducers: Annotated[
        str, typer.Option(help="Standalone reducers, a host each: numbers, or shares of the workers, as in 0,n/2,n.")
    ] = "n",
    bandwidth: Annotated[str, typer.Option(help="Each host's NIC, each way, as tc writes it.")] = "25gbit",
    reducer_bandwidth: Annotated[
        str | None, typer.Option(help="The reducers' NICs, if they differ from the workers'.")
    ] = None,
    latency: Annotated[str, typer.Option(help="Of a packet, one way, with what both ends' software adds.")] = "20us",
    jitter: Annotated[str, typer.Option(help="At most so much more, by chance (always the same).")] = "0us",
    size: Annotated[str, typer.Option(help="Tensors of float32: a size, or several as in 1MiB,64MiB.")] = "64MiB",
    algorithm: Annotated[str, typer.Option(help=f"Algorithms, of {', '.join(ALGORITHMS)}.")] = "direct,server",
    iterations: Annotated[int, typer.Option(min=1, help="All-reduces in a row, after one that is not timed.")] = 2,
    chunk: Annotated[str, typer.Option(help="As REDUCER_CHUNK_BYTES; 0: chosen.")] = "0",
    window: Annotated[str, typer.Option(help="As REDUCER_WINDOW_BYTES; 0: chosen.")] = "0",
    cores: Annotated[int, typer.Option(min=0, help="Of each host. 0: processors cost no time.")] = 0,
    shared_cores: Annotated[
        bool, typer.Option("--shared-cores", help="All hosts share the cores, as emulated hosts do.")
    ] = False,
    frame_cost: Annotated[str, typer.Option(help="A core's time for a frame, at either end.")] = "5us",
    byte_cost: Annotated[str, typer.Option(help="A core's time for a byte, at either end.")] = "0.3ns",
    check: Annotated[
        bool,
        typer.Option("--check", help="Give every rank tensors of its own and compare the sums: for small jobs."),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    png_file: Annotated[
        Path | None,
        typer.Option("--png", help="Draw times beside the model, over size, workers and reducers, into this file."),
    ] = None,
) -> None:
    """Time all-reduces of a cluster of any size on a model of its network.

    Example: reducer simulate --workers 64 --reducers 64 --bandwidth 25gbit
    --latency 20us --size 64MiB --algorithm direct,server,ring

    It runs the library's own code for every worker and reducer in this process:
    1,024 of each take minutes and about 6 GiB. The results are the same in
    every run. The exit status is 1 if a sum is wrong or a job cannot run, 2 for
    a wrong option.
    """
    try:
        network = Network(
            bandwidth=parse_rate(bandwidth),
            reducer_bandwidth=None if reducer_bandwidth is None else parse_rate(reducer_bandwidth),
            latency_s=parse_duration(latency),
            jitter_s=parse_duration(jitter),
            cores=cores,
            shared_cores=shared_cores,
            frame_s=parse_duration(frame_cost) if cores else 0.0,
            byte_s=parse_duration(byte_cost) if cores else 0.0,
        )
        if shared_cores and not cores:
            raise ValueError("--shared-cores needs --cores: the number of cores that all hosts have together")
        check_can_draw(png_file)
        sizes = parse_sizes(size)
        jobs = jobs_of(_numbers(workers), reducers, _algorithms(algorithm), _setting(chunk), _setting(window))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console = Console() if sys.stdout.isatty() else Console(width=_LOG_COLUMNS)
    rows = _run(console, jobs, network, sizes, iterations, check)
    title = f"all-reduce, simulated: {describe(network)}"
    console.print(simulation_table(rows, title))
    if json_file is not None:
        write_json(json_file, {"title": title, "command": sys.argv}, [row.as_json() for row in rows])
        console.print(f"figures: {json_file}")
    if png_file is not None:
        draw(rows, title, png_file)
        console.print(f"picture: {png_file}")
    wrong = sum(row.found["wrong"] for row in rows)
    if wrong:
        raise ReducerError(f"{wrong} results were not the sum in rank order")
    if check:
        console.print("every result was compared with the sum, and equal")


def _run(
    console: Console, jobs: list[Job], network: Network, sizes: list[int], iterations: int, check: bool
) -> list[Row]:
    rows: list[Row] = []
    with console.status("simulating") as status:
        for number, job in enumerate(jobs, start=1):
            status.update(
                f"job {number} of {len(jobs)}: {job.algorithm}, {job.workers} workers, {job.reducers} reducers"
            )
            rows += simulate(job, network, sizes, iterations, check)
    return rows


def _numbers(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(item) for item in text.split(",")))
    except ValueError:
        raise ValueError(f"{text!r} is no number of workers: write 64, or several as in 64,256") from None


def _algorithms(text: str) -> list[str]:
    names = list(dict.fromkeys(item.strip() for item in text.split(",")))
    for name in names:
        if name not in ALGORITHMS:
            raise ValueError(f"{name!r} is no algorithm: choose from {', '.join(ALGORITHMS)}")
    return names


def _setting(text: str) -> int:
    (nbytes,) = parse_sizes(text)
    return nbytes
