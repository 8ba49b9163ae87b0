"""A torch store in this process, for others."""

from __future__ import annotations

import socket

from torch._C._distributed_c10d import TCPStore

from reducer._door import split_address
from reducer.errors import InvalidArgumentError, UnavailableError


def hold_store(listen: str) -> tuple[TCPStore, str]:
    """A store in this process at "host:port" (port 0: a free one), and its address.

    Raises InvalidArgumentError, UnavailableError (the address cannot be used).
    """
    try:
        host, port = split_address(listen)
    except ValueError:
        raise InvalidArgumentError(f"'{listen}' is no address: write host:port") from None
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UnavailableError(f"cannot listen on {listen}: {error.strerror or error}") from error
    port = listener.getsockname()[1]
    # The server is in the store of a client, which has to reach it.
    reach = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    store = TCPStore(reach, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
