"""What a core of a reducer moves, beside what a core of iperf3 moves: push and pull, on this machine's loopback.

Compared is the same work: a reducer takes each byte in once and gives each byte out once, and iperf3's two ends
together do the same to a byte. So the figure of both is

    (bytes received + bytes sent) / CPU seconds, user and system, of the process or processes,

for the reducer those of `reducer-server` alone (its sums included), for iperf3 those of both its ends. What the kernel
does for loopback happens in the sender's time in both cases. Both take turns; the median of the turns counts.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer
from rich.console import Console
from rich.table import Table

from reducer._bench.contest import CONTENDER_ERRORS, Contender
from reducer._bench.servers import Server
from reducer._bench.team import LocalTeam
from reducer._bench.units import parse_size
from reducer.serve import query_stats

GOAL = 0.6
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Turn:
    """Bytes in both directions, and the CPU seconds that they took."""

    nbytes: int
    user_s: float
    system_s: float

    @property
    def rate(self) -> float:
        """Bytes for a second of a core."""
        return self.nbytes / (self.user_s + self.system_s)


def cpu_times(pid: int) -> tuple[float, float]:
    """(user, system) seconds of all threads of a process."""
    # The name, in parentheses, may hold blanks: user and system ticks are 14th and 15th.
    words = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    per_second = os.sysconf("SC_CLK_TCK")
    return int(words[11]) / per_second, int(words[12]) / per_second


def reducer_turn(contender: Contender, server: Server, nbytes: int, iterations: int) -> Turn:
    """All-reduces one after the other. RuntimeError if a result is wrong."""
    before, began = query_stats(server.address), cpu_times(server.child.pid)
    case = {"collective": "all_reduce", "dtype": "float32", "op": "sum", "nbytes": nbytes}
    command = {**case, "do": "measure", "group": contender.name, "iterations": iterations}
    replies = contender.team.call(command, _TIMEOUT_S)
    ended, after = cpu_times(server.child.pid), query_stats(server.address)
    if any(reply["wrong"] for reply in replies):
        raise RuntimeError(f"{contender.name}: wrong results")
    moved = sum(int(after[name]) - int(before[name]) for name in ("pushed_bytes", "result_bytes"))
    return Turn(moved, ended[0] - began[0], ended[1] - began[1])


def iperf_turn(seconds: float, congestion_control: str) -> Turn:
    """One stream of iperf3 at its defaults. RuntimeError if it fails."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    common = ["iperf3", "-p", port, "-J"]
    # Nobody reads what it says, and a full pipe would stop it.
    receiver = subprocess.Popen([*common, "-s", "-1", "-B", "127.0.0.1"], stdout=subprocess.DEVNULL, text=True)
    try:
        _await_listener(int(port), receiver)
        name = [] if congestion_control == "system" else ["-C", congestion_control]
        sender = subprocess.Popen(
            [*common, "-c", "127.0.0.1", "-t", f"{seconds:.0f}", *name], stdout=subprocess.PIPE, text=True
        )
        assert sender.stdout is not None
        said = sender.stdout.read()
        _, status, of_sender = os.wait4(sender.pid, 0)
        sender.returncode = os.waitstatus_to_exitcode(status)
        if sender.returncode != 0:
            raise RuntimeError(f"iperf3 failed: {said}")
        _, status, of_receiver = os.wait4(receiver.pid, 0)
        receiver.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if receiver.returncode is None:
            receiver.kill()
            receiver.wait()

    end = json.loads(said)["end"]
    moved = int(end["sum_sent"]["bytes"]) + int(end["sum_received"]["bytes"])
    both = (of_sender, of_receiver)
    return Turn(moved, sum(each.ru_utime for each in both), sum(each.ru_stime for each in both))


def _await_listener(port: int, receiver: subprocess.Popen[str]) -> None:
    """Until iperf3 listens: a connection of ours would be its one test."""
    wanted = f"{port:04X}"
    for _ in range(100):
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            words = line.split()
            if words[1].endswith(":" + wanted) and words[3] == "0A":
                return
        try:
            receiver.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        raise RuntimeError("iperf3 -s ended at once")
    raise RuntimeError("iperf3 -s did not listen within 5 s")


def _open(team: LocalTeam, transport: str, server: Server) -> Contender:
    team.meet("127.0.0.1", _TIMEOUT_S)
    # The first group of a process is the one that torch calls the default one.
    Contender("default", "gloo", team).open(_TIMEOUT_S)
    environment = {"REDUCER_ALGORITHM": "server", "REDUCER_SERVERS": server.address}
    environment |= {"REDUCER_INTERFACE": "lo", "REDUCER_TRANSPORT": transport}
    contender = Contender(f"reducer, {transport}", "reducer", team, environment)
    contender.open(_TIMEOUT_S)
    return contender


def make_table(turns: dict[str, list[Turn]], title: str) -> tuple[Table, bool]:
    """The table, and whether every row of a reducer reaches the goal."""
    table = Table(title=title, title_justify="left")
    for name in ("who", "bytes both ways, GB", "CPU user, s", "CPU system, s", "GB/s a core", "of iperf3", "goal"):
        table.add_column(name, justify="left" if name == "who" else "right")
    reference = statistics.median(turn.rate for turn in turns["iperf3"])
    fine = True
    for who, mine in turns.items():
        rate = statistics.median(turn.rate for turn in mine)
        met = who == "iperf3" or rate / reference >= GOAL
        fine = fine and met
        table.add_row(
            who,
            f"{sum(turn.nbytes for turn in mine) / 1e9:.1f}",
            f"{sum(turn.user_s for turn in mine):.2f}",
            f"{sum(turn.system_s for turn in mine):.2f}",
            f"{rate / 1e9:.2f}",
            f"{rate / reference:.2f}",
            "" if who == "iperf3" else f"{GOAL}: {'[green]met' if met else '[red]missed'}",
        )
    return table, fine


def main(
    ranks: Annotated[int, typer.Option(min=2, help="Workers that push and pull.")] = 2,
    size: Annotated[str, typer.Option(help="Tensor.")] = "64MiB",
    transport: Annotated[str, typer.Option(help="REDUCER_TRANSPORT of the workers: a list.")] = "grpc,auto",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 3,
    iterations: Annotated[int, typer.Option(min=1, help="All-reduces a turn.")] = 40,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of iperf3 a turn.")] = 3.0,
    congestion_control: Annotated[
        str, typer.Option(help="iperf3's; a reducer has reno where it may. `system`: the host's.")
    ] = "reno",
) -> None:
    """A reducer's bytes per second of a core, beside iperf3's on the same machine in the same run."""
    console = Console() if sys.stdout.isatty() else Console(width=110)
    if shutil.which("iperf3") is None:
        console.print("[red]error:[/red] iperf3 is missing: apt-get install iperf3")
        raise typer.Exit(2)
    turns: dict[str, list[Turn]] = {}
    try:
        nbytes = parse_size(size)
        server = Server("reducer 0")
        teams: list[LocalTeam] = []
        try:
            contenders = []
            for name in dict.fromkeys(transport.split(",")):
                # Ranks of its own for each: a process has one transport.
                teams.append(LocalTeam(f"throughput, {name}", ranks, environment={"GLOO_SOCKET_IFNAME": "lo"}))
                contender = _open(teams[-1], name, server)
                if contender.failed is not None:
                    console.print(f"{contender.name} is left out: {contender.failed}")
                    continue
                reducer_turn(contender, server, nbytes, 2)
                contenders.append(contender)
            for _ in range(rounds):
                for contender in contenders:
                    turn = reducer_turn(contender, server, nbytes, iterations)
                    turns.setdefault(contender.name, []).append(turn)
                turns.setdefault("iperf3", []).append(iperf_turn(seconds, congestion_control))
        finally:
            for team in teams:
                team.close()
            server.child.stop()
    except (*CONTENDER_ERRORS, ValueError, FileNotFoundError, RuntimeError) as error:
        console.print(f"[red]error:[/red] {error}")
        raise typer.Exit(1) from None
    if len(turns) < 2:
        console.print("[red]error:[/red] no transport could be measured")
        raise typer.Exit(1)
    title = f"a core's throughput, push + pull, {ranks} workers, all-reduce of {size}, loopback"
    table, _ = make_table(turns, title)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
