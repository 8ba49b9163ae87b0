"""What a job's workers share in the store: one record, which changes by compare-and-set only."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import urlparse

from torch._C._distributed_c10d import FileStore, Store, TCPStore

from reducer import errors
from reducer._door import split_address

Record = dict[str, Any]

_KEY = "record"
# For an answer of the store: the other workers wait meanwhile.
_ANSWER_S = 20.0


def open_store(rendezvous: str | Store | None, patience_s: float) -> tuple[Store, str]:
    """The store, and its name for messages. Raises InvalidArgumentError, UnavailableError.

    None: the one that torchrun's agent holds, by MASTER_ADDR and MASTER_PORT.
    """
    if rendezvous is None:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            raise errors.InvalidArgumentError(
                "rendezvous: give tcp://host:port of `reducer rendezvous`, file:///path or a store; only under "
                "torchrun, whose agent has one, it may be left out"
            )
        rendezvous = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if not isinstance(rendezvous, str):
        return rendezvous, type(rendezvous).__name__
    parts = urlparse(rendezvous)
    if parts.scheme == "file" and parts.path and not parts.netloc:
        return FileStore(parts.path, -1), rendezvous
    try:
        host, port = split_address(parts.netloc)
    except ValueError:
        host, port = "", 0
    if parts.scheme != "tcp" or not host or parts.path.strip("/"):
        raise errors.InvalidArgumentError(f"rendezvous: '{rendezvous}' is neither tcp://host:port nor file:///path")
    try:
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=patience_s))
        store.set_timeout(timedelta(seconds=min(_ANSWER_S, patience_s)))
        return store, rendezvous
    except RuntimeError as error:
        raise errors.UnavailableError(
            f"no store answers at {rendezvous}: start `reducer rendezvous --listen {host}:{port}` there ({error})"
        ) from None


class SharedRecord:
    """A JSON object in a store. Thread safety: that of the store."""

    def __init__(self, store: Store, where: str, first: Record) -> None:
        """Makes it, if nobody has."""
        self._store = store
        self._where = where
        self._text = self._ask(lambda: store.compare_set(_KEY, "", _encode(first)))

    def read(self) -> Record:
        """As it is now."""
        self._text = self._ask(lambda: self._store.get(_KEY))
        return _decode(self._text)

    def change(self, edit: Callable[[Record], bool]) -> Record:
        """Has `edit` change it, once or (if others were faster) again on what they made of it; as it is then.

        `edit` says whether there is anything to write.
        """
        pause = 0.001
        while True:
            record = _decode(self._text)
            if not edit(record):
                current = self.read()  # what we hold may be old
                if not edit(current):
                    return current
                record = current
            wanted = _encode(record)
            self._text = self._swap(self._text, wanted)
            if self._text == wanted:
                return record
            time.sleep(pause)  # as many may try as there are workers
            pause = min(0.05, pause * 2)

    def _swap(self, before: str, wanted: str) -> str:
        text: str = self._ask(lambda: self._store.compare_set(_KEY, before, wanted))
        return text

    def mark(self, key: str) -> None:
        self._ask(lambda: self._store.set(key, "1"))

    def marked(self, key: str) -> bool:
        return bool(self._ask(lambda: self._store.check([key])))

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            answer = call()
        except RuntimeError as error:  # each kind of store has its own
            raise errors.UnavailableError(
                f"the store at {self._where} is gone, by which the workers of this job find each other: {error}"
            ) from None
        return answer.decode() if isinstance(answer, bytes) else answer


def _encode(record: Record) -> str:
    # No two texts are equal, so that who wrote one knows it.
    return json.dumps({**record, "writing": secrets.token_hex(8)})


def _decode(text: str) -> Record:
    record: Record = json.loads(text)
    return record
