"""The command ``reducer``: serve, stats, dump, blame, bench, simulate, tune, rendezvous, info.

It starts without torch, which takes seconds to import and which a reducer's host need not have: only `bench`, `tune`
and `rendezvous` need it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

import reducer
from reducer.errors import ReducerError, UnavailableError

EXIT_FAILED = 1

app = typer.Typer(
    name="reducer",
    help="Data-parallel PyTorch training through reduction servers.\n\n"
    "A first run on one machine, without any set-up: reducer bench --ranks 4",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"reducer {reducer.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    listen: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="Where to serve; 0.0.0.0 is every interface, port 0 picks a free port."),
    ] = "0.0.0.0:7000",
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=256, metavar="N", help="Threads that move and sum data (default: cores, at most 4)."),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most memory promised to groups, as in 512MiB or 4GiB (default: half of this host's). A group of n "
            "workers needs n x (2 x window + 128 KiB), by default about 2 MiB each; what does not fit is refused.",
        ),
    ] = None,
    grace: Annotated[
        int, typer.Option(min=0, metavar="SECONDS", help="After SIGTERM, how long groups at work may finish.")
    ] = 30,
    congestion_control: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Of its TCP connections: auto (reno where the kernel permits it), system, or a name that the kernel "
            "has, as bbr.",
        ),
    ] = "auto",
    transport: Annotated[
        str,
        typer.Option(metavar="NAME", help="What workers' data may come by: auto (tcp and gRPC, on one port) or grpc."),
    ] = "auto",
    tls_cert: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Certificate to show (PEM): all connections are TLS then, by gRPC."),
    ] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help="Its key (PEM, without a passphrase).")] = None,
    tls_ca: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Authorities (PEM): who connects has to show a certificate of one of them."),
    ] = None,
    token_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Tokens, one a line: who connects has to have one of them."),
    ] = None,
    admin_token_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Operators' tokens, one a line: only who has one of them may drain it by a call and see all groups. "
            "A job's token shows its own groups, and drains where it is the only one and there are no operators' ones.",
        ),
    ] = None,
) -> None:
    """Run a reduction server on this host, until a signal ends it.

    It prints one line with its address when it is ready. SIGTERM, or Ctrl-C,
    drains it: it takes in no new group, and ends when the last worker has left
    or the grace is over; a second signal ends it at once. The exit status is 0
    after a drain, 1 if it cannot serve (a port in use), 2 for a wrong option.

    Example, on each of two hosts:
    reducer serve --listen 0.0.0.0:7000 --threads 4 --memory-limit 8GiB

    Workers find them by the environment:
    REDUCER_SERVERS=host1:7000,host2:7000

    Files of TLS and tokens may also be named by REDUCER_TLS_CERT,
    REDUCER_TLS_KEY, REDUCER_TLS_CA, REDUCER_TOKEN_FILE and
    REDUCER_ADMIN_TOKEN_FILE; they are read again when they change
    (docs/security.md).
    """
    from reducer.serve import serve as start

    arguments = ["--listen", listen, "--grace", str(grace), "--congestion-control", congestion_control]
    arguments += ["--transport", transport]
    if threads is not None:
        arguments += ["--threads", str(threads)]
    if memory_limit is not None:
        arguments += ["--memory-limit", memory_limit]
    if admin_token_file is not None:
        arguments += ["--admin-token-file", admin_token_file]
    start([*arguments, *_security(tls_cert, tls_key, tls_ca, token_file)])


def _security(tls_cert: str | None, tls_key: str | None, tls_ca: str | None, token_file: str | None) -> list[str]:
    """The options of the native binary, which reads the environment itself."""
    given = {"--tls-cert": tls_cert, "--tls-key": tls_key, "--tls-ca": tls_ca, "--token-file": token_file}
    return [text for option, path in given.items() if path is not None for text in (option, path)]


@app.command()
def stats(
    addresses: Annotated[list[str], typer.Argument(metavar="HOST:PORT", help="Running reducers.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="One line of JSON for each reducer, in the given order; bytes and seconds.")
    ] = False,
    tls_ca: Annotated[
        str | None, typer.Option(metavar="FILE", help="Authorities of the reducers' certificates (PEM): ask by TLS.")
    ] = None,
    tls_cert: Annotated[
        str | None, typer.Option(metavar="FILE", help="A certificate to show to reducers that demand one (PEM).")
    ] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help="Its key (PEM).")] = None,
    token_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A token, for reducers that have tokens: a job's shows its own groups, an operator's (of the "
            "reducers' --admin-token-file) all.",
        ),
    ] = None,
) -> None:
    """Ask running reducers for their counters: memory, bytes, slots, groups.

    Example: reducer stats host1:7000 host2:7000

    Memory is reserved (promised to groups) or held (by chunks that wait for
    other ranks). A slot is one chunk of one operation. The exit status is 1 if
    a reducer does not answer within 5 seconds.

    The files may also be named by REDUCER_TLS_CA, REDUCER_TLS_CERT,
    REDUCER_TLS_KEY and REDUCER_TOKEN_FILE.
    """
    from reducer.serve import query_stats

    failed = False
    for address in addresses:
        try:
            reply = query_stats(address, _security(tls_cert, tls_key, tls_ca, token_file))
        except ReducerError as error:
            typer.echo(f"reducer: {error}", err=True)
            failed = True
            continue
        if as_json:
            typer.echo(json.dumps(reply))
        else:
            _print_stats(address, reply)
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _print_stats(address: str, reply: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from reducer._bench.units import format_seconds, format_size

    memory = [format_size(reply[f"{name}_bytes"]) for name in ("reserved", "held", "memory_limit")]
    table = Table(title=f"reducer at {address}", show_header=False)
    table.add_row("state", "draining" if reply["draining"] else "serving")
    table.add_row("up for", format_seconds(reply["uptime_s"]))
    table.add_row("protocol", str(reply["protocol_version"]))
    table.add_row("memory", f"{memory[0]} reserved, {memory[1]} held, limit {memory[2]}")
    table.add_row("most held", format_size(reply["held_bytes_max"]))
    table.add_row("pushed to it", format_size(reply["pushed_bytes"]))
    table.add_row("sent from it", format_size(reply["result_bytes"]))
    table.add_row("slots", "{slots_done} done, {slots_failed} failed, {slots_open} open".format_map(reply))
    table.add_row("connections", f"{reply['connections']} open, {reply['refused']} refusals")
    if reply.get("damaged", "0") != "0":
        table.add_row("damaged", f"{reply['damaged']} chunks, sent again")
    console = Console()
    console.print(table)
    if not reply["groups"]:
        return
    title = "groups" if reply.get("all_groups", True) else "groups of this token"
    groups = Table("job", "group", "workers connected", "memory reserved", title=title)
    for group in reply["groups"]:
        connected = f"{group['connected']} of {group['world_size']}"
        groups.add_row(group["job"][:8], group["group"], connected, format_size(group["reserved_bytes"]))
    console.print(groups)


@app.command()
def dump(
    pids: Annotated[
        list[int] | None,
        typer.Argument(metavar="PID", help="Processes of this host (default: all of yours that have a group)."),
    ] = None,
    job: Annotated[
        str | None,
        typer.Option(
            metavar="JOB",
            help="Only your processes of one job: how its number begins, as in reducer-JOB or `reducer stats`, or the "
            "name of one of its groups.",
        ),
    ] = None,
) -> None:
    """Have running workers write their flight recorders, and print where.

    Each process gets a signal (RTMIN+5, unless it was told another), at which it
    writes its last calls to reducer-JOB/rankR.json in $REDUCER_RECORDER_DIR, or
    $TMPDIR, or /tmp. It goes on working. A process that does not expect the
    signal gets none.

    Example, on each host of a job that hangs:
    reducer dump && reducer blame

    Where several jobs share the host, of one of them:
    reducer dump --job 1a2b3c4d

    The exit status is 1 if there is no such process, if JOB fits several jobs
    (which are listed then), or if a process wrote nothing within 10 seconds.
    """
    from reducer import recorder

    asked = []
    failed = False
    if pids and job is not None:
        raise typer.BadParameter("give processes or a job, not both", param_hint="--job")
    if pids:
        chosen = [(pid, recorder.process(pid)) for pid in pids]
    else:
        chosen = [(one.pid, one) for one in (recorder.processes() if job is None else recorder.of_job(job))]
    if not chosen:
        raise ReducerError("no process of yours on this host has a group of reducer")
    for pid, process in chosen:
        try:
            if process is None:
                raise UnavailableError(f"process {pid} on this host has no group of reducer, or it is not yours")
            asked.append(recorder.request(process))
        except UnavailableError as error:
            typer.echo(f"reducer: {error}", err=True)
            failed = True
    for wait in asked:
        try:
            typer.echo(str(wait()))
        except UnavailableError as error:
            typer.echo(f"reducer: {error}", err=True)
            failed = True
    if failed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def blame(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PATH",
            help="Files of dumps, or folders with them; of a folder with several jobs the newest "
            "(default: $REDUCER_RECORDER_DIR, or $TMPDIR, or /tmp).",
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="And a table of each group: how far every rank is.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON for each group.")] = False,
) -> None:
    """Say who is behind, and where, from the ranks' flight recorders.

    It puts the dumps side by side that workers write after an error, or that
    `reducer dump` asks for; those of several hosts have to be brought together
    first (REDUCER_RECORDER_DIR may be a shared folder). Ranks are compared by
    the numbers of their calls, and so clocks may differ.

    Example: reducer blame -v /tmp/reducer-1a2b3c4d

    The exit status is 0 if it could tell, whatever it found, and 1 if there is no dump.
    """
    from reducer import recorder
    from reducer.blame import blame as judge

    folders = paths or [recorder.default_folder()]
    files = recorder.find(folders)
    if not files:
        raise ReducerError(f"no dump (reducer-JOB/rankR.json) in {', '.join(map(str, folders))}")
    dumps = [recorder.read(file) for file in files]
    verdicts = judge(dumps)
    for verdict in verdicts:
        typer.echo(json.dumps(asdict(verdict)) if as_json else verdict.sentence)
    if verbose and not as_json:
        from reducer.blame import tables

        for table in tables(dumps):
            _print(table)


def _print(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


# The options of these commands are where their code is, which imports more than a reducer's host need have.
_APART = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(add_help_option=False, context_settings=_APART)
def bench(context: typer.Context) -> None:
    """Time and check collectives, several backends side by side."""
    try:
        # It imports torch.
        from reducer.bench import bench_command
    except ModuleNotFoundError as error:
        raise ReducerError(f"the benchmark needs {error.name}: pip install 'reducer[bench]'") from error
    _run_apart(bench_command, context)


@app.command(add_help_option=False, context_settings=_APART)
def simulate(context: typer.Context) -> None:
    """Time all-reduces of a cluster of any size on a model of its network."""
    from reducer.simulate import simulate_command

    _run_apart(simulate_command, context)


def _run_apart(command: Callable[..., None], context: typer.Context) -> None:
    apart = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    apart.command()(command)
    apart(context.args, prog_name=f"reducer {context.info_name}")


@app.command(add_help_option=False, context_settings=_APART)
def tune(context: typer.Context) -> None:
    """Measure every algorithm on this cluster and write the table that `auto` goes by."""
    try:
        # It imports torch.
        from reducer.tune import tune_command
    except ModuleNotFoundError as error:
        raise ReducerError(f"measuring needs {error.name}: pip install 'reducer[bench]'") from error
    _run_apart(tune_command, context)


@app.command(add_help_option=False, context_settings=_APART)
def rendezvous(context: typer.Context) -> None:
    """Hold the store by which the workers of an elastic job find each other."""
    try:
        # It imports torch.
        from reducer.rendezvous import rendezvous_command
    except ModuleNotFoundError as error:
        raise ReducerError(f"a store needs {error.name}: pip install torch") from error
    _run_apart(rendezvous_command, context)


@app.command()
def info() -> None:
    """Print versions, instruction sets, interfaces and the settings in effect.

    A report of a fault should have it.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    table.add_row("reducer", reducer.__version__)
    table.add_row("python", platform.python_version())
    table.add_row("system", platform.platform())
    try:
        found_torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        found_torch = "not installed"
    table.add_row("torch found", found_torch)
    fine = _add_native(table)
    for name, address in _interfaces():
        table.add_row(f"interface {name}", address)
    Console().print(table)
    if not fine:
        raise typer.Exit(EXIT_FAILED)


def _add_native(table: Any) -> bool:
    """Rows that come from the native library; False if it, or a setting, is wrong."""
    try:
        from reducer import _core
        from reducer.options import Options, resolve
    except ImportError as error:
        table.add_row("native library", f"cannot be loaded: {error}")
        return False
    table.add_row("torch built for", _core.torch_version)
    table.add_row("protocol", str(_core.protocol_version))
    table.add_row("instruction sets", ", ".join(_core.instruction_sets()))
    try:
        settings = resolve()
    except ReducerError as error:
        table.add_row("settings", f"wrong: {error}")
        return False
    for field in fields(Options):
        variable = f"REDUCER_{field.name.upper()}"
        given = os.environ.get(variable, "").strip()
        value = getattr(settings, field.name)
        text = settings.shared[variable] if isinstance(value, tuple) else str(value)
        if not given:
            text = f"{'none' if text == '' else 'chosen by the library' if text == '0' else text} (default)"
        table.add_row(variable, text)
    return True


def _interfaces() -> list[tuple[str, str]]:
    """Names and IPv4 addresses of this host's interfaces, as REDUCER_INTERFACE takes them."""
    import fcntl
    import struct

    get_address = 0x8915  # SIOCGIFADDR
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, get_address, struct.pack("256s", name.encode()))
            except OSError:
                continue  # no IPv4 address
            found.append((name, socket.inet_ntoa(answer[20:24])))
    return found


def main() -> None:
    """The console script. Errors are one line on stderr and exit status 1; those of the options end with 2."""
    try:
        app()
    except ReducerError as error:
        print(f"reducer: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
