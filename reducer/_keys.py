"""How workers of a job know each other's messages: each carries a MAC made with the job's token, where it has one."""

from __future__ import annotations

import hashlib
import hmac
from contextlib import suppress
from pathlib import Path

from reducer.errors import InvalidArgumentError

# As in csrc/common/limits.h.
_TOKEN_BYTES_MIN = 16
_TOKEN_BYTES_MAX = 256
# Of tokens that were renewed, how many are still good here.
_KEYS_MAX = 4
# So that a MAC is good for nothing else that may ever be made with a token.
_PURPOSE = b"reducer: what workers say to each other, 1"


class Keys:
    """One for each token that this process has read, the latest four: a message is signed with all of them, and taken
    if any of its MACs was made with any of them. So workers understand each other while their files are being renewed.

    A line is "MAC,MAC,... message", HMAC-SHA256 in hexadecimal digits; without a token it is the message. Neither a
    token nor a key is in any error's text or `repr`.
    """

    def __init__(self) -> None:
        self._path = ""
        self._keys: tuple[bytes, ...] = ()

    def __bool__(self) -> bool:
        return bool(self._keys)

    def use(self, path: str) -> None:
        """The token in the file at `path` from now on, too; "": none. Raises InvalidArgumentError.

        Those of another file are forgotten: all groups of a process have the same one. If a file that was read before
        cannot be read now, what it held stays good.
        """
        if path != self._path:
            self._path, self._keys = path, ()
        if not path:
            return
        try:
            key = hmac.digest(_read(path), _PURPOSE, hashlib.sha256)
        except InvalidArgumentError:
            if not self._keys:
                raise
            return
        self._keys = (*(one for one in self._keys if one != key), key)[-_KEYS_MAX:]

    def renew(self) -> None:
        """Reads the file again."""
        with suppress(InvalidArgumentError):  # there are keys already, or the job has none
            self.use(self._path)

    def line(self, message: bytes) -> bytes:
        if not self._keys:
            return message
        return b",".join(_mac(key, message) for key in self._keys) + b" " + message

    def message(self, line: bytes) -> bytes | None:
        """What a line says; None: nobody who has the token wrote it."""
        if not self._keys:
            return line
        macs, _, message = line.partition(b" ")
        signed = False
        expected = [_mac(key, message) for key in self._keys]
        for mac in macs.split(b",", _KEYS_MAX)[:_KEYS_MAX]:
            for one in expected:
                signed |= hmac.compare_digest(one, mac)
        return message if signed else None


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, hashlib.sha256).hex().encode()


def _read(path: str) -> bytes:
    """The token of a worker's file, by the rules of csrc/server/tokens.cc."""
    try:
        with Path(path).open("rb") as file:
            text = file.read(_TOKEN_BYTES_MAX + 4096)
    except OSError as error:
        raise InvalidArgumentError(f"the token file '{path}' cannot be read: {error.strerror}") from None
    tokens = [token for line in text.split(b"\n") if (token := line.rstrip(b"\r "))]
    if len(tokens) != 1:
        raise InvalidArgumentError(f"the token file '{path}' has {len(tokens)} tokens; a worker's has one line")
    (token,) = tokens
    if not _TOKEN_BYTES_MIN <= len(token) <= _TOKEN_BYTES_MAX or not all(0x21 <= byte <= 0x7E for byte in token):
        raise InvalidArgumentError(
            f"the token file '{path}' has no token; it takes {_TOKEN_BYTES_MIN} to {_TOKEN_BYTES_MAX} printable "
            "characters, as `openssl rand -hex 32` makes"
        )
    return token
