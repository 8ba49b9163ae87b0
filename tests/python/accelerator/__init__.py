"""A fake accelerator for tests: the device "fake", made of threads and of memory that the host cannot read.

It works late (`torch.fake.slow`), so that a missing synchronisation shows as a wrong result. `device.h` says what its
streams and
its memory do. `build()` compiles it, once for each torch and each change of its source; `load()` makes this process
have it, and must
come before the first group: reducer is left before the streams end.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib.util
import subprocess
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[2] / "build" / "accelerator"
_BUILD_S = 280.0

_native: Any = None


class BuildFailure(RuntimeError):
    """The extension does not compile; the text is the compiler's."""


def _run(*command: str) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_BUILD_S, check=False
    )
    if done.returncode != 0:
        raise BuildFailure(f"{' '.join(command)}\n{done.stdout}")


def build() -> Path:
    """The extension, up to date."""
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    folder = FOLDER / f"torch-{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        settings = {
            "CMAKE_BUILD_TYPE": "",
            "SUFFIX": suffix,
            "TORCH_ABI": str(int(torch.compiled_with_cxx11_abi())),
            "TORCH_INCLUDES": ";".join([*cpp_extension.include_paths(), sysconfig.get_path("include")]),
            "TORCH_LIBRARIES": ";".join(cpp_extension.library_paths()),
        }
        chosen = [f"-D{name}={value}" for name, value in settings.items()]
        stamp, text = folder / "settings", "\n".join(chosen)
        if not stamp.exists() or stamp.read_text() != text:
            _run("cmake", "-G", "Ninja", "-S", str(HERE), "-B", str(folder), *chosen)
            stamp.write_text(text)
        _run("ninja", "-C", str(folder), "-j", "1")
    return folder / f"_fake_accelerator{suffix}"


def load() -> None:
    """Gives this process the devices fake:0 and fake:1, and `torch.fake`. Does nothing the second time."""
    global _native
    if _native is not None:
        return
    spec = importlib.util.spec_from_file_location("_fake_accelerator", build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _native = module
    atexit.register(module.stop)
    torch.utils.rename_privateuse1_backend("fake")  # type: ignore[attr-defined]
    torch._register_device_module("fake", _device_module())  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------- torch.fake


@dataclass(frozen=True)
class Copy:
    """A copy between host and device, as it ran; times in seconds on a clock of its own."""

    upload: bool  # to the device
    pinned: bool  # the host's side
    nbytes: int
    stream: int
    begin: float
    end: float


def take_copies() -> list[Copy]:
    """The copies that ended since the last call."""
    return [Copy(*copy) for copy in _native.take_copies()]


@contextlib.contextmanager
def slow(milliseconds: float) -> Iterator[None]:
    """Kernels and copies launched within begin this much later than they could."""
    before = _native.delay()
    _native.set_delay(int(milliseconds * 1000))
    try:
        yield
    finally:
        _native.set_delay(before)


@contextlib.contextmanager
def gate() -> Iterator[Any]:
    """The current stream stops here until the gate is opened (`open()`), at the latest at the end of the block."""
    made = _native.Gate()
    try:
        yield made
    finally:
        made.open()


@contextlib.contextmanager
def uploads_held() -> Iterator[None]:
    """No copy to a device begins within."""
    _native.hold_uploads(True)
    try:
        yield
    finally:
        _native.hold_uploads(False)


def _index(device: Any = None) -> int:
    if device is None:
        return int(torch.accelerator.current_device_index())
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return _index() if index is None else index


def _synchronize(device: Any = None) -> None:
    torch.accelerator.synchronize(_index(device))


def _current_stream(device: Any = None) -> torch.Stream:
    return torch.accelerator.current_stream(_index(device))


@contextlib.contextmanager
def _stream(stream: torch.Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    # set_stream() makes the stream's device the current one.
    device, before = _index(), _current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)
        torch.accelerator.set_device_index(device)


def _device_module() -> types.ModuleType:
    module: Any = types.ModuleType("torch.fake")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module._lazy_init = module.init = lambda: None
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.device_count = lambda: _native.device_count
    module.current_device = _index
    module.set_device = lambda device: torch.accelerator.set_device_index(_index(device))
    module.synchronize = _synchronize
    module.current_stream = _current_stream
    module.stream = _stream
    module.Stream = lambda device=None: torch.Stream(f"fake:{_index(device)}")
    module.Event = lambda: torch.Event("fake")

    module.slow = slow
    module.gate = gate
    module.uploads_held = uploads_held
    module.take_copies = take_copies
    module.pinned_bytes = _native.pinned_bytes
    module.pinned_bytes_max = _native.pinned_bytes_max
    module.reset_pinned_bytes_max = _native.reset_pinned_bytes_max
    module.device_bytes = lambda device=None: _native.device_bytes(_index(device))
    return module  # type: ignore[no-any-return]
