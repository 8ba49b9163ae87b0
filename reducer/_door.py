"""A worker's door: a listening socket without a thread, by which other workers see whether its process lives.

The kernel answers for a process that is at work or stopped, and refuses for one that has ended, however it ended. What
is said through the door waits there until the process looks. Whoever is refused has proof; whoever gets no answer at
all (a lost host, a broken network) knows nothing.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import selectors
import socket
import time
from collections.abc import Collection, Hashable, Mapping
from contextlib import suppress
from typing import Any, Generic, TypeVar

from reducer import errors
from reducer._keys import Keys

Key = TypeVar("Key", bound=Hashable)
Message = dict[str, Any]

_BACKLOG = 4096
# The most that a rank of a group of 4,096 has to say at once is 24 KB: which ranks are out. What it begins with is
# short, and so are its topics.
_LINE_BYTES_MAX = 32 << 10
_FIRST_BYTES_MAX = 1 << 10
_TOPIC_CHARS_MAX = 128
# Connections that have said nothing yet, such as speak of what nobody here has asked about, and such as speak of what
# this process waits for: two groups of the largest size.
_SILENT_MAX = 1024
_UNASKED_MAX = 1024
_ASKED_MAX = 8192
# What is read from a connection, and taken in from all, at a time; and what may be held of all together.
_READ_BYTES = 64 << 10
_HEARD_BYTES_MAX = 2 << 20
_HELD_BYTES_MAX = 12 << 20
# Between two attempts to reach somebody who neither lets us in nor refuses.
_DIAL_AGAIN_S = 1.0

_doors: dict[str, Door] = {}
_door_of_worker: dict[str, str] = {}
_keys = Keys()


class _Caller:
    """A connection that came."""

    def __init__(self, connection: socket.socket, address: str, places: _Places) -> None:
        self.socket = connection
        self.address = address
        self.places = places
        self.held = bytearray()
        self.topic: str | None = None  # of its first line, and so of all


class _Places:
    """For callers of one kind, so many; if more come, the address that has most of them loses its oldest."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._count = 0
        self._by_address: dict[str, dict[_Caller, None]] = {}

    def take(self, caller: _Caller) -> None:
        self._by_address.setdefault(caller.address, {})[caller] = None
        self._count += 1
        caller.places = self

    def leave(self, caller: _Caller) -> None:
        there = self._by_address[caller.address]
        del there[caller]
        self._count -= 1
        if not there:
            del self._by_address[caller.address]

    @property
    def full(self) -> bool:
        return self._count > self.most

    def first_to_go(self) -> _Caller | None:
        crowd = max(self._by_address.values(), key=len, default=None)
        return next(iter(crowd)) if crowd else None


class Door:
    """One for each address that this process listens at. Thread safety: one thread at a time.

    A connection has one topic, and what it says waits in it, with the kernel, until somebody here asks about that: so
    no message pushes another out. With `keys` a line that the job's token did not sign ends its connection. Memory: at
    most 16 MiB, with what hear() returns at a time.
    """

    def __init__(self, host: str, keys: Keys | None = None) -> None:
        """Listens at a free port of `host`, an address of this machine. Raises UnavailableError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise errors.UnavailableError(f"cannot listen on {host}: {error.strerror}") from error
        self._socket.setblocking(False)
        port = self._socket.getsockname()[1]
        self.address = f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
        self.keys = Keys() if keys is None else keys
        self.refused = 0  # connections, for what they said
        self._selector = selectors.EpollSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._listening = True
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if descriptors == resource.RLIM_INFINITY:
            descriptors = 1 << 20
        self._silent = _Places(min(_SILENT_MAX, descriptors // 8))
        self._unasked = _Places(min(_UNASKED_MAX, descriptors // 8))
        self._asked = _Places(min(_ASKED_MAX, descriptors // 2))
        self._callers: dict[_Caller, None] = {}
        self._expected: frozenset[str] = frozenset()
        self._topic: str | None = None  # that is being asked about
        self._held_bytes = 0

    @property
    def fileno(self) -> int:
        """Readable when there is something to take in."""
        return self._selector.fileno()

    def expect(self, topics: Collection[str]) -> None:
        """What this process will ask about, until it says otherwise: strangers cannot push out who speaks of that."""
        self._expected = frozenset(topics)
        for caller in list(self._callers):
            if caller.topic is not None and caller in self._callers:
                self._move(caller)

    def hear(self, topic: str | None) -> list[Message]:
        """Takes in what has come, without waiting; what was said about `topic` since the last time, or a part of it:
        all of it has been heard when this returns nothing. None: only lets go of those who have hung up."""
        heard: list[Message] = []
        room = _HEARD_BYTES_MAX
        self._attend(topic, heard)
        self._let_in()
        for key, _ in self._selector.select(0):
            caller: _Caller | None = key.data
            if caller is not None and caller in self._callers and room > 0:
                room -= self._read(caller, heard)
        return heard

    def forget(self, topic: str) -> None:
        """Nobody here will ask about it any more."""
        self.expect(self._expected - {topic})
        for caller in [caller for caller in self._callers if caller.topic == topic]:
            self._hang_up(caller)
        if self._topic == topic:
            self._topic = None

    def _attend(self, topic: str | None, heard: list[Message]) -> None:
        if topic == self._topic:
            return
        before, self._topic = self._topic, topic
        for caller in list(self._callers):
            if caller.topic is None or caller.topic not in (before, topic) or caller not in self._callers:
                continue
            if caller.topic == before:
                self._selector.unregister(caller.socket)
            else:
                self._selector.register(caller.socket, selectors.EVENT_READ, caller)
            self._move(caller)
            if caller.topic == topic and caller in self._callers:
                self._digest(caller, heard)

    def _let_in(self) -> None:
        if not self._listening:
            self._selector.register(self._socket, selectors.EVENT_READ)
            self._listening = True
        # No more than can be listened to before one of them would have to go.
        for _ in range(max(1, self._silent.most // 4)):
            try:
                connection, address = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and not self._make_room():
                    self._selector.unregister(self._socket)  # it would be readable all the time
                    self._listening = False
                    return
                continue
            connection.setblocking(False)
            caller = _Caller(connection, str(address[0]), self._silent)
            self._callers[caller] = None
            self._selector.register(connection, selectors.EVENT_READ, caller)
            self._silent.take(caller)
            self._keep_within(self._silent)

    def _make_room(self) -> bool:
        """Whether a descriptor could be had."""
        caller = self._silent.first_to_go() or self._unasked.first_to_go()
        if caller is not None:
            self._hang_up(caller)
        return caller is not None

    def _keep_within(self, places: _Places) -> None:
        # Who is hung up on and has to say something calls again.
        if places.full and (caller := places.first_to_go()) is not None:
            self._hang_up(caller)

    def _move(self, caller: _Caller) -> None:
        """To the places for what it speaks of."""
        asked = caller.topic in self._expected or caller.topic == self._topic
        places = self._asked if asked else self._unasked
        if caller.places is not places:
            caller.places.leave(caller)
            places.take(caller)
            self._keep_within(places)

    def _read(self, caller: _Caller, heard: list[Message]) -> int:
        """How many bytes it said."""
        wanted = _READ_BYTES if caller.topic is not None else _FIRST_BYTES_MAX - len(caller.held)
        try:
            read = caller.socket.recv(wanted)
        except BlockingIOError:
            return 0
        except OSError:
            read = b""
        if not read:
            self._hang_up(caller)
            return 0
        self._hold(caller, caller.held + read)
        self._digest(caller, heard)
        return len(read)

    def _digest(self, caller: _Caller, heard: list[Message]) -> None:
        """Takes the lines that a caller has said; those of one who speaks of something else stay where they are."""
        start = 0
        while (end := caller.held.find(b"\n", start)) >= 0:
            message = self._message(bytes(caller.held[start:end]))
            if message is None or message["topic"] != (caller.topic or message["topic"]):
                self._refuse(caller)
                return
            if caller.topic is None:
                caller.topic = message["topic"]
                self._move(caller)
                if caller not in self._callers:
                    return
                if caller.topic != self._topic:
                    self._selector.unregister(caller.socket)
                    return
            heard.append(message)
            start = end + 1
        self._hold(caller, caller.held[start:])
        if len(caller.held) >= (_FIRST_BYTES_MAX if caller.topic is None else _LINE_BYTES_MAX):
            self._refuse(caller)
        elif self._held_bytes > _HELD_BYTES_MAX:
            self._hang_up(max(self._callers, key=lambda one: len(one.held)))

    def _hold(self, caller: _Caller, held: bytearray) -> None:
        self._held_bytes += len(held) - len(caller.held)
        caller.held = held

    def _message(self, line: bytes) -> Message | None:
        text = self.keys.message(line) if len(line) < _LINE_BYTES_MAX else None
        if text is None:
            return None
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            return None
        topic = message.get("topic") if isinstance(message, dict) else None
        return message if isinstance(topic, str) and len(topic) <= _TOPIC_CHARS_MAX else None

    def _refuse(self, caller: _Caller) -> None:
        self.refused += 1
        self._hang_up(caller)

    def _hang_up(self, caller: _Caller) -> None:
        del self._callers[caller]
        caller.places.leave(caller)
        self._hold(caller, bytearray())
        with suppress(KeyError):  # who speaks of something else is not listened to
            self._selector.unregister(caller.socket)
        caller.socket.close()

    def close(self) -> None:
        # (The selector is closed and not cleared: a child that was forked shares it with its parent.)
        self._selector.close()
        for caller in self._callers:
            caller.socket.close()
        self._callers.clear()
        self._socket.close()


def door_at(host: str) -> Door:
    """This process' door at an address of this machine, opened by the first that asks. Raises UnavailableError."""
    if host not in _doors:
        _doors[host] = Door(host, _keys)
    return _doors[host]


def use_token(path: str) -> None:
    """What is said through this process' doors is signed with the token in this file; "": with none.

    Raises InvalidArgumentError.
    """
    _keys.use(path)


def renew_token() -> None:
    """Takes a token in that has come into the file since, beside those that were there."""
    _keys.renew()


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
    """ "host:port" or "[host]:port" in two. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= 65535):
        raise ValueError(f"'{address}' is no host:port")
    return host.strip("[]"), int(port)


class _Call:
    """A connection to one door, made again whenever it ends but for a refusal."""

    def __init__(self, address: str, said: bytearray) -> None:
        """`said`: to all, and more and more of it."""
        self.address = address
        self.dead = False
        self._said = said
        self._sent_bytes = 0
        self._socket: socket.socket | None = None
        self._connected = False
        self._next_dial = 0.0

    @property
    def known(self) -> bool:
        return self._connected or self.dead

    @property
    def delivered(self) -> bool:
        return self._connected and self._sent_bytes == len(self._said)

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
        while not self.delivered:
            self._sent_bytes += self._socket.send(self._said[self._sent_bytes : self._sent_bytes + _READ_BYTES])
        if not self._socket.recv(4096):
            raise ConnectionResetError(errno.ECONNRESET, "closed")

    def _dial(self) -> None:
        host, port = split_address(self.address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._sent_bytes = 0
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

    def __init__(self, keys: Keys | None = None) -> None:
        """`keys`: what is said is signed with."""
        self._calls: dict[Key, _Call] = {}
        self._keys = Keys() if keys is None else keys
        self._said = bytearray()

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
                self._calls[key] = _Call(address, self._said)

    def say(self, message: Message) -> None:
        """Says it to all that live, and all of it again to those whose connection is made again."""
        self._said += self._keys.line(json.dumps(message, separators=(",", ":")).encode()) + b"\n"

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
