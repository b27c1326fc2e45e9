"""Connection of the fast path: inspects received bytes before Sanic, and sends bodies with sendfile."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from time import monotonic, perf_counter
from typing import Any

import structlog

from distributor_node.services.api.accesses import AccessCounter, AccessRenewal
from distributor_node.services.api.assets.response import (
    PAGE_SIZE,
    is_cached,
    load_into_cache,
    peek_cached,
    read_chunk,
)
from distributor_node.services.api.fast_path.handler import FastPath, PreparedResponse
from distributor_node.services.api.fast_path.object_cache import BLOCKED_SECONDS, CachedObject
from distributor_node.services.api.protocol import ApiHttp, PublicProtocol, peer_of
from distributor_node.shared.domain.peers import HOP_HEADER
from distributor_node.shared.observability.metrics import ABORTED_RESPONSES, REQUESTS_IN_PROGRESS

_MAX_BUFFERED = 64 * 1024
"""Bytes that a client may send ahead during a long response. Reading is paused beyond that."""
_NOTHING = memoryview(b"")

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Transfer:
    """A body that is sent in a task."""

    fast_path: FastPath
    prepared: PreparedResponse
    sender: FileSender
    request: bytes = (
        b""  # the received bytes, for Sanic if nothing can be sent; empty if something has been sent
    )


class FastPathProtocol(PublicProtocol):
    """Responds to simple requests for cached objects itself, and passes everything else to Sanic unchanged.

    It writes only while Sanic waits for the first byte of a request and no earlier write is pending. What arrives while
    a long body is sent is buffered until its end. PublicProtocol enforces the timeouts.
    """

    __slots__ = ("_buffered", "_fast_path", "_peer", "_socket", "_transfer", "_transfer_task")

    def __init__(self, connection: socket.socket, **named: Any) -> None:
        super().__init__(connection, **named)
        self._fast_path: FastPath | None = getattr(self.app.ctx, "fast_path", None)
        # The socket itself, for calls that transports do not offer. The transport closes it.
        self._socket: socket.socket | None = connection if self._fast_path is not None else None
        self._transfer: _Transfer | None = None
        self._transfer_task: asyncio.Task[None] | None = None
        self._buffered = bytearray()
        self._peer = ""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self._fast_path is not None and self._fast_path.needs_peer:
            self._peer = peer_of(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._socket = None
        if self._transfer_task is not None:
            self._transfer_task.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._transfer is not None:
            self._buffer(data)
        elif self._socket is None or not self._can_bypass() or not self._respond(data):
            super().data_received(data)

    def _respond(self, data: bytes) -> bool:
        fast_path, transport = self._fast_path, self.transport
        now = monotonic()
        prepared = fast_path.prepare(data, now) if fast_path is not None else None
        if fast_path is None or prepared is None or transport is None or self._socket is None:
            return False
        self._time = now
        body, first, length = prepared.cached.body, prepared.first, prepared.length
        if not length:
            response = prepared.head
        elif body is not None:
            response = prepared.head + (body if length == len(body) else body[first : first + length])
        else:
            self._send_file(fast_path, prepared, self._socket, data)
            return True
        # To the socket itself: the transport keeps what it is given until the end of the loop's turn, which costs more.
        try:
            accepted = self._socket.send(response)
        except BlockingIOError:
            accepted = 0
        except OSError as error:
            fast_path.record(prepared, 0, 0.0, self._abort_on_error(error), self._peer)
            return True
        if accepted < len(response):
            transport.write(response[accepted:])
        fast_path.record(prepared, length, perf_counter() - prepared.started, peer=self._peer)
        return True

    def _send_file(
        self, fast_path: FastPath, prepared: PreparedResponse, connection: socket.socket, data: bytes
    ) -> None:
        """Send the head and as much of the file as the socket takes now. The rest is sent in a task."""
        cached, head, length, sent = prepared.cached, prepared.head, prepared.length, 0
        # An unaligned sendfile needs one page more per segment and costs about 50 % more CPU. Send the bytes up to the
        # page boundary with the head, then sendfile from there. If they are not in memory, send everything unaligned.
        before_page = -prepared.first % PAGE_SIZE
        unaligned = (
            peek_cached(cached.descriptor, prepared.first, min(before_page, length))
            if before_page
            else _NOTHING
        )
        objects = fast_path.objects
        if self._time >= cached.resident_until and not cached.is_resident(
            prepared.first, length, self._time, objects.resident_seconds, first_resident=bool(unaligned)
        ):
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
            fast_path.record(prepared, 0, 0.0, self._abort_on_error(error), self._peer)
            return
        seconds = perf_counter() - prepared.started
        if seconds > BLOCKED_SECONDS:
            objects.note_blocked(seconds, self._time)
        if sent == length:
            fast_path.record(prepared, length, seconds, peer=self._peer)
        else:
            sender = FileSender(cached, prepared.first, length, fast_path.accesses, sent)
            self._start_transfer(
                _Transfer(fast_path, prepared, sender), sender.send(self._connection(), head)
            )

    def _connection(self) -> Connection:
        if self.transport is None or self._socket is None:
            raise ConnectionResetError(errno.ECONNRESET, "client disconnected")
        return Connection(self.transport, self._can_write, self._socket.fileno())

    def _start_transfer(self, transfer: _Transfer, work: Coroutine[Any, Any, None]) -> None:
        # Here, not in the task: before its first turn, another connection could have the file closed.
        transfer.prepared.cached.begin_send()
        REQUESTS_IN_PROGRESS.inc()
        self._transfer = transfer
        self._transfer_task = task = asyncio.create_task(work, name="asset-body")
        task.add_done_callback(partial(self._on_transfer_ended, transfer))
        transfer.fast_path.track(task)

    def _on_transfer_ended(self, transfer: _Transfer, task: asyncio.Task[None]) -> None:
        """Record the end of a body, complete or not. Also called for a task that was cancelled before it started."""
        transfer.prepared.cached.end_send()
        REQUESTS_IN_PROGRESS.dec()
        self._transfer = self._transfer_task = None
        self._time = monotonic()
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        sender = transfer.sender
        if isinstance(error, TruncatedFile) and transfer.request and not sender.started:
            # Nothing has been sent to the client: Sanic's path reports the fault.
            self._resume_reading(transfer.request)
            return
        if sender.sent == transfer.prepared.length and self._abort_reason is None:
            error = None  # the client has reset the connection before the task has ended
        abort_reason = self._abort_on_error(error) if error is not None else None
        transfer.fast_path.record(
            transfer.prepared,
            sender.sent,
            sender.started_at - transfer.prepared.started,
            abort_reason,
            self._peer,
        )
        if abort_reason is None:
            self._resume_reading(b"")

    def _abort_on_error(self, error: BaseException) -> str:
        """Abort the connection in the middle of a response. Returns the reason."""
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
        """Process `unread`, then what was received during a long response."""
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
        if not self._half_closed:
            transport.resume_reading()
        elif self._is_idle():
            self.close()

    def _progress(self) -> object:
        return super()._progress(), self._transfer.sender.sent if self._transfer is not None else 0

    def _enforce_timeouts(self, http: ApiHttp | None, unchanged: float, silent: float, unsent: int) -> bool:
        # While a body is sent the connection is not idle, although Sanic's stage is IDLE.
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


_HOP = f"\n{HOP_HEADER}:".lower().encode()


class PeerProtocol(FastPathProtocol):
    """A connection to the port for the other nodes of the fleet. Other requests than theirs are left to Sanic, which
    refuses them."""

    __slots__ = ()
    for_peers = True

    def _respond(self, data: bytes) -> bool:
        return _HOP in data.lower() and super()._respond(data)


# Bodies that do not fit into the socket at once, or are not in memory: sent by sendfile at the client's pace.

_NETWORK_ERRNOS = (errno.ENOTCONN, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH)
SENDFILE_CHUNK = 1024 * 1024
"""Bytes given to the socket before other connections get their turn."""
_READAHEAD_BYTES = 4 * 1024 * 1024
COLD_READ_CHUNK = 512 * 1024
_BUFFERED_CHUNK = 32 * 1024
"""Bytes written to the transport while the socket is full. The transport reports when there is room again."""


class TruncatedFile(Exception):
    """The file has fewer bytes than the object, or cannot be read."""


def send_file(cached: CachedObject, descriptor: int, first: int, length: int) -> int:
    """Send bytes of the file to the socket `descriptor`. Returns how many it took, 0 if it is full.

    Raises TruncatedFile, or ConnectionError if the client has disconnected.
    """
    try:
        sent = os.sendfile(descriptor, cached.descriptor, first, length)
    except BlockingIOError:
        return 0
    except OSError as error:
        if isinstance(error, ConnectionError):
            raise
        if isinstance(error, TimeoutError) or error.errno in _NETWORK_ERRNOS:
            raise ConnectionResetError(error.errno, error.strerror) from error
        logger.error("object_unreadable", object_id=cached.object_id, reason=error.strerror)
        raise TruncatedFile(cached.object_id) from error
    if not sent:
        logger.error("object_truncated", object_id=cached.object_id, size=cached.size)
        raise TruncatedFile(cached.object_id)
    return sent


@dataclass(slots=True)
class Connection:
    """A connection to a client."""

    transport: asyncio.Transport
    writable: asyncio.Event  # set while the transport's buffer is empty
    descriptor: int  # of the socket


class FileSender:
    """Sends one body. The caller brackets it with `CachedObject.begin_send` and `end_send`."""

    def __init__(
        self, cached: CachedObject, first: int, length: int, accesses: AccessCounter, sent: int = 0
    ) -> None:
        if cached.file is None:
            raise ValueError("FileSender: expected an open file, got an object in memory")
        self._cached = cached
        self._file = cached.file.descriptor
        self._first = first
        self._length = length
        self._renewal = AccessRenewal(accesses, cached.object_id)
        self._cached_until = 0
        self._is_untold = False  # bytes that were just read do not seem to be in memory
        self.sent = sent  # bytes of the body sent so far
        self.started = sent > 0  # bytes of the head or the body have been sent
        self.started_at = perf_counter()

    async def send_from_disk(self, connection: Connection, head: bytes) -> None:
        """Read the first chunk before the head is sent, then `send`.

        If the disk fails, TruncatedFile is raised while `started` is still False, and Sanic's path can respond.
        """
        chunk = bytes(await self._read(min(COLD_READ_CHUNK, self._length)))
        self.sent = len(chunk)
        await self.send(connection, head + chunk)

    async def send(self, connection: Connection, head: bytes = b"") -> None:
        """Send the rest. Raises TruncatedFile, or ConnectionError once the client has disconnected."""
        if not self.started:
            self.started, self.started_at = True, perf_counter()
        transport = connection.transport
        transport.set_write_buffer_limits(high=0)
        try:
            if head:
                await self._write(connection, head)
            while self.sent < self._length:
                if transport.is_closing():
                    raise ConnectionResetError(errno.ECONNRESET, "client disconnected")
                await self._send_chunk(connection)
                self._renewal.touch_if_due()
        finally:
            if not transport.is_closing():
                transport.set_write_buffer_limits(high=64 * 1024, low=16 * 1024)

    async def _send_chunk(self, connection: Connection) -> None:
        remaining = self._length - self.sent
        position = self._first + self.sent
        if position >= self._cached_until and not await self._load(position, remaining):
            await self._write_chunk(connection, min(COLD_READ_CHUNK, remaining))
            return
        length = min(remaining, self._cached_until - position)
        sent = send_file(self._cached, connection.descriptor, position, length)
        self.sent += sent
        if sent < length:
            await self._write_chunk(connection, min(_BUFFERED_CHUNK, remaining - sent))
        else:
            # For a client that takes everything at once nothing waits here, and other connections would starve.
            await asyncio.sleep(0)

    async def _load(self, position: int, remaining: int) -> bool:
        """Have the next bytes read into memory if they are not there. Returns whether sendfile would find them there.

        False on a file system that cannot tell: sendfile might wait for a server.
        """
        window = min(remaining, SENDFILE_CHUNK)
        if not is_cached(self._file, position, window):
            os.posix_fadvise(self._file, position, min(remaining, _READAHEAD_BYTES), os.POSIX_FADV_WILLNEED)
            if self._is_untold:
                return False
            try:
                await load_into_cache(self._file, position, window)
            except OSError as error:
                logger.error("object_unreadable", object_id=self._cached.object_id, reason=error.strerror)
                raise TruncatedFile(self._cached.object_id) from error
            if not is_cached(self._file, position, window):
                self._is_untold = True
                return False
        self._cached_until = position + window
        return True

    async def _write_chunk(self, connection: Connection, length: int) -> None:
        chunk = await self._read(length)
        self.sent += length
        await self._write(connection, chunk)

    async def _write(self, connection: Connection, chunk: bytes | memoryview) -> None:
        connection.transport.write(chunk)
        await connection.writable.wait()

    async def _read(self, length: int) -> memoryview:
        try:
            chunk = await read_chunk(self._file, self._first + self.sent, length)
        except OSError as error:
            logger.error("object_unreadable", object_id=self._cached.object_id, reason=error.strerror)
            raise TruncatedFile(self._cached.object_id) from error
        if len(chunk) < length:
            logger.error("object_truncated", object_id=self._cached.object_id, size=self._cached.size)
            raise TruncatedFile(self._cached.object_id)
        return chunk
