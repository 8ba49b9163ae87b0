"""A worker's door: a listening socket without a thread, by which other workers see whether its process lives.

The kernel answers for a process that is at work or stopped, and refuses for one that has ended, however it ended. What
is said through the door waits there until the process looks. Whoever is refused has proof; whoever gets no answer at
all (a lost host, a broken network) knows nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import socket
import time
from collections.abc import Hashable, Mapping
from typing import Any, Generic, TypeVar

from reducer import errors

Key = TypeVar("Key", bound=Hashable)
Message = dict[str, Any]

_BACKLOG = 4096
_LINE_BYTES_MAX = 1 << 20
# Topics (meetings) whose messages are kept for later, messages of each, and connections that are open at a time.
_TOPICS_MAX = 64
_MESSAGES_MAX = 1 << 16
_CONNECTIONS_MAX = 4096
# Between two attempts to reach somebody who neither lets us in nor refuses.
_DIAL_AGAIN_S = 1.0

_doors: dict[str, Door] = {}
_door_of_worker: dict[str, str] = {}


class Door:
    """One for each address that this process listens at. Thread safety: one thread at a time."""

    def __init__(self, host: str) -> None:
        """Listens at a free port of `host`, an address of this machine. Raises UnavailableError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise errors.UnavailableError(f"cannot listen on {host}: {error.strerror}") from error
        self._socket.setblocking(False)
        port = self._socket.getsockname()[1]
        self.address = f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
        self._incoming: dict[socket.socket, bytearray] = {}
        self._heard: dict[str, list[Message]] = {}

    @property
    def fileno(self) -> int:
        return self._socket.fileno()

    def hear(self, topic: str) -> list[Message]:
        """Takes in what has come, without waiting; what was said about `topic` since the last time."""
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self._socket.accept()
                connection.setblocking(False)
                self._incoming[connection] = bytearray()
                if len(self._incoming) > _CONNECTIONS_MAX:  # the oldest; who has to say something calls again
                    self._hang_up(next(iter(self._incoming)))
        for connection in list(self._incoming):
            self._read(connection)
        return self._heard.pop(topic, [])

    def _read(self, connection: socket.socket) -> None:
        held = self._incoming[connection]
        ended = False
        try:
            while not ended and len(held) <= _LINE_BYTES_MAX:
                read = connection.recv(65536)
                held += read
                ended = not read
        except BlockingIOError:
            pass
        except OSError:
            ended = True
        *lines, rest = bytes(held).split(b"\n")
        held[:] = rest
        for line in lines:
            ended |= not self._keep(line)
        if ended or len(held) > _LINE_BYTES_MAX:
            self._hang_up(connection)

    def _hang_up(self, connection: socket.socket) -> None:
        connection.close()
        del self._incoming[connection]

    def _keep(self, line: bytes) -> bool:
        try:
            message = json.loads(line)
            topic = message["topic"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        if not isinstance(topic, str):
            return False
        if topic not in self._heard and len(self._heard) >= _TOPICS_MAX:
            del self._heard[next(iter(self._heard))]
        messages = self._heard.setdefault(topic, [])
        messages.append(message)
        return len(messages) <= _MESSAGES_MAX

    def close(self) -> None:
        for connection in self._incoming:
            connection.close()
        self._incoming.clear()
        self._socket.close()


def door_at(host: str) -> Door:
    """This process' door at an address of this machine, opened by the first that asks. Raises UnavailableError."""
    if host not in _doors:
        _doors[host] = Door(host)
    return _doors[host]


def _leave_to_parent() -> None:
    # A forked child that held the door would answer for a parent that is dead.
    for door in _doors.values():
        door.close()
    _doors.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def remember(workers: list[str], doors: list[str]) -> None:
    """Notes where the doors of workers are, by the addresses of the reducers inside them."""
    _door_of_worker.update(zip(workers, doors, strict=True))


def doors_of(workers: list[str]) -> list[str]:
    return [_door_of_worker[worker] for worker in workers]


def split_address(address: str) -> tuple[str, int]:
    """ "host:port" or "[host]:port" in two."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


class _Call:
    """A connection to one door, made again whenever it ends but for a refusal."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.dead = False
        self.said = b""
        self._left = b""
        self._socket: socket.socket | None = None
        self._connected = False
        self._next_dial = 0.0

    def say(self, text: bytes) -> None:
        self.said += text
        self._left += text

    @property
    def known(self) -> bool:
        return self._connected or self.dead

    @property
    def delivered(self) -> bool:
        return self._connected and not self._left

    def step(self) -> None:
        """Does what can be done without waiting."""
        if self.dead:
            return
        try:
            self._advance()
        except BlockingIOError:
            pass
        except OSError as error:
            refused = error.errno == errno.ECONNREFUSED
            self.hang_up()
            self.dead = refused
            # One that ended is looked at again at once: refused, or the other end only hung up.
            self._next_dial = time.monotonic() + (0.0 if _ended(error) else _DIAL_AGAIN_S)

    def _advance(self) -> None:
        if self._socket is None:
            if time.monotonic() < self._next_dial:
                return
            self._dial()
        assert self._socket is not None
        if not self._connected:
            failure = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if failure:
                raise OSError(failure, os.strerror(failure))
            try:
                self._socket.getpeername()
            except OSError:
                return  # it is still being made
            self._connected = True
        while self._left:
            self._left = self._left[self._socket.send(self._left) :]
        if not self._socket.recv(4096):
            raise ConnectionResetError(errno.ECONNRESET, "closed")

    def _dial(self) -> None:
        host, port = split_address(self.address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._left = self.said
        result = self._socket.connect_ex((host, port))
        if result not in (0, errno.EINPROGRESS):
            raise OSError(result, os.strerror(result))

    def register(self, selector: selectors.BaseSelector) -> None:
        if self._socket is not None:
            wanted = selectors.EVENT_READ | (0 if self.delivered else selectors.EVENT_WRITE)
            selector.register(self._socket, wanted)

    def hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None
        self._connected = False


def _ended(error: OSError) -> bool:
    return error.errno in (errno.ECONNRESET, errno.EPIPE)


class Calls(Generic[Key]):
    """Connections to the doors of others: says things to them, and notices which of their processes have ended.

    Thread safety: one thread at a time.
    """

    def __init__(self) -> None:
        self._calls: dict[Key, _Call] = {}

    def __enter__(self) -> Calls[Key]:
        return self

    def __exit__(self, *_: object) -> None:
        for call in self._calls.values():
            call.hang_up()
        self._calls.clear()

    def watch(self, addresses: Mapping[Key, str]) -> None:
        """Calls exactly these from now on."""
        for key in [key for key in self._calls if addresses.get(key) != self._calls[key].address]:
            self._calls.pop(key).hang_up()
        for key, address in addresses.items():
            if key not in self._calls:
                self._calls[key] = _Call(address)

    def say(self, message: Message) -> None:
        """Says it to all that live, and again to those whose connection is made again."""
        text = json.dumps(message).encode() + b"\n"
        for call in self._calls.values():
            call.say(text)

    def delivered(self) -> bool:
        """Whether all that live were told everything."""
        return all(call.delivered or call.dead for call in self._calls.values())

    def step(self, wait_s: float, door: Door | None = None) -> None:
        """Waits at most so long until something can be done (or somebody is at the door), and does it."""
        for call in self._calls.values():
            call.step()
        with selectors.DefaultSelector() as selector:
            if door is not None:
                selector.register(door.fileno, selectors.EVENT_READ)
                for connection in door._incoming:
                    selector.register(connection, selectors.EVENT_READ)
            for call in self._calls.values():
                call.register(selector)
            selector.select(wait_s)
        for call in self._calls.values():
            call.step()

    def all_known(self) -> bool:
        """Whether it is known of all whether they live."""
        return all(call.known for call in self._calls.values())

    def dead(self) -> set[Key]:
        """Those who refused: their processes have ended."""
        return {key for key, call in self._calls.items() if call.dead}
