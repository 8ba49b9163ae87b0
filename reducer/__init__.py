"""Data-parallel training through reduction servers: a backend of ``torch.distributed`` named "reducer".

Importing this package registers the backend. Where the package is installed the import is not even needed: torch
finds the
backend by its entry point, and ``torch.distributed.init_process_group("reducer")`` works. The native library is loaded
when the
first group is made.

    import torch.distributed as dist
    dist.init_process_group("reducer")
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reducer._shrink import shrink
    from reducer.errors import (
        AbortedError,
        InternalError,
        InvalidArgumentError,
        MismatchError,
        ReducerError,
        ResourceExhaustedError,
        TimeoutError,
        UnavailableError,
        VersionError,
    )
    from reducer.options import Options
    from reducer.recorder import dump

__version__ = "0.1.0"

__all__ = [
    "AbortedError",
    "InternalError",
    "InvalidArgumentError",
    "MismatchError",
    "Options",
    "ReducerError",
    "ResourceExhaustedError",
    "TimeoutError",
    "UnavailableError",
    "VersionError",
    "__version__",
    "dump",
    "shrink",
]

_MODULE_OF = {"Options": "reducer.options", "dump": "reducer.recorder", "shrink": "reducer._shrink"}
_ENTRY_POINT_GROUP = "torch.backends"


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = _MODULE_OF.get(name, "reducer.errors")
        return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'reducer' has no attribute {name!r}")


def _create(options: Any, backend_options: Any) -> Any:
    from reducer.backend import create

    return create(options, backend_options)


def _autoload() -> None:
    """Registers the backend: what torch calls at the end of its own import, and so as little as can be."""
    from torch import distributed, version

    if not distributed.is_available() or hasattr(distributed.Backend, "REDUCER"):
        return
    devices = ["cpu"]
    # The driver's device file and not torch.cuda.is_available(), which would wake the driver in every process.
    if version.cuda is not None and os.path.exists("/dev/nvidiactl"):
        devices.append("cuda")
    distributed.Backend.register_backend("reducer", _create, extended_api=True, devices=devices)


def _register() -> None:
    """Registers the backend now, unless torch will call `_autoload` when it is imported (a reducer's host has no
    torch).
    """
    if "torch" not in sys.modules:
        if importlib.util.find_spec("torch") is None:
            return
        if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1" and any(
            point.value == "reducer:_autoload" for point in importlib.metadata.entry_points(group=_ENTRY_POINT_GROUP)
        ):
            return
        importlib.import_module("torch")
    elif not hasattr(sys.modules["torch"], "distributed"):
        return  # torch is being imported, and this is its entry point at work
    _autoload()


_register()
