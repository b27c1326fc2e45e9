"""Taking connections from the kernel: all that wait, in one turn of the loop.

The loop's own server takes a single one in each of its turns, and each turn answers everybody who is
connected already. Where a thousand clients come at once the last of them would wait for a thousand turns: for seconds.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import structlog
from sanic import Sanic
from sanic.server import AsyncioServer, HttpProtocol

EMFILE_BACKOFF = 0.5
"""Seconds without taking anybody after the system had no descriptor or memory left for one more."""

logger = structlog.get_logger()


class AcceptLoop:
    """Listens on a bound, non-blocking socket, which becomes its own, from its making until `close`.
    `accepted_count`: how many connections, ever."""

    def __init__(
        self, listener: socket.socket, make_protocol: Callable[[], asyncio.BaseProtocol], backlog: int
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.listener = listener
        self.accepted_count = 0
        self._make_protocol = make_protocol
        self._backlog = backlog
        self._tasks: set[asyncio.Task[None]] = set()
        self._resume_timer: asyncio.TimerHandle | None = None
        listener.listen(backlog)
        self._start()

    def close(self) -> None:
        """Stop listening; connections that were taken live on."""
        if self._resume_timer is not None:
            self._resume_timer.cancel()
        if self.listener.fileno() >= 0:
            self._loop.remove_reader(self.listener.fileno())
            self.listener.close()

    async def wait_connected(self) -> None:
        """Return when those that were taken are the protocol's: a few turns of the loop later."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self) -> None:
        self._resume_timer = None
        self._loop.add_reader(self.listener.fileno(), self._accept)

    def _accept(self) -> None:
        """Everybody who waits; not more than the queue holds, so that others have their turn whoever comes."""
        for _ in range(self._backlog):
            try:
                connection, _ = self.listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:
                continue  # gone before it was taken
            except OSError as error:
                # It stays in the queue, and the socket readable: without a pause the loop would turn and turn
                logger.error("accept_failed", reason=error.strerror)
                self._loop.remove_reader(self.listener.fileno())
                self._resume_timer = self._loop.call_later(EMFILE_BACKOFF, self._start)
                return
            self.accepted_count += 1
            connection.setblocking(False)
            task = self._loop.create_task(self._connect(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection)
        except OSError:
            connection.close()  # the client has left already


def create_accepting_server(
    application: Sanic[Any, Any],
    bound: socket.socket,
    protocol: type[HttpProtocol],
    connections: set[Any],
    backlog: int,
) -> Any:
    """Sanic's server of the running loop (untyped); its `server` is an AcceptLoop once it has been awaited.

    Not `sanic.server.serve`, which has the loop accept; nor Sanic.create_server, which would set up logs and signals,
    and warn people at their terminals.
    """
    loop = asyncio.get_running_loop()
    make_protocol = partial(protocol, loop=loop, connections=connections, app=application)

    async def accept() -> AcceptLoop:
        return AcceptLoop(bound, make_protocol, backlog)

    return AsyncioServer(app=application, loop=loop, serve_coro=accept(), connections=connections)
