"""What can go wrong, as exceptions.

Errors of settings and of making a group are these. Errors of a collective come from torch: ``ValueError`` and
``TypeError`` for
its arguments, ``torch.distributed.DistBackendError`` from ``wait()`` for everything that happened on the way.
"""

from __future__ import annotations

import builtins


class ReducerError(Exception):
    """The base of all of them."""


class InvalidArgumentError(ReducerError, ValueError):
    """A setting or an argument is wrong."""


class MismatchError(ReducerError, ValueError):
    """The ranks of a group do not agree."""


class TimeoutError(ReducerError, builtins.TimeoutError):
    """A deadline passed."""


class UnavailableError(ReducerError, ConnectionError):
    """A peer cannot be reached, or went away."""


class ResourceExhaustedError(ReducerError, RuntimeError):
    """A limit was reached."""


class AbortedError(ReducerError, RuntimeError):
    """The group was aborted or destroyed, or belongs to another process."""


class VersionError(ReducerError, RuntimeError):
    """Two parts are of versions that do not fit together."""


class InternalError(ReducerError, RuntimeError):
    """A fault in reducer itself."""


# By the numbers of `reducer::Code`.
_BY_CODE: dict[int, type[ReducerError]] = {
    1: InvalidArgumentError,
    2: MismatchError,
    3: TimeoutError,
    4: UnavailableError,
    5: ResourceExhaustedError,
    6: AbortedError,
    7: VersionError,
    8: InternalError,
}


def from_code(code: int, message: str) -> ReducerError:
    """The exception for a native status; an unknown number is an internal error."""
    return _BY_CODE.get(code, InternalError)(message)
