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

from services.api.assets.reading import peek_cached
from services.api.fast_lane.body_sender import (
    SENDFILE_CHUNK,
    Connection,
    FileSender,
    TruncatedFile,
    send_file,
)
from services.api.fast_lane.lane import FastPath, PreparedResponse
from services.api.protocol import ApiHttp, PublicProtocol
from shared.observability.metrics import ABORTED_RESPONSES, REQUESTS_IN_PROGRESS

_MAX_BUFFERED = 64 * 1024
"""Bytes a client may send ahead while it is sent a long body; then it is not read from."""
_PAGE_SIZE = 4096

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Transfer:
    """A body that is sent in a task. `request`: what the client asked, for Sanic's path if nothing could be sent; empty
    once something was said."""

    fast_path: FastPath
    prepared: PreparedResponse
    sender: FileSender
    request: bytes = b""


class FastPathProtocol(PublicProtocol):
    """Answers simple requests for cached objects itself, and hands everything else to Sanic unchanged.

    It writes only while Sanic waits for a request's first byte and nothing written before is on its way; what
    arrives while a long body is sent is kept until that has ended. Time limits are those of PublicProtocol, which
    sees every byte.
    """

    __slots__ = ("_buffered", "_fast_path", "_socket", "_transfer", "_transfer_task")

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self._fast_path: FastPath | None = getattr(self.app.ctx, "fast_path", None)
        self._socket: socket.socket | None = None
        self._transfer: _Transfer | None = None
        self._transfer_task: asyncio.Task[None] | None = None
        self._buffered = bytearray()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if self._fast_path is not None and connection is not None:
            # Another name for the transport's own socket, never closed here: it offers what transports do not.
            self._socket = socket.socket(
                connection.family, socket.SOCK_STREAM, connection.proto, fileno=connection.fileno()
            )

    def connection_lost(self, exc: Exception | None) -> None:
        if self._socket is not None:
            self._socket.detach()
            self._socket = None
        if self._transfer_task is not None:
            self._transfer_task.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._transfer is not None:
            self._buffer(data)
        elif not self._can_bypass() or not self._respond(data):
            super().data_received(data)

    def _can_bypass(self) -> bool:
        """Whether nothing is under way on this connection."""
        http, transport = self._http, self.transport
        if self._socket is None or transport is None or self.recv_buffer or self.draining:
            return False
        if http is not None and not (
            http.stage is Stage.IDLE and getattr(http, "request", None) is None and http.keep_alive
        ):
            return False
        return not transport.is_closing() and not transport.get_write_buffer_size()

    def _respond(self, data: bytes) -> bool:
        fast_path, transport = self._fast_path, self.transport
        now = monotonic()
        prepared = fast_path.prepare(data, now) if fast_path is not None else None
        if fast_path is None or prepared is None or transport is None or self._socket is None:
            return False
        self._time = now
        body, first, length = prepared.cached.body, prepared.first, prepared.length
        if not length:
            transport.write(prepared.head)
        elif body is not None:
            transport.write(prepared.head + (body if length == len(body) else body[first : first + length]))
        else:
            self._send_file(fast_path, prepared, self._socket, data)
            return True
        fast_path.record(prepared, length, perf_counter() - prepared.started)
        return True

    def _send_file(
        self, fast_path: FastPath, prepared: PreparedResponse, connection: socket.socket, data: bytes
    ) -> None:
        """The head and as much of the file as the socket takes now; the rest in a task."""
        cached, head, length, sent = prepared.cached, prepared.head, prepared.length, 0
        # A body that begins within a page takes one page more than a segment holds, and the kernel then works half as
        # long again: what lies before the next page goes with the head, and the file from there. Should it have left
        # memory just now, all of it is sent as it lies.
        unaligned = peek_cached(cached.descriptor, prepared.first, min(-prepared.first % _PAGE_SIZE, length))
        if not cached.is_resident(prepared.first, length, self._time, first_resident=bool(unaligned)):
            sender = FileSender(cached, prepared.first, length, fast_path.accesses)
            self._start_transfer(
                _Transfer(fast_path, prepared, sender, data), sender.send_from_disk(self._connection(), head)
            )
            return
        flags = socket.MSG_MORE if unaligned is not None and len(unaligned) < length else 0
        try:
            accepted = (
                connection.sendmsg((head, unaligned), (), flags)
                if unaligned
                else connection.send(head, flags)
            )
            head, sent = head[accepted:], max(0, accepted - len(head))
            if not head and sent < length:
                sent += send_file(
                    cached, connection.fileno(), prepared.first + sent, min(length - sent, SENDFILE_CHUNK)
                )
        except BlockingIOError:
            pass
        except (OSError, TruncatedFile) as error:
            fast_path.record(prepared, 0, 0.0, self._abort_on_error(error))
            return
        if sent == length:
            fast_path.record(prepared, length, perf_counter() - prepared.started)
        else:
            sender = FileSender(cached, prepared.first, length, fast_path.accesses, sent)
            self._start_transfer(
                _Transfer(fast_path, prepared, sender), sender.send(self._connection(), head)
            )

    def _connection(self) -> Connection:
        if self.transport is None or self._socket is None:
            raise ConnectionResetError(errno.ECONNRESET, "the client has left")
        return Connection(self.transport, self._can_write, self._socket.fileno())

    def _start_transfer(self, transfer: _Transfer, work: Coroutine[Any, Any, None]) -> None:
        # Here, not in the task: until that has its first turn, other connections could have the file closed
        transfer.prepared.cached.begin_send()
        REQUESTS_IN_PROGRESS.inc()
        self._transfer = transfer
        self._transfer_task = task = asyncio.create_task(work, name="asset-body")
        task.add_done_callback(partial(self._on_transfer_ended, transfer))
        transfer.fast_path.track(task)

    def _on_transfer_ended(self, transfer: _Transfer, task: asyncio.Task[None]) -> None:
        """The body has ended, well or not; called for a task that was cancelled before it began, too."""
        transfer.prepared.cached.end_send()
        REQUESTS_IN_PROGRESS.dec()
        self._transfer = self._transfer_task = None
        self._time = monotonic()
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        sender = transfer.sender
        if isinstance(error, TruncatedFile) and transfer.request and not sender.started:
            # Nothing has been said to the client: Sanic's path finds out what is wrong
            self._resume_reading(transfer.request)
            return
        abort_reason = self._abort_on_error(error) if error is not None else None
        transfer.fast_path.record(
            transfer.prepared, sender.sent, sender.started_at - transfer.prepared.started, abort_reason
        )
        if abort_reason is None:
            self._resume_reading(b"")

    def _abort_on_error(self, error: BaseException) -> str:
        """End the connection in the middle of an answer; the reason why."""
        if isinstance(error, asyncio.CancelledError | OSError):
            reason: str | None = self._abort_reason
            if reason is None:
                reason = "client_disconnected"
                ABORTED_RESPONSES.labels(reason=reason).inc()
            self.abort()
            return reason
        reason = "object_unreadable"
        if not isinstance(error, TruncatedFile):
            reason = "unexpected_error"
            logger.error("response_failed", exc_info=error)
        self.abort_response(reason)
        return reason

    def _buffer(self, data: bytes) -> None:
        self._buffered += data
        if len(self._buffered) > _MAX_BUFFERED and self.transport is not None:
            self.transport.pause_reading()

    def _resume_reading(self, unread: bytes) -> None:
        """What came during a long answer is next."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        buffered, self._buffered = unread + bytes(self._buffered), bytearray()
        if unread:
            super().data_received(buffered)
        elif buffered:
            self.data_received(buffered)
        elif self.draining:
            self.allow_last_request()
        transport.resume_reading()

    def _progress(self) -> object:
        return super()._progress(), self._transfer.sender.sent if self._transfer is not None else 0

    def _enforce_timeouts(self, http: ApiHttp, unchanged: float, silent: float, unsent: int) -> bool:
        # While a body is sent the connection is not idle, whatever Sanic believes
        return super()._enforce_timeouts(
            http, unchanged, 0.0 if self._transfer is not None else silent, unsent
        )

    def start_draining(self) -> None:
        if self._transfer is not None:
            self.draining = True
        else:
            super().start_draining()

    def _is_idle(self) -> bool:
        return self._transfer is None and super()._is_idle()
