"""A client of a reducer that shares no code with it: Python's grpcio, and messages from the .proto file."""

from __future__ import annotations

import functools
import queue
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from certificates import Files
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

WAIT_S = 30.0
HELLO, WELCOME, PUSH, RESULT, ERROR, CANCEL, BYE = range(1, 8)
SETTLED, BEAT, RESEND = 12, 13, 17
PROTOCOL_VERSION = 3
WINDOW_BYTES = 1 << 20
PROTO = Path(__file__).resolve().parents[2] / "csrc" / "wire" / "reducer.proto"


@functools.cache
def described() -> descriptor_pool.DescriptorPool:
    """What is in the .proto file. (A reducer with tokens describes itself to nobody.)"""
    with tempfile.NamedTemporaryFile() as out:
        subprocess.run(
            ["protoc", f"-I{PROTO.parent}", f"--descriptor_set_out={out.name}", PROTO], check=True, timeout=WAIT_S
        )
        files = descriptor_pb2.FileDescriptorSet.FromString(Path(out.name).read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


def message(name: str) -> Any:
    """The class of a message of the .proto file."""
    return message_factory.GetMessageClass(described().FindMessageTypeByName(name))


def promised(workers: int, window_bytes: int) -> int:
    """What a reducer promises to a group."""
    return workers * (2 * window_bytes + (128 << 10))


class Client:
    """A connection to one reducer. Use as a context."""

    def __init__(self, address: str, tls: Files | None = None) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        if tls is None:
            self.channel = grpc.insecure_channel(address, options)
        else:
            files = [path.read_bytes() for path in (tls.ca, tls.key, tls.cert)]
            self.channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(*files), options)
        grpc.channel_ready_future(self.channel).result(WAIT_S)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.channel.close()

    def services(self) -> list[str]:
        """What reflection lists."""
        return list(ProtoReflectionDescriptorDatabase(self.channel).get_services())

    def reflected(self, name: str) -> Any:
        """The descriptor of a message as the reducer tells it."""
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))
        return pool.FindMessageTypeByName(name)

    def message(self, name: str) -> Any:
        return message(name)

    def call(self, method: str, metadata: Sequence[tuple[str, str]] = ()) -> Any:
        """Calls "reducer.v1.Control/NAME" with an empty request, by the .proto file's types; the reply."""
        request = message(f"reducer.v1.{method}Request")()
        reply = message(f"reducer.v1.{method}Reply")
        invoke = self.channel.unary_unary(
            f"/reducer.v1.Control/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=reply.FromString,
        )
        return invoke(request, timeout=WAIT_S, metadata=list(metadata))

    def healthy(self) -> bool:
        """What the standard health service says."""
        check = health_pb2_grpc.HealthStub(self.channel).Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        return bool(check.status == health_pb2.HealthCheckResponse.SERVING)

    def stats(self) -> Any:
        return self.call("Stats")

    def exchange(self) -> Exchange:
        return Exchange(self)


class Exchange:
    """One stream of reducer.v1.Data/Exchange. Frames go as bytes, so that any bytes can go."""

    def __init__(self, client: Client) -> None:
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.frame = message("reducer.v1.Frame")
        self._call = client.channel.stream_stream("/reducer.v1.Data/Exchange")(self._requests(), timeout=WAIT_S)

    def _requests(self) -> Iterator[bytes]:
        while (request := self._outgoing.get()) is not None:
            yield request

    def send_bytes(self, message: bytes) -> None:
        self._outgoing.put(message)

    def send(self, **frame: Any) -> None:
        self.send_bytes(self.frame(**frame).SerializeToString())

    def receive(self) -> Any:
        """The next frame; StopIteration or grpc.RpcError if the stream has ended."""
        return self.frame.FromString(next(self._call))

    def ended(self) -> bool:
        """Waits for the end of the stream; whether it came without another frame."""
        try:
            next(self._call)
        except (StopIteration, grpc.RpcError):
            return True
        return False

    def close(self) -> None:
        """Leaves in good order."""
        self.send(kind=BYE)
        self._outgoing.put(None)
        assert self.ended()

    def cut(self) -> None:
        """Leaves as a killed process does."""
        self._call.cancel()
        self._outgoing.put(None)

    def hello(self, *, job: bytes = b"0123456789abcdef", rank: int = 0, world_size: int = 1, **more: Any) -> None:
        hello = {
            "version": PROTOCOL_VERSION,
            "job": job,
            "group": "default",
            "rank": rank,
            "world_size": world_size,
            "host": f"test-host:{rank}",
            "window_bytes": WINDOW_BYTES,
        }
        self.send(kind=HELLO, hello=hello | more)

    def join(self, **hello: Any) -> None:
        """Says hello and is welcome."""
        self.hello(**hello)
        welcome = self.receive()
        assert welcome.kind == WELCOME, welcome.text

    def push(self, values: list[float], *, seq: int = 0, **more: Any) -> None:
        """One chunk of an all_reduce(sum) of float32."""
        payload = struct.pack(f"<{len(values)}f", *values)
        frame = {"kind": PUSH, "seq": seq, "collective": 1, "op": 1, "dtype": 1, "count": len(values)}
        self.send(**(frame | {"length": len(payload), "timeout_ms": 10_000, "payload": payload} | more))


def crc32c(payload: bytes) -> int:
    """Bit by bit, as RFC 3720 defines it."""
    crc = 0xFFFFFFFF
    for byte in payload:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def floats(payload: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(payload) // 4}f", payload))
