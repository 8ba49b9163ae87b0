"""Doors that strangers come to: what is signed, what a replay can do, who has to go, what is kept."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import secrets
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from door_words import TOPIC, dial, keys_of, line_of, token_file, word
from ranks import Ranks, here

import reducer
from reducer import _agreement, _door
from reducer._keys import Keys

SOON_S = 30.0


@pytest.fixture(params=["signed", "unsigned"], name="keys")
def keys_or_none(request: pytest.FixtureRequest, tmp_path: Path) -> Keys:
    return keys_of(token_file(tmp_path)) if request.param == "signed" else Keys()


def hear(door: _door.Door, topic: str, count: int) -> list[dict[str, Any]]:
    """So many messages about a topic."""
    heard: list[dict[str, Any]] = []
    end = time.monotonic() + SOON_S
    while len(heard) < count:
        assert time.monotonic() < end, f"{len(heard)} of {count}"
        heard += door.hear(topic)
    assert door.hear(topic) == []
    return heard


def is_hung_up(connection: socket.socket, door: _door.Door, topic: str = TOPIC) -> bool:
    connection.settimeout(0.02)
    end = time.monotonic() + 2.0
    while time.monotonic() < end:
        door.hear(topic)
        try:
            return connection.recv(1) == b""
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


def meet(
    doors: Sequence[_door.Door], came: list[int] | None = None, timeout: float = 8.0, topic: str = TOPIC
) -> dict[int, object]:
    """What each rank that comes finds, or its error."""
    addresses = [door.address for door in doors]
    found: dict[int, object] = {}

    def come(rank: int) -> None:
        try:
            found[rank] = _agreement.agree(topic, rank, addresses, doors[rank], timeout).all
        except reducer.ReducerError as error:
            found[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in came or range(len(doors))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SOON_S)
        assert not thread.is_alive()
    return found


@contextlib.contextmanager
def doors_with(keys: Keys, count: int) -> Iterator[list[_door.Door]]:
    doors = [_door.Door("127.0.0.1", keys) for _ in range(count)]
    try:
        yield doors
    finally:
        for door in doors:
            door.close()


# ---------------------------------------------------------------- keys


def test_a_line_is_good_with_the_token_and_with_no_other(tmp_path: Path) -> None:
    path = token_file(tmp_path)
    one, other, none = keys_of(path), keys_of(token_file(tmp_path, "other")), Keys()
    text = b'{"topic":"t"}'
    assert keys_of(path).message(one.line(text)) == text
    assert other.message(one.line(text)) is None
    assert one.message(text) is None
    assert one.message(b"") is None
    assert one.message(b" " + text) is None
    assert none.message(none.line(text)) == text
    for index in range(len(one.line(text))):
        forged = bytearray(one.line(text))
        forged[index] ^= 1
        assert one.message(bytes(forged)) is None
    assert path.read_text().strip() not in repr(one) + repr(vars(one))


def test_workers_understand_each_other_while_tokens_are_renewed(tmp_path: Path) -> None:
    tokens = [secrets.token_hex(16) for _ in range(6)]
    path = token_file(tmp_path, token=tokens[0])
    old, new = keys_of(path), keys_of(path)
    for count, token in enumerate(tokens[1:], 1):
        path.write_text(token)
        new.renew()
        # Who has not read it again, and who has read no other.
        for one in (old, keys_of(path)):
            known = count <= 3 or one is not old  # four are kept
            assert (new.message(one.line(b"x")) == b"x") == known
            assert (one.message(new.line(b"x")) == b"x") == known
    path.unlink()
    new.renew()  # what was read stays good
    path.write_text(tokens[-1])
    assert keys_of(path).message(new.line(b"x")) == b"x"
    new.use("")
    assert not new
    assert new.line(b"x") == b"x"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read: No such file"),
        ("", "has 0 tokens"),
        ("secret-one-sixteen\nsecret-two-sixteen\n", "has 2 tokens"),
        ("secret", "has no token"),
        ("secret secret secret", "has no token"),
        ("secret-" + "x" * 300, "has no token"),
        ("secret-" + "x" * 100_000, "has no token"),
    ],
)
def test_what_is_no_token_file_is_said_and_not_quoted(content: str | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    with pytest.raises(reducer.InvalidArgumentError) as raised:
        keys_of(path)
    assert told in str(raised.value)
    assert "secret" not in str(raised.value)


# ---------------------------------------------------------------- what strangers say


@pytest.mark.parametrize("signed_by", ["nobody", "another token"])
def test_who_knows_the_job_and_not_the_token_is_not_heard(signed_by: str, tmp_path: Path) -> None:
    keys = keys_of(token_file(tmp_path))
    liar = Keys() if signed_by == "nobody" else keys_of(token_file(tmp_path, "other"))
    lie = line_of(word(1, decided=True, dead=[0, 2]), liar)
    with doors_with(keys, 3) as doors:
        strangers = [dial(door) for door in doors]
        for stranger in strangers:
            stranger.sendall(lie)
        assert meet(doors) == dict.fromkeys(range(3), frozenset())
        assert [door.refused for door in doors] == [1, 1, 1]
        assert all(is_hung_up(*pair) for pair in zip(strangers, doors, strict=True))
        for stranger in strangers:
            stranger.close()


def test_ranks_with_different_tokens_are_told_what_to_look_at(tmp_path: Path) -> None:
    doors = [_door.Door("127.0.0.1", keys_of(token_file(tmp_path, str(rank)))) for rank in range(2)]
    for rank, error in meet(doors, timeout=1.0).items():
        assert isinstance(error, reducer.UnavailableError)
        assert f"{1 - rank} did not come within 1 s" in str(error)
        assert "is REDUCER_TOKEN_FILE the same on all ranks?" in str(error)
    for door in doors:
        door.close()


def test_a_line_of_another_topic_ends_a_connection(keys: Keys) -> None:
    with doors_with(keys, 1) as (door,), dial(door) as caller:
        caller.sendall(line_of(word(0), keys) + line_of(word(0, topic="other"), keys) + line_of(word(2), keys))
        assert hear(door, TOPIC, 1) == [word(0)]
        assert is_hung_up(caller, door)


# ---------------------------------------------------------------- replays


class Recorder(_door.Door):
    """Keeps what it was told, to be said again by somebody who has read the network."""

    def __init__(self, keys: Keys) -> None:
        super().__init__("127.0.0.1", keys)
        self.lines: list[bytes] = []

    def _message(self, line: bytes) -> dict[str, Any] | None:
        self.lines.append(line + b"\n")
        return super()._message(line)


def said(doors: Sequence[Recorder]) -> list[bytes]:
    return sorted({line for door in doors for line in door.lines})


def replay(lines: list[bytes], doors: Sequence[_door.Door], seed: int) -> list[socket.socket]:
    """All of them to all doors, in any order, some of them twice."""
    chance = random.Random(seed)
    callers = []
    for door in doors:
        for _ in range(2):
            callers.append(dial(door))
            callers[-1].sendall(b"".join(chance.sample(lines, len(lines))))
    return callers


@pytest.mark.parametrize("seed", range(4))
def test_old_lines_change_nothing(keys: Keys, seed: int) -> None:
    """Of a meeting that failed, in the next one of the same group; of that, in another group's, and in itself."""
    doors = [Recorder(keys) for _ in range(4)]
    # Two of four come, agree that the others are silent, and are no majority. The others come later, and hear of it.
    first = meet(doors, [0, 3], timeout=0.5)
    assert {type(error) for error in first.values()} == {reducer.UnavailableError}
    late = meet(doors, [1, 2], timeout=0.5)
    assert {type(error) for error in late.values()} <= {reducer.AbortedError, reducer.UnavailableError}
    old = said(doors)
    assert any(b'"silent":[1,2]' in line and b'"decided":true' in line for line in old)
    callers = replay(old, doors, seed)
    assert meet(doors) == dict.fromkeys(range(4), frozenset())
    # Everything that was ever said, while a rank is dead: the same group again, and another one.
    doors[2].close()
    callers += replay(said(doors), [doors[0], doors[1], doors[3]], seed)
    assert meet(doors, [0, 1, 3]) == dict.fromkeys((0, 1, 3), frozenset({2}))
    callers += replay(said(doors), [doors[0], doors[1], doors[3]], seed)
    assert meet(doors, [0, 1, 3], topic="shrink/another") == dict.fromkeys((0, 1, 3), frozenset({2}))
    for one in [*callers, *doors]:
        one.close()


def test_a_rank_goes_over_to_a_later_meeting(keys: Keys) -> None:
    """Some have tried before, and this one has not."""
    with doors_with(keys, 4) as doors:
        for _ in range(2):
            errors = meet(doors, [0], timeout=0.1)
            assert [type(error) for error in errors.values()] == [reducer.UnavailableError]
        for door in doors[1:]:
            door.hear(TOPIC)
            door.forget(TOPIC)  # what rank 0 decided by itself
        assert meet(doors) == dict.fromkeys(range(4), frozenset())


def test_the_same_line_again_and_again_in_its_own_meeting(keys: Keys) -> None:
    with doors_with(keys, 2) as doors, dial(doors[0]) as caller:
        caller.sendall(line_of(word(1), keys) * 5000)
        assert meet(doors) == {0: frozenset(), 1: frozenset()}


# ---------------------------------------------------------------- too many


def test_a_flood_pushes_out_neither_words_nor_who_is_speaking(keys: Keys) -> None:
    """Silent ones, and such as speak of what nobody asks about, from the honest one's own address."""
    with doors_with(keys, 1) as (door,), contextlib.ExitStack() as open_ones:
        door.expect([TOPIC, "shrink/another"])
        honest = open_ones.enter_context(dial(door))
        early = open_ones.enter_context(dial(door))
        long = line_of(word(1, dead=list(range(1000))), keys)
        honest.sendall(line_of(word(1), keys) + long[:700])
        early.sendall(line_of(word(2, topic="shrink/another"), keys))
        assert hear(door, TOPIC, 1) == [word(1)]
        for index in range(3000):
            stranger = open_ones.enter_context(dial(door))
            if index % 2:
                stranger.sendall(line_of({"topic": f"stranger {index}"}, keys) + b"x" * 100)
            if index % 100 == 0:
                door.hear(TOPIC)
        assert door.hear(TOPIC) == []
        assert len(door._callers) <= _door._SILENT_MAX + _door._UNASKED_MAX + 2
        honest.sendall(long[700:])
        assert hear(door, TOPIC, 1) == [word(1, dead=list(range(1000)))]
        assert hear(door, "shrink/another", 1) == [word(2, topic="shrink/another")]
        # And the next one that comes is heard.
        with dial(door) as later:
            later.sendall(line_of(word(3), keys))
            assert hear(door, TOPIC, 1) == [word(3)]


def test_the_address_that_has_most_loses_its_oldest() -> None:
    places = _door._Places(4)
    ends = [socket.socketpair() for _ in range(6)]
    addresses = ["a", "b", "b", "b", "c", "b"]
    callers = [_door._Caller(near, address, places) for (near, _), address in zip(ends, addresses, strict=True)]
    for caller in callers[:5]:
        places.take(caller)
    assert places.full
    assert places.first_to_go() is callers[1]
    places.leave(callers[1])
    assert not places.full
    places.leave(callers[2])
    places.leave(callers[3])
    assert places.first_to_go() is callers[0]
    for pair in ends:
        for end in pair:
            end.close()


FLOOD = """
import random, socket, sys
addresses = [(host, int(port)) for host, port in (one.split(":") for one in sys.argv[2:])]
topic, chance, kept = sys.argv[1].encode(), random.Random(1), []
words = [
    b"", b"x" * 200, b"\\xff\\n", b"[" * 900 + b"\\n", b'{"topic": "unknown %d"}\\n',
    b'{"topic": "' + topic + b'", "meeting": 1, "rank": 9, "round": 0, "dead": [0], "silent": [], "decided": true}\\n',
]
print("begun", flush=True)
while True:
    one = socket.socket()
    one.setblocking(False)
    one.connect_ex(chance.choice(addresses))
    kept.append(one)
    if len(kept) > 300:
        one = kept.pop(chance.randrange(300))
        try:
            one.send(chance.choice(words).replace(b"%d", b"%d" % chance.randrange(10**6)))
        except OSError:
            pass
        if chance.random() < 0.5:
            one.close()
"""


def test_ranks_agree_in_a_flood(keys: Keys) -> None:
    """Of connections as fast as another process can make them, to all ranks, who know the topic where it is signed."""
    topic = TOPIC if keys else "another"
    with doors_with(keys, 5) as doors:
        doors[2].close()
        at = [door.address for door in doors if door is not doors[2]]
        with subprocess.Popen([sys.executable, "-c", FLOOD, topic, *at], stdout=subprocess.PIPE) as flood:
            try:
                assert flood.stdout is not None
                assert flood.stdout.readline() == b"begun\n"
                for _ in range(3):
                    found = meet(doors, [0, 1, 3, 4], timeout=SOON_S)
                    assert found == dict.fromkeys((0, 1, 3, 4), frozenset({2}))
                assert flood.poll() is None
                # They were there.
                assert sum(len(door._callers) for door in doors) > 100
            finally:
                flood.kill()


def test_without_descriptors_nothing_breaks(keys: Keys) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as open_ones, doors_with(keys, 1) as (door,):
        door.expect([TOPIC])
        for _ in range(100):
            open_ones.enter_context(dial(door))
        honest = open_ones.enter_context(dial(door))
        honest.sendall(line_of(word(1), keys))
        used = max(int(name) for name in os.listdir("/proc/self/fd"))
        while (filled := os.dup(0)) < used:  # the gaps
            open_ones.callback(os.close, filled)
        os.close(filled)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 5, hard))
            assert hear(door, TOPIC, 1) == [word(1)]
            assert len(door._callers) <= 5
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            later = open_ones.enter_context(dial(door))
            later.sendall(line_of(word(2), keys))
            for caller in [caller for caller in door._callers if caller.topic is None]:
                door._hang_up(caller)
            resource.setrlimit(resource.RLIMIT_NOFILE, (used - 50, hard))  # not even one
            assert door.hear(TOPIC) == []
            assert select.select([door.fileno], [], [], 0.0) == ([], [], [])  # nor turns in vain
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert hear(door, TOPIC, 1) == [word(2)]


# ---------------------------------------------------------------- what is kept


def test_the_longest_honest_words_fit(tmp_path: Path) -> None:
    path = token_file(tmp_path)
    keys = keys_of(path)
    for _ in range(3):  # as many MACs as there can be
        path.write_text(secrets.token_hex(32))
        keys.renew()
    most = {"meeting": _agreement._NUMBER_MAX - 1, "round": 4 * 4096}
    first = line_of(word(4095, **most), keys)
    assert len(first) < _door._FIRST_BYTES_MAX
    longest = line_of(word(4095, dead=list(range(4096)), **most), keys)
    assert 20_000 < len(longest) < _door._LINE_BYTES_MAX
    with doors_with(keys, 1) as (door,), dial(door) as caller:
        sender = threading.Thread(target=caller.sendall, args=(first + longest * 20,))
        sender.start()
        heard = hear(door, TOPIC, 21)
        sender.join(SOON_S)
        assert not sender.is_alive()
        assert _agreement._word(heard[-1], 4096) is not None


def test_lines_without_an_end_are_not_kept(keys: Keys) -> None:
    with doors_with(keys, 1) as (door,):
        for first, most in ((b"", _door._FIRST_BYTES_MAX), (line_of(word(1), keys), _door._LINE_BYTES_MAX)):
            with dial(door) as caller:
                caller.sendall(first + b"x" * (most - 2))
                assert len(hear(door, TOPIC, 1 if first else 0)) == (1 if first else 0)
                assert not is_hung_up(caller, door)
                caller.sendall(b"xx")
                assert is_hung_up(caller, door)
        assert door._held_bytes == 0


def test_half_lines_have_a_bound_together(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_door, "_HELD_BYTES_MAX", 1 << 20)
    with doors_with(keys, 1) as (door,), contextlib.ExitStack() as open_ones:
        for _ in range(60):
            caller = open_ones.enter_context(dial(door))
            caller.sendall(line_of(word(1), keys) + b"x" * 30_000)
        with dial(door) as honest:
            honest.sendall(line_of(word(2), keys))
            heard: list[dict[str, Any]] = []
            end = time.monotonic() + SOON_S
            while word(2) not in heard or len(door._callers) == 61:
                assert time.monotonic() < end
                heard += door.hear(TOPIC)
                assert door._held_bytes <= 1 << 20
        assert len(door._callers) > 30


def test_what_is_taken_in_at_a_time_has_a_bound(keys: Keys) -> None:
    """And all of it comes, in the order in which each has said it."""
    one = line_of(word(1, dead=list(range(4000))), keys)
    count = 40
    lines = line_of(word(1), keys) + one * count
    with doors_with(keys, 1) as (door,), contextlib.ExitStack() as open_ones:
        callers = [open_ones.enter_context(dial(door)) for _ in range(8)]
        senders = [threading.Thread(target=caller.sendall, args=(lines,)) for caller in callers]
        for sender in senders:
            sender.start()
        total, end = 0, time.monotonic() + SOON_S
        while total < 8 * (count + 1):
            assert time.monotonic() < end
            heard = door.hear(TOPIC)
            assert len(heard) * len(one) <= _door._HEARD_BYTES_MAX + 2 * _door._READ_BYTES
            total += len(heard)
        for sender in senders:
            sender.join(SOON_S)
            assert not sender.is_alive()


def test_what_nobody_asks_about_stays_with_the_kernel(keys: Keys) -> None:
    """Until somebody does, even if who said it has gone."""
    first = line_of(word(1), keys)
    with doors_with(keys, 1) as (door,):
        with dial(door) as caller:
            caller.sendall(first * 200)
            end = time.monotonic() + SOON_S
            while not door._unasked.full and door._held_bytes == 0:
                assert time.monotonic() < end
                assert door.hear("other") == []
        assert door.hear("other") == []
        assert door._held_bytes <= _door._FIRST_BYTES_MAX
        assert hear(door, TOPIC, 200) == [word(1)] * 200
        door.forget(TOPIC)
        assert not door._callers


def test_a_forked_child_leaves_its_parents_door_alone() -> None:
    program = """
import os, socket
from reducer import _door
door = _door.door_at("127.0.0.1")
first = socket.create_connection(_door.split_address(door.address))
first.sendall(b'{"topic": "t", "n": 1}\\n')
assert [m["n"] for m in door.hear("t")] == [1]
if os.fork() == 0:
    assert not _door._doors
    os._exit(0)
assert os.wait()[1] == 0
first.sendall(b'{"topic": "t", "n": 2}\\n')
assert [m["n"] for m in door.hear("t")] == [2]
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- real processes


def where() -> tuple[str, list[str]]:
    """The topic of this rank's group, and all doors."""
    from reducer._shrink import _native_of, _topic

    backend = _native_of(dist.group.WORLD)
    dist.all_reduce(torch.ones(10))
    return _topic(backend), _door.doors_of(backend.workers)


def shrink_and_sum() -> tuple[int, float]:
    reducer.shrink(timeout=SOON_S)
    tensor = torch.full((1000,), float(here().rank))
    dist.all_reduce(tensor)
    return dist.get_world_size(), tensor[0].item()


def test_shrink_with_a_token_that_is_being_renewed_and_a_liar(tmp_path: Path) -> None:
    """Each rank reads its own copy; two of them are new by the time of the death."""
    token = secrets.token_hex(16)
    files = [token_file(tmp_path, f"token{rank}", token) for rank in range(4)]
    env = [{"REDUCER_ALGORITHM": "direct", "REDUCER_TOKEN_FILE": str(path)} for path in files]
    ranks = Ranks(4, env)
    with contextlib.ExitStack() as open_ones:
        open_ones.callback(ranks.kill)
        ((topic, doors), *_) = ranks.call(where)
        for path in files[:2]:
            path.write_text(token[::-1])
        ranks.kill_rank(2)
        lie = word(1, topic=topic, dead=[0, 3], decided=True)
        for rank in (0, 1, 3):
            liar = open_ones.enter_context(socket.create_connection(_door.split_address(doors[rank])))
            liar.sendall(line_of(lie, Keys()))
        for path in files[2:]:
            path.write_text(token[::-1])  # (the group that comes next is made with it)
        assert ranks.call(shrink_and_sum, only=[0, 1, 3]) == [(3, 4.0)] * 3
        assert token not in ranks.logs()
