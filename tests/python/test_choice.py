"""Which way a call goes: by the NICs that are given, by what was measured, by a table of `reducer tune`."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, here, init_group, standalone_reducers

from reducer import _core, tuning
from reducer.serve import query_stats


def make_group_error() -> str:
    """In a rank: why a group cannot be made."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011: the parent looks at it
        init_group()
    return str(caught.value)


def test_bandwidths_of_all_or_of_none() -> None:
    with standalone_reducers(2) as (slow, fast):
        alone = {"REDUCER_SERVERS": f"{slow}@1gbit,{fast}@1gbit"}
        with Ranks(2, alone, init=False) as fresh:
            for text in fresh.call(make_group_error):
                assert re.search(r"REDUCER_BANDWIDTH is not set on ranks 0 \(\S+\), 1 \(\S+\), and REDUCER_SERV", text)
        with Ranks(2, {"REDUCER_SERVERS": slow, "REDUCER_BANDWIDTH": "1gbit"}, init=False) as fresh:
            for text in fresh.call(make_group_error):
                assert f"has no bandwidths, and the ranks have REDUCER_BANDWIDTH; write {slow}@10gbit for each" in text
        both = {"REDUCER_BANDWIDTH": "1gbit"}, {"REDUCER_BANDWIDTH": "2gbit"}
        with Ranks(2, [dict(one) for one in both], init=False) as fresh:
            for text in fresh.call(make_group_error):
                assert "1000000000bit on rank 0 and 2000000000bit on rank 1, which share a host" in text


def push_a_mebibyte() -> None:
    tensor = torch.ones(1 << 18)
    dist.all_reduce(tensor)
    assert tensor.eq(dist.get_world_size()).all()


def test_a_faster_server_gets_more() -> None:
    with standalone_reducers(2) as (slow, fast):
        env = {
            "REDUCER_SERVERS": f"{slow}@1gbit,{fast}@3gbit",
            "REDUCER_BANDWIDTH": "1gbit",
            "REDUCER_ALGORITHM": "server",
        }
        with Ranks(2, env) as fresh:
            fresh.call(push_a_mebibyte)
            pushed = [query_stats(address)["pushed_bytes"] for address in (slow, fast)]
    assert pushed == [1 << 19, 3 << 19]


# ---------------------------------------------------------------- what is measured when a group is made


def pretend_hosts(per_host: int = 1) -> None:
    """In a rank: its place is a host of its own, or one that it shares with its neighbours."""
    _core.host_identity = lambda: f"host {here().rank // per_host}"  # type: ignore[assignment]


def make_group(suffix: str = "") -> dict[str, Any]:
    """In a rank: makes the group, sums a few sizes in it, ends it; what `auto` was, and how long making it took."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("reducer").addHandler(handler)
    began = time.monotonic()
    init_group(suffix)
    took = time.monotonic() - began
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    for count in (1, 5000, 300_000):
        tensor = torch.full((count,), float(dist.get_rank()))
        dist.all_reduce(tensor)
        assert tensor.eq(sum(range(dist.get_world_size()))).all()
    found = {
        "algorithm": backend.algorithm,
        "ways": backend.explain(1 << 20),
        "took": took,
        "measured": any("measured" in message for message in messages),
        "messages": messages,
    }
    dist.destroy_process_group()
    logging.getLogger("reducer").removeHandler(handler)
    return found


def split_algorithms() -> str:
    """In a rank: whether a group of the first two goes by measurements, made anew and split off."""
    init_group("split")
    new = dist.new_group([0, 1])
    whole = dist.group.WORLD
    assert whole is not None
    mine = [0, 1] if dist.get_rank() < 2 else [2]
    split = whole.split_group(mine, group_name=f"part of {mine[0]}")
    found = ""
    if dist.get_rank() < 2:
        backends = [group._get_backend(torch.device("cpu")) for group in (new, split)]
        found = " ".join(str(bool(backend.explain(1 << 16))) for backend in backends)
        dist.all_reduce(torch.ones(5000), group=new)
        split.allreduce([torch.ones(5000)]).wait()
    dist.destroy_process_group()
    return found


def test_a_group_on_several_hosts_measures_once(tmp_path: Path) -> None:
    with standalone_reducers(1) as addresses:
        env = {"REDUCER_SERVERS": ",".join(addresses), "XDG_CACHE_HOME": str(tmp_path), "REDUCER_LOG": "info"}
        with Ranks(3, env, init=False) as fresh:
            fresh.call(pretend_hosts)
            first = fresh.call(make_group)
            again = fresh.call(make_group, "again")
            parts = fresh.call(split_algorithms)
        [cached] = (tmp_path / "reducer").glob("costs-*.json")
        # Later processes read the cache; one that is damaged they leave, say so, and measure.
        with Ranks(3, env, init=False) as later:
            later.call(pretend_hosts)
            from_cache = later.call(make_group)
        cached.write_text("{")
        with Ranks(3, env, init=False) as later:
            later.call(pretend_hosts)
            from_damaged = later.call(make_group)
    for found in first:
        assert found["measured"]
        assert found["took"] < 5
        assert found["algorithm"] == first[0]["algorithm"]
        assert found["ways"] == first[0]["ways"]
        assert {way["algorithm"] for way in found["ways"]} == {"direct", "mixed", "server"}
        assert sum(way["chosen"] for way in found["ways"]) == 1
        assert all(way["seconds"] > 0 for way in found["ways"])
    for found in again + from_cache:
        assert not found["measured"], found["messages"]
        assert found["algorithm"] == first[0]["algorithm"]
    assert parts == ["True True", "True True", ""], "parts go by the whole's measurements"
    assert from_damaged[0]["measured"]
    assert any("cannot be read and are ignored" in message for message in from_damaged[0]["messages"])
    assert json.loads(cached.read_text())["samples"], "it was written anew"


def test_nothing_is_measured_on_one_host_or_if_told_so(tmp_path: Path) -> None:
    with Ranks(2, {"XDG_CACHE_HOME": str(tmp_path), "REDUCER_LOG": "info"}, init=False) as fresh:
        fresh.call(pretend_hosts, 2)
        one_host = fresh.call(make_group)
    off = {"XDG_CACHE_HOME": str(tmp_path), "REDUCER_LOG": "info", "REDUCER_TUNING": "off"}
    with Ranks(2, off, init=False) as fresh:
        fresh.call(pretend_hosts)
        told = fresh.call(make_group)
    for found in one_host + told:
        assert not found["measured"]
        assert found["ways"] == []
    assert not list(tmp_path.iterdir())


def test_without_a_home_measurements_live_as_long_as_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.setattr(tuning, "_measured", {})
    ground = tuning.Ground(("here",), (), "{}")
    assert tuning.recall(ground) == []
    tuning.remember(ground, SMALL_DIRECT)
    assert tuning.recall(ground) == SMALL_DIRECT


# ---------------------------------------------------------------- tables


def table_of(path: Path, *samples: tuning.Sample) -> Path:
    tuning.write_table(path, samples, ["for a test"])
    return path


SMALL_DIRECT = [
    tuning.Sample("direct", 0, 0, 2, 1, 1, 1 << 10, 100_000),
    tuning.Sample("direct", 0, 0, 2, 1, 1, 1 << 20, 9_000_000),
    tuning.Sample("server", 0, 0, 2, 1, 1, 1 << 10, 200_000),
    tuning.Sample("server", 65536, 0, 2, 1, 1, 1 << 20, 3_000_000),
]


def test_auto_goes_by_a_table(tmp_path: Path) -> None:
    path = table_of(tmp_path / "table.json", *SMALL_DIRECT)
    with standalone_reducers(1) as addresses:
        # Rank 0 reads it; the others need not have it.
        env = {"REDUCER_SERVERS": ",".join(addresses), "REDUCER_TRANSPORT": "grpc"}
        with Ranks(2, [env | {"REDUCER_TUNING": str(path)}, env], init=False) as fresh:
            found = fresh.call(make_group)
    expected = _core.choose_algorithms(SMALL_DIRECT, 2, 1, 1)
    for one in found:
        assert one["algorithm"] == expected
        assert one["algorithm"].startswith("0-")
        assert one["algorithm"].endswith(":server/64KiB")


def test_a_table_of_another_shape_is_used_with_a_warning(tmp_path: Path) -> None:
    path = table_of(tmp_path / "table.json", *(sample._replace(ranks=7) for sample in SMALL_DIRECT))
    with Ranks(2, {"REDUCER_TUNING": str(path), "REDUCER_TRANSPORT": "grpc"}, init=False) as fresh:
        found = fresh.call(make_group)
    assert found[0]["algorithm"] == "direct", "there is no standalone reducer"
    assert any("has no measurements of 2 ranks on 1 hosts with 0 stand" in text for text in found[0]["messages"])


WRONG_TABLES = {
    "no file": (None, "cannot be read: No such file"),
    "not JSON": ("hello", "is no table of `reducer tune`"),
    "not text": (b"\xff\xfe\x00", "is no table of `reducer tune`"),
    "foreign JSON": ('{"name": "x"}', "its format is None"),
    "a list": ("[]", "its format is None"),
    "another version": ('{"format": "reducer tuning 9"}', "its format is 'reducer tuning 9'"),
    "empty": ('{"format": "reducer tuning 1", "measured": []}', "has no measurements"),
    "no algorithm": ('{"format": "reducer tuning 1", "measured": [{}]}', "entry 1 has no algorithm"),
}


def wrong_entry(**changes: object) -> str:
    entry = {"algorithm": "direct", "chunk_bytes": 0, "window_bytes": 0, "ranks": 2, "hosts": 1, "servers": 0}
    entry |= {"times": [[1024, 5]], **changes}
    return json.dumps({"format": "reducer tuning 1", "measured": [entry]})


WRONG_TABLES |= {
    "algorithm": (wrong_entry(algorithm="tree"), "in entry 1: 'tree' is no algorithm"),
    "ranks": (wrong_entry(ranks=0), "ranks is 0, which is no number from 1 on"),
    "text": (wrong_entry(ranks="2"), "ranks is '2'"),
    "hosts": (wrong_entry(hosts=3), "2 ranks cannot be on 3 hosts"),
    "time": (wrong_entry(times=[[1024, 0]]), "nanoseconds is 0"),
    "pair": (wrong_entry(times=[1024]), "in entry 1"),
    "chunk": (wrong_entry(chunk_bytes=5), "a chunk of 5 bytes is outside of 4KiB to 16MiB"),
}


@pytest.mark.parametrize("kind", list(WRONG_TABLES))
def test_a_wrong_table_is_refused(tmp_path: Path, kind: str) -> None:
    content, expected = WRONG_TABLES[kind]
    path = tmp_path / "table.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        tuning.read_table(path)
    assert str(path) in str(caught.value)


def test_every_rank_hears_of_a_wrong_table(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("hello")
    with Ranks(2, [{"REDUCER_TUNING": str(path)}, {}], init=False) as fresh:
        for text in fresh.call(make_group_error):
            assert f"REDUCER_TUNING: '{path}' is no table of `reducer tune`" in text


def test_a_table_keeps_other_shapes(tmp_path: Path) -> None:
    other = SMALL_DIRECT[0]._replace(ranks=5)
    path = table_of(tmp_path / "table.json", *SMALL_DIRECT, other)
    newer = SMALL_DIRECT[0]._replace(nanoseconds=7)
    table_of(path, newer)
    assert tuning.read_table(path) == [other, newer]
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


# ---------------------------------------------------------------- the commands


def run_cli(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "reducer", *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "COLUMNS": "200", **(env or {})},
        check=False,
    )


def test_tune_writes_what_auto_then_goes_by(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    quick = ["--reducers", "1", "--min", "1KiB", "--max", "64KiB", "--factor", "64", "--seconds", "0.02"]
    done = run_cli("tune", *quick, "--algorithm", "direct,server", "--chunks", "16KiB", "--output", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "what auto will do" in done.stdout
    samples = tuning.read_table(path)
    assert {sample.shape for sample in samples} == {(2, 1, 1)}
    assert {sample.way for sample in samples} == {
        (name, chunk, 0) for name in ("direct", "server") for chunk in (0, 16384)
    }
    explained = run_cli(
        *("bench", "--explain", "--backend", "reducer", "--algorithm", "auto,server", *quick),
        env={"REDUCER_TUNING": str(path), "REDUCER_TRANSPORT": "grpc"},
    )
    assert explained.returncode == 0, explained.stdout + explained.stderr
    picked = _core.choose_algorithms(samples, 2, 1, 1)
    assert f"auto is: {picked}" in explained.stdout
    assert "predicted" in explained.stdout
    assert "went by no measurement" not in explained.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("tune", "--algorithm", "ring"), "'ring' is nothing that auto chooses among"),
        (("tune", "--algorithm", "server"), "server needs standalone reducers"),
        (("tune", "--chunks", "1KiB"), "1 KiB is outside of 4KiB to 16MiB"),
        (("tune", "--output", "/nonexistent/table.json"), "the folder '/nonexistent' does not exist"),
        (("tune", "--min", "tiny"), "'tiny' is not a size"),
        (("bench", "--explain", "--algorithm", "direct"), "--explain is of the times of all_reduce"),
        (("bench", "--explain", "--collective", "barrier"), "--explain is of the times of all_reduce"),
    ],
)
def test_wrong_options_of_the_commands(arguments: tuple[str, ...], expected: str) -> None:
    done = run_cli(*arguments)
    assert done.returncode == 2
    assert expected in done.stdout


def test_tune_does_not_touch_a_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text("my notes")
    done = run_cli("tune", "--output", str(path))
    assert done.returncode == 2
    assert "is no table of" in done.stdout
    assert path.read_text() == "my notes"
