"""What plain TCP carries between two emulated hosts: the line rate that bounds everything else.

Run as a program it is one end: `listen ADDRESS` prints its port, takes one connection and prints the
bytes a second that it received; `send ADDRESS PORT` fills the connection for a while.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from _netlab.cluster import Host

_WARM_UP_S = 0.3
_MEASURED_S = 1.2
_TIMEOUT_S = 20.0


def measure(pairs: Sequence[tuple[Host, Host]]) -> list[float]:
    """Bytes a second from the first to the second host of each pair, all at the same time."""
    from reducer._bench.processes import Child, stop_all

    script = str(Path(__file__).resolve())
    children: list[Child] = []
    try:
        receivers = []
        for number, (_, target) in enumerate(pairs):
            command = [*target.prefix, sys.executable, script, "listen", target.address]
            receivers.append(Child(f"line receiver {number}", command, capture_stdout=True))
            children.append(receivers[-1])
        deadline = time.monotonic() + _TIMEOUT_S
        ports = [receiver.read_line(deadline) for receiver in receivers]
        for number, ((source, target), port) in enumerate(zip(pairs, ports, strict=True)):
            command = [*source.prefix, sys.executable, script, "send", target.address, port]
            children.append(Child(f"line sender {number}", command))
        deadline = time.monotonic() + _TIMEOUT_S
        return [float(receiver.read_line(deadline)) for receiver in receivers]
    finally:
        stop_all(children)


def _listen(address: str) -> None:
    with socket.create_server((address, 0)) as server:
        print(server.getsockname()[1], flush=True)
        server.settimeout(_TIMEOUT_S)
        connection, _ = server.accept()
    with connection:
        connection.settimeout(_TIMEOUT_S)
        buffer = bytearray(1 << 20)
        begin = time.monotonic() + _WARM_UP_S
        while time.monotonic() < begin:
            connection.recv_into(buffer)
        received, begin = 0, time.monotonic()
        while time.monotonic() < begin + _MEASURED_S:
            received += connection.recv_into(buffer)
        print(received / (time.monotonic() - begin), flush=True)


def _send(address: str, port: int) -> None:
    data = bytes(1 << 18)
    with socket.create_connection((address, port), timeout=_TIMEOUT_S) as connection:
        try:
            while True:
                connection.sendall(data)
        except ConnectionError:
            return  # The receiver has seen enough.


if __name__ == "__main__":
    if sys.argv[1] == "listen":
        _listen(sys.argv[2])
    else:
        _send(sys.argv[2], int(sys.argv[3]))
