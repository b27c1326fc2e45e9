"""The connection that looks at what arrives before Sanic does."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from time import monotonic, perf_counter
from typing import Any

import structlog
from sanic.http import Stage

from services.api.assets.reading import borrow_cached
from services.api.fast_lane.body_sender import AT_ONCE, BodySender, Connection, FileShort, send_file
from services.api.fast_lane.lane import FastLane, ReadyAnswer
from services.api.protocol import ApiHttp, PublicProtocol
from shared.observability.metrics import ABORTED_RESPONSES, REQUESTS_IN_PROGRESS

_MOST_KEPT = 64 * 1024
"""Bytes a client may send ahead while it is sent a long body; then it is not read from."""
_PAGE = 4096

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Sending:
    """A body that is sent in a task. `request`: what the client asked, for Sanic's lane if nothing could be sent; empty
    once something was said."""

    lane: FastLane
    ready: ReadyAnswer
    sender: BodySender
    request: bytes = b""


class FastLaneProtocol(PublicProtocol):
    """Answers simple requests for cached objects itself, and hands everything else to Sanic unchanged.

    It writes only while Sanic waits for a request's first byte and nothing written before is on its way; what
    arrives while a long body is sent is kept until that has ended. Time limits are those of PublicProtocol, which
    sees every byte.
    """

    __slots__ = ("_kept", "_lane", "_sending", "_socket", "_task_sending")

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self._lane: FastLane | None = getattr(self.app.ctx, "fast_lane", None)
        self._socket: socket.socket | None = None
        self._sending: _Sending | None = None
        self._task_sending: asyncio.Task[None] | None = None
        self._kept = bytearray()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if self._lane is not None and connection is not None:
            # Another name for the transport's own socket, never closed here: it offers what transports do not.
            self._socket = socket.socket(
                connection.family, socket.SOCK_STREAM, connection.proto, fileno=connection.fileno()
            )

    def connection_lost(self, exc: Exception | None) -> None:
        if self._socket is not None:
            self._socket.detach()
            self._socket = None
        if self._task_sending is not None:
            self._task_sending.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._sending is not None:
            self._keep(data)
        elif not self._is_ours() or not self._answer(data):
            super().data_received(data)

    def _is_ours(self) -> bool:
        """Whether nothing is under way on this connection."""
        http, transport = self._http, self.transport
        if self._socket is None or transport is None or self.recv_buffer or self.draining:
            return False
        if http is not None and not (
            http.stage is Stage.IDLE and getattr(http, "request", None) is None and http.keep_alive
        ):
            return False
        return not transport.is_closing() and not transport.get_write_buffer_size()

    def _answer(self, data: bytes) -> bool:
        lane, transport = self._lane, self.transport
        now = monotonic()
        ready = lane.prepare(data, now) if lane is not None else None
        if lane is None or ready is None or transport is None or self._socket is None:
            return False
        self._time = now
        body, first, length = ready.hot.body, ready.first, ready.length
        if not length:
            transport.write(ready.head)
        elif body is not None:
            transport.write(ready.head + (body if length == len(body) else body[first : first + length]))
        else:
            self._send_file(lane, ready, self._socket, data)
            return True
        lane.record(ready, length, perf_counter() - ready.started)
        return True

    def _send_file(self, lane: FastLane, ready: ReadyAnswer, connection: socket.socket, data: bytes) -> None:
        """The head and as much of the file as the socket takes now; the rest in a task."""
        hot, head, length, sent = ready.hot, ready.head, ready.length, 0
        # A body that begins within a page takes one page more than a segment holds, and the kernel then works half as
        # long again: what lies before the next page goes with the head, and the file from there. Should it have left
        # memory just now, all of it is sent as it lies.
        edge = borrow_cached(hot.descriptor, ready.first, min(-ready.first % _PAGE, length))
        if not hot.is_near(ready.first, length, self._time, first_is=bool(edge)):
            sender = BodySender(hot, ready.first, length, lane.accesses)
            self._send_later(
                _Sending(lane, ready, sender, data), sender.send_from_disk(self._far_end(), head)
            )
            return
        together = socket.MSG_MORE if edge is not None and len(edge) < length else 0
        try:
            taken = (
                connection.sendmsg((head, edge), (), together) if edge else connection.send(head, together)
            )
            head, sent = head[taken:], max(0, taken - len(head))
            if not head and sent < length:
                sent += send_file(hot, connection.fileno(), ready.first + sent, min(length - sent, AT_ONCE))
        except BlockingIOError:
            pass
        except (OSError, FileShort) as error:
            lane.record(ready, 0, 0.0, self._end(error))
            return
        if sent == length:
            lane.record(ready, length, perf_counter() - ready.started)
        else:
            sender = BodySender(hot, ready.first, length, lane.accesses, sent)
            self._send_later(_Sending(lane, ready, sender), sender.send(self._far_end(), head))

    def _far_end(self) -> Connection:
        if self.transport is None or self._socket is None:
            raise ConnectionResetError(errno.ECONNRESET, "the client has left")
        return Connection(self.transport, self._can_write, self._socket.fileno())

    def _send_later(self, sending: _Sending, work: Coroutine[Any, Any, None]) -> None:
        # Here, not in the task: until that has its first turn, other connections could have the file closed
        sending.ready.hot.begin_send()
        REQUESTS_IN_PROGRESS.inc()
        self._sending = sending
        self._task_sending = task = asyncio.create_task(work, name="asset-body")
        task.add_done_callback(partial(self._sent, sending))
        sending.lane.own(task)

    def _sent(self, sending: _Sending, task: asyncio.Task[None]) -> None:
        """The body has ended, well or not; called for a task that was cancelled before it began, too."""
        sending.ready.hot.end_send()
        REQUESTS_IN_PROGRESS.dec()
        self._sending = self._task_sending = None
        self._time = monotonic()
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        sender = sending.sender
        if isinstance(error, FileShort) and sending.request and not sender.begun:
            # Nothing has been said to the client: Sanic's lane finds out what is wrong
            self._go_on(sending.request)
            return
        abort_reason = self._end(error) if error is not None else None
        sending.lane.record(sending.ready, sender.sent, sender.began_at - sending.ready.started, abort_reason)
        if abort_reason is None:
            self._go_on(b"")

    def _end(self, error: BaseException) -> str:
        """End the connection in the middle of an answer; the reason why."""
        if isinstance(error, asyncio.CancelledError | OSError):
            reason: str | None = self._abort_reason
            if reason is None:
                reason = "client_disconnected"
                ABORTED_RESPONSES.labels(reason=reason).inc()
            self.abort()
            return reason
        reason = "object_unreadable"
        if not isinstance(error, FileShort):
            reason = "unexpected_error"
            logger.error("response_failed", exc_info=error)
        self.abort_response(reason)
        return reason

    def _keep(self, data: bytes) -> None:
        self._kept += data
        if len(self._kept) > _MOST_KEPT and self.transport is not None:
            self.transport.pause_reading()

    def _go_on(self, unread: bytes) -> None:
        """What came during a long answer is next."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        kept, self._kept = unread + bytes(self._kept), bytearray()
        if unread:
            super().data_received(kept)
        elif kept:
            self.data_received(kept)
        elif self.draining:
            self.allow_last_request()
        transport.resume_reading()

    def _progress(self) -> object:
        return super()._progress(), self._sending.sender.sent if self._sending is not None else 0

    def _enforce_timeouts(self, http: ApiHttp, unchanged: float, silent: float, unsent: int) -> bool:
        # While a body is sent the connection is not idle, whatever Sanic believes
        return super()._enforce_timeouts(
            http, unchanged, 0.0 if self._sending is not None else silent, unsent
        )

    def start_draining(self) -> None:
        if self._sending is not None:
            self.draining = True
        else:
            super().start_draining()

    def _is_idle(self) -> bool:
        return self._sending is None and super()._is_idle()
