"""An emulated cluster of rate-limited hosts on one machine: Gloo against each of our algorithms.

Each host is a network namespace whose NIC is limited in both directions; reducers have hosts of
their own. All contenders run on the same hosts in one run, in turns, so that noise of the machine
hits them alike; every result is checked exactly. Needs Linux, root, iproute2.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import netlab_cluster
import typer
from netlab_cluster import NetlabError
from netlab_ddp import DdpScenario, run_ddp
from netlab_goals import Verdict, judge, make_goal_table
from netlab_run import Setting, run
from netlab_scenarios import CONTENDERS, SCENARIOS, Competitor, Scenario, Shape
from rich.console import Console

from reducer._bench.units import parse_rate, parse_sizes

EXIT_FAILED = 1
EXIT_NOT_HERE = 2
_LOG_COLUMNS = 125
DDP = "ddp"


def _terminate(number: int, _: FrameType | None) -> None:
    # The clean-up is bounded by deadlines; an impatient second Ctrl-C must not cut it short.
    for each in netlab_cluster.ENDING_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    # Raised where the main thread stands, so that every `finally` and `with` cleans up.
    raise SystemExit(128 + number)


def _known(names: str, note: Callable[[str], None]) -> tuple[Competitor, ...]:
    """The contenders named, but for those that this build does not have."""
    asked = [Competitor(name.strip()) for name in names.split(",") if name.strip()]
    if not asked:
        raise ValueError("--contenders names nobody")
    absent = {each: each.unknown_here() for each in asked}
    for each, why in absent.items():
        if why is not None:
            note(f"{each.name} is left out: {why}")
    return tuple(each for each in asked if absent[each] is None)


def _parse_rates(text: str) -> dict[str, str]:
    """ "w0=1gbit,r=2gbit" by host or kind of host."""
    rates = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        label, equals, rate = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r} is no host's rate: write w0=2gbit, or r=2gbit for every reducer")
        rates[label] = rate
    return rates


def _chosen(names: str) -> list[str]:
    known = [*SCENARIOS, DDP]
    asked = known if names == "all" else names.split(",")
    for name in asked:
        if name not in known:
            raise ValueError(f"{name!r} is no scenario: write all, or some of {', '.join(known)}")
    return asked


def _refuse(scenario: str, said: Mapping[str, bool]) -> None:
    """ValueError if an option was said that the scenario does not take."""
    refused = [option for option, was_said in said.items() if was_said]
    if refused:
        raise ValueError(f"the scenario {scenario} takes no {', '.join(refused)}: it says itself what runs on what")


def _ddp(
    workers: int | None, reducers: int | None, rate: str | None, contenders: str | None, budget: float | None
) -> DdpScenario:
    scenario = DdpScenario()
    hosts = scenario.shape.hosts if workers is None else workers
    reducers = scenario.shape.reducers if reducers is None else reducers
    names = tuple(contenders.split(",")) if contenders else scenario.contenders
    known = [Competitor(name) for name in names]
    if known[0].name != "gloo":
        raise ValueError(f"the first contender of {DDP} is gloo: the others are compared with it")
    return replace(
        scenario,
        shape=Shape(hosts, reducers, rate=rate or scenario.shape.rate),
        contenders=names,
        budget_s=budget or scenario.budget_s,
    )


def run_all(jobs: Sequence[Callable[[], tuple[bool, list[Verdict]]]], console: Console) -> int:
    """Runs one after the other, then shows their goals. The exit code: a missed goal is a finding and no failure."""
    verdicts: list[Verdict] = []
    code = 0
    for job in jobs:
        try:
            fine, found = job()
        except NetlabError as error:
            console.print(f"[red]{error}[/red]")
            fine, found = False, []
        verdicts += found
        code = code if fine else EXIT_FAILED
    if verdicts:
        console.print(make_goal_table(verdicts))
    return code


def main(
    scenario: Annotated[
        str | None, typer.Option(help=f"Clusters with goals: all, or some of {', '.join(SCENARIOS)} and {DDP}.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=2, max=64, help="Worker hosts (default: 8).")] = None,
    ranks_per_host: Annotated[int, typer.Option(min=1, max=16, help="Workers that share a host and its NIC.")] = 1,
    reducers: Annotated[int | None, typer.Option(min=0, max=64, help="Hosts with a reducer (default: 8).")] = None,
    rate: Annotated[
        str | None, typer.Option(help="Each host's NIC, as tc writes it (default: 1gbit, or the scenario's).")
    ] = None,
    rates: Annotated[str, typer.Option(help="Hosts whose NIC is another one: w0=2gbit,r=500mbit.")] = "",
    sizes: Annotated[str | None, typer.Option(help="Tensors (default: 1KiB,64KiB,1MiB,16MiB,64MiB).")] = None,
    contenders: Annotated[
        str | None,
        typer.Option(
            help=f"Who runs (default: {','.join(CONTENDERS)}); a chunk, a window and a transport may "
            "follow, as in server/63KiB/2MiB:grpc."
        ),
    ] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Rounds per size, instead of a time budget.")] = None,
    budget: Annotated[float | None, typer.Option(min=1, help="Seconds to measure for (default: 180).")] = None,
    limited: Annotated[bool, typer.Option("--limit/--no-limit", help="Limit the NICs.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a reducer.")] = 1,
    congestion_control: Annotated[
        str, typer.Option(help="Of reducer's connections; `system` is what Gloo has.")
    ] = "auto",
    host_congestion_control: Annotated[
        str | None, typer.Option(help="The emulated hosts' own, as `reno` (default: this machine's).")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where JSON and pictures go.")] = Path("out"),
) -> None:
    """Gloo against ring, direct, server and mixed on emulated hosts with limited NICs.

    With --scenario the cluster, and unless said otherwise sizes, contenders and seconds, are those of
    a row of the table of goals, and the goals are judged by what was measured.
    """
    # A log file is no terminal, and has room for the whole table.
    console = Console() if sys.stdout.isatty() else Console(width=_LOG_COLUMNS)

    def setting(name: str, shape: Shape, by_default: Scenario | None) -> Setting:
        names = contenders or ",".join(by_default.contenders if by_default else CONTENDERS)
        asked = tuple(parse_sizes(sizes or "1KiB,64KiB,1MiB,16MiB,64MiB"))
        if min(asked) < 1:
            raise ValueError(f"--sizes {sizes}: a tensor has at least 1 byte")
        known = _known(names, console.print)
        running = tuple(each for each in known if shape.reducers or each.algorithm not in ("server", "mixed"))
        if not running:
            raise ValueError(f"nobody is left to run of --contenders {names}: server and mixed need --reducers")
        return Setting(
            name=name,
            shape=shape,
            sizes=tuple(by_default.sizes) if by_default and sizes is None else asked,
            contenders=running,
            rounds=iterations,
            budget_s=budget or (by_default.budget_s if by_default else 180.0),
            threads=threads,
            congestion_control=congestion_control,
            host_congestion_control=host_congestion_control,
            output=output,
        )

    def job(name: str, shape: Shape, by_default: Scenario | None) -> Callable[[], tuple[bool, list[Verdict]]]:
        asked = setting(name, shape, by_default)

        def run_and_judge() -> tuple[bool, list[Verdict]]:
            result = run(asked, console)
            found = judge(by_default.name, by_default.goals, result.rows, result.failures) if by_default else []
            return result.ok, found

        return run_and_judge

    jobs: list[Callable[[], tuple[bool, list[Verdict]]]] = []
    try:
        if rate is not None:
            parse_rate(rate)
        for name in _chosen(scenario) if scenario is not None else ():
            _refuse(name, {"--no-limit": not limited, "--rates": bool(rates), "--ranks-per-host": ranks_per_host > 1})
            if name == DDP:
                _refuse(name, {"--sizes": sizes is not None, "--iterations": iterations is not None})
                training = _ddp(workers, reducers, rate, contenders, budget)
                control = congestion_control, host_congestion_control
                jobs.append(partial(run_ddp, training, output, console, threads, *control))
                continue
            _refuse(name, {"--workers": workers is not None, "--reducers": reducers is not None})
            chosen = SCENARIOS[name]
            jobs.append(job(f"netlab-{name}", replace(chosen.shape, rate=rate or chosen.shape.rate), chosen))
        if scenario is None:
            limit = (rate or "1gbit") if limited else None
            hosts, others = 8 if workers is None else workers, 8 if reducers is None else reducers
            jobs.append(job("netlab", Shape(hosts, others, ranks_per_host, limit, _parse_rates(rates)), None))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    reason = netlab_cluster.why_not()
    if reason is not None:
        print(f"netlab cannot run here: {reason}", file=sys.stderr)
        raise SystemExit(EXIT_NOT_HERE)
    for each in netlab_cluster.ENDING_SIGNALS:
        signal.signal(each, _terminate)
    raise SystemExit(run_all(jobs, console))


if __name__ == "__main__":
    typer.run(main)
