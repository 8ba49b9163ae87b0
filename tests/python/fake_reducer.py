"""What a worker may meet in place of a reducer of its own version: a gRPC server that shares no code with one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from control_client import ERROR, HELLO, message

VERSION_CODE = 7  # reducer::Code::kVersion


class FakeReducer:
    """Answers every hello as a reducer of another protocol version does. Use as a context."""

    def __init__(self, protocol_version: int, threads: int = 8) -> None:
        self.ranks_seen: list[int] = []
        self._version = protocol_version
        self._frame = message("reducer.v1.Frame")
        # A stream takes a thread for as long as it lives.
        self._server = grpc.server(ThreadPoolExecutor(threads))
        handler = grpc.stream_stream_rpc_method_handler(self._exchange)
        service = grpc.method_handlers_generic_handler("reducer.v1.Data", {"Exchange": handler})
        self._server.add_generic_rpc_handlers((service,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> FakeReducer:
        self._server.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._server.stop(grace=None).wait(10)

    def _exchange(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        # Without it the worker takes this for a call that failed, and tries again.
        context.send_initial_metadata((("reducer-accepted", "1"),))
        first = self._frame.FromString(next(requests))
        assert first.kind == HELLO
        self.ranks_seen.append(first.hello.rank)
        text = (
            f"this reducer (fake-host:1) speaks protocol version {self._version}, the worker speaks "
            f"{first.hello.version}; install the same version of reducer on both"
        )
        yield self._frame(kind=ERROR, fatal=True, code=VERSION_CODE, text=text).SerializeToString()
