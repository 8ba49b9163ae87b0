"""Every parser in Python of what peers or files say, fed with anything: valid text that was changed, and random bytes.

What is wrong is refused by the errors that are documented, or by silence where strangers speak; what is right is still
understood afterwards; and what is kept has a bound.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from door_words import TOPIC, dial, keys_of, line_of, token_file, word
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

import reducer
from reducer import _agreement, _door, recorder
from reducer._keys import Keys
from reducer.blame import blame, tables
from reducer.elastic import _record, _rendezvous
from reducer.elastic._record import SharedRecord
from reducer.elastic._rendezvous import EMPTY, Rendezvous, Terms, Worker

SOON_S = 20.0
# The same examples in every run; `REDUCER_FUZZ_EXAMPLES=100000 pytest tests/python/test_parsers.py` looks for others.
EXAMPLES = int(os.environ.get("REDUCER_FUZZ_EXAMPLES", "0"))


def fuzzed(count: int) -> Any:
    return settings(
        max_examples=EXAMPLES or count,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


# ---------------------------------------------------------------- changed text

# Texts that stand for what json.dumps() does not write.
DIGITS, DEEP = "@digits", "@deep"

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([-(1 << 63) - 1, 1 << 31, 1 << 63, 10**30, 10**4000, 4096, 4097, 1e308, -0.0, 0.5]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.sampled_from([DIGITS, DEEP, "", "\0", "\x1b[31m", "\ud800", "[/red]", ":smile:", "5", "1:2", "a" * 300]),
    st.text(max_size=5),
    st.sampled_from([[], {}, [[]], [None], {"": None}, [1, 2, 3] * 50, {"uid": "x"}]),
)


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """All places in a JSON value: what they are in, and key or index there."""
    found = []
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found.append((value, key))
        found += nodes(one)
    return found


def spelled(value: Any, pairs_first: list[tuple[str, Any]]) -> str:
    """JSON, with some keys of the outermost object given before, too."""
    text = json.dumps(value)
    if pairs_first and text.startswith("{") and len(text) > 2:
        text = "{" + ", ".join(f"{json.dumps(key)}: {json.dumps(one)}" for key, one in pairs_first) + ", " + text[1:]
    return text.replace(f'"{DIGITS}"', "9" * 5000).replace(f'"{DEEP}"', "[" * 50_000)


@st.composite
def changed(draw: st.DrawFn, valid: Any) -> bytes:
    """The text of a valid value, changed in its structure, then perhaps in its bytes."""
    value = copy.deepcopy(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(0, 3))):
        places = nodes(value)
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["other", "other", "other", "gone", "twice"]))
        if how == "gone":
            del holder[key]
        elif how == "other":
            holder[key] = copy.deepcopy(draw(junk))
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[draw(st.text(max_size=3))] = copy.deepcopy(holder[key])
    keys = list(value) if isinstance(value, dict) else []
    doubled = draw(st.lists(st.tuples(st.sampled_from(keys), junk), max_size=2)) if keys else []
    text = spelled(value, doubled).encode()
    how = draw(st.sampled_from(["whole", "whole", "whole", "cut", "flipped", "spliced"]))
    at = draw(st.integers(0, max(0, len(text) - 1)))
    if how == "cut":
        return text[:at]
    if how == "flipped":
        return text[:at] + bytes([text[at] ^ draw(st.integers(1, 255))]) + text[at + 1 :] if text else text
    if how == "spliced":
        return text[:at] + draw(st.binary(max_size=8)) + text[at:]
    return text


@pytest.fixture(scope="module", name="folder")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parsers")


# ---------------------------------------------------------------- what workers say

WORDS = [word(1), word(3, round=2, dead=[0, 2], silent=[1]), word(2, meeting=7, decided=True, dead=[1])]
SIZE = 4


def right(word_: _agreement._Word | None) -> bool:
    return word_ is None or (
        0 <= word_.rank < SIZE
        and 0 <= word_.round < _agreement._NUMBER_MAX
        and 0 <= word_.meeting < _agreement._NUMBER_MAX
        and all(type(rank) is int and 0 <= rank < SIZE for rank in word_.view.all)
        and not word_.view.dead & word_.view.silent
        and isinstance(word_.decided, bool)
    )


def test_valid_words_are_understood() -> None:
    for one in WORDS:
        said = _agreement._word(one, SIZE)
        assert said is not None
        assert right(said)
        assert (said.rank, said.round, said.meeting) == (one["rank"], one["round"], one["meeting"])


@fuzzed(400)
@given(st.one_of(changed(WORDS), st.binary(max_size=200)))
@example(b"[" * 30_000)
@example(b"9" * 30_000)
@example(b'{"topic": ' + b"9" * 30_000 + b"}")
@example(b"null")
@example(b'"topic"')
@example(b"\xff\xfe{\0}\0")
def test_lines_at_a_door(line: bytes) -> None:
    with contextlib.closing(_door.Door("127.0.0.1")) as door:
        message = door._message(line)
        assert message is None or isinstance(message["topic"], str)
        if message is not None:
            assert right(_agreement._word(message, SIZE))


class Told:
    """A door at which just these messages come."""

    address = "nowhere"
    keys = Keys()
    refused = 0

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self._messages = messages

    def hear(self, topic: str | None) -> list[dict[str, Any]]:
        messages, self._messages = self._messages, []
        return messages


@fuzzed(200)
@given(st.lists(st.one_of(st.sampled_from(WORDS), changed(WORDS)), max_size=20))
def test_a_meeting_takes_any_words(said: list[Any]) -> None:
    messages = []
    for one in said:
        with contextlib.suppress(ValueError, RecursionError):
            message = one if isinstance(one, dict) else json.loads(one)
            if isinstance(message, dict):
                messages.append(message)
    _agreement._meetings.pop(("nowhere", TOPIC), None)
    with _door.Calls[int]() as calls:
        door: Any = Told(messages)
        meeting = _agreement._Meeting(TOPIC, 0, SIZE, calls, door, 1.0)
        meeting._listen()
        assert len(meeting._said) <= _agreement._AHEAD_MAX + 1
        assert all(set(by_rank) <= {1, 2, 3} for by_rank in meeting._said.values())
        for outside in (meeting._found, meeting._view, meeting._decided or meeting._view):
            assert outside.all <= set(range(SIZE))


@fuzzed(60)
@given(st.lists(st.one_of(changed(WORDS), st.binary(max_size=2000)), max_size=5), st.integers(0, 2**32))
def test_connections_that_say_anything(said: list[bytes], seed: int) -> None:
    """In pieces; and somebody else is heard, before and after."""
    chance = random.Random(seed)
    with contextlib.closing(_door.Door("127.0.0.1")) as door, dial(door) as stranger, dial(door) as honest:
        stream = b"\n".join(said) + b"\n" * chance.randrange(2)
        honest.sendall(line_of(word(1), Keys()))
        heard: list[dict[str, Any]] = []
        with contextlib.suppress(OSError):
            while stream:
                most = chance.choice((1, 10, 1000, 100_000))
                stranger.sendall(stream[:most])
                stream = stream[most:]
                heard += door.hear(TOPIC)
                assert door._held_bytes <= 2 * _door._LINE_BYTES_MAX
        honest.sendall(line_of(word(2), Keys()))
        end = time.monotonic() + SOON_S
        while word(1) not in heard or word(2) not in heard:
            assert time.monotonic() < end
            heard += door.hear(TOPIC)
        assert all(right(_agreement._word(message, SIZE)) for message in heard)
        assert door._held_bytes <= 2 * _door._LINE_BYTES_MAX


@fuzzed(300)
@given(st.data())
def test_what_was_signed_is_taken_and_nothing_else(folder: Path, data: st.DataObject) -> None:
    path = folder / "token"
    if not path.exists():
        token_file(folder)
    keys = keys_of(path)
    text = json.dumps(data.draw(st.sampled_from(WORDS))).encode()
    line = keys.line(text)
    assert keys.message(line) == text
    at = data.draw(st.integers(0, len(line)))
    other = line[:at] + data.draw(st.binary(max_size=5)) + line[at + data.draw(st.integers(0, 5)) :]
    assert keys.message(other) in (None, text)
    if not other.endswith(b" " + text):
        assert keys.message(other) is None
    assert keys.message(data.draw(st.binary(max_size=200))) is None


@fuzzed(200)
@given(st.binary(max_size=400) | st.text("ab \r\n~", max_size=40).map(str.encode))
def test_token_files(folder: Path, content: bytes) -> None:
    path = folder / "any token"
    path.write_bytes(content)
    try:
        keys = keys_of(path)
    except reducer.InvalidArgumentError as error:
        assert str(path) in str(error)
        return
    token = content.strip(b"\r\n ")
    assert 16 <= len(token) <= 256
    assert keys.message(keys.line(b"x")) == b"x"


@fuzzed(300)
@given(st.text(max_size=20) | st.from_regex(r"\A\[?[0-9a-f:.]{0,8}\]?:[0-9]{0,6}\Z"))
@example("127.0.0.1:70000")
@example("127.0.0.1:" + "9" * 5000)
@example("127.0.0.1:\u0663")
def test_addresses(text: str) -> None:
    try:
        _, port = _door.split_address(text)
    except ValueError:
        return
    assert 0 <= port <= 65535


# ---------------------------------------------------------------- the flight recorder's files


def call(number: int, **more: Any) -> dict[str, Any]:
    entry = {
        "number": number, "group": 0, "kind": "collective", "seq": number - 1, "collective": "all_reduce", "op": "sum",
        "dtype": "float32", "count": 10, "bytes": 40, "algorithm": "direct", "two_levels": False, "state": "done",
        "queued": 5.0, "started": 5.1, "ended": 6.0, "waits_for": [],
    }  # fmt: skip
    return {**entry, **more}


def dump(rank: int, *calls: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": 1, "reason": "a signal", "time": 10.0, "host": f"h{rank}", "pid": 90 + rank, "job": "0011",
        "rank": rank, "entries": 1000, "recorded": len(calls), "calls": list(calls),
        "groups": [{
            "id": 0, "job": "00112233", "name": "default", "rank": rank, "world_size": 3,
            "hosts": ["a:1", "b:2", "c:3"], "open": True, "called": 3,
        }],
    }  # fmt: skip


SENT = {"kind": "send/recv", "collective": "send/recv", "from": 0, "to": 1, "tag": 7, "state": "started"}
DUMPS = [
    dump(0, call(1), call(2, state="started", waits_for=["rank 1 (b:2)"]), call(3, **SENT, seq=0)),
    dump(
        1, call(1), call(2, state="failed", error="rank 2 was lost", code="unavailable", late="rank 2 has not arrived")
    ),
    dump(2, call(1, root=1), call(2, kind="second step", state="passed on"), call(3, **{**SENT, "from": 1, "to": 2})),
]


def judged(dumps: list[recorder.Dump]) -> None:
    verdicts = blame(dumps)
    assert verdicts or not any(one.groups for one in dumps)
    for verdict in verdicts:
        assert verdict.sentence.isprintable()
        assert len(verdict.ranks) <= 4096
    output = io.StringIO()
    for table in tables(dumps):
        Console(file=output, width=100).print(table)
    output.getvalue().encode()
    assert "\x1b" not in output.getvalue()


def test_valid_dumps_are_understood() -> None:
    judged([recorder.parse(json.dumps(one), "a file") for one in DUMPS])


@fuzzed(400)
@given(changed(DUMPS), st.sampled_from([[], [0], [0, 1], [0, 1, 2]]), st.booleans())
@example(spelled({**DUMPS[0], "groups": [{**DUMPS[0]["groups"][0], "world_size": 1 << 40}]}, []).encode(), [1], True)
@example(spelled({**DUMPS[0], "calls": [call(3, **{**SENT, "to": 5}, seq=0)]}, []).encode(), [1], True)
@example(spelled({**DUMPS[0], "host": "[/red]", "time": float("nan")}, []).encode(), [], True)
@example(spelled({**DUMPS[0], "pid": DIGITS}, []).encode(), [], True)
@example(spelled({**DUMPS[0], "calls": DEEP}, []).encode(), [], True)
def test_dumps(text: bytes, others: list[int], before: bool) -> None:
    try:
        parsed = recorder.parse(text, "\x1b a file")
    except reducer.InvalidArgumentError as error:
        assert "a file" in str(error)
        assert str(error).isprintable()
        assert len(str(error)) < 1000
        return
    beside = [recorder.parse(json.dumps(DUMPS[index]), "another") for index in others]
    try:
        judged([parsed, *beside] if before else [*beside, parsed])
    except reducer.InvalidArgumentError as error:
        assert "one of them is not what its process wrote" in str(error)
    judged(beside)


@fuzzed(200)
@given(st.binary(max_size=300))
def test_files_of_any_bytes(folder: Path, content: bytes) -> None:
    path = folder / "rank0.json"
    path.write_bytes(content)
    with pytest.raises(reducer.InvalidArgumentError):
        recorder.read(path)


def test_what_is_no_file_of_a_dump_is_not_waited_for(tmp_path: Path) -> None:
    pipe, large = tmp_path / "rank0.json", tmp_path / "rank1.json"
    os.mkfifo(pipe)
    with large.open("wb") as file:
        file.truncate((1 << 30) + 1)
    (tmp_path / "rank2.json").mkdir()
    (tmp_path / "rank3.json").symlink_to("/dev/zero")
    (tmp_path / "rank4.json").symlink_to(tmp_path / "nothing")
    found = recorder.find([tmp_path])
    assert [file.name for file in found] == [f"rank{rank}.json" for rank in range(5)]
    why = ("no regular file", "none is larger", "Is a directory", "no regular file", "No such file")
    for file, told in zip(found, why, strict=True):
        with pytest.raises(reducer.ReducerError, match=told):
            recorder.read(file)


def test_blame_of_a_hostile_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "rank0.json").write_text(json.dumps({**DUMPS[0], "time": "\x1b[2J"}))
    done = subprocess.run(
        [sys.executable, "-m", "reducer", "blame", "-v", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "is no dump of the flight recorder" in done.stderr
    assert "\x1b" not in done.stderr + done.stdout


ANNOUNCED = [
    {"pid": 5, "signal": 39, "folder": "/tmp", "job": "0a", "rank": 1, "groups": [{"job": "0a", "name": "default"}]}
]


@fuzzed(300)
@given(st.one_of(changed(ANNOUNCED), st.binary(max_size=50)))
def test_announcements(text: bytes) -> None:
    told = recorder._announced(text)
    if told is not None:
        assert told.pid >= 0
        assert 0 <= told.signal <= 64
        with contextlib.suppress(OSError):  # a name that is too long
            assert list(told.folder.glob("reducer-x/nothing")) == []
    assert recorder._announced(json.dumps(ANNOUNCED[0]).encode()) is not None


# ---------------------------------------------------------------- elastic's record


def worker(name: str, **more: Any) -> dict[str, Any]:
    return {"uid": name, "host": f"h:{name}", "door": "127.0.0.1:5000", **more}


NEWS = {
    "step": 4, "actions": {"a": "go on", "b": "retry"}, "source": 0, "new": [1], "lost": ["h:z"], "left": [],
    "summary": "retry",
}  # fmt: skip
TERMS = {"on_loss": "retry", "min_workers": 1, "max_workers": 0}
RECORDS = [
    {**EMPTY, "writing": "0"},
    {**EMPTY, "terms": TERMS, "waiting": {"a": worker("a", since=1.0)}},
    {
        **EMPTY, "terms": TERMS, "generation": 3, "members": [worker("a"), worker("b")], "news": NEWS, "begun": True,
        "arrived": {"a": worker("a", since=1.0, step=4, phase="begun")},
        "left": {"b": {"step": 4, "phase": "boundary"}}, "waiting": {"c": worker("c", since=2.5)}, "over": None,
    },
]  # fmt: skip


class OneText:
    """A store with this in it."""

    def __init__(self, text: bytes) -> None:
        self.text = text

    def compare_set(self, key: str, before: str, wanted: str) -> bytes:
        if self.text.decode(errors="replace") == before:
            self.text = wanted.encode()
        return self.text

    def get(self, key: str) -> bytes:
        return self.text


def test_valid_records_are_understood() -> None:
    for one in RECORDS:
        store: Any = OneText(json.dumps(one).encode())
        assert SharedRecord(store, "here", EMPTY).read() == one


@fuzzed(400)
@given(st.one_of(changed(RECORDS), st.binary(max_size=100)))
@example(b"[" * 50_000)
@example(b"9" * 5000)
def test_records_in_the_store(text: bytes) -> None:
    store: Any = OneText(text)
    shared = SharedRecord(store, "here", EMPTY)
    me = Worker("a", "h:a", "127.0.0.1:5000")
    nobody: Any = None
    terms = Terms(**TERMS)
    rendezvous = Rendezvous(
        shared, me, nobody, terms, timeout_s=1.0, patience_s=1.0, last_call_s=0.0, where="here"
    )  # fmt: skip
    try:
        record = shared.read()
    except reducer.MismatchError as error:
        assert "the store at here is no record of this version" in str(error)
        return
    with contextlib.suppress(reducer.ReducerError):
        rendezvous.somebody_waits()
        if record["generation"] > 0 and rendezvous._is_in(record):
            assert rendezvous._seen_by_me(record).rank < len(record["members"])
        plan = _rendezvous._plan(record, frozenset(record["arrived"]) | set(record["waiting"]), terms, settled=True)
        if plan is not None:
            plan(record)
            # What follows from a record is one.
            _record._check(json.loads(json.dumps(record)))
    with contextlib.suppress(reducer.ReducerError):
        rendezvous._register(record["generation"], None)
    with contextlib.suppress(reducer.ReducerError):
        rendezvous.leave(None, over=False)
        shared.read()
