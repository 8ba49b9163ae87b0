"""The native binary ``reducer-server``. Nothing here imports torch: a reducer's host need not have it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from reducer.errors import ReducerError, UnavailableError

# The binary itself gives up after 5 s.
_ANSWER_S_MAX = 30.0


def server_binary() -> Path:
    """The path of ``reducer-server``. Raises UnavailableError if the package has no native parts."""
    path = Path(__file__).resolve().parent / "bin" / "reducer-server"
    if not path.exists():
        raise UnavailableError(f"{path} is not there: reducer was not built (run `make setup`, or `pip install .`)")
    return path


def serve(arguments: list[str]) -> NoReturn:
    """Replaces this process by the reducer, so that its signals, messages and exit status are the native ones."""
    binary = server_binary()
    try:
        os.execv(binary, [str(binary), *arguments])
    except OSError as error:
        raise UnavailableError(f"{binary} cannot be run: {error.strerror}") from error


def query_stats(address: str, security: Sequence[str] = ()) -> dict[str, Any]:
    """The counters of the reducer at "host:port", by the names of reducer.v1.StatsReply (csrc/wire/reducer.proto).

    `security`: options of the binary for TLS and the token; the environment is read, too. Raises UnavailableError if
    none answers there within 5 s, or not to us.
    """
    asked = subprocess.run(
        [server_binary(), *security, "--stats", address],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=_ANSWER_S_MAX,
    )
    if asked.returncode != 0:
        raise UnavailableError(asked.stderr.strip().removeprefix("reducer-server: "))
    reply = json.loads(asked.stdout)
    if not isinstance(reply, dict):
        raise ReducerError(f"{address} answered something else than counters: {asked.stdout[:200]}")
    return _with_numbers(reply)


def _with_numbers(message: dict[str, Any]) -> dict[str, Any]:
    """Protobuf's JSON writes 64-bit integers as text; here they are integers."""
    numbers: dict[str, Any] = {}
    for name, value in message.items():
        if isinstance(value, list):
            numbers[name] = [_with_numbers(item) for item in value]
        elif isinstance(value, str) and name not in ("job", "group"):
            numbers[name] = int(value)
        else:
            numbers[name] = value
    return numbers
