"""A server for one application: opens its port, accepts, drains on close, and can be opened again in the process."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog
from sanic import Sanic
from sanic.server import AsyncioServer

from distributor_node.services.api.graceful_shutdown import (
    DRAIN_TIMEOUT,
    QUIET_PERIOD,
    QUIET_PERIOD_SHARED,
    drain_accept_queue,
    wait_until_flushed,
)
from distributor_node.services.api.listen import (
    ListenAddress,
    bind,
    listen_unless_listening,
    stop_listening,
)
from distributor_node.services.api.protocol import PublicProtocol, Timeouts
from distributor_node.services.api.sanic_app import ApiApplication, prepare_start
from distributor_node.shared.observability.logging import OutageLog
from distributor_node.shared.runtime.process import descriptor_ceiling
from distributor_node.shared.waiting import TurnBudget

BACKLOG = 1024
EMFILE_BACKOFF = 0.5
"""Seconds without accepting after the system had no descriptor or memory left for one more connection."""

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
        """The port in use. Known once the server has been open."""
        return self._address.port

    @property
    def is_open(self) -> bool:
        return self._listening is not None

    async def wait_disconnected(self, seconds: float) -> bool:
        """Wait until no client of the open port is connected. Returns False after `seconds`."""
        return self._listening is None or await self._listening.connections.wait_empty(seconds)

    async def open(self) -> None:
        """Listen on the port. A port that the system chose is kept when the server opens again.

        Raises ConfigurationError if the port is taken.
        """
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

    async def close(self, drain_seconds: float, *, ending: bool = False) -> None:
        """Stop accepting, let responses finish within `drain_seconds`, then abort the rest.

        Accepted connections get their response. Idle keep-alive connections may send one more request within
        KEEPALIVE_DRAIN_GRACE. The port can be opened again before this returns; connections to it are not affected.

        `ending`: the process ends. A socket that systemd opened then goes on listening, and its queue is left to the
        next process.
        """
        inherited = self._address.inherited
        if self._listening is None:
            if ending and inherited is not None:
                listen_unless_listening(inherited, BACKLOG)  # systemd takes one that does not for a failure
            return
        deadline = time.monotonic() + drain_seconds
        listening, self._listening = self._listening, None
        connections = listening.connections
        connections.start_draining()
        if inherited is None:
            await self._release_port(listening.accept_loop, drain_seconds)
        else:
            await self._leave_port(listening.accept_loop, inherited, ending=ending)
        if not await connections.wait_empty(max(0.0, deadline - time.monotonic())):
            aborted = [connection.close_now() for connection in set(connections)].count(True)
            if aborted:
                logger.warning("responses_aborted_on_close", connections=aborted)
            await connections.wait_empty(_ABORT_GRACE)
        if tasks := connections.tasks():
            await asyncio.wait(tasks, timeout=_ABORT_GRACE)
        if not await wait_until_flushed(self.port, max(0.0, deadline - time.monotonic())):
            logger.warning("responses_unflushed_on_close", port=self.port)
        logger.info("server_closed", port=self.port)

    async def _release_port(self, accept_loop: AcceptLoop, drain_seconds: float) -> None:
        """Close the listening socket once no connection is queued or half-open.

        On a busy machine some may still be queued when the time for that is over.
        """
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
            accept_loop.accept_queued()
            accept_loop.close()
            self._port_free.set()
        await accept_loop.wait_connected()

    async def _leave_port(self, accept_loop: AcceptLoop, inherited: socket.socket, *, ending: bool) -> None:
        """Stop accepting from a socket that is not ours to close. Unless the process ends, clients are refused."""
        if not ending:
            accept_loop.accept_queued()
            stop_listening(inherited)
        accept_loop.close()
        await accept_loop.wait_connected()


@dataclass(frozen=True, slots=True)
class _Listening:
    """The state of the port from one `open` to the next `close`."""

    accept_loop: AcceptLoop
    connections: Connections  # those that `accept_loop` has accepted and that are still open


class Connections(set[PublicProtocol]):
    """The open connections of one listening socket. They add and discard themselves."""

    def __init__(self) -> None:
        super().__init__()
        self._connection_closed = asyncio.Event()
        self._draining = False
        self._ending: set[asyncio.Task[None]] = set()  # of connections that have been lost while draining

    def start_draining(self) -> None:
        """Close each connection after its current response, connections that are added later included."""
        self._draining = True
        for connection in self.copy():
            connection.start_draining()

    def tasks(self) -> set[asyncio.Task[None]]:
        """Return the tasks that serve these connections, and those of connections that have been lost while draining.

        A connection has none before its first request for Sanic, which may come during the drain.
        """
        return self._ending | {connection.task for connection in self if connection.task is not None}

    def add(self, connection: PublicProtocol, /) -> None:
        super().add(connection)
        if self._draining:
            # Deferred: Sanic adds a connection before it is fully initialised.
            connection.loop.call_soon(connection.start_draining)

    def discard(self, connection: object, /) -> None:
        super().discard(connection)
        if self._draining and isinstance(connection, PublicProtocol) and connection.task is not None:
            self._ending.add(connection.task)
        self._connection_closed.set()

    async def wait_empty(self, seconds: float) -> bool:
        """Wait until no connection is left. Returns False after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while self:
                    if self._connection_closed.is_set():
                        self._connection_closed = asyncio.Event()
                    await self._connection_closed.wait()
        except TimeoutError:
            return False
        return True


ACCEPTED_AT_ONCE = 8
"""Connections that one turn of the event loop accepts, or more if its turns are long."""
ACCEPTED_WHILE_REQUESTS_WAIT = 2
_CONNECTION_SECONDS = (
    0.0002  # about the time that the loop takes until a new connection waits for its first request
)


class AcceptLoop:
    """Accepts the queued connections, some in each turn of the event loop.

    The loop's own server accepts one connection per turn, and each turn also serves all connected clients. When a
    thousand clients connect at once, the last of them would wait for a thousand turns, which takes seconds. All of them
    in one turn are a piece of work for which the connected clients would wait. So a turn accepts ACCEPTED_AT_ONCE
    connections, or as many as take about as long as the turn before: at most half of the loop's time is for accepting.

    Where requests wait for their turns, these are what makes the turns long, and more connections would bring more of
    them: then a turn accepts ACCEPTED_WHILE_REQUESTS_WAIT, which is still more than it begins.
    """

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[socket.socket], asyncio.BaseProtocol],
        backlog: int,
        ceiling: int | None = None,
        requests_wait: Callable[[], bool] = lambda: False,
    ) -> None:
        """Start to listen on `listener`, a bound, non-blocking socket, unless it listens already. `close` closes it.

        `ceiling`: the number of open descriptors at which accepting pauses. What is above it is for the work that
        accepted connections ask for: files, and connections to sources. `requests_wait`: whether requests of accepted
        connections wait for their turns.
        """
        self._requests_wait = requests_wait
        self._ceiling = ceiling
        self._pause_log = OutageLog(logger, down="accepting_paused", up="accepting_resumed")
        self._loop = asyncio.get_running_loop()
        self.listener = listener
        self.accepted_count = 0  # connections since the start
        self._make_protocol = make_protocol
        self._backlog = backlog
        self._tasks: set[asyncio.Task[None]] = set()
        self._resume_timer: asyncio.TimerHandle | None = None
        self._left_queued_at: float | None = None  # when the last turn accepted as many as it may
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
        self._loop.add_reader(self.listener.fileno(), self._accept_in_turn)

    def accept_queued(self) -> None:
        """Accept the connections that are queued now."""
        self._accept(self._backlog)

    def _accept_in_turn(self) -> None:
        """Accept some of what is queued. The socket stays readable, so the next turn goes on."""
        most, now = ACCEPTED_AT_ONCE, time.monotonic()
        if self._requests_wait():
            most = ACCEPTED_WHILE_REQUESTS_WAIT
        elif self._left_queued_at is not None:
            most = max(most, int((now - self._left_queued_at) / _CONNECTION_SECONDS))
        self._left_queued_at = None
        if self._accept(min(most, self._backlog)):
            self._left_queued_at = time.monotonic()

    def _accept(self, most: int) -> bool:
        """Accept up to `most` connections. Returns whether more may be queued."""
        for _ in range(most):
            try:
                connection, _ = self.listener.accept()
            except (BlockingIOError, InterruptedError):
                return False
            except ConnectionError:
                continue  # the client left before it was accepted
            except OSError as error:
                # The connection stays queued and the socket readable: without a pause the loop would spin.
                if (
                    error.errno != errno.EINVAL
                ):  # another worker has stopped the inherited socket: soon, so do we
                    logger.error("accept_failed", reason=error.strerror)
                self._pause()
                return False
            self.accepted_count += 1
            connection.setblocking(False)
            task = self._loop.create_task(self._connect(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            # The kernel gives the lowest free number, so at least as many descriptors are open.
            if self._ceiling is not None and connection.fileno() >= self._ceiling:
                self._pause_log.failed(f"{self._ceiling} descriptors are open; the rest is for work")
                self._pause()
                return False
        return True

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
            await self._loop.connect_accepted_socket(partial(self._make_protocol, connection), connection)
        except OSError:
            connection.close()  # the client has left already


def create_accepting_server(
    application: Sanic[Any, Any],
    bound: socket.socket,
    protocol: type[PublicProtocol],
    connections: set[Any],
    backlog: int,
) -> Any:
    """Return a Sanic server (untyped) for the running loop. Once awaited, its `server` is an AcceptLoop.

    `sanic.server.serve` would let the loop accept. `Sanic.create_server` would configure logging and signals.
    """
    loop = asyncio.get_running_loop()
    timeouts = Timeouts.of(application)
    make_protocol = partial(protocol, loop=loop, connections=connections, app=application, timeouts=timeouts)
    turns: TurnBudget = application.ctx.turns

    async def accept() -> AcceptLoop:
        return AcceptLoop(bound, make_protocol, backlog, descriptor_ceiling(), lambda: turns.requests_wait)

    return AsyncioServer(app=application, loop=loop, serve_coro=accept(), connections=connections)
