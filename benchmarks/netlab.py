"""All-reduce on an emulated cluster: Gloo and every algorithm of `reducer`, each beside its bound.

Each host is a network namespace whose NIC is limited to a rate each way (see _netlab/cluster.py). In
one run, on the same hosts and interface, every contender gets its own worker processes, one per
host, which stay up and wait on a pipe while others are measured. At each size all warm up, then take
turns in rounds. Each iteration is timed on every rank, from call to result, and counts as its
slowest rank; nothing stands between two iterations. Every result is compared with the exact one.

The bound is what docs/algorithms.md derives for the contender from the line rate, and the line rate
is what one plain TCP connection carries between two of the hosts in the same run. The commands that
drive the ranks go through Unix sockets, so they do not touch the limited network.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from _netlab import line
from _netlab.cluster import INTERFACE, Cluster, ClusterError, Host
from _netlab.report import Setting, json_rows, netlab_table, write_png
from rich.console import Console
from rich.live import Live
from rich.markup import escape

from reducer._bench import units
from reducer._bench.contest import (
    CONTENDER_ERRORS,
    Budget,
    Contender,
    Outcome,
    run_case,
)
from reducer._bench.processes import ChildError
from reducer._bench.report import complaints, write_json
from reducer._bench.servers import Server, stop_servers
from reducer._bench.team import LocalTeam

CONTENDERS = ("gloo", "ring", "direct", "server", "mixed")
#: Part of the nominal rate that TCP's payload makes of full Ethernet frames of 1500 bytes.
_PAYLOAD_SHARE = 0.955
_START_S = 240.0


@dataclass(frozen=True)
class Plan:
    """What was asked for."""

    workers: int
    reducers: int
    rate: str | None
    sizes: tuple[int, ...]
    contenders: tuple[str, ...]
    budget: Budget

    @property
    def collective_timeout_s(self) -> float:
        """Time after which a collective has failed: many times what a ring needs."""
        if self.rate is None:
            return 60.0
        return max(60.0, 20 * 2 * max(self.sizes) * 8 / units.parse_rate(self.rate))


def main(
    workers: Annotated[int, typer.Option(min=2, help="Emulated hosts that train.")] = 8,
    reducers: Annotated[
        int, typer.Option(min=0, help="Emulated hosts that reduce.")
    ] = 8,
    rate: Annotated[
        str, typer.Option(help="Rate of each host's NIC, each way.")
    ] = "1gbit",
    sizes: Annotated[str, typer.Option(help="Sizes of the tensor.")] = (
        "1KiB,64KiB,1MiB,16MiB,64MiB"
    ),
    contenders: Annotated[
        str, typer.Option(help=f"Who takes part: a list of {', '.join(CONTENDERS)}.")
    ] = ",".join(CONTENDERS),
    seconds: Annotated[
        float,
        typer.Option(min=0.1, help="Time for each size of each contender, in seconds."),
    ] = 6.0,
    no_limit: Annotated[
        bool,
        typer.Option(
            "--no-limit", help="No rate limit: how much this machine can carry."
        ),
    ] = False,
    pairs_only: Annotated[
        bool,
        typer.Option(
            "--pairs-only",
            help="Only show what plain TCP carries in all pairs of hosts at once, both ways.",
        ),
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for netlab.json and netlab.png.")
    ] = Path("out"),
) -> None:
    """All-reduce on an emulated cluster of rate-limited hosts. Needs root."""
    console = _console()
    try:
        plan = make_plan(
            workers, reducers, None if no_limit else rate, sizes, contenders, seconds
        )
    except ValueError as error:
        console.print(f"[red]error:[/] {escape(str(error))}")
        raise typer.Exit(2) from None
    try:
        with _cleaning_up(), Cluster(workers + reducers, plan.rate) as cluster:
            if pairs_only:
                _show_pairs(console, plan, cluster)
                return
            fine = _run(console, plan, cluster, out)
    except ClusterError as error:
        console.print(f"[red]error:[/] {escape(str(error))}")
        raise typer.Exit(2) from None
    except (*CONTENDER_ERRORS, FileNotFoundError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("interrupted; the emulated cluster is removed")
        raise typer.Exit(130) from None
    if not fine:
        raise typer.Exit(1)


def make_plan(
    workers: int,
    reducers: int,
    rate: str | None,
    sizes: str,
    contenders: str,
    seconds: float,
) -> Plan:
    """ValueError says which option is wrong."""
    if rate is not None:
        units.parse_rate(rate)
    names = tuple(dict.fromkeys(name.strip() for name in contenders.split(",")))
    for name in names:
        if name not in CONTENDERS:
            raise ValueError(
                f"contender {name!r} is not known: choose from {', '.join(CONTENDERS)}"
            )
    if reducers == 0:
        names = tuple(name for name in names if name not in ("server", "mixed"))
    if not names:
        raise ValueError("server and mixed need standalone reducers: say --reducers 8")
    return Plan(
        workers=workers,
        reducers=reducers,
        rate=rate,
        sizes=tuple(units.parse_sizes(sizes)),
        contenders=names,
        budget=Budget(seconds=seconds, iterations_max=300),
    )


def _run(console: Console, plan: Plan, cluster: Cluster, out: Path) -> bool:
    """Whether every contender ran, with right results."""
    worker_hosts = cluster.hosts[: plan.workers]
    setting = _setting(console, plan, worker_hosts)
    with contextlib.ExitStack() as stack:
        servers = _start_servers(stack, cluster.hosts[plan.workers :], plan)
        console.print(
            f"starting {plan.workers} ranks for each of {', '.join(plan.contenders)}",
            style="dim",
        )
        contenders = _start_contenders(stack, plan, worker_hosts, servers)
        for contender in contenders:
            if contender.failed is not None:
                note = f"{contender.name} does not take part: {contender.failed}"
                console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)
        cases = _measure(console, plan, setting, contenders)
    console.print(netlab_table(setting, cases, 10_000))
    for complaint in complaints(cases):
        console.print(f"[yellow]note:[/] {escape(complaint)}", highlight=False)
    about = {
        "title": setting.title,
        "command": sys.argv,
        "workers": plan.workers,
        "reducers": plan.reducers,
        "rate": plan.rate,
        "line_bytes_per_s": setting.line,
        "cores": os.cpu_count(),
        "absent": {c.name: c.failed for c in contenders if c.failed is not None},
    }
    write_json(out / "netlab.json", about, json_rows(setting, cases))
    write_png(out / "netlab.png", setting, cases)
    console.print(f"figures: {out / 'netlab.json'}\npicture: {out / 'netlab.png'}")
    complete = all(contender.failed is None for contender in contenders)
    return complete and all(outcome.ok for case in cases for outcome in case)


def _setting(console: Console, plan: Plan, hosts: Sequence[Host]) -> Setting:
    [carried] = line.measure([(hosts[0], hosts[1])])
    text = f"line rate: one TCP connection carries {carried * 8 / 1e9:.3f} Gbit/s"
    if plan.rate is not None:
        nominal = _PAYLOAD_SHARE * units.parse_rate(plan.rate) / 1e9
        text += f" ({_PAYLOAD_SHARE} of {plan.rate} is {nominal:.3f})"
    console.print(text, highlight=False)
    return Setting(plan.workers, plan.reducers, plan.rate, carried)


def _show_pairs(console: Console, plan: Plan, cluster: Cluster) -> None:
    hosts = cluster.hosts
    pairs = list(zip(hosts[::2], hosts[1::2], strict=False))
    rates = line.measure([*pairs, *((target, source) for source, target in pairs)])
    slowest, fastest = min(rates) * 8 / 1e9, max(rates) * 8 / 1e9
    console.print(
        f"{len(pairs)} pairs, both ways at once, NICs of {plan.rate or 'any rate'}: "
        f"{slowest:.3f} to {fastest:.3f} Gbit/s each way",
        highlight=False,
    )


def _start_servers(
    stack: contextlib.ExitStack, hosts: Sequence[Host], plan: Plan
) -> list[Server]:
    servers: list[Server] = []
    if any(name in ("server", "mixed") for name in plan.contenders):
        stack.callback(stop_servers, servers)
        for number, host in enumerate(hosts):
            name = f"reducer {number} at {host.address}"
            servers.append(Server(name, f"{host.address}:0", prefix=host.prefix))
    return servers


def _start_contenders(
    stack: contextlib.ExitStack,
    plan: Plan,
    hosts: Sequence[Host],
    servers: Sequence[Server],
) -> list[Contender]:
    """Ranks of their own for each, started together; one that cannot run says so in `failed`."""
    contenders = []
    for name in plan.contenders:
        team = LocalTeam(name, len(hosts), prefixes=[host.prefix for host in hosts])
        stack.callback(team.close)
        environment = {"GLOO_SOCKET_IFNAME": INTERFACE, "REDUCER_INTERFACE": INTERFACE}
        if name == "gloo":
            contenders.append(Contender(name, "gloo", team, environment))
            continue
        addresses = (
            [server.address for server in servers]
            if name in ("server", "mixed")
            else []
        )
        environment["REDUCER_ALGORITHM"] = name
        environment["REDUCER_SERVERS"] = ",".join(addresses)
        contenders.append(Contender(f"reducer {name}", "reducer", team, environment))
    for contender in contenders:
        assert isinstance(contender.team, LocalTeam)
        try:
            contender.team.meet(hosts[0].address, _START_S)
        except ChildError as error:
            contender.failed = str(error)
            continue
        contender.open(plan.collective_timeout_s)
    return contenders


def _measure(
    console: Console, plan: Plan, setting: Setting, contenders: Sequence[Contender]
) -> list[list[Outcome]]:
    cases: list[list[Outcome]] = []
    with Live(console=console, transient=True, refresh_per_second=2) as live:
        for nbytes in plan.sizes:
            case = {
                "collective": "all_reduce",
                "dtype": "float32",
                "op": "sum",
                "nbytes": nbytes,
            }
            cases.append(run_case(contenders, case, plan.budget))
            live.update(netlab_table(setting, cases, max(4, console.height - 8)))
    return cases


@contextlib.contextmanager
def _cleaning_up() -> Iterator[None]:
    """Turns SIGTERM into an exception, so that the way out is the same as for Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        # A second signal must not interrupt the cleaning up.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _console() -> Console:
    """A console that does not squeeze the table when its output goes into a file."""
    console = Console()
    return console if console.is_terminal else Console(width=130)


if __name__ == "__main__":
    typer.run(main)
