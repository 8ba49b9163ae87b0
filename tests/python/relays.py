"""Relays of connections: what goes through can be read, and the other end sees another address."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

WAIT_S = 20.0


@contextlib.contextmanager
def tapped(address: str, source: str = "127.0.0.1") -> Iterator[tuple[str, bytearray]]:
    """A relay to `address`, which sees `source` behind it, and what went through it."""
    host, port = address.rsplit(":", 1)
    seen = bytearray()
    listening = socket.create_server(("127.0.0.1", 0))
    ends: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def relay(origin: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := origin.recv(65536):
                seen.extend(data)
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listening.accept()
                far = socket.create_connection((host, int(port)), source_address=(source, 0))
                ends.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threads.append(threading.Thread(target=relay, args=pair))
                    threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}", seen
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        acceptor.join(WAIT_S)
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(WAIT_S)
        for end in ends:
            end.close()


@contextlib.contextmanager
def seen_from(source: str, address: str) -> Iterator[str]:
    """An address by which clients reach `address` and seem to be at `source`."""
    with tapped(address, source) as (relayed, _):
        yield relayed
