"""Starts the native reducer. Nothing here imports torch: a reducer's host need not have it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn


def server_binary() -> Path:
    """The path of ``reducer-server``.

    Raises:
        FileNotFoundError: the package was installed without its native parts.
    """
    path = Path(__file__).resolve().parent / "bin" / "reducer-server"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: the package was not built (run `make setup`, or `pip install .`)")
    return path


def serve(arguments: list[str]) -> NoReturn:
    """Replaces this process by the reducer, so that its signals and exit status are the native ones."""
    binary = server_binary()
    os.execv(binary, [str(binary), *arguments])
