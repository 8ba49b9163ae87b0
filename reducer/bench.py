"""`reducer bench`: collectives timed and checked, several backends side by side in one run.

How a figure comes about, in the manner of NVIDIA's nccl-tests (its PERFORMANCE.md derives algbw and
busbw, and the factors between them):

* All contenders are groups of the same processes, on the same interface, with the same buffers. At
  each size they warm up, then take turns in rounds, another one first each time, so that what else
  happens on the machine meets all of them alike.
* Each iteration is timed on each rank, from the call until the result is there, and nothing, no
  barrier either, stands between two iterations. The iteration's time is that of its slowest rank;
  the table gives the median and the 99th percentile of these (with less than 100 iterations that is
  the slowest).
* Inputs are whole numbers, so that the exact result is known beforehand in whatever order it is
  computed. Every result, of every iteration and rank, is compared with it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape

from reducer._bench import programs, report, units
from reducer._bench.contest import CONTENDER_ERRORS, Budget, Contender, Outcome, run_case
from reducer._bench.explain import explain_choice, read_choice
from reducer._bench.formulas import COLLECTIVES, bus_factor
from reducer._bench.memory_mode import memory_table, run_memory
from reducer._bench.start import ReducersOption, started_reducers, started_team, under_torchrun
from reducer._bench.team import Team

BACKENDS = ("reducer", "gloo", "nccl", "core", "openmpi")
ALGORITHMS = ("auto", "local", "direct", "server", "mixed", "ring")
TRANSPORTS = ("auto", "grpc", "tcp", "shm")
DTYPES = (
    *("float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)
OPS = ("sum", "avg", "product", "min", "max", "band", "bor", "bxor")


@dataclass(frozen=True)
class Plan:
    """What was asked for."""

    backends: tuple[str, ...]
    algorithms: tuple[str, ...]
    transport: str
    collective: str
    dtype: str
    op: str
    sizes: tuple[int, ...]
    servers: tuple[str, ...]
    timeout_s: float
    local: bool
    explain: bool = False


def bench_command(
    backend: Annotated[
        str,
        typer.Option(
            help="What to run side by side: a list of the backends reducer, gloo and nccl, of core (this library's "
            "own C++ interface) and openmpi (both only on one machine, and for the all-reduce of float32, sum)."
        ),
    ] = "reducer,gloo",
    algorithm: Annotated[
        str,
        typer.Option(
            help="Algorithms of the backend reducer to run side by side: "
            "a list of auto, local, direct, server, mixed and ring."
        ),
    ] = "auto",
    transport: Annotated[
        str,
        typer.Option(
            envvar="REDUCER_TRANSPORT", help=f"What the backend reducer's bytes go by: one of {', '.join(TRANSPORTS)}."
        ),
    ] = "auto",
    collective: Annotated[str, typer.Option(help=f"What to run: one of {', '.join(COLLECTIVES)}.")] = "all_reduce",
    ranks: Annotated[
        int,
        typer.Option(
            min=1,
            help="Ranks to start on this machine. Under torchrun, its ranks are used instead.",
        ),
    ] = 2,
    reducers: ReducersOption = 0,
    dtype: Annotated[str, typer.Option(help=f"Element type: one of {', '.join(DTYPES)}.")] = ("float32"),
    op: Annotated[str, typer.Option(help=f"Reduction: one of {', '.join(OPS)}.")] = "sum",
    smallest: Annotated[str, typer.Option("--min", help="Smallest size of the whole tensor.")] = ("4"),
    largest: Annotated[str, typer.Option("--max", help="Largest size of the whole tensor.")] = ("256MiB"),
    factor: Annotated[int, typer.Option(min=2, help="Each size is so many times the last.")] = 4,
    seconds: Annotated[
        float,
        typer.Option(min=0.01, help="Time to spend on each size of each contender, in seconds."),
    ] = 1.0,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds after which a collective counts as failed.")] = 60.0,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="Instead of times, show how much memory one all-reduce of --memory-size takes "
            "beyond the tensor, in a worker and in each reducer, and the bound.",
        ),
    ] = False,
    memory_size: Annotated[str, typer.Option(help="Size of the tensor for --memory.")] = "1GiB",
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Show what `auto` picked at each size and why: the terms of its model for each way, and the predicted "
            "time beside the measured one. Name the fixed algorithms beside it: --algorithm auto,direct,mixed.",
        ),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    png_file: Annotated[
        Path | None, typer.Option("--png", help="Draw time and bandwidth over size into this file; not with --memory.")
    ] = None,
) -> None:
    """Time collectives and check their results, several backends side by side.

    Starts its ranks on this machine, over the loopback interface. To run over a cluster, start it
    with torchrun: torchrun ... -m -- reducer bench ... (the two dashes keep torchrun from taking
    options for its own). GLOO_SOCKET_IFNAME and REDUCER_INTERFACE then choose the interface.
    """
    console = _console()
    try:
        plan = Plan(
            backends=_choices("--backend", backend, BACKENDS),
            algorithms=_choices("--algorithm", algorithm, ALGORITHMS),
            transport=_choice("--transport", transport.strip().lower(), TRANSPORTS),
            collective=_choice("--collective", collective, COLLECTIVES),
            dtype=_choice("--dtype", dtype, DTYPES),
            op=_choice("--op", op, OPS),
            sizes=_sizes(collective, smallest, largest, factor),
            servers=tuple(filter(None, os.environ.get("REDUCER_SERVERS", "").split(","))),
            timeout_s=timeout,
            local=not under_torchrun(),
            explain=explain,
        )
        tensor_bytes = units.parse_size(memory_size)
        if memory and png_file is not None:
            raise ValueError("--memory gives one figure for each contender and draws no --png: leave one of them out")
        report.check_can_draw(png_file)
        if explain:
            _check_explain(plan, memory)
        _check_servers(plan, reducers)
        if memory or not plan.local:
            _check_backends(plan)
        if not plan.local and reducers:
            raise ValueError("--reducers starts them on one machine: under torchrun set REDUCER_SERVERS")
    except ValueError as error:
        console.print(f"[red]error:[/] {escape(str(error))}")
        raise typer.Exit(2) from None
    try:
        if memory:
            fine = _run_memory(console, plan, ranks, reducers, tensor_bytes, json_file)
        else:
            budget = Budget(seconds=seconds, timeout_s=2 * timeout + 10 * seconds)
            fine = _run_speed(console, plan, ranks, reducers, budget, json_file, png_file)
    except (*CONTENDER_ERRORS, FileNotFoundError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if not fine:
        raise typer.Exit(1)


def _run_speed(
    console: Console,
    plan: Plan,
    ranks: int,
    reducers: int,
    budget: Budget,
    json_file: Path | None,
    png_file: Path | None,
) -> bool:
    """Whether every contender that can run here gave right results."""
    absent: dict[str, str] = {}
    with started_reducers(reducers) as started, started_team(ranks) as (team, is_first):
        if not is_first:
            return True
        contenders = _contenders(plan, team, [server.address for server in started])
        for contender in contenders:
            contender.open(plan.timeout_s)
            if contender.failed is not None:
                absent[contender.name] = contender.failed
        cases: list[list[Outcome]] = []
        title = _title(plan, team.world_size, reducers_used(contenders, len(started) or len(plan.servers)))

        def table(rows_max: int = 10_000) -> Any:
            return report.bench_table(title, plan.collective, team.world_size, cases, rows_max)

        with Live(console=console, transient=True, refresh_per_second=4) as live:
            for nbytes in plan.sizes:
                case = {
                    "collective": plan.collective,
                    "dtype": plan.dtype,
                    "op": plan.op,
                    "nbytes": nbytes,
                }
                cases.append(run_case(contenders, case, budget))
                live.update(table(max(4, console.height - 8)))
        choice = (
            read_choice(team, "reducer auto", plan.sizes) if plan.explain and "reducer auto" not in absent else None
        )
    console.print(table())
    if choice is not None:
        explain_choice(console, choice, cases)
    notes = [f"{name} does not take part: {why}" for name, why in absent.items()]
    for note in notes + report.complaints(cases):
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)
    factor = bus_factor(plan.collective, team.world_size)
    if json_file is not None:
        rows = [
            report.as_json(outcome, factor, report.ratio_to("gloo", outcome, case))
            for case in cases
            for outcome in case
        ]
        about = {"title": title, "command": sys.argv, "ranks": team.world_size}
        about |= {"absent": absent}
        about |= {"collective": plan.collective, "dtype": plan.dtype, "op": plan.op}
        report.write_json(json_file, about, rows)
        console.print(f"figures: {json_file}")
    if png_file is not None:
        report.write_bench_png(png_file, title, plan.collective, team.world_size, cases)
        console.print(f"picture: {png_file}")
    return all_fine(cases)


def all_fine(cases: Sequence[Sequence[Outcome]]) -> bool:
    """Whether whoever could start went through all sizes with right results; nobody at all is not fine.

    A backend that cannot run here has no outcome, and is no failure of the run as long as another could.
    """
    outcomes = [outcome for case in cases for outcome in case]
    return bool(outcomes) and all(outcome.ok for outcome in outcomes)


def _run_memory(
    console: Console,
    plan: Plan,
    ranks: int,
    reducers: int,
    nbytes: int,
    json_file: Path | None,
) -> bool:
    findings = []
    with started_reducers(reducers) as started:
        addresses = [server.address for server in started]
        pids = [server.child.pid for server in started]
        for name in [contender.name for contender in _contenders(plan, _NoTeam(), addresses)]:
            # Processes of its own for each: what one leaves in its heap is not the next one's.
            with started_team(ranks) as (team, is_first):
                if not is_first:
                    continue
                contenders = _contenders(plan, team, addresses)
                contender = next(other for other in contenders if other.name == name)
                contender.open(plan.timeout_s)
                servers = len(pids) or len(plan.servers)
                findings.append(run_memory(contender, nbytes, servers, pids, plan.timeout_s))
    if not findings:
        return True
    console.print(memory_table(nbytes, findings))
    for finding in findings:
        if finding.error is not None:
            console.print(f"[yellow]note:[/] {finding.contender}: {escape(finding.error)}")
    if json_file is not None:
        about = {"command": sys.argv, "ranks": ranks, "bytes": nbytes}
        report.write_json(json_file, about, [finding.as_json() for finding in findings])
        console.print(f"figures: {json_file}")
    return all(finding.ok for finding in findings)


class _NoTeam:
    """Stands where contenders are only counted."""

    world_size = 0

    def call(self, command: dict[str, Any], timeout_s: float) -> list[dict[str, Any]]:
        raise AssertionError("no rank was started")

    def close(self) -> None:
        return


def _contenders(plan: Plan, team: Team, started: Sequence[str]) -> list[Contender]:
    """The backends asked for, `reducer` once per algorithm."""
    servers = ",".join(started or plan.servers)
    local = {"GLOO_SOCKET_IFNAME": "lo", "REDUCER_INTERFACE": "lo"} if plan.local else {}
    contenders = []
    for backend in plan.backends:
        if backend in programs.BY_NAME:
            program = programs.BY_NAME[backend](team.world_size, plan.transport)
            contenders.append(Contender(backend, backend, program))
            continue
        if backend != "reducer":
            contenders.append(Contender(backend, backend, team, local))
            continue
        for algorithm in plan.algorithms:
            alone = algorithm in ("local", "direct", "ring")
            environment = {
                **local,
                "REDUCER_ALGORITHM": algorithm,
                "REDUCER_TRANSPORT": plan.transport,
                "REDUCER_SERVERS": "" if alone else servers,
            }
            contenders.append(Contender(f"reducer {algorithm}", backend, team, environment))
    return contenders


def _check_explain(plan: Plan, memory: bool) -> None:
    if memory or plan.collective != "all_reduce" or "reducer" not in plan.backends or "auto" not in plan.algorithms:
        raise ValueError(
            "--explain is of the times of all_reduce, the backend reducer and the algorithm auto; leave --memory out, "
            "and name auto in --algorithm"
        )


def _check_backends(plan: Plan) -> None:
    for backend in plan.backends:
        if backend in programs.BY_NAME:
            raise ValueError(f"--backend {backend} starts its ranks on this machine, and only takes times")


def _check_servers(plan: Plan, reducers: int) -> None:
    needing = [name for name in plan.algorithms if name in ("server", "mixed")]
    if "reducer" in plan.backends and needing and not (reducers or plan.servers):
        raise ValueError(
            f"the algorithm {needing[0]} needs standalone reducers: say --reducers 2, or set REDUCER_SERVERS"
        )


def _choice(option: str, text: str, known: Sequence[str]) -> str:
    if text not in known:
        raise ValueError(f"{option} {text!r} is not known: choose from {', '.join(known)}")
    return text


def _choices(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    items = [_choice(option, item.strip(), known) for item in text.split(",")]
    return tuple(dict.fromkeys(items))


def _sizes(collective: str, smallest: str, largest: str, factor: int) -> tuple[int, ...]:
    if collective == "barrier":
        return (0,)
    first, last = units.parse_size(smallest), units.parse_size(largest)
    return tuple(units.size_range(first, last, factor))


def _title(plan: Plan, ranks: int, reducers: int) -> str:
    what = plan.collective if plan.collective == "barrier" else f"{plan.collective} of {plan.dtype}"
    if plan.collective in ("all_reduce", "reduce", "reduce_scatter"):
        what += f" ({plan.op})"
    where = "one machine, loopback" if plan.local else "under torchrun"
    return f"{what}, {ranks} ranks, {reducers} standalone reducers, {where}"


def reducers_used(contenders: Sequence[Contender], count: int) -> int:
    """The standalone reducers, if some contender's bytes go by them: `auto` on one machine is shared memory."""
    groups = [each for each in contenders if count and each.backend == "reducer" and each.failed is None]
    algorithms = [read_choice(each.team, each.name, ()).algorithm for each in groups]
    return count if any("server" in text or "mixed" in text for text in algorithms) else 0


def _console() -> Console:
    """A console that does not squeeze the table when its output goes into a file."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
