"""Sanic's HTTP/1.1 protocol with our own ideas of time, ends and records."""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from time import monotonic
from typing import Any

from sanic import Request
from sanic.exceptions import RequestTimeout, ServiceUnavailable
from sanic.http import Http, Stage
from sanic.response import BaseHTTPResponse
from sanic.server import HttpProtocol

from distributor_node.services.api.headers import date_now
from distributor_node.services.api.request_log import count_and_log, request_record
from distributor_node.shared.observability.metrics import ABORTED_RESPONSES

RESPONSE_START_TIMEOUT = 60.0
"""Seconds until an answer has begun, at most: a backstop, handlers have shorter limits of their own."""
CLIENT_CLOSED_REQUEST = 499
"""Status in log and metrics of a request whose client left before the answer began."""
_MAX_CHECK_INTERVAL = 5.0
KEEPALIVE_DRAIN_GRACE = 1.0
"""Seconds at a stop in which an idle connection may bring one more request, and is told with the answer that it ends.
The request may be on its way: a client that finds the connection closed instead cannot know whether it was heard."""


class ApiHttp(Http):
    """One connection's requests and answers: adds the request id, and keeps the record of each request."""

    def init_for_request(self) -> None:
        """Begin to wait for a request: at a stop not for long."""
        super().init_for_request()  # type: ignore[no-untyped-call]
        if isinstance(self.protocol, PublicProtocol) and self.protocol.draining:
            self.protocol.allow_last_request()

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
        """Answer an exception, unless nobody is there to read the answer."""
        transport = self.protocol.transport
        if self.head_only is None:
            # The head could not be read to its end: Sanic would not know that no body may follow
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
                self.request_body = None  # the rest of it is not waited for
        self.record()

    def abort_response(self, reason: str) -> None:
        """End the connection in the middle of an answer, so that the client notices."""
        self.keep_alive = False
        self.stage = Stage.FAILED
        self.response_func: Any = None  # what Sanic still wants to send goes nowhere
        if self.request is not None:
            request_record(self.request).abort_reason = reason
        ABORTED_RESPONSES.labels(reason=reason).inc()
        if isinstance(self.protocol, PublicProtocol):
            self.protocol.note_abort(reason)
        if self.protocol.transport is not None:
            self.protocol.transport.abort()

    def record(self) -> None:
        """Count and log the record, once."""
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
        count_and_log(
            record,
            response.status if response is not None else CLIENT_CLOSED_REQUEST,
            cache=headers.get("X-Cache"),
            source=headers.get("X-Data-Source"),
            sent=sent,
        )


class PublicProtocol(HttpProtocol):
    """Time limits: a whole head within `request_timeout` however it drips; an answer that the client does not take
    within `response_timeout`; an idle connection `keep_alive_timeout`. All in seconds, seen within a quarter more.

    Sanic counts from the last call of `send`, which cuts a paused player and lets a dripping head live for ever.
    """

    HTTP_CLASS = ApiHttp
    __slots__ = (
        "_abort_reason",
        "_check_interval",
        "_since",
        "_watched",
        "draining",
    )  # without, Sanic's metaclass leaves no room for any

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self._http = None  # until Sanic's task has begun; the client or a stop may be quicker
        self._abort_reason: str | None = None
        self._watched: tuple[object, ...] = ()
        self._since = 0.0
        self.draining = False
        self._check_interval = min(
            _MAX_CHECK_INTERVAL,
            self.keep_alive_timeout / 4,
            self.request_timeout / 4,
            self.response_timeout / 4,
        )

    def check_timeouts(self) -> None:
        """Runs itself, from the first request's wait until the connection ends."""
        self._callback_check_timeouts = None
        http = self._http
        if self._task is None or http is None or self.transport is None:
            return
        now = monotonic()
        unsent = self._unsent()
        watched = (http.stage, self._progress(), unsent)
        if watched != self._watched:
            self._watched, self._since = watched, now
        if not self._enforce_timeouts(http, now - self._since, now - self._time, unsent):
            self._callback_check_timeouts = self.loop.call_later(
                max(0.02, self._check_interval), self.check_timeouts
            )

    def _progress(self) -> object:
        """Changes when this connection gets on, beside stage and unsent bytes."""
        return self.state["requests_count"]

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)  # type: ignore[no-untyped-call]

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)  # type: ignore[no-untyped-call]

    def abort(self) -> None:
        """End the connection at once."""
        super().abort()  # type: ignore[no-untyped-call]

    def note_abort(self, reason: str) -> None:
        """The answer under way is being cut."""
        self._abort_reason = reason

    def abort_response(self, reason: str) -> None:
        """End the connection in the middle of an answer, so that the client notices."""
        if self._http is not None:
            self._http.abort_response(reason)
            return
        self.note_abort(reason)
        ABORTED_RESPONSES.labels(reason=reason).inc()
        self.abort()

    def _enforce_timeouts(self, http: ApiHttp, unchanged: float, silent: float, unsent: int) -> bool:
        """`unchanged`: seconds in this stage without progress; `silent`: since the last byte either way."""
        if unsent:
            if unchanged > self.response_timeout:
                http.abort_response("client_stalled")
                return True
        elif http.stage is Stage.IDLE:
            if silent > self.keep_alive_timeout:
                return self._cancel()
        elif http.stage is Stage.REQUEST or (http.stage is Stage.HANDLER and http.request_body):
            if unchanged > self.request_timeout:
                http.exception = RequestTimeout("")
                return self._cancel()
        elif http.stage is Stage.HANDLER and unchanged > RESPONSE_START_TIMEOUT:
            http.exception = ServiceUnavailable("")
            return self._cancel()
        return False

    def _cancel(self) -> bool:
        if self._task is not None:
            self._task.cancel()
        return True

    def _unsent(self) -> int:
        """Bytes that the client has not taken yet, those in the kernel included."""
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

    @property
    def task(self) -> asyncio.Task[None] | None:
        """What runs this connection."""
        return self._task

    def start_draining(self) -> None:
        """Close once the answer under way has ended. If its head says that the connection stays, or if none is under
        way, there may be one request more."""
        self.draining = True  # when the answer begins: Sanic forgets it with each head that it reads
        http = self._http
        if self._is_idle():
            self.allow_last_request()
        elif http is not None and http.stage is not Stage.RESPONSE:
            http.keep_alive = False

    def allow_last_request(self) -> None:
        """Close the connection unless it brings a request within a moment. Who still receives has not asked yet."""
        self.loop.call_later(KEEPALIVE_DRAIN_GRACE, self._close_if_idle)

    def _is_idle(self) -> bool:
        """Whether nothing is asked or answered."""
        return (self._http is None or self._http.stage is Stage.IDLE) and not self.recv_buffer

    def _close_if_idle(self) -> None:
        if not self._is_idle():
            return
        if self._unsent():
            self.allow_last_request()
        else:
            self.close()

    def close_now(self) -> bool:
        """Close at once; True if that cuts an answer."""
        transport = self.transport
        if transport is None:
            return False
        if self._is_idle() and not transport.get_write_buffer_size():
            transport.abort()
            return False
        self.abort_response("shutdown")
        return True
