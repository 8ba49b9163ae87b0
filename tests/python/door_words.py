"""What ranks say at each other's doors, for tests that play a rank or a stranger."""

from __future__ import annotations

import json
import secrets
import socket
from pathlib import Path
from typing import Any

from reducer import _door
from reducer._keys import Keys

WAIT_S = 30.0
TOPIC = "shrink/00112233445566778899aabbccddeeff"


def token_file(folder: Path, name: str = "token", token: str | None = None) -> Path:
    path = folder / name
    path.write_text((token or secrets.token_hex(16)) + "\n")
    return path


def keys_of(path: Path) -> Keys:
    keys = Keys()
    keys.use(str(path))
    return keys


def word(rank: int, **more: Any) -> dict[str, Any]:
    said = {"topic": TOPIC, "meeting": 1, "rank": rank, "round": 0, "dead": [], "silent": [], "decided": False}
    return {**said, **more}


def line_of(message: dict[str, Any], keys: Keys) -> bytes:
    return keys.line(json.dumps(message).encode()) + b"\n"


def dial(door: _door.Door) -> socket.socket:
    return socket.create_connection(_door.split_address(door.address), timeout=WAIT_S)
