"""What a job's workers share in the store: one record, which changes by compare-and-set only."""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast
from urllib.parse import urlparse

from torch._C._distributed_c10d import FileStore, Store, TCPStore

from reducer import errors
from reducer._door import split_address
from reducer.elastic._decision import Action, Phase

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
        """Makes it, if nobody has. What is there and is no record is a MismatchError, here and below."""
        self._store = store
        self._where = where
        self._checked = ""
        self._text = self._ask(lambda: store.compare_set(_KEY, "", _encode(first)))

    def read(self) -> Record:
        """As it is now."""
        self._text = self._ask(lambda: self._store.get(_KEY))
        return self._decode()

    def change(self, edit: Callable[[Record], bool]) -> Record:
        """Has `edit` change it, once or (if others were faster) again on what they made of it; as it is then.

        `edit` says whether there is anything to write.
        """
        pause = 0.001
        while True:
            record = self._decode()
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
        # What is no text is no record either, which is for who reads it to say.
        return answer.decode(errors="replace") if isinstance(answer, bytes) else answer

    def _decode(self) -> Record:
        try:
            record = json.loads(self._text)
            if self._text != self._checked:  # it is read far more often than it changes
                _check(record)
                self._checked = self._text
        except (ValueError, TypeError, KeyError, RecursionError):
            raise errors.MismatchError(
                f"what is in the store at {self._where} is no record of this version of reducer: give the job another "
                "name (`job`) or another store, and all of its workers the same version"
            ) from None
        return cast(Record, record)


def _encode(record: Record) -> str:
    # No two texts are equal, so that who wrote one knows it.
    return json.dumps({**record, "writing": secrets.token_hex(8)})


# ---------------------------------------------------------------- what is a record

_STEP_MAX = 1 << 62
_PHASES = frozenset(phase.value for phase in Phase)
_ACTIONS = frozenset(action.value for action in Action)


def _check(record: Any) -> None:
    """Raises TypeError, ValueError, KeyError."""
    _must(isinstance(record, dict))
    if record["terms"] is not None:
        _must(_is_text(record["terms"]["on_loss"]))
        _must(all(_is_step(record["terms"][name]) for name in ("min_workers", "max_workers")))
    _must(_is_step(record["generation"]) and isinstance(record["begun"], bool))
    _must(record["over"] is None or _is_step(record["over"]))
    _must(all(isinstance(record[place], dict) for place in ("arrived", "waiting", "left")))
    _must(isinstance(record["members"], list))
    for member in record["members"]:
        _check_worker(member, member["uid"])
    for place in ("arrived", "waiting"):
        for uid, said in record[place].items():
            _check_worker(said, uid)
            _must(type(said["since"]) in (int, float) and 0 <= said["since"] < _STEP_MAX)
    for said in (*record["arrived"].values(), *record["left"].values()):
        _must(_is_step(said["step"]) and said["phase"] in _PHASES)
    _must(record["arrived"].keys().isdisjoint(record["waiting"]))
    uids = [member["uid"] for member in record["members"]]
    _must(len(set(uids)) == len(uids))
    if record["generation"] > 0:
        _check_news(record["news"], len(uids))


def _check_worker(said: Any, uid: str) -> None:
    _must(said["uid"] == uid and _is_text(uid) and _is_text(said["host"]) and _is_text(said["door"]))
    host, _ = split_address(said["door"])
    ipaddress.ip_address(host)


def _check_news(news: Any, members: int) -> None:
    _must(_is_step(news["step"]) and news["summary"] in _ACTIONS and isinstance(news["actions"], dict))
    _must(all(action in _ACTIONS for action in news["actions"].values()))
    _must(news["source"] is None or (_is_step(news["source"]) and news["source"] < members))
    _must(all(_is_step(rank) and rank < members for rank in _listed(news["new"])))
    _must(all(_is_text(host) for name in ("lost", "left") for host in _listed(news[name])))


def _listed(value: Any) -> list[Any]:
    _must(isinstance(value, list))
    return cast("list[Any]", value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < _STEP_MAX


def _must(holds: bool) -> None:
    if not holds:
        raise ValueError
