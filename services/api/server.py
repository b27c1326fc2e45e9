"""The public port: opens, serves, drains, and can be opened again while the process lives."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog
from sanic import Sanic
from sanic.server import AsyncioServer, HttpProtocol

from distributor_node.services.api.graceful_shutdown import (
    DRAIN_TIMEOUT,
    QUIET_PERIOD,
    QUIET_PERIOD_SHARED,
    drain_accept_queue,
    wait_until_flushed,
)
from distributor_node.services.api.listen import ListenAddress, bind
from distributor_node.services.api.protocol import PublicProtocol
from distributor_node.services.api.sanic_app import ApiApplication, prepare_start

BACKLOG = 1024
_ABORT_GRACE = 1.0

logger = structlog.get_logger()


class PublicServer:
    """Serves one application in the running loop."""

    def __init__(
        self,
        application: ApiApplication,
        address: ListenAddress,
        protocol: type[PublicProtocol] = PublicProtocol,
    ) -> None:
        self._application = application
        self._address = address
        self._protocol = protocol
        self._listening: _Listening | None = None
        self._port_free = asyncio.Event()
        self._port_free.set()

    @property
    def port(self) -> int:
        """The port in use, once it has been open."""
        return self._address.port

    @property
    def is_open(self) -> bool:
        return self._listening is not None

    async def wait_disconnected(self, seconds: float) -> bool:
        """Wait until no client of the open port is connected; False after so many seconds."""
        return self._listening is None or await self._listening.connections.wait_empty(seconds)

    async def open(self) -> None:
        """Listen; ConfigurationError if the port is taken. A port chosen by the system stays the same."""
        await self._port_free.wait()
        if self._listening is not None:
            return
        bound = bind(self._address)
        self._address = replace(self._address, port=bound.getsockname()[1])
        connections = Connections()
        server = create_accepting_server(self._application, bound, self._protocol, connections, BACKLOG)
        if not self._application.state.is_started:
            prepare_start(self._application)
            await server.startup()
            await server.before_start()
            self._listening = _Listening((await server).server, connections)
            await server.after_start()
        else:
            self._listening = _Listening((await server).server, connections)
        logger.info("server_listening", host=self._address.host, port=self.port)

    async def close(self, drain_seconds: float) -> None:
        """Stop accepting, let answers end within `drain_seconds`, and cut the rest. Who was let in already is answered,
        and who asks once more on an idle connection within a moment.

        Meanwhile the port can be opened again: connections made since are left alone.
        """
        if self._listening is None:
            return
        deadline = time.monotonic() + drain_seconds
        listening, self._listening = self._listening, None
        connections = listening.connections
        connections.start_draining()
        tasks = connections.tasks()
        await self._release_port(listening.accept_loop, drain_seconds)
        tasks |= connections.tasks()
        if not await connections.wait_empty(max(0.0, deadline - time.monotonic())):
            aborted = [connection.close_now() for connection in set(connections)].count(True)
            if aborted:
                logger.warning("responses_aborted_on_close", connections=aborted)
            await connections.wait_empty(_ABORT_GRACE)
        if tasks:
            await asyncio.wait(tasks, timeout=_ABORT_GRACE)
        if not await wait_until_flushed(self.port, max(0.0, deadline - time.monotonic())):
            logger.warning("responses_unflushed_on_close", port=self.port)
        logger.info("server_closed", port=self.port)

    async def _release_port(self, accept_loop: AcceptLoop, drain_seconds: float) -> None:
        """Close the port when nobody is coming in any more."""
        self._port_free.clear()
        quiet = QUIET_PERIOD_SHARED if self._address.shared else QUIET_PERIOD
        try:
            await drain_accept_queue(
                accept_loop.listener,
                lambda: accept_loop.accepted_count,
                min(DRAIN_TIMEOUT, drain_seconds),
                quiet,
            )
        finally:
            accept_loop.close()
            self._port_free.set()
        await accept_loop.wait_connected()


@dataclass(frozen=True, slots=True)
class _Listening:
    """One time that the port is open. `connections`: all that `accept_loop` has taken."""

    accept_loop: AcceptLoop
    connections: Connections


class Connections(set[PublicProtocol]):
    """The open connections of one listening socket; they add and discard themselves."""

    def __init__(self) -> None:
        super().__init__()
        self._connection_closed = asyncio.Event()
        self._draining = False

    def start_draining(self) -> None:
        """End each as soon as its answer has ended, those that are still to come too."""
        self._draining = True
        for connection in self.copy():
            connection.start_draining()

    def tasks(self) -> set[asyncio.Task[None]]:
        """What runs them."""
        return {connection.task for connection in self if connection.task is not None}

    def add(self, connection: PublicProtocol, /) -> None:
        super().add(connection)
        if self._draining:
            # Later, since Sanic adds a connection before it is whole
            connection.loop.call_soon(connection.start_draining)

    def discard(self, connection: object, /) -> None:
        super().discard(connection)
        self._connection_closed.set()

    async def wait_empty(self, seconds: float) -> bool:
        """True as soon as no connection is left; False after so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                while self:
                    if self._connection_closed.is_set():
                        self._connection_closed = asyncio.Event()
                    await self._connection_closed.wait()
        except TimeoutError:
            return False
        return True


# Taking connections from the kernel: all that wait, in one turn of the loop.
#
# The loop's own server takes a single one in each of its turns, and each turn answers everybody who is
# connected already. Where a thousand clients come at once the last of them would wait for a thousand turns: for
# seconds.

EMFILE_BACKOFF = 0.5
"""Seconds without taking anybody after the system had no descriptor or memory left for one more."""


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
