"""The command ``reducer``: serve, stats, bench, info."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import reducer
from reducer.bench import bench_command
from reducer.serve import serve as start_server
from reducer.serve import server_binary

app = typer.Typer(
    name="reducer",
    help="Collective communication for PyTorch through reduction servers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("bench")(bench_command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"reducer {reducer.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def serve(
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where to serve; port 0 picks a free one and prints it.")
    ] = "0.0.0.0:7000",
    threads: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads that move and sum data [default: cores, at most 4].")
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most memory promised to groups, as in 512MiB or 4GiB [default: half of this host's]. A group of n "
            "workers needs 2 x n x window: 4 MiB for each worker by default.",
        ),
    ] = None,
    grace: Annotated[
        int, typer.Option(min=0, metavar="SECONDS", help="After SIGTERM, how long groups at work may finish.")
    ] = 30,
) -> None:
    """Run a reduction server on this host.

    Prints one line when ready. SIGTERM drains: no new group is taken in, and the process ends when the last worker has left.

    Workers find it by REDUCER_SERVERS=host:port,host:port. Example: reducer serve --listen 0.0.0.0:7000 --memory-limit 8GiB
    """
    arguments = ["--listen", listen, "--grace", str(grace)]
    if threads is not None:
        arguments += ["--threads", str(threads)]
    if memory_limit is not None:
        arguments += ["--memory-limit", memory_limit]
    start_server(arguments)


@app.command()
def stats(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="A running reducer.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the reply as JSON.")] = False,
) -> None:
    """Ask a reducer what it is doing: memory, bytes, slots, groups."""
    asked = subprocess.run([server_binary(), "--stats", address], capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        typer.echo(asked.stderr.strip(), err=True)
        raise typer.Exit(asked.returncode)
    if as_json:
        typer.echo(asked.stdout.strip())
        return
    reply: dict[str, Any] = json.loads(asked.stdout)
    groups: list[dict[str, Any]] = reply.pop("groups", [])
    table = Table(title=f"reducer at {address}", show_header=False)
    for key, value in reply.items():
        table.add_row(key.replace("_", " "), str(value))
    console = Console()
    console.print(table)
    if groups:
        listing = Table("job", "group", "ranks connected", "bytes reserved", title="groups")
        for group in groups:
            listing.add_row(
                str(group["job"])[:8],
                str(group["group"]),
                f"{group['connected']} of {group['world_size']}",
                str(group["reserved_bytes"]),
            )
        console.print(listing)


@app.command()
def info() -> None:
    """Print versions, instruction sets and the settings in effect: what a bug report needs."""
    table = Table(show_header=False)
    table.add_row("reducer", reducer.__version__)
    table.add_row("python", sys.version.split()[0])
    try:
        from reducer import _core
    except ImportError as error:
        table.add_row("native library", f"cannot be loaded: {error}")
    else:
        table.add_row("protocol", str(_core.protocol_version))
        table.add_row("built for torch", _core.torch_version)
        table.add_row("instruction sets", ", ".join(_core.instruction_sets()))
    for name in sorted(name for name in os.environ if name.startswith("REDUCER_")):
        table.add_row(name, os.environ[name])
    Console().print(table)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
