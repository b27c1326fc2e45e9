"""Listening sockets of the API: bound to an address, listening, and stopped.

This module imports no metrics: the supervisor binds sockets before prometheus_client may be imported.
"""

from __future__ import annotations

import ctypes
import socket
from dataclasses import dataclass

from distributor_node.shared.domain.errors import ConfigurationError

_LIBC = ctypes.CDLL(None, use_errno=True)
_UNSPECIFIED = bytes(16)  # a sockaddr of the family AF_UNSPEC


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where to listen."""

    host: str
    port: int  # 0: any free port
    shared: bool = False  # SO_REUSEPORT: several processes listen on the port
    setting: str = "public_api"  # the settings group that the address comes from, for messages
    inherited: socket.socket | None = (
        None  # a listening socket that systemd opened: host and port are its own
    )


def bind(address: ListenAddress) -> socket.socket:
    """Return a bound TCP socket that does not listen yet, or a copy of the inherited socket.

    Raises ConfigurationError if the address is unavailable.
    """
    if address.inherited is not None:
        copied = address.inherited.dup()
        copied.setblocking(False)
        return copied
    try:
        found = socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, sockaddr = found[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # UnicodeError: not a host's name at all
        raise ConfigurationError(
            f"{address.setting}.host: expected an address or a host's name, got {address.host!r}:"
            f" {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(sockaddr)
    except OSError as error:
        bound.close()
        where = f"{address.host}:{address.port}"
        raise ConfigurationError(
            f"{address.setting}.port: cannot listen on {where}: {error.strerror}"
        ) from error
    return bound


def listen_unless_listening(listener: socket.socket, backlog: int) -> None:
    """Listen. A socket that listens already keeps its backlog."""
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.listen(backlog)


def stop_listening(listener: socket.socket) -> None:
    """Refuse connections in all processes that share the socket, which stays bound. It can listen again.

    By connect(2) to AF_UNSPEC, which Python does not offer and which may be repeated. A second `shutdown`, by another
    worker, would mark the socket, and every connection accepted later would be at its end.
    """
    if _LIBC.connect(listener.fileno(), _UNSPECIFIED, len(_UNSPECIFIED)) != 0:
        raise OSError(ctypes.get_errno(), "cannot stop listening")
