"""A standalone reducer as another program sees it: health, reflection, counters, raw streams, signals."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from control_client import (
    BYE,
    ERROR,
    PROTOCOL_VERSION,
    RESEND,
    RESULT,
    WAIT_S,
    WINDOW_BYTES,
    Client,
    Exchange,
    crc32c,
    floats,
    message,
    promised,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from servers import Server, serving, started

INVALID_ARGUMENT, MISMATCH, UNAVAILABLE, RESOURCE_EXHAUSTED, VERSION, INTERNAL = 1, 2, 4, 5, 7, 8
OTHER_JOB = b"fedcba9876543210"

# Lanes, as csrc/wire/lane.h numbers them.
COLLECTIVES = 0
PART = 1 << 62  # what rank 0 pushes of a gather
STEP = 1 << 61 | 3  # the second step of collective 3
PAIR = 1 << 63 | 0 << 44 | 1 << 32 | 7  # from rank 0 to rank 1, tag 7


@pytest.fixture
def server() -> Iterator[Server]:
    with serving("--threads", "2", "--memory-limit", "64MiB") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected


@pytest.fixture
def open_stream(client: Client) -> Iterator[Callable[[], Exchange]]:
    """Opens streams, which are cut when the test ends."""
    with ExitStack() as stack:

        def opened() -> Exchange:
            stream = client.exchange()
            stack.callback(stream.cut)
            return stream

        yield opened


def assert_works(stream: Exchange, seq: int) -> None:
    """A group of one rank gets its own values back."""
    stream.push([1.5, -2.0, 3.25], seq=seq)
    result = stream.receive()
    assert (result.kind, result.seq) == (RESULT, seq)
    assert floats(result.payload) == [1.5, -2.0, 3.25]


def test_health(client: Client) -> None:
    health = health_pb2_grpc.HealthStub(client.channel)
    for service in ("", "reducer.v1.Data"):
        reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as unknown:
        health.Check(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=WAIT_S)
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_describes_the_services(client: Client) -> None:
    assert {"reducer.v1.Data", "reducer.v1.Control", "grpc.health.v1.Health"} <= set(client.services())
    frame = client.reflected("reducer.v1.Frame").fields_by_name
    assert {name: field.number for name, field in frame.items()} == {
        name: field.number for name, field in message("reducer.v1.Frame").DESCRIPTOR.fields_by_name.items()
    }
    assert frame["payload"].number == max(field.number for field in frame.values())


def test_stats_of_an_idle_reducer(client: Client) -> None:
    stats = client.stats()
    assert stats.protocol_version == PROTOCOL_VERSION
    assert stats.memory_limit_bytes == 64 << 20
    assert stats.uptime_s > 0
    assert not stats.draining
    assert (stats.connections, stats.reserved_bytes, stats.held_bytes, len(stats.groups)) == (0, 0, 0, 0)


def test_stats_count_what_happens(client: Client, open_stream: Callable[[], Exchange]) -> None:
    first, second = open_stream(), open_stream()
    first.join(rank=0, world_size=2)
    second.join(rank=1, world_size=2)
    first.push([1.0, 2.0])
    second.push([10.0, 20.0])
    assert [floats(stream.receive().payload) for stream in (first, second)] == [[11.0, 22.0]] * 2
    stats = client.stats()
    assert (stats.connections, stats.slots_done, stats.slots_failed, stats.slots_open) == (2, 1, 0, 0)
    assert (stats.pushed_bytes, stats.result_bytes) == (16, 16)
    (group,) = stats.groups
    assert group.job == b"0123456789abcdef".hex()
    assert (group.group, group.world_size, group.connected) == ("default", 2, 2)
    # A push of every rank, or its result.
    assert group.reserved_bytes == stats.reserved_bytes == promised(2, WINDOW_BYTES)


def test_jobs_do_not_see_each_other(open_stream: Callable[[], Exchange]) -> None:
    streams = {(job, rank): open_stream() for job in (b"0" * 16, OTHER_JOB) for rank in range(2)}
    for (job, rank), stream in streams.items():
        stream.join(job=job, rank=rank, world_size=2)
    for (job, rank), stream in streams.items():
        stream.push([float(rank + 1) if job == OTHER_JOB else 100.0 * (rank + 1)])
    for (job, _), stream in streams.items():
        assert floats(stream.receive().payload) == [3.0 if job == OTHER_JOB else 300.0]


@pytest.mark.parametrize("joined", [False, True], ids=["first", "after-hello"])
@pytest.mark.parametrize(
    "garbage",
    [b"", b"\xff" * 11, b"GET / HTTP/1.1\r\n\r\n", b"\x08\x03\xfa\x01\xff\xff\xff\xff\x0f", b"\x08\x63", bytes(70_000)],
    ids=["empty", "varint", "text", "overlong-payload", "unknown-kind", "zeros"],
)
def test_garbage_ends_its_own_stream_only(open_stream: Callable[[], Exchange], garbage: bytes, joined: bool) -> None:
    other, bad = open_stream(), open_stream()
    other.join(job=OTHER_JOB)
    assert_works(other, seq=0)
    if joined:
        bad.join()
    bad.send_bytes(garbage)
    reply = bad.receive()
    assert (reply.kind, reply.fatal, reply.code) == (ERROR, True, INVALID_ARGUMENT)
    assert reply.text
    assert bad.ended()
    assert_works(other, seq=1)


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1])
def test_another_protocol_version_is_refused(open_stream: Callable[[], Exchange], version: int) -> None:
    stream = open_stream()
    stream.hello(version=version)
    reply = stream.receive()
    assert (reply.kind, reply.fatal, reply.code) == (ERROR, True, VERSION)
    assert f"version {PROTOCOL_VERSION}" in reply.text
    assert str(version) in reply.text
    assert stream.ended()


@pytest.mark.parametrize(
    "hello",
    [{"rank": 2, "world_size": 2}, {"world_size": 0}, {"world_size": 1 << 20}, {"window_bytes": 0}],
    ids=["rank", "no-world", "huge-world", "no-window"],
)
def test_an_impossible_hello_is_refused(open_stream: Callable[[], Exchange], hello: dict[str, object]) -> None:
    stream = open_stream()
    stream.hello(**hello)
    reply = stream.receive()
    assert (reply.kind, reply.fatal, reply.code) == (ERROR, True, INVALID_ARGUMENT)
    assert stream.ended()


def test_a_window_that_the_group_does_not_have_is_refused(client: Client, open_stream: Callable[[], Exchange]) -> None:
    """The group's memory was promised for the window of its first worker."""
    first, greedy = open_stream(), open_stream()
    first.join(rank=0, world_size=2, window_bytes=4096, config_text="window 4096 B")
    greedy.hello(rank=1, world_size=2, window_bytes=1 << 30, config_text="window 1073741824 B")
    reply = greedy.receive()
    assert (reply.kind, reply.fatal, reply.code) == (ERROR, True, MISMATCH)
    for word in ("rank 1 (test-host:1)", "window 1073741824 B", "rank 0 (test-host:0)", "window 4096 B"):
        assert word in reply.text
    assert greedy.ended()
    assert client.stats().reserved_bytes == promised(2, 4096)
    # The place of rank 1 is free for one that fits.
    second = open_stream()
    second.join(rank=1, world_size=2, window_bytes=4096)
    for stream in (first, second):
        stream.push([1.0])
    assert [floats(stream.receive().payload) for stream in (first, second)] == [[2.0], [2.0]]


def test_what_a_peer_calls_itself_obeys_no_terminal(open_stream: Callable[[], Exchange]) -> None:
    first, second = open_stream(), open_stream()
    first.join(rank=0, world_size=2, host="evil\x1b[2J\x07", config_text="a\x7f\tb", config=1)
    second.hello(rank=1, world_size=2, group="g\rroup", config=2)
    text = second.receive().text
    assert "group 'g?roup' is set up differently" in text
    assert "rank 0 (evil?[2J?) has 2 and a?\tb" in text


def test_a_push_before_hello_is_refused(open_stream: Callable[[], Exchange]) -> None:
    stream = open_stream()
    stream.push([1.0])
    reply = stream.receive()
    assert (reply.kind, reply.fatal) == (ERROR, True)
    assert stream.ended()


@pytest.mark.parametrize("lane", [COLLECTIVES, PART, STEP], ids=["collectives", "part", "step"])
def test_a_push_beyond_the_window_is_refused(open_stream: Callable[[], Exchange], lane: int) -> None:
    stream = open_stream()
    stream.join(world_size=2, window_bytes=8)
    stream.push([1.0], seq=0)
    stream.push([1.0, 2.0], seq=1, lane=lane)
    reply = stream.receive()
    assert (reply.kind, reply.fatal, reply.code) == (ERROR, True, RESOURCE_EXHAUSTED)
    assert "rank 0 has 12 bytes outstanding, more than the window of 8" in reply.text
    assert stream.ended()


def test_a_send_through_a_standalone_reducer_is_refused(client: Client, open_stream: Callable[[], Exchange]) -> None:
    """Send and recv have a window for each pair and tag, however many: nobody has promised memory for them."""
    streams = [open_stream() for _ in range(2)]
    for rank, stream in enumerate(streams):
        stream.join(rank=rank, world_size=2)
    streams[0].push([1.0], lane=PAIR, collective=10, op=0, pusher=1, puller=2)
    reply = streams[0].receive()
    assert (reply.kind, reply.fatal, reply.code) == (ERROR, True, INVALID_ARGUMENT)
    assert "send and recv go to the other worker" in reply.text
    assert streams[0].ended()
    assert client.stats().slots_open == 0


@pytest.mark.parametrize("values", [[1.5], [1.0, -2.0, 3.25] * 100], ids=["one", "many"])
def test_checksums_are_verified_and_given_back(open_stream: Callable[[], Exchange], values: list[float]) -> None:
    stream = open_stream()
    stream.join()
    payload = struct.pack(f"<{len(values)}f", *values)
    stream.push(values, checksum=crc32c(payload))
    result = stream.receive()
    assert (result.kind, result.text) == (RESULT, "")
    assert result.payload == payload
    assert result.HasField("checksum")
    assert result.checksum == crc32c(payload)


def test_a_push_with_a_wrong_checksum_is_asked_for_again(client: Client, open_stream: Callable[[], Exchange]) -> None:
    partner, damaged = open_stream(), open_stream()
    partner.join(rank=0, world_size=2)
    damaged.join(rank=1, world_size=2)
    good, bad = struct.pack("<2f", 10.0, 20.0), struct.pack("<2f", 10.0, 21.0)
    partner.push([1.0, 2.0])
    partner.push([1.0, 2.0], seq=1)
    damaged.push([10.0, 20.0], checksum=crc32c(bad))
    damaged.push([10.0, 20.0], seq=1, checksum=crc32c(good))  # waits for the one before it
    asked = damaged.receive()
    assert (asked.kind, asked.seq) == (RESEND, 0)
    damaged.push([10.0, 20.0], checksum=crc32c(good))
    results = [damaged.receive() for _ in range(2)]
    for seq, result in enumerate(results):
        assert (result.kind, result.seq, result.payload) == (RESULT, seq, struct.pack("<2f", 11.0, 22.0))
        assert partner.receive().payload == result.payload
        damaged.send(kind=RESEND, seq=seq)  # as if it had come damaged
        assert damaged.receive() == result
    assert client.stats().damaged == 3
    damaged.send(kind=RESEND, seq=7)
    assert "asks for a result that it was not given" in damaged.receive().text


def test_a_push_whose_checksum_is_always_wrong_is_refused(client: Client, open_stream: Callable[[], Exchange]) -> None:
    other, partner, damaged = open_stream(), open_stream(), open_stream()
    other.join(job=OTHER_JOB)
    partner.join(rank=0, world_size=2)
    damaged.join(rank=1, world_size=2)
    partner.push([1.0, 2.0])
    for _ in range(17):
        damaged.push([10.0, 20.0], checksum=crc32c(struct.pack("<2f", 10.0, 21.0)))
    for _ in range(16):
        assert damaged.receive().kind == RESEND
    reply = damaged.receive()
    assert (reply.kind, reply.fatal, reply.code) == (ERROR, True, INTERNAL)
    assert "a chunk of rank 1 (test-host:1) arrived at " in reply.text
    assert "with a wrong checksum" in reply.text
    assert damaged.ended()
    told = partner.receive()
    assert (told.kind, told.fatal, told.code) == (ERROR, False, UNAVAILABLE)
    assert "rank 1 (test-host:1) was lost" in told.text
    assert "wrong checksum" in told.text
    assert_works(other, seq=0)
    assert client.stats().slots_open == 0


def test_different_calls_are_named_to_every_rank(open_stream: Callable[[], Exchange]) -> None:
    streams = [open_stream() for _ in range(2)]
    for rank, stream in enumerate(streams):
        stream.join(rank=rank, world_size=2)
    streams[0].push([1.0, 2.0])
    streams[1].push([1.0, 2.0], op=3)
    replies = [stream.receive() for stream in streams]
    assert [(reply.kind, reply.code, reply.fatal) for reply in replies] == [(ERROR, MISMATCH, False)] * 2
    assert replies[0].text == replies[1].text
    for word in ("rank 0", "rank 1", "sum", "min"):
        assert word in replies[0].text
    # The group goes on.
    for stream in streams:
        stream.push([4.0], seq=1)
    assert [floats(stream.receive().payload) for stream in streams] == [[8.0], [8.0]]


@pytest.mark.parametrize("job", [b"", b"short", b"x" * 17])
def test_a_job_of_another_length_is_refused(open_stream: Callable[[], Exchange], job: bytes) -> None:
    stream = open_stream()
    stream.hello(job=job)
    reply = stream.receive()
    assert (reply.kind, reply.fatal, reply.code) == (ERROR, True, INVALID_ARGUMENT)
    assert f"{len(job)} bytes; a job has 16" in reply.text


def test_memory_limit_refuses_a_group_that_does_not_fit() -> None:
    with serving("--memory-limit", "3MiB") as server, Client(server.address) as client:
        fits, too_much = client.exchange(), client.exchange()
        fits.join(world_size=1)
        too_much.hello(job=OTHER_JOB, world_size=1, host="greedy-host:1")
        reply = too_much.receive()
        assert (reply.kind, reply.fatal, reply.code) == (ERROR, True, RESOURCE_EXHAUSTED)
        assert "--memory-limit" in reply.text
        assert too_much.ended()
        stats = client.stats()
        assert stats.reserved_bytes == promised(1, WINDOW_BYTES)
        assert stats.refused == 1
        # What a group had is free when it has left.
        fits.close()
        later = client.exchange()
        later.join(job=OTHER_JOB)
        assert_works(later, seq=0)
        later.close()


def test_sigterm_drains(server: Server, client: Client, open_stream: Callable[[], Exchange]) -> None:
    at_work, newcomer = open_stream(), open_stream()
    at_work.join()
    health = health_pb2_grpc.HealthStub(client.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    server.terminate()
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    assert "1 connection" in server.read_until("draining")
    newcomer.hello(job=OTHER_JOB)
    reply = newcomer.receive()
    assert (reply.kind, reply.fatal, reply.code) == (ERROR, True, UNAVAILABLE)
    assert client.stats().draining
    # Who was there goes on, and then leaves.
    assert_works(at_work, seq=0)
    assert_works(at_work, seq=1)
    at_work.send(kind=BYE)
    at_work.cut()
    assert server.wait() == 0
    assert server.output.splitlines()[-1] == "reducer stopped"


def test_sigterm_of_an_idle_reducer_ends_it(server: Server) -> None:
    server.terminate()
    assert server.wait() == 0


def test_the_grace_of_a_drain_ends() -> None:
    with serving("--grace", "0") as server, Client(server.address) as client:
        stream = client.exchange()
        stream.join()
        server.terminate()
        assert server.wait() == 0
        assert "still connected" in server.output
        stream.cut()


def test_drain_by_call(server: Server, client: Client, open_stream: Callable[[], Exchange]) -> None:
    stream = open_stream()
    stream.join()
    assert client.call("Drain").connections == 1
    assert_works(stream, seq=0)
    stream.send(kind=BYE)
    stream.cut()
    assert server.wait() == 0


def test_a_port_in_use_is_named(server: Server) -> None:
    with started(listen=server.address) as second:
        assert second.wait() == 1
        assert server.address in second.output
        assert "in use" in second.output.lower()
    with Client(server.address) as client:
        assert not client.stats().draining


def test_after_a_killed_worker_the_others_are_sent_away_with_its_name(open_stream: Callable[[], Exchange]) -> None:
    streams = [open_stream() for _ in range(2)]
    for rank, stream in enumerate(streams):
        stream.join(rank=rank, world_size=2)
    streams[0].push([1.0])
    streams[1].cut()
    # Either that worker is lost, or this reducer is to it: nobody is answered here any more (docs/protocol.md).
    with pytest.raises(grpc.RpcError) as ended:
        streams[0].receive()
    assert ended.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "rank 1 (test-host:1) was lost" in ended.value.details()


def settled_stats(client: Client, done: Callable[[Any], bool]) -> Any:
    """The counters as soon as they are as wanted; what they are after WAIT_S otherwise."""
    deadline = time.monotonic() + WAIT_S
    while not done(stats := client.stats()) and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    return stats


def test_nothing_is_held_when_all_have_left_in_the_middle(client: Client, open_stream: Callable[[], Exchange]) -> None:
    streams = [open_stream() for _ in range(2)]
    for rank, stream in enumerate(streams):
        stream.join(rank=rank, world_size=2)
    for seq in range(20):
        streams[0].push([1.0] * 1000, seq=seq)
    held = settled_stats(client, lambda stats: stats.slots_open == 20).held_bytes
    assert 20 * 4000 < held < 20 * (4000 + 2048) + 64 * 2 * 768, "slots, frames and places count, too"
    for stream in streams:
        stream.cut()
    stats = settled_stats(client, lambda stats: stats.connections == 0 and stats.held_bytes == 0)
    assert (stats.connections, stats.slots_open, stats.held_bytes, stats.reserved_bytes) == (0, 0, 0, 0)
