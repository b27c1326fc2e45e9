"""Sanic's HTTP/1.1 protocol with stricter timeouts, draining on shutdown, and one log record per request.

This module and sanic_app.py are the ones that depend on Sanic's internals, server.py on its server class.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import socket
import struct
import termios
from dataclasses import dataclass
from time import monotonic, time
from typing import Any, Self

from sanic import Request, Sanic
from sanic.exceptions import BadRequest, RequestTimeout, ServiceUnavailable
from sanic.http import Http, Stage
from sanic.models.server_types import ConnInfo
from sanic.response import BaseHTTPResponse
from sanic.server import HttpProtocol

from distributor_node.services.api.access_log import AccessLog
from distributor_node.services.api.clients import SlowClients, bytes_acknowledged
from distributor_node.services.api.headers import date_now
from distributor_node.services.api.request_log import count_and_log, request_record
from distributor_node.shared.observability.metrics import ABORTED_RESPONSES
from distributor_node.shared.waiting import TurnBudget

RESPONSE_START_TIMEOUT = 60.0
"""Seconds until a response must have started. A last resort: handlers have shorter limits."""
CLIENT_CLOSED_REQUEST = 499
"""Status in log and metrics of a request whose client left before the response started (nginx's 499)."""
_MAX_CHECK_INTERVAL = 5.0
_LOW_WATER, _HIGH_WATER = 16 * 1024, 64 * 1024  # bytes of the transport's write buffer, as Sanic sets them
KEEPALIVE_DRAIN_GRACE = 1.0
"""Seconds after a stop in which an idle connection may send one more request. Its response announces the close.
A request may be in flight, and a client whose connection is just closed cannot know whether it was processed."""


# RFC 9112 section 7.1, with the line break that ends the chunk before.
_CHUNK_LINE = re.compile(rb"\r\n[0-9A-Fa-f]{1,16}(?:[ \t]*;[\t\x20-\x7e]*)?\r\n")
_MAX_CHUNK_LINE = 256
_FREE_CHUNKS, _BYTES_PER_CHUNK = 256, 64  # a body needs 64 bytes per chunk, beyond the free chunks


def end_chunked_head_response(request: Request) -> None:
    """End the response to a HEAD request whose head announced a chunked body.

    Sanic would send the end of the body too.
    """
    http = request.stream
    if isinstance(http, ApiHttp):
        http.response_func = None
        http.stage = Stage.IDLE


async def send_processing(request: Request) -> None:
    """Tell the client that its request is being worked on, before the response begins (102, RFC 2518 section 10.1)."""
    http = request.stream
    if isinstance(http, ApiHttp) and http.stage is Stage.HANDLER and request.version == "1.1":
        await http.protocol.send(b"HTTP/1.1 102 Processing\r\n\r\n")  # type: ignore[no-untyped-call]


class ApiHttp(Http):
    """The requests and responses of one connection: adds the request id, and keeps the record of each request."""

    __slots__ = ("_chunks",)

    def init_for_request(self) -> None:
        """Wait for the next request. While draining, at most KEEPALIVE_DRAIN_GRACE."""
        super().init_for_request()  # type: ignore[no-untyped-call]
        if isinstance(self.protocol, PublicProtocol) and self.protocol.draining:
            self.protocol.allow_last_request()

    async def http1_request_header(self) -> None:
        """Read a head, in a turn of its own. Responses of the fast path do not wait for one.

        Whether the connection persists depends on the tokens of Connection (RFC 9112 section 9.3).
        """
        while not self.recv_buffer:
            await self._receive_more()
        turns: TurnBudget = self.protocol.app.ctx.turns
        await turns.take_whole()
        await super().http1_request_header()  # type: ignore[no-untyped-call]
        request: Request = self.request
        tokens = {
            token.strip().lower()
            for value in request.headers.getall("connection", ())
            for token in value.split(",")
        }
        self.keep_alive = "close" not in tokens and (request.version == "1.1" or "keep-alive" in tokens)
        self._chunks = 0

    async def read(self) -> bytes | None:
        """Read some bytes of the body. Sanic accepts chunk sizes that RFC 9112 does not: `0x5`, ` 5 `, `5` and a CR."""
        framing: Any = self.request_body  # "chunked", or whether there is a body
        if framing == "chunked" and self.request_bytes_left == 0:
            await self._check_chunk_line()
        return await super().read()

    async def _check_chunk_line(self) -> None:
        if self.expecting_continue:
            self.expecting_continue = False
            await self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        while (end := self.recv_buffer.find(b"\r\n", 2)) < 0 and len(self.recv_buffer) <= _MAX_CHUNK_LINE:
            await self._receive_more()
        self._chunks += 1
        allowed = _FREE_CHUNKS + (self.request_bytes or 0) // _BYTES_PER_CHUNK
        if not _CHUNK_LINE.fullmatch(self.recv_buffer, 0, max(0, end + 2)) or self._chunks > allowed:
            self.keep_alive = False
            raise BadRequest("")

    def raw_body(self) -> RawBody | None:
        """The rest of the body that has begun, if it consists of its own bytes and their number was announced."""
        transport = self.protocol.transport
        if transport is None or transport.is_closing() or self.request.version != "1.1":
            return None
        connection = transport.get_extra_info("socket")
        if connection is None or self.response_func != self.http1_response_normal:
            return None
        return RawBody(self, transport, connection.fileno())

    def respond(self, response: BaseHTTPResponse) -> BaseHTTPResponse:
        response = super().respond(response)
        if getattr(self.protocol, "draining", False):
            self.keep_alive = False
        request: Request | None = self.request
        if request is not None:
            response.headers["X-Request-ID"] = request_record(request).request_id
        response.headers["Date"] = date_now()
        return response

    async def error_response(self, exception: BaseException) -> None:
        """Send an error response, unless the client has disconnected."""
        transport = self.protocol.transport
        if self.head_only is None:
            # The head was not parsed completely, so Sanic does not know that no body may follow.
            self.head_only = self.recv_buffer.startswith(b"HEAD ")
        if transport is None or transport.is_closing():
            self.keep_alive = False
            self.stage = Stage.FAILED
            if self.request is not None:
                request_record(self.request).abort_reason = (
                    request_record(self.request).abort_reason or "client_disconnected"
                )
        else:
            await super().error_response(exception)  # type: ignore[arg-type]
            if isinstance(exception, RequestTimeout):
                self.request_body = None  # do not wait for the rest of it
        self.record()

    def abort_response(self, reason: str) -> None:
        """Abort the connection in the middle of a response, so that the client notices."""
        self.keep_alive = False
        self.stage = Stage.FAILED
        self.response_func: Any = None  # discards what Sanic still sends
        if self.request is not None:
            request_record(self.request).abort_reason = reason
        ABORTED_RESPONSES.labels(reason=reason).inc()
        if isinstance(self.protocol, PublicProtocol):
            self.protocol.note_abort(reason)
        if self.protocol.transport is not None:
            self.protocol.transport.abort()

    def record(self) -> None:
        """Count and log the request, once."""
        request: Request | None = self.request
        response: BaseHTTPResponse | None = self.response
        if request is None:
            return
        record = request_record(request)
        if record.recorded:
            return
        record.recorded = True
        headers: Any = response.headers if response is not None else {}
        sent = record.sent
        if sent is None:
            body = getattr(response, "body", None)
            sent = 0 if self.head_only or not body else len(body)
        status = response.status if response is not None else CLIENT_CLOSED_REQUEST
        access_log: AccessLog | None = getattr(request.app.ctx, "access_log", None)
        if access_log is not None:
            access_log.add_request(request, peer_of(self.protocol.transport), status, sent, time())
        count_and_log(
            record,
            status,
            cache=headers.get("X-Cache"),
            source=headers.get("X-Data-Source"),
            sent=sent,
        )


class RawBody:
    """The rest of a body whose bytes may go from a file to the socket itself, past the transport and Sanic.

    The last byte may not: Sanic ends the response with it.
    """

    __slots__ = ("_http", "_socket", "_transport")

    def __init__(self, http: ApiHttp, transport: asyncio.Transport, descriptor: int) -> None:
        """`descriptor`: of the transport's socket."""
        self._http, self._transport, self._socket = http, transport, descriptor
        transport.set_write_buffer_limits(high=0)  # it tells when it is empty

    @property
    def admitted(self) -> int:
        """How many of the next bytes may be sent by `send_file`. None if the connection has ended."""
        return 0 if self._transport.is_closing() else max(0, self._http.response_bytes_left - 1)

    @property
    def is_held_up(self) -> bool:
        """Whether the transport holds earlier bytes, which come first."""
        return self._transport.get_write_buffer_size() > 0

    async def wait_until_empty(self) -> None:
        """Wait until the transport holds nothing, or the connection has ended."""
        await self._http.protocol._can_write.wait()

    def end(self) -> None:
        """Let the transport hold as much as before."""
        if not self._transport.is_closing():
            self._transport.set_write_buffer_limits(low=_LOW_WATER, high=_HIGH_WATER)

    def send_file(self, descriptor: int, offset: int, length: int) -> int:
        """Send bytes of a file, as many as are `admitted`. Returns how many the socket takes now, perhaps none.

        An error is not raised: it is met again by the call that sends these bytes another way.
        """
        # Asked again: the descriptor of a connection that has ended may be that of another one.
        if self._transport.is_closing() or self._transport.get_write_buffer_size():
            return 0
        try:
            sent = os.sendfile(self._socket, descriptor, offset, length)
        except OSError:
            return 0
        self._http.response_bytes_left -= sent
        return sent


def came_to_peer_port(request: Request) -> bool:
    """Whether the request came to the port for the other nodes of the fleet."""
    http = request.stream
    return isinstance(http, ApiHttp) and getattr(http.protocol, "for_peers", False)


def peer_of(transport: asyncio.BaseTransport | None) -> str:
    """Return the address of a connection; empty for a Unix socket, or one that has ended."""
    peername = transport.get_extra_info("peername") if transport is not None else None
    return str(peername[0]) if isinstance(peername, tuple) else ""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Timeouts of a connection, in seconds, each enforced up to a quarter late."""

    request: float  # for a whole head, however slowly it arrives
    response: float  # for a response that the client does not read
    keep_alive: float  # for an idle connection
    check_interval: float  # from one look at the connection to the next

    @classmethod
    def of(cls, application: Sanic[Any, Any]) -> Self:
        """Return those of its configuration."""
        config = application.config
        timeouts = (config.REQUEST_TIMEOUT, config.RESPONSE_TIMEOUT, config.KEEP_ALIVE_TIMEOUT)
        return cls(*timeouts, max(0.02, min(_MAX_CHECK_INTERVAL, min(timeouts) / 4)))


class PublicProtocol(HttpProtocol):
    """A connection with timeouts. Sanic counts them from the last call of `send`. That aborts a paused player, and lets
    a slow head live for ever.

    Sanic's part of the connection, with its task, begins with the first bytes that are for it (`_begin`). It costs two
    fifths of what a new connection costs, and most clients ask for hits alone.
    """

    HTTP_CLASS = ApiHttp
    for_peers = False  # whether this is the port for the other nodes of the fleet
    __slots__ = (
        "_abort_reason",
        "_half_closed",
        "_since",
        "_slow_clients",
        "_timeouts",
        "_watched",
        "draining",
    )  # Sanic's metaclass leaves no __dict__

    def __init__(
        self,
        connection: socket.socket,
        *,
        loop: asyncio.AbstractEventLoop,
        app: Sanic[Any, Any],
        connections: set[Any],
        timeouts: Timeouts,
    ) -> None:
        """`connection`: the accepted socket, which the transport closes. `connections`: has this one while it is open.

        Sanic's own initialisation follows in `_begin`. Until then, only the attributes set here are there.
        """
        self.loop, self.app, self.connections = loop, app, connections
        self.transport: Any = None
        self.conn_info: ConnInfo | None = None
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._task: asyncio.Task[None] | None = None
        self._time = 0.0
        self._http: ApiHttp | None = None  # until Sanic's task has started; the client may leave before
        self._callback_check_timeouts: Any = None
        self._abort_reason: str | None = None
        self._half_closed = False  # the client has sent all its requests
        self._watched: tuple[object, ...] = ()
        self._since = 0.0
        self._slow_clients: SlowClients | None = getattr(app.ctx, "slow_clients", None)
        self._timeouts = timeouts
        self.draining = False

    def check_timeouts(self) -> None:
        """Enforce the timeouts. Reschedules itself until the connection ends."""
        self._callback_check_timeouts = None
        http = self._http
        if self.transport is None or self.transport.is_closing():
            return
        now = monotonic()
        unsent = self._unsent()
        watched = (Stage.IDLE if http is None else http.stage, self._progress(), unsent)
        if watched != self._watched:
            self._watched, self._since = watched, now
        if self._slow_clients is not None:
            self._slow_clients.observe(self, unsent, now)
        if not self._enforce_timeouts(http, now - self._since, now - self._time, unsent):
            self._check_later()

    def _check_later(self) -> None:
        self._callback_check_timeouts = self.loop.call_later(
            self._timeouts.check_interval, self.check_timeouts
        )

    def _can_bypass(self) -> bool:
        """Whether Sanic waits for the first byte of a request and no write is pending."""
        http, transport = self._http, self.transport
        if transport is None or self.recv_buffer or self.draining:
            return False
        if http is not None and not (
            http.stage is Stage.IDLE and getattr(http, "request", None) is None and http.keep_alive
        ):
            return False
        return not transport.is_closing() and not transport.get_write_buffer_size()

    def _progress(self) -> object:
        """Return a value that changes with progress, in addition to stage and unsent bytes.

        What a client reads of a streamed body is replaced at once. So as many bytes may be unsent at each look at a
        client that reads all the time.
        """
        if self._http is None:
            return None
        request: Request | None = getattr(self._http, "request", None)
        return self.state["requests_count"], None if request is None else request_record(request).sent

    def connection_made(self, transport: Any) -> None:
        """Does what Sanic's does, but for the task and its description of the connection: see `_begin`."""
        transport.set_write_buffer_limits(low=_LOW_WATER, high=_HIGH_WATER)
        self.transport = transport
        self.recv_buffer = bytearray()
        self._time = monotonic()
        self.connections.add(self)
        self._check_later()

    def data_received(self, data: bytes) -> None:
        if self.conn_info is None:
            self._begin()
        super().data_received(data)

    def _begin(self) -> None:
        """Let Sanic serve the connection. It is described from now on."""
        kept = self.transport, self._can_write, self._callback_check_timeouts
        super().__init__(loop=self.loop, app=self.app, connections=self.connections)
        self.transport, self._can_write, self._callback_check_timeouts = kept
        self.conn_info = ConnInfo(self.transport)
        self._task = self.loop.create_task(self.connection_task())  # type: ignore[no-untyped-call]

    def _setup_connection(self) -> None:
        """The first step of Sanic's task. Sanic's own checks the timeouts too, which is under way here."""
        self._http = ApiHttp(self)  # type: ignore[no-untyped-call]
        self._time = monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._slow_clients is not None:
            self._slow_clients.forget(self)
        if self._callback_check_timeouts is not None:
            self._callback_check_timeouts.cancel()
        if self.conn_info is not None:
            super().connection_lost(exc)  # type: ignore[no-untyped-call]
        else:
            self.connections.discard(self)
            self.resume_writing()  # type: ignore[no-untyped-call]

    def eof_received(self) -> bool:
        """Answer what the client has asked for before it closed its side. Idle connections are closed.

        A client that has closed both sides looks the same. It is noticed by the first write.
        """
        self._half_closed = True
        if self.conn_info is not None:
            self._data_received.set()
        if not self._is_idle():
            return True
        if self.transport is not None and self.transport.get_write_buffer_size():
            # The transport alone would wait without a limit for a client that does not take the end of its response.
            self.close()
        return False

    async def receive_more(self) -> None:
        """Wait for more bytes. Raises CancelledError if none will come: the connection has ended or is half-closed."""
        received = len(self.recv_buffer)
        if self.transport is not None and not self._half_closed:
            await super().receive_more()  # type: ignore[no-untyped-call]
        if self.transport is not None and (len(self.recv_buffer) > received or not self._half_closed):
            return
        if self._http is not None:
            self._http.exception = BadRequest("")  # of a request that was not sent completely
        raise asyncio.CancelledError

    def abort(self) -> None:
        """Abort the connection."""
        super().abort()  # type: ignore[no-untyped-call]

    def note_abort(self, reason: str) -> None:
        """Note the reason why the current response is being aborted."""
        self._abort_reason = reason

    def abort_response(self, reason: str) -> None:
        """Abort the connection in the middle of a response, so that the client notices."""
        if self._http is not None:
            self._http.abort_response(reason)
            return
        self.note_abort(reason)
        ABORTED_RESPONSES.labels(reason=reason).inc()
        self.abort()

    def _enforce_timeouts(self, http: ApiHttp | None, unchanged: float, silent: float, unsent: int) -> bool:
        """Return whether a timeout has ended the connection.

        `http`: None until Sanic's task has begun. `unchanged`: seconds in this stage without progress. `silent`:
        seconds since the last byte in either direction.
        """
        if unsent:
            if unchanged > self._timeouts.response:
                self.abort_response("client_stalled")
                return True
        elif http is None or http.stage is Stage.IDLE:
            if silent > self._timeouts.keep_alive:
                return self._cancel()
        elif http.stage is Stage.REQUEST or (http.stage is Stage.HANDLER and http.request_body):
            if unchanged > self._timeouts.request:
                http.exception = RequestTimeout("")
                return self._cancel()
        elif http.stage is Stage.HANDLER and unchanged > RESPONSE_START_TIMEOUT:
            http.exception = ServiceUnavailable("")
            return self._cancel()
        return False

    def _cancel(self) -> bool:
        if self._task is not None:
            self._task.cancel()
        else:
            self.close()
        return True

    def _unsent(self) -> int:
        """Return the number of bytes that the client has not acknowledged, those in the kernel included."""
        if self.transport is None or self.transport.is_closing():
            return 0
        waiting: int = self.transport.get_write_buffer_size()
        connection = self.transport.get_extra_info("socket")
        if connection is None:
            return waiting
        try:
            queued = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, struct.pack("i", 0))
        except OSError:
            return waiting
        return waiting + int(struct.unpack("i", queued)[0])

    def acknowledged(self) -> int | None:
        """Return the number of bytes that the client has acknowledged since it connected. None: unknown."""
        connection = None if self.transport is None else self.transport.get_extra_info("socket")
        return None if connection is None else bytes_acknowledged(connection)

    @property
    def task(self) -> asyncio.Task[None] | None:
        """The task that serves this connection."""
        return self._task

    def start_draining(self) -> None:
        """Close after the current response.

        If its head has announced keep-alive, or if there is no current response, the client may send one more request.
        """
        self.draining = (
            True  # applied when a response starts: Sanic resets keep_alive with each head that it reads
        )
        http = self._http
        if self._is_idle():
            self.allow_last_request()
        elif http is not None and http.stage is not Stage.RESPONSE:
            http.keep_alive = False

    def allow_last_request(self) -> None:
        """Close the connection unless a request arrives within KEEPALIVE_DRAIN_GRACE.

        The grace is extended while the client is still receiving the last response.
        """
        self.loop.call_later(KEEPALIVE_DRAIN_GRACE, self._close_if_idle)

    def _is_idle(self) -> bool:
        """Whether there is neither a request nor a response in progress."""
        return (self._http is None or self._http.stage is Stage.IDLE) and not self.recv_buffer

    def _close_if_idle(self) -> None:
        if not self._is_idle():
            return
        if self._unsent():
            self.allow_last_request()
        else:
            self.close()

    def close_now(self) -> bool:
        """Close at once. Returns whether that aborts a response."""
        transport = self.transport
        if transport is None:
            return False
        if self._is_idle() and not transport.get_write_buffer_size():
            transport.abort()
            return False
        self.abort_response("shutdown")
        return True
