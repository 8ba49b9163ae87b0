"""The command ``reducer rendezvous``: a store that outlives the workers of a job."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from reducer._store import hold_store

READY = "reducer rendezvous ready on "


def rendezvous_command(
    listen: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="Where to serve; 0.0.0.0 is every interface, port 0 picks a free port."),
    ] = "0.0.0.0:29400",
) -> None:
    """Hold the store by which workers find each other, until a signal ends it.

    torch's TCPStore, in a process of its own: where rank 0 holds the store, a
    job ends with rank 0. It is little work; one serves several jobs. It asks
    nobody who he is: listen where only the workers' hosts can reach it.

    Example: reducer rendezvous --listen 10.0.0.9:29400

    The workers of an elastic job find it by
    elastic.Session(model, optimizer, "tcp://10.0.0.9:29400").

    The exit status is 0 after SIGTERM or Ctrl-C, 1 if it cannot listen.
    """
    # Before the store has threads, which would take the signals.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    store, address = hold_store(listen)
    print(f"{READY}{address}", flush=True)
    if address.startswith(("0.0.0.0:", "[::]:")):
        print("reducer: warning: every host that reaches this one can read and change what is in it", file=sys.stderr)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    del store
