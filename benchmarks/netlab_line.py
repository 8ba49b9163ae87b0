"""The line: what one plain TCP stream moves between two emulated hosts, and how long a byte takes."""

from __future__ import annotations

import multiprocessing
import socket
import time
from multiprocessing.connection import Connection

from netlab_cluster import Cluster, NetlabError, become_child, signals_held

_BLOCK_BYTES = 1 << 20
# The token bucket's burst and TCP's slow start go by before anything is counted.
_SETTLE_SECONDS = 0.4
_DEADLINE_SECONDS = 30.0


def _receive(namespace: str, address: str, seconds: float, answers: Connection) -> None:
    become_child(namespace)
    with socket.create_server((address, 0)) as listener:
        listener.settimeout(_DEADLINE_SECONDS)
        answers.send(listener.getsockname()[1])
        stream, _ = listener.accept()
    block = bytearray(_BLOCK_BYTES)
    with stream:
        stream.settimeout(_DEADLINE_SECONDS)
        settled = time.monotonic() + _SETTLE_SECONDS
        while time.monotonic() < settled and stream.recv_into(block):
            pass
        begin, received = time.monotonic(), 0
        while time.monotonic() < begin + seconds:
            received += stream.recv_into(block)
        answers.send(8 * received / (time.monotonic() - begin))


def _send(namespace: str, address: str, port: int) -> None:
    become_child(namespace)
    block = bytes(_BLOCK_BYTES)
    with socket.create_connection((address, port), timeout=_DEADLINE_SECONDS) as stream:
        try:
            while True:
                stream.sendall(block)
        except OSError:
            return  # the receiver has seen enough and closed


def _echo(namespace: str, address: str, answers: Connection) -> None:
    become_child(namespace)
    with socket.create_server((address, 0)) as listener:
        listener.settimeout(_DEADLINE_SECONDS)
        answers.send(listener.getsockname()[1])
        stream, _ = listener.accept()
    with stream:
        stream.settimeout(_DEADLINE_SECONDS)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while byte := stream.recv(1):
            stream.sendall(byte)


def _ping(namespace: str, address: str, port: int, times: int, answers: Connection) -> None:
    become_child(namespace)
    with socket.create_connection((address, port), timeout=_DEADLINE_SECONDS) as stream:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        taken = []
        for _ in range(times):
            begin = time.monotonic()
            stream.sendall(b"x")
            stream.recv(1)
            taken.append(time.monotonic() - begin)
    answers.send(sorted(taken)[times // 2])


def one_way_seconds(cluster: Cluster, source: str, target: str, times: int = 500) -> float:
    """Half of a plain TCP ping-pong of one byte between two emulated hosts, the median of `times`."""
    context = multiprocessing.get_context("fork")
    port_ours, port_theirs = context.Pipe(duplex=False)
    ours, theirs = context.Pipe(duplex=False)
    address = cluster.address(target)
    echo = context.Process(target=_echo, args=(cluster.namespace(target), address, port_theirs), daemon=True)
    ping = None
    try:
        with signals_held():
            echo.start()
        if not port_ours.poll(_DEADLINE_SECONDS):
            raise NetlabError("the ping-pong's echo did not start")
        arguments = (cluster.namespace(source), address, port_ours.recv(), times, theirs)
        ping = context.Process(target=_ping, args=arguments, daemon=True)
        with signals_held():
            ping.start()
        if not ours.poll(_DEADLINE_SECONDS):
            raise NetlabError(f"no TCP ping-pong from {source} to {target} in {_DEADLINE_SECONDS} s")
        return float(ours.recv()) / 2
    finally:
        for process in (echo, ping):
            if process is not None:
                process.kill()
                process.join(_DEADLINE_SECONDS)
        for end in (port_ours, port_theirs, ours, theirs):
            end.close()


def line_rate(cluster: Cluster, source: str, target: str, seconds: float = 2.0) -> float:
    """bit/s of one TCP stream from host `source` to host `target`, as its receiver counts them."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    address = cluster.address(target)
    receiver = context.Process(
        target=_receive,
        args=(cluster.namespace(target), address, seconds, theirs),
        daemon=True,
    )
    with signals_held():
        receiver.start()
    theirs.close()
    sender = None
    try:
        if not ours.poll(_DEADLINE_SECONDS):
            raise NetlabError("the line's receiver did not start")
        port = ours.recv()
        sender = context.Process(target=_send, args=(cluster.namespace(source), address, port), daemon=True)
        with signals_held():
            sender.start()
        if not ours.poll(_DEADLINE_SECONDS):
            raise NetlabError(f"no TCP stream from {source} to {target} in {_DEADLINE_SECONDS} s")
        return float(ours.recv())
    except EOFError as error:
        raise NetlabError(f"the TCP stream from {source} to {target} broke") from error
    finally:
        for process in (receiver, sender):
            if process is not None:
                process.kill()
                process.join(_DEADLINE_SECONDS)
        ours.close()
