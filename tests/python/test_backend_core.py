"""The native module that needs no torch, and the settings that are read with it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import pytest

import reducer
from reducer import _core
from reducer.options import Settings, resolve


@pytest.fixture
def pinned() -> Iterator[None]:
    """Any test may pin an instruction set; the best one comes back."""
    yield
    _core.pin_instruction_set("")


def test_it_loads_without_torch() -> None:
    # As on a host where torch is not installed.
    code = (
        "import importlib.util, sys; importlib.util.find_spec = lambda *_: None; "
        "import reducer._core as c; print(c.version); assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == reducer.__version__


def test_versions() -> None:
    assert _core.version == reducer.__version__
    assert _core.protocol_version >= 1
    assert _core.torch_version.count(".") == 2


@pytest.mark.parametrize(
    ("text", "nbytes"), [("4096", 4096), ("64KiB", 65536), ("4MiB", 4 << 20), ("1GB", 10**9), ("0", 0)]
)
def test_parse_size(text: str, nbytes: int) -> None:
    assert _core.parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "four", "4 potatoes", "-1", "1e40GiB", "nan"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        _core.parse_size(text)


def test_parse_servers() -> None:
    assert _core.parse_servers("") == []
    assert _core.parse_servers("a:1, [::1]:7000") == ["a:1", "[::1]:7000"]
    with pytest.raises(reducer.InvalidArgumentError, match="'b' has no port; write host:port"):
        _core.parse_servers("a:1,b")


def test_addresses() -> None:
    assert _core.choose_bind_host("", "127.0.0.1") == "127.0.0.1"
    assert _core.choose_bind_host("127.0.0.1", "") == "127.0.0.1"
    assert _core.choose_bind_host("lo", "") in ("127.0.0.1", "::1", "[::1]")
    with pytest.raises(ValueError, match="lo"):
        _core.choose_bind_host("nosuch0", "")
    assert _core.resolve_servers(["127.0.0.1:7000"]) == ["127.0.0.1:7000"]
    assert _core.host_label().endswith(f":{os.getpid()}")


@pytest.mark.usefixtures("pinned")
def test_reduce_is_the_rank_order_sum_on_every_instruction_set() -> None:
    random = np.random.default_rng(3)
    inputs = [(random.standard_normal(1003) * 2.0 ** random.integers(-12, 12, 1003)).astype("f4") for _ in range(5)]
    expected = inputs[0]
    for other in inputs[1:]:
        expected = expected + other
    assert _core.instruction_sets()
    for name in _core.instruction_sets():
        _core.pin_instruction_set(name)
        out = np.empty_like(expected)
        _core.reduce("float32", "sum", inputs, out)
        assert np.array_equal(out.view("i4"), expected.view("i4")), name
    with pytest.raises(ValueError, match="no instruction set"):
        _core.pin_instruction_set("abacus")


def test_reduce_refuses() -> None:
    out = bytearray(8)
    with pytest.raises(TypeError, match="'float8' is no dtype; there are float32"):
        _core.reduce("float8", "sum", [bytes(8)], out)
    with pytest.raises(ValueError, match="'mean' is no operation; there are sum"):
        _core.reduce("float32", "mean", [bytes(8)], out)
    with pytest.raises(TypeError, match="band has no meaning on float32"):
        _core.reduce("float32", "band", [bytes(8)], out)
    with pytest.raises(ValueError, match=r"inputs\[1\] has 4 bytes, out has 8"):
        _core.reduce("float32", "sum", [bytes(8), bytes(4)], out)
    with pytest.raises(ValueError, match=r"inputs\[0\] overlaps out"):
        _core.reduce("float32", "sum", [out], out)
    with pytest.raises(ValueError, match="no whole number of float64"):
        _core.reduce("float64", "sum", [bytes(12)], bytearray(12))
    with pytest.raises(ValueError, match="inputs is empty"):
        _core.reduce("float32", "sum", [], out)
    with pytest.raises(TypeError, match="out must be a contiguous, writable buffer"):
        _core.reduce("float32", "sum", [bytes(8)], bytes(8))


def test_settings_from_options_and_environment() -> None:
    assert resolve(None, {}) == Settings()
    environ = {
        "REDUCER_SERVERS": "a:1,b:2",
        "REDUCER_CHUNK_BYTES": "64KiB",
        "REDUCER_CHECKSUM": "on",
        "REDUCER_LOG": "",
    }
    options = reducer.Options(chunk_bytes=8192, connect_timeout=timedelta(seconds=3), servers=["c:3"])
    assert resolve(None, environ).servers == ("a:1", "b:2")
    read = resolve(options, environ)
    assert read.servers == ("c:3",)
    assert read.chunk_bytes == 8192
    assert read.checksum
    assert read.connect_timeout == timedelta(seconds=3)
    assert read.shared["REDUCER_CHUNK_BYTES"] == "8192"
