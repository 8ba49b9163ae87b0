"""Peers that mean harm: floods, connections that say nothing, sizes that are not true, results that nobody reads.

A reducer answers or closes, its memory stays within its promise, and a job of others that it serves meanwhile notices
nothing.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from control_client import (
    BEAT,
    CANCEL,
    ERROR,
    HELLO,
    PROTOCOL_VERSION,
    PUSH,
    RESULT,
    WELCOME,
    Client,
    Exchange,
    floats,
    promised,
)
from raw_peer import BUSY, GREETING, dial, ended, frame_of, greet, message
from servers import Server, serving

MIB = 1 << 20
MEMORY_LIMIT_BYTES = 64 * MIB
STRANGER_BYTES_MAX = 64 << 10
# Of one address, where a process may have 4096 descriptors and more.
STRANGERS_MAX = 256
STRANGERS_MAX_IN_ALL = 1024
# How long a connection may say nothing.
SILENCE_S = 10.0
# Another host than the job's, as far as the reducer can tell.
ELSEWHERE = "127.0.0.2"


class Job:
    """Two well-behaved workers of a group, one step at a time."""

    def __init__(self, client: Client) -> None:
        self.seq = 0
        self.workers: list[Exchange] = []
        for rank in range(2):
            self.workers.append(client.exchange())
            self.workers[-1].join(job=b"well-behaved-job", rank=rank, world_size=2)

    def step(self) -> None:
        """An all-reduce, with its right result for both."""
        for rank, worker in enumerate(self.workers):
            worker.push([1.0 + rank, float(self.seq)], seq=self.seq)
        for worker in self.workers:
            answer = worker.receive()
            assert answer.kind == RESULT, answer.text
            assert floats(answer.payload) == [3.0, 2.0 * self.seq]
        self.seq += 1

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


@pytest.fixture(name="server", scope="module")
def a_server() -> Iterator[Server]:
    with serving("--memory-limit", str(MEMORY_LIMIT_BYTES)) as server:
        yield server


@pytest.fixture(name="client", scope="module")
def a_client(server: Server) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.fixture(name="job")
def a_job(client: Client) -> Iterator[Job]:
    job = Job(client)
    job.step()
    yield job
    job.step()
    job.close()


def resident_bytes(server: Server, what: str = "VmRSS") -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) << 10


def descriptors(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


@contextlib.contextmanager
def crowd(server: Server, count: int, begin: bytes, source: str = ELSEWHERE) -> Iterator[list[socket.socket]]:
    """So many connections from one address, each of which says `begin` and no more."""
    with contextlib.ExitStack() as stack:
        peers = []
        for _ in range(count):
            peers.append(stack.enter_context(contextlib.closing(dial(server.address, source))))
            with contextlib.suppress(ConnectionError):
                peers[-1].sendall(begin)
        yield peers


def closed(peer: socket.socket) -> bool:
    """Whether it is closed by now; what it was told is read."""
    peer.setblocking(False)
    try:
        while peer.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


def wait_until(condition: Callable[[], bool], meanwhile: Job) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        meanwhile.step()


def close_all_within(peers: list[socket.socket], seconds: float, meanwhile: Job) -> None:
    deadline = time.monotonic() + seconds
    while peers := [peer for peer in peers if not closed(peer)]:
        assert time.monotonic() < deadline, f"{len(peers)} connections are open still"
        meanwhile.step()
        time.sleep(0.05)


HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
BEGINNINGS = {  # of connections that go no further, by the address that they come from
    "127.0.0.2": b"",
    "127.0.0.3": GREETING[:3],
    "127.0.0.4": GREETING,
    "127.0.0.5": GREETING + struct.pack("<II", 100, 0) + b"\x08",
    "127.0.0.6": b"\x16\x03\x01\x02\x00\x01",
}


def test_a_flood_of_connections_takes_few_places(server: Server, client: Client, job: Job) -> None:
    refused = client.stats().refused
    memory = resident_bytes(server)
    extra = 60
    with contextlib.ExitStack() as stack:
        peers = []
        for source, begin in BEGINNINGS.items():
            peers += stack.enter_context(crowd(server, STRANGERS_MAX + extra, begin, source))
            job.step()
        wait_until(lambda: client.stats().refused >= refused + extra * len(BEGINNINGS), job)
        assert descriptors(server) < STRANGERS_MAX_IN_ALL + 64
        assert resident_bytes(server) < memory + 32 * MIB
        close_all_within(peers, SILENCE_S + 10, job)
    wait_until(lambda: descriptors(server) < 64, job)


def test_by_http2_too(server: Server, client: Client, job: Job) -> None:
    refused = client.stats().refused
    with crowd(server, STRANGERS_MAX + 60, HTTP2):
        wait_until(lambda: client.stats().refused >= refused + 60, job)
        assert descriptors(server) < 2 * STRANGERS_MAX + 64  # two for each
        job.step()
    wait_until(lambda: descriptors(server) < 64, job)


def test_who_comes_too_many_is_told_and_others_are_let_in(server: Server, client: Client, job: Job) -> None:
    refused = client.stats().refused
    with crowd(server, STRANGERS_MAX + 20, b"") as peers:
        wait_until(lambda: client.stats().refused >= refused + 20, job)
        told = []
        for peer in peers:
            peer.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                told.append(peer.recv(8))
        assert told.count(BUSY) == 20
        job.step()
        greet(server.address, "127.0.0.3").close()


@pytest.mark.parametrize(
    ("header", "payload"), [(100, 16 * MIB), (100, STRANGER_BYTES_MAX), (80_000, 0), (1, 0xFFFFFFFF), (0xFFFFFFFF, 0)]
)
def test_sizes_are_not_believed_before_the_hello(
    server: Server, client: Client, job: Job, header: int, payload: int
) -> None:
    memory = resident_bytes(server)
    with contextlib.closing(greet(server.address)) as peer:
        peer.sendall(struct.pack("<II", header, payload))
        error = frame_of(peer, client.message("reducer.v1.Frame"))
        assert error.kind == ERROR
        assert error.fatal
        assert "sent what cannot be read: a message" in error.text
        assert ended(peer)
    job.step()
    assert resident_bytes(server) < memory + 4 * MIB


def test_by_grpc_a_large_message_before_the_hello_is_refused(client: Client, job: Job) -> None:
    stranger = client.exchange()
    stranger.push([0.0] * (STRANGER_BYTES_MAX // 4))
    error = stranger.receive()
    assert error.kind == ERROR
    assert "before it has said who it is; until then the limit is 65536" in error.text
    assert stranger.ended()
    job.step()


def worker_by_tcp(server: Server, client: Client, **more: Any) -> tuple[socket.socket, Any]:
    """A worker of a group of one, or as its hello says, by the tcp transport; and the class of its frames."""
    frame = client.message("reducer.v1.Frame")
    peer = greet(server.address)
    hello = {"version": PROTOCOL_VERSION, "job": b"it-does-not-read", "group": "g", "world_size": 1, "host": "h:1"}
    peer.sendall(message(frame(kind=HELLO, hello=hello | {"window_bytes": MIB} | more)))
    assert frame_of(peer, frame).kind == WELCOME
    return peer, frame


def test_who_never_reads_results_is_closed_before_they_fill_the_memory(
    server: Server, client: Client, job: Job
) -> None:
    peer, frame = worker_by_tcp(server, client)
    before = resident_bytes(server)
    pushed = 0
    payload = bytes(MIB // 2)
    call = {"collective": 1, "op": 1, "dtype": 1, "count": len(payload) // 4, "length": len(payload)}
    with contextlib.closing(peer):
        peer.settimeout(1.0)
        with contextlib.suppress(ConnectionError, TimeoutError):
            for seq in range(2000):
                peer.sendall(message(frame(kind=PUSH, seq=seq, payload=payload, **call)))
                pushed += len(payload)
                if seq % 50 == 0:
                    job.step()
        assert pushed < 100 * MIB
        assert resident_bytes(server) < before + 16 * MIB
        peer.settimeout(20.0)
        assert ended(peer)
    wait_until(lambda: client.stats().connections == 2, job)
    assert client.stats().reserved_bytes == promised(2, MIB)  # the job's
    job.step()


def test_empty_results_that_nobody_reads_are_counted_too(server: Server, client: Client, job: Job) -> None:
    peer, frame = worker_by_tcp(server, client)
    before = resident_bytes(server)
    pushes = 0
    with contextlib.closing(peer):
        peer.settimeout(1.0)
        with contextlib.suppress(ConnectionError, TimeoutError):
            for first in range(0, 1_000_000, 1000):
                many = b"".join(
                    message(frame(kind=PUSH, seq=seq, collective=4, dtype=1)) for seq in range(first, first + 1000)
                )
                peer.sendall(many)
                pushes += 1000
                if first % 50_000 == 0:
                    job.step()
        assert pushes < 1_000_000
        assert resident_bytes(server) < before + MEMORY_LIMIT_BYTES + 16 * MIB
        peer.settimeout(20.0)
        assert ended(peer)
    job.step()


def test_chunks_that_wait_for_ever_keep_within_the_limit(server: Server, client: Client, job: Job) -> None:
    """Each of a worker whose fellow never comes: empty ones, and small ones each in a buffer of its own."""
    frame = client.message("reducer.v1.Frame")
    before = resident_bytes(server)
    beats = message(frame(kind=BEAT)) * 12_000

    def empty() -> Iterator[bytes]:
        for first in range(0, 200_000, 500):
            yield b"".join(
                message(frame(kind=PUSH, seq=seq, collective=4, dtype=1)) for seq in range(first, first + 500)
            )

    def small(nbytes: int) -> Iterator[bytes]:
        call = {"collective": 1, "op": 1, "dtype": 1, "count": nbytes // 4, "length": nbytes}
        for seq in range(1100):
            yield message(frame(kind=PUSH, seq=seq, payload=bytes(nbytes), **call))
            yield beats

    for chunks, closes in ((empty(), True), (small(8), False), (small(8192), False)):
        peer, _ = worker_by_tcp(server, client, world_size=2, window_bytes=12 * MIB)
        with contextlib.closing(peer):
            peer.settimeout(20.0)
            with contextlib.suppress(ConnectionError):
                for chunk in chunks:
                    peer.sendall(chunk)
            assert not closes or ended(peer)
            assert resident_bytes(server) < before + MEMORY_LIMIT_BYTES + 48 * MIB, "32 MiB of them in buffers"
        wait_until(lambda: client.stats().connections == 2, job)


def test_floods_of_tiny_frames_leave_others_their_share() -> None:
    """Words that cost a reducer more than their bytes, from more workers than it has threads."""
    over = threading.Event()

    def flood(peer: socket.socket, words: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            while not over.is_set():
                peer.sendall(words)

    # A server of its own: what it has received of the flood keeps it at work for a while.
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving())
        client = stack.enter_context(Client(server.address))
        frame = client.message("reducer.v1.Frame")
        words = b"".join(message(frame(kind=CANCEL, seq=seq, code=6, text="no")) for seq in range(30_000))
        threads = []
        for rank in range(4):
            peer, _ = worker_by_tcp(server, client, rank=rank, world_size=5)
            stack.enter_context(contextlib.closing(peer))
            peer.settimeout(30.0)
            threads.append(threading.Thread(target=flood, args=[peer, words]))
            threads[-1].start()
        victim, _ = worker_by_tcp(server, client, job=b"by-tcp-as-others")
        stack.enter_context(contextlib.closing(victim))
        steps = 0
        try:
            end = time.monotonic() + 3
            while time.monotonic() < end:
                victim.sendall(message(frame(kind=PUSH, seq=steps, collective=4, dtype=1)))
                assert frame_of(victim, frame).kind == RESULT
                steps += 1
        finally:
            over.set()
            for thread in threads:
                thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert steps > 10


def test_a_message_longer_than_the_window_is_refused_by_its_announcement(
    server: Server, client: Client, job: Job
) -> None:
    frame = client.message("reducer.v1.Frame")
    peer, _ = worker_by_tcp(server, client)
    with contextlib.closing(peer):
        peer.sendall(struct.pack("<II", 20, 2 * MIB))
        assert (
            "a message of 2097172 bytes; with the window that it announced the limit is" in frame_of(peer, frame).text
        )
        peer.settimeout(20.0)
        assert ended(peer)
    job.step()


def test_a_second_hello_another_rank_and_a_frame_of_another_group_harm_nobody(
    server: Server, client: Client, job: Job
) -> None:
    peer, frame = worker_by_tcp(server, client)
    with contextlib.closing(peer):
        hello = {"version": PROTOCOL_VERSION, "job": b"well-behaved-job", "world_size": 2, "window_bytes": MIB}
        peer.sendall(message(frame(kind=HELLO, hello=hello)))
        assert "a second hello" in frame_of(peer, frame).text
        assert ended(peer)
    liar = client.exchange()  # rank 0 is there already
    liar.hello(job=b"well-behaved-job", rank=0, world_size=2)
    assert "is connected already" in liar.receive().text
    assert liar.ended()
    job.step()
