"""Fixtures that the Python tests share."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

import pytest
import ranks as harness
from accelerator.worlds import WORLDS, World

# What the flight recorders of tests write goes with them. (Here: before the server that forks ranks starts.)
if "REDUCER_RECORDER_DIR" not in os.environ:
    os.environ["REDUCER_RECORDER_DIR"] = tempfile.mkdtemp(prefix="reducer-dumps-")
    atexit.register(shutil.rmtree, os.environ["REDUCER_RECORDER_DIR"], ignore_errors=True)


@pytest.fixture(name="run_ranks")
def fixture_run_ranks() -> Callable[..., list[object]]:
    """`run_ranks(n, function, *arguments, env=..., timeout=...)`: real processes in one group, results by rank."""
    return harness.run_ranks


@pytest.fixture
def reducers() -> Iterator[Callable[..., list[str]]]:
    """`reducers(k, *options)`: addresses of `k` standalone reducers, which end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda count, *options: stack.enter_context(harness.standalone_reducers(count, *options))


@pytest.fixture(scope="module")
def module_reducers() -> Iterator[Callable[..., list[str]]]:
    """The same, ending with the module."""
    with contextlib.ExitStack() as stack:
        yield lambda count, *options: stack.enter_context(harness.standalone_reducers(count, *options))


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: str(world[0]))
def accelerator_world(request: pytest.FixtureRequest, module_reducers: Callable[..., list[str]]) -> Iterator[World]:
    """Two ranks with a fake accelerator each, and with small chunks."""
    algorithm, count = request.param
    world = World(
        {
            "REDUCER_ALGORITHM": algorithm,
            "REDUCER_SERVERS": ",".join(module_reducers(count)),
            "REDUCER_CHUNK_BYTES": "4KiB",
        }
    )
    yield world
    world.close()


@pytest.fixture(scope="module")
def accelerator_pair() -> Iterator[World]:
    """The same, with the settings of a user who sets none."""
    world = World({})
    yield world
    world.close()
