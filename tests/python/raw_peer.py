"""A worker's end of the tcp transport as plain bytes, to do with it what no worker does."""

from __future__ import annotations

import socket
import struct
from typing import Any

GREETING, ACCEPTED, BUSY = b"reducer\1", b"REDUCER\1", b"REDBUSY\1"
WAIT_S = 20.0


def dial(address: str, source: str = "127.0.0.1") -> socket.socket:
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), WAIT_S, (source, 0))


def greet(address: str, source: str = "127.0.0.1") -> socket.socket:
    """A connection that carries frames."""
    peer = dial(address, source)
    peer.sendall(GREETING)
    assert receive(peer, 8) == ACCEPTED
    return peer


def receive(peer: socket.socket, nbytes: int) -> bytes:
    """So many bytes, or what came before the end."""
    data = b""
    while len(data) < nbytes:
        try:
            part = peer.recv(nbytes - len(data))
        except ConnectionResetError:
            break
        if not part:
            break
        data += part
    return data


def message(frame: Any) -> bytes:
    """The sizes of header and payload, the header (all of the frame but its payload's bytes), the payload."""
    whole = frame.SerializeToString()
    header = len(whole) - len(frame.payload)
    return struct.pack("<II", header, len(frame.payload)) + whole


def frame_of(peer: socket.socket, kind: Any) -> Any:
    """The next frame; None at the end or where the other end says goodbye."""
    sizes = receive(peer, 8)
    if len(sizes) < 8:
        return None
    header, payload = struct.unpack("<II", sizes)
    body = receive(peer, header + payload)
    return kind.FromString(body) if header else None


def ended(peer: socket.socket) -> bool:
    """Reads to the end: whether it comes within WAIT_S."""
    try:
        while peer.recv(65536):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True
