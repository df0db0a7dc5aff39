"""Programs that a cell asks although it did not start them: whose processor time is its own."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import unquote, urlsplit

#: Where the schemes of an address listen if it does not say so.
_PORTS = {"http": 80, "https": 443}
_REDIS_PORT = 6379
_TIMEOUT_S = 2.0


def programs(addresses: Iterable[str | None]) -> frozenset[int] | None:
    """Return the process ids of the servers at these addresses, as far as they run on this machine.

    Parameters
    ----------
    addresses:
        Of a cache server (``redis://``, ``unix://``) or an API (``http://``); None says nothing.

    Returns
    -------
    frozenset or None
        Ids of this machine's processes; a server elsewhere or that does not answer has none. None if
        a server on this machine cannot be found among its processes: it is somebody else's, or in a
        container.
    """
    found: set[int] = set()
    for address in filter(None, addresses):
        with suppress(OSError, ValueError):
            own = _at(address)
            if own is None:
                return None
            found |= own
    return frozenset(found)


def _at(address: str) -> set[int] | None:
    parts = urlsplit(address)
    if parts.scheme == "unix":
        with socket.socket(socket.AF_UNIX) as one:
            one.settimeout(_TIMEOUT_S)
            one.connect(unquote(parts.path))
            return _peer(one)
    there = (parts.hostname or "localhost", parts.port or _PORTS.get(parts.scheme, _REDIS_PORT))
    with socket.create_connection(there, timeout=_TIMEOUT_S) as one:
        if one.getsockname()[0] != one.getpeername()[0]:
            return set()
        port = one.getpeername()[1]
    return _listening(port)


def _peer(one: socket.socket) -> set[int] | None:
    """Return who is at the other end of a Unix socket; 0 is a process that cannot be seen from here."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return None
    pid = struct.unpack("3i", one.getsockopt(socket.SOL_SOCKET, option, 12))[0]
    return {pid} if pid else None


def _listening(port: int) -> set[int] | None:
    """Return the processes that listen at a port; other users' cannot be seen."""
    import psutil

    try:
        held = psutil.net_connections("tcp")
    except psutil.Error:
        return None
    found = {one.pid for one in held if one.status == psutil.CONN_LISTEN and one.laddr.port == port}
    return None if not found or None in found else found - {os.getpid()}
