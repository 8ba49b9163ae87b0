"""How much of a reducer strangers can hold: places for streams and watchers, and threads, of which they get none."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import torch.distributed as dist
from certificates import Files, issue
from control_client import BYE, RESULT, Client, Exchange, floats
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from ranks import Ranks
from raw_peer import BUSY, WAIT_S, dial, greet, receive
from relays import seen_from
from servers import Server, serving

# Of one address, where a process may have 4096 descriptors and more.
STRANGERS_MAX = 256
STREAMS_OF_A_CONNECTION = 16
WATCHES_MAX, WATCHES_OF_ONE_MAX = 16, 4
CROWDED = "too many connections that have not said who they are"
# Another host, as far as the reducer can tell.
ELSEWHERE = "127.0.0.2"


@pytest.fixture(name="server")
def a_server() -> Iterator[Server]:
    with serving("--threads", "2", "--memory-limit", "64MiB") as server:
        yield server


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def threads_of(server: Server) -> int:
    """Those on which gRPC runs calls that wait; one is at rest where there is reflection."""
    names = [path.read_text() for path in Path(f"/proc/{server.process.pid}/task").glob("*/comm")]
    return sum(name.startswith("grpcpp_sync") for name in names)


# ---------------------------------------------------------------- streams


def said(stream: Exchange) -> str:
    """What a stream of a stranger is told at its end."""
    with pytest.raises(grpc.RpcError) as ended:
        stream.receive()
    assert ended.value.code() == grpc.StatusCode.UNAVAILABLE
    return str(ended.value.details())


def test_each_stream_of_a_stranger_takes_a_place(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        elsewhere = stack.enter_context(seen_from(ELSEWHERE, server.address))
        others = stack.enter_context(Client(elsewhere))
        worker = others.exchange()
        worker.join()
        # Connections first: each is a stranger, and its first stream with it.
        count = STRANGERS_MAX // STREAMS_OF_A_CONNECTION
        clients = [stack.enter_context(Client(server.address)) for _ in range(count)]
        streams = [client.exchange() for client in clients for _ in range(STREAMS_OF_A_CONNECTION - 1)]
        for stream in streams:
            stack.callback(stream.cut)
        refused = others.stats().refused
        # As many as places, and one more.
        extra = [client.exchange() for client in clients]
        for stream in extra:
            stack.callback(stream.cut)
        with Client(elsewhere) as later:  # of another address; by its connection that one has a place, too
            greet(server.address, ELSEWHERE).close()
            stranger = later.exchange()
            stranger.join(job=b"fedcba9876543210")
            stranger.close()
        with contextlib.closing(dial(server.address)) as full:
            assert receive(full, 8) == BUSY
        assert others.stats().refused == refused + 1
        # Whoever was let in before goes on.
        worker.push([1.0, 2.0])
        answer = worker.receive()
        assert (answer.kind, floats(answer.payload)) == (RESULT, [1.0, 2.0])
        # On a connection with a place, one more than there are is told why, as what a worker tries again after.
        streams[1].cut()  # (the first one's place is its connection's)
        wait_until(lambda: place_for(server.address))
        with Client(server.address) as last:
            first, second = last.exchange(), last.exchange()
            assert CROWDED in said(second)
            first.join(job=b"fedcba9876543211")  # its place is free then
            third = last.exchange()
            third.join(job=b"fedcba9876543212")
            for stream in (first, third):
                stream.close()
        worker.send(kind=BYE)
        worker.cut()


def place_for(address: str) -> bool:
    with contextlib.closing(dial(address)) as peer:
        peer.settimeout(1.0)
        with contextlib.suppress(TimeoutError):
            return peer.recv(8) != BUSY
        return True


def sum_in_a_new_group() -> float:
    group = dist.new_group()
    tensor = torch.ones(1000)
    dist.all_reduce(tensor, group=group)
    return float(tensor[0])


@pytest.mark.parametrize("transport", ["auto", "grpc", "tls"])
def test_a_worker_for_whom_there_is_no_place_waits_for_one(transport: str, tmp_path: Path) -> None:
    tls: Files | None = issue(tmp_path / "tls") if transport == "tls" else None
    security = tls.environment() if tls else {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(*(tls.options() if tls else [])))
        elsewhere = stack.enter_context(seen_from(ELSEWHERE, server.address))
        client = stack.enter_context(Client(elsewhere, tls))
        env = {"REDUCER_SERVERS": server.address, "REDUCER_ALGORITHM": "server", "REDUCER_CONNECT_TIMEOUT": "60"}
        env |= {"REDUCER_TRANSPORT": "grpc" if transport == "grpc" else "auto"} | security
        ranks = stack.enter_context(Ranks(2, env))
        assert ranks.call(sum_in_a_new_group) == [2.0, 2.0]
        pool = stack.enter_context(ThreadPoolExecutor(1))
        with contextlib.ExitStack() as strangers:
            refused = client.stats().refused
            while client.stats().refused == refused:  # they come until there is no place
                for _ in range(STRANGERS_MAX // 8):
                    strangers.enter_context(contextlib.closing(dial(server.address)))
            with contextlib.closing(dial(server.address)) as last:  # after it nothing of theirs is left to be told
                assert receive(last, 8) == BUSY
            refused = client.stats().refused
            waiting = pool.submit(ranks.call, sum_in_a_new_group)
            wait_until(lambda: client.stats().refused >= refused + 8)  # several tries of each
            assert not waiting.done()
        assert waiting.result(WAIT_S) == [2.0, 2.0]


# ---------------------------------------------------------------- watchers


def watch(client: Client) -> Any:
    return health_pb2_grpc.HealthStub(client.channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)


def refusal(call: Any) -> str:
    with pytest.raises(grpc.RpcError) as ended:
        next(call)
    assert ended.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    return str(ended.value.details())


def test_watchers_are_few_hold_no_thread_and_are_sent_away_at_the_end(server: Server) -> None:
    serves, stops = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    with contextlib.ExitStack() as stack:
        clients = []
        for number in range(2, 2 + WATCHES_MAX // WATCHES_OF_ONE_MAX + 1):
            elsewhere = stack.enter_context(seen_from(f"127.0.0.{number}", server.address))
            clients.append(stack.enter_context(Client(elsewhere)))
        *crowd, late = clients
        watches = []
        for client in crowd:
            for _ in range(WATCHES_OF_ONE_MAX):
                watches.append(watch(client))
                assert next(watches[-1]).status == serves
            assert "16 in all, 4 of one address" in refusal(watch(client))
        for client in clients:
            assert "use Check" in refusal(watch(client))
            assert client.healthy()
            assert not client.stats().draining
        assert threads_of(server) == 1
        # Who leaves makes room, at once.
        watches.pop(0).cancel()

        def let_in() -> bool:
            watches.append(watch(late))
            try:
                return bool(next(watches[-1]).status == serves)
            except grpc.RpcError:
                watches.pop()
                return False

        wait_until(let_in)
        began = time.monotonic()
        server.terminate()
        for call in watches:
            assert next(call).status == stops
            with pytest.raises(grpc.RpcError) as ended:
                next(call)
            assert ended.value.code() == grpc.StatusCode.UNAVAILABLE
        assert server.wait() == 0
        assert time.monotonic() - began < 5.0


def test_a_watch_of_an_unknown_service_takes_no_place(server: Server) -> None:
    with Client(server.address) as client:
        for _ in range(WATCHES_OF_ONE_MAX + 1):
            asked = health_pb2.HealthCheckRequest(service="no.such.Service")
            call = health_pb2_grpc.HealthStub(client.channel).Watch(asked, timeout=WAIT_S)
            assert next(call).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            with pytest.raises(grpc.RpcError) as ended:
                next(call)
            assert ended.value.code() == grpc.StatusCode.NOT_FOUND


# ---------------------------------------------------------------- who does not read


def http2(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4
WINDOW_0 = struct.pack(">HI", 4, 0)  # initial window size


def literal(name: str, value: str) -> bytes:
    """A header as HPACK has it without any table."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def unread_calls(peer: socket.socket, path: str, count: int) -> None:
    """Calls with empty requests, by a client that takes no byte of a reply; returns when their headers have come."""
    headers = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "a", "te": "trailers"}
    block = b"".join(literal(name, value) for name, value in headers.items())
    block += literal("content-type", "application/grpc")
    peer.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2(SETTINGS, 0, 0, WINDOW_0))
    for stream in range(1, 2 * count, 2):
        peer.sendall(http2(HEADERS, END_HEADERS, stream, block) + http2(DATA, END_STREAM, stream, bytes(5)))
    answered: set[int] = set()
    while len(answered) < count:
        head = receive(peer, 9)
        assert len(head) == 9, "it closed the connection"
        kind, _, stream = struct.unpack(">BBI", head[3:])
        receive(peer, int.from_bytes(head[:3], "big"))
        if kind == HEADERS:
            answered.add(stream)


@pytest.mark.parametrize("path", ["/grpc.health.v1.Health/Check", "/reducer.v1.Control/Stats"])
def test_those_who_do_not_read_their_answers_hold_nobody_up(server: Server, path: str) -> None:
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(Client(server.address))
        assert client.healthy()
        for _ in range(8):
            peer = stack.enter_context(contextlib.closing(dial(server.address)))
            unread_calls(peer, path, STREAMS_OF_A_CONNECTION)
        assert threads_of(server) == 1
        assert client.healthy()
        assert client.stats().connections == 0
        server.terminate()
        assert server.wait() == 0


def test_a_watch_that_is_not_read_does_not_delay_the_end(server: Server) -> None:
    with contextlib.closing(dial(server.address)) as peer, Client(server.address) as client:
        unread_calls(peer, "/grpc.health.v1.Health/Watch", WATCHES_OF_ONE_MAX)
        assert "use Check" in refusal(watch(client))
        began = time.monotonic()
        server.terminate()
        assert server.wait() == 0
        assert time.monotonic() - began < 5.0


def test_reflection_holds_few_threads_and_not_the_others(server: Server) -> None:
    with Client(server.address) as client:
        assert threads_of(server) == 1
        ended = threading.Event()

        def questions() -> Iterator[Any]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            ended.wait(WAIT_S)

        stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
        calls = [stub.ServerReflectionInfo(questions(), timeout=WAIT_S) for _ in range(STREAMS_OF_A_CONNECTION - 1)]
        held, refused = 0, 0
        for call in calls:
            try:
                assert next(call).list_services_response.service
                held += 1
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                refused += 1
        assert held + refused == len(calls)
        assert 1 <= held <= 8
        assert threads_of(server) <= 8
        assert client.healthy()
        assert not client.stats().draining
        ended.set()
        for call in calls:
            call.cancel()
