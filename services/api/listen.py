"""Listening sockets of the API.

This module imports no metrics: the supervisor needs it before prometheus_client may be imported (see multiprocess.py).
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

from distributor_node.shared.domain.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where to listen. Port 0: any free one. `shared`: several processes listen on it (SO_REUSEPORT).
    `setting`: where the address comes from, for messages."""

    host: str
    port: int
    shared: bool = False
    setting: str = "public_api"


def bind(address: ListenAddress) -> socket.socket:
    """A bound TCP socket that does not listen yet; ConfigurationError if the address cannot be had."""
    try:
        found = socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, sockaddr = found[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigurationError(
            f"{address.setting}.host {address.host!r}: {error.strerror or error}"
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
