"""Listening sockets of the API: bound to an address, then accepted from in batches.

This module imports no metrics: the supervisor binds sockets before prometheus_client may be imported.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.observability.logging import OutageLog

EMFILE_BACKOFF = 0.5
"""Seconds without accepting after the system had no descriptor or memory left for one more connection."""

_LIBC = ctypes.CDLL(None, use_errno=True)
_UNSPECIFIED = bytes(16)  # a sockaddr of the family AF_UNSPEC

logger = structlog.get_logger()


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


class AcceptLoop:
    """Accepts every queued connection in one turn of the event loop.

    The loop's own server accepts one connection per turn, and each turn also serves all connected clients. When a
    thousand clients connect at once, the last of them would wait for a thousand turns, which takes seconds.
    """

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.BaseProtocol],
        backlog: int,
        ceiling: int | None = None,
    ) -> None:
        """Start to listen on `listener`, a bound, non-blocking socket, unless it listens already. `close` closes it.

        `ceiling`: the number of open descriptors at which accepting pauses. What is above it is for the work that
        accepted connections ask for: files, and connections to sources.
        """
        self._ceiling = ceiling
        self._pause_log = OutageLog(logger, down="accepting_paused", up="accepting_resumed")
        self._loop = asyncio.get_running_loop()
        self.listener = listener
        self.accepted_count = 0  # connections since the start
        self._make_protocol = make_protocol
        self._backlog = backlog
        self._tasks: set[asyncio.Task[None]] = set()
        self._resume_timer: asyncio.TimerHandle | None = None
        listen_unless_listening(listener, backlog)
        self._start()

    def close(self) -> None:
        """Stop listening. Accepted connections stay open."""
        if self._resume_timer is not None:
            self._resume_timer.cancel()
        if self.listener.fileno() >= 0:
            self._loop.remove_reader(self.listener.fileno())
            self.listener.close()

    async def wait_connected(self) -> None:
        """Wait until every accepted connection has its protocol, a few turns of the loop later."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self) -> None:
        self._resume_timer = None
        if not self._has_room():
            self._resume_timer = self._loop.call_later(EMFILE_BACKOFF, self._start)
            return
        self._pause_log.succeeded()
        self._loop.add_reader(self.listener.fileno(), self._accept)

    def accept_queued(self) -> None:
        """Accept the connections that are queued now."""
        self._accept()

    def _accept(self) -> None:
        """Accept what is queued, at most `backlog` connections, so that other callbacks get their turn."""
        for _ in range(self._backlog):
            try:
                connection, _ = self.listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:
                continue  # the client left before it was accepted
            except OSError as error:
                # The connection stays queued and the socket readable: without a pause the loop would spin.
                if (
                    error.errno != errno.EINVAL
                ):  # another worker has stopped the inherited socket: soon, so do we
                    logger.error("accept_failed", reason=error.strerror)
                self._pause()
                return
            self.accepted_count += 1
            connection.setblocking(False)
            task = self._loop.create_task(self._connect(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            # The kernel gives the lowest free number, so at least as many descriptors are open.
            if self._ceiling is not None and connection.fileno() >= self._ceiling:
                self._pause_log.failed(f"{self._ceiling} descriptors are open; the rest is for work")
                self._pause()
                return

    def _pause(self) -> None:
        self._loop.remove_reader(self.listener.fileno())
        if self._resume_timer is not None:
            self._resume_timer.cancel()
        self._resume_timer = self._loop.call_later(EMFILE_BACKOFF, self._start)

    def _has_room(self) -> bool:
        if self._ceiling is None:
            return True
        try:
            number = os.dup(self.listener.fileno())
        except OSError:
            return False
        os.close(number)
        return number < self._ceiling

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection)
        except OSError:
            connection.close()  # the client has left already
