"""`reducer tune`: measures each way to go on the cluster as it is, and writes the table that `auto` goes by."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

import reducer
from reducer import _core, tuning
from reducer._bench import report, units
from reducer._bench.contest import CONTENDER_ERRORS, Budget, Contender, Outcome, run_case
from reducer._bench.explain import way_name
from reducer._bench.processes import ChildError
from reducer._bench.start import ReducersOption, started_reducers, started_team, under_torchrun
from reducer._bench.team import Team
from reducer.errors import InvalidArgumentError

Way = tuple[str, int, int]  # algorithm, chunk, window; 0: the library's choice


def tune_command(
    output: Annotated[
        Path, typer.Option(help="The table to write; one that is there keeps what it has of other shapes.")
    ] = Path("reducer-tuning.json"),
    ranks: Annotated[
        int, typer.Option(min=2, help="Ranks to start on this machine. Under torchrun, its ranks are used instead.")
    ] = 2,
    reducers: ReducersOption = 0,
    algorithm: Annotated[
        str | None,
        typer.Option(help="What to measure: a list of direct, server and mixed. Default: all that can run here."),
    ] = None,
    chunks: Annotated[
        str | None,
        typer.Option(help="Chunk sizes to measure beside the library's choice: a list, as in 64KiB,256KiB."),
    ] = None,
    smallest: Annotated[str, typer.Option("--min", help="Smallest size.")] = "1KiB",
    largest: Annotated[str, typer.Option("--max", help="Largest size.")] = "64MiB",
    factor: Annotated[int, typer.Option(min=2, help="Each size is so many times the last.")] = 4,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time to spend on each size of each way, in seconds.")] = 0.5,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds after which an all-reduce counts as failed.")] = 60.0,
) -> None:
    """Measure every algorithm over sizes on this cluster, and write the table that `auto` goes by.

    On one machine it starts its ranks itself. On a cluster start it with torchrun, as the training will be (as many
    ranks on as many hosts, REDUCER_SERVERS set): torchrun ... -m -- reducer tune --output tuning.json. Then set
    REDUCER_TUNING=tuning.json (rank 0 reads it), or reducer.Options(tuning="tuning.json").
    """
    console = Console() if Console().is_terminal else Console(width=120)
    try:
        sizes = tuple(units.size_range(units.parse_size(smallest), units.parse_size(largest), factor))
        servers = os.environ.get("REDUCER_SERVERS", "").strip()
        if under_torchrun() and reducers:
            raise ValueError("--reducers starts them on one machine: under torchrun set REDUCER_SERVERS")
        ways = _ways(algorithm, chunks, bool(reducers or servers))
        if output.exists():
            tuning.read_table(output)  # what cannot be added to is not to be found out at the end
        if not output.parent.is_dir():
            raise ValueError(f"--output: the folder '{output.parent}' does not exist")
    except (ValueError, InvalidArgumentError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}")
        raise typer.Exit(2) from None
    budget = Budget(seconds=seconds, timeout_s=2 * timeout + 10 * seconds)
    try:
        with started_reducers(reducers) as started, started_team(ranks) as (team, is_first):
            if is_first:
                servers = ",".join(server.address for server in started) or servers
                _tune(console, team, servers, ways, sizes, budget, timeout, output)
    except (*CONTENDER_ERRORS, InvalidArgumentError, OSError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _ways(algorithm: str | None, chunks: str | None, with_servers: bool) -> list[Way]:
    known = ("direct", "mixed", "server") if with_servers else ("direct",)
    names = known if algorithm is None else tuple(dict.fromkeys(item.strip() for item in algorithm.split(",")))
    for name in names:
        if name not in ("direct", "mixed", "server"):
            raise ValueError(f"--algorithm {name!r} is nothing that auto chooses among: direct, mixed and server")
        if name not in known:
            raise ValueError(f"--algorithm {name} needs standalone reducers: say --reducers 2, or set REDUCER_SERVERS")
    sizes = [0] if chunks is None else [0, *units.parse_sizes(chunks)]
    for nbytes in sizes[1:]:
        if not _core.min_chunk_bytes <= nbytes <= _core.max_chunk_bytes:
            raise ValueError(f"--chunks: {units.format_size(nbytes)} is outside of 4KiB to 16MiB")
    return [(name, chunk, 0) for name in names for chunk in dict.fromkeys(sizes)]


def _tune(
    console: Console,
    team: Team,
    servers: str,
    ways: Sequence[Way],
    sizes: Sequence[int],
    budget: Budget,
    timeout_s: float,
    output: Path,
) -> None:
    hosts = len({reply["place"] for reply in team.call({"do": "place"}, 60.0)})
    contenders = _open(team, servers, ways, timeout_s)
    count = len(tuning_servers(servers))
    title = f"all_reduce of float32 (sum), {team.world_size} ranks on {hosts} hosts, {count} standalone reducers"
    cases: list[list[Outcome]] = []
    with Live(console=console, transient=True, refresh_per_second=4) as live:
        for nbytes in sizes:
            case = {"collective": "all_reduce", "dtype": "float32", "op": "sum", "nbytes": nbytes}
            cases.append(run_case(contenders, case, budget))
            _check_alive(contenders)
            live.update(report.bench_table(title, "all_reduce", team.world_size, cases, max(4, console.height - 8)))
    console.print(report.bench_table(title, "all_reduce", team.world_size, cases))
    for complaint in report.complaints(cases):
        console.print(f"[yellow]note:[/] {escape(complaint)}", highlight=False)
    by_name = {way_name(*way): way for way in ways}
    shape = (team.world_size, hosts, count)
    samples = [
        tuning.Sample(*by_name[outcome.contender], *shape, outcome.nbytes, max(1, round(outcome.median_s * 1e9)))
        for case in cases
        for outcome in case
        if outcome.ok
    ]
    if not samples:
        raise InvalidArgumentError("no way gave a right result: there is no table to write")
    picked = _core.choose_algorithms(samples, team.world_size, hosts, count)
    about = [
        f"reducer {reducer.__version__}, {time.strftime('%Y-%m-%d %H:%M %Z')}: {title}; medians of the slowest rank",
        f"standalone reducers: {servers or 'none'}",
        f"auto with this table: {picked}",
        "use: REDUCER_TUNING=<this file> on rank 0, or reducer.Options(tuning=...)",
    ]
    tuning.write_table(output, samples, about)
    console.print(picked_table(picked))
    console.print(f"written: {output}; use it with REDUCER_TUNING={output}", highlight=False)


def _check_alive(contenders: Sequence[Contender]) -> None:
    """ChildError if a rank was lost: all ways need it."""
    for contender in contenders:
        if contender.failed is not None:
            raise ChildError(contender.failed)


def tuning_servers(text: str) -> list[str]:
    """The addresses behind REDUCER_SERVERS: a name may have several."""
    names = [item.partition("@")[0].strip() for item in text.split(",") if item.strip()]
    return _core.resolve_servers(names) if names else []


def _open(team: Team, servers: str, ways: Sequence[Way], timeout_s: float) -> list[Contender]:
    local = {} if under_torchrun() else {"REDUCER_INTERFACE": "lo"}
    contenders = []
    for way in ways:
        environment = {
            **local,
            "REDUCER_SERVERS": servers,
            "REDUCER_ALGORITHM": way[0],
            "REDUCER_CHUNK_BYTES": str(way[1]) if way[1] else "",
        }
        contender = Contender(way_name(*way), "reducer", team, environment)
        contender.open(timeout_s)
        if contender.failed is not None:
            raise InvalidArgumentError(f"{contender.name} cannot run here: {contender.failed}")
        contenders.append(contender)
    return contenders


def picked_table(picked: str) -> Table:
    """The ranges of a text like "0-64KiB:direct,64KiB-:mixed"."""
    table = Table("sizes", "algorithm", title="what auto will do", title_justify="left")
    for item in picked.split(","):
        sizes, _, way = item.rpartition(":")
        table.add_row(sizes or "all", way)
    return table
