"""Bodies that do not fit into the socket at once, or are not in memory: sent at the client's pace, from file to
socket."""

from __future__ import annotations

import asyncio
import errno
import os
from dataclasses import dataclass
from time import monotonic, perf_counter

import structlog

from services.api.accesses import AccessCounter
from services.api.assets.hot import CachedObject
from services.api.assets.reading import is_cached, read_chunk
from services.api.assets.sender import ACCESS_RENEWAL_INTERVAL

_NETWORK_ERRNOS = (errno.ENOTCONN, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH)
SENDFILE_CHUNK = 1024 * 1024
"""Bytes handed to the socket before other connections have their turn."""
_READAHEAD_BYTES = 4 * 1024 * 1024
COLD_READ_CHUNK = 512 * 1024
_BUFFERED_CHUNK = 32 * 1024
"""Bytes that wait in the connection's own buffer while the socket is full: it tells us when there is room again."""

logger = structlog.get_logger()


class TruncatedFile(Exception):
    """The file gives fewer bytes than the object has, or none at all: the disk fails, or it was cut short."""


def send_file(cached: CachedObject, descriptor: int, first: int, length: int) -> int:
    """Hand bytes of the file to the socket `descriptor`; how many it took, 0 if it is full. TruncatedFile;
    ConnectionError if the client has left."""
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
    """The far end: `transport` buffers and tells when it is empty (`writable`), `descriptor` is its socket."""

    transport: asyncio.Transport
    writable: asyncio.Event
    descriptor: int


class FileSender:
    """One body, of an object whose send has begun (`CachedObject.begin_send`). `sent`: bytes of it that have left;
    `started`: the client has been told something, `started_at` when."""

    def __init__(
        self, cached: CachedObject, first: int, length: int, accesses: AccessCounter, sent: int = 0
    ) -> None:
        if cached.file is None:
            raise ValueError("an object in memory is written at once")
        self._cached = cached
        self._file = cached.file.descriptor
        self._first = first
        self._length = length
        self._accesses = accesses
        self._renewed_at = monotonic()
        self._cached_until = 0
        self.sent = sent
        self.started = sent > 0
        self.started_at = perf_counter()

    async def send_from_disk(self, connection: Connection, head: bytes) -> None:
        """As `send`; the beginning is read before the head is sent, so that a failing disk costs no answer:
        TruncatedFile then with `started` false."""
        chunk = bytes(await self._read(min(COLD_READ_CHUNK, self._length)))
        self.sent = len(chunk)
        await self.send(connection, head + chunk)

    async def send(self, connection: Connection, head: bytes = b"") -> None:
        """Everything that has not been sent. TruncatedFile; ConnectionError once the client has left."""
        if not self.started:
            self.started, self.started_at = True, perf_counter()
        transport = connection.transport
        transport.set_write_buffer_limits(high=0)
        try:
            if head:
                await self._write(connection, head)
            while self.sent < self._length:
                if transport.is_closing():
                    raise ConnectionResetError(errno.ECONNRESET, "the client has left")
                await self._send_chunk(connection)
                self._renew_access()
        finally:
            if not transport.is_closing():
                transport.set_write_buffer_limits(high=64 * 1024, low=16 * 1024)

    async def _send_chunk(self, connection: Connection) -> None:
        remaining = self._length - self.sent
        position = self._first + self.sent
        if position >= self._cached_until and not self._readahead(position, remaining):
            await self._write_chunk(connection, min(COLD_READ_CHUNK, remaining))
            return
        length = min(remaining, self._cached_until - position)
        sent = send_file(self._cached, connection.descriptor, position, length)
        self.sent += sent
        if sent < length:
            await self._write_chunk(connection, min(_BUFFERED_CHUNK, remaining - sent))
        else:
            # Where the client takes all at once nothing waits here, and others would
            await asyncio.sleep(0)

    def _readahead(self, position: int, remaining: int) -> bool:
        """False if what comes next has to be read from the disk; then more of it is on its way into memory."""
        window = min(remaining, SENDFILE_CHUNK)
        if is_cached(self._file, position, window):
            self._cached_until = position + window
            return True
        os.posix_fadvise(self._file, position, min(remaining, _READAHEAD_BYTES), os.POSIX_FADV_WILLNEED)
        return False

    async def _write_chunk(self, connection: Connection, length: int) -> None:
        await self._write(connection, await self._read(length))
        self.sent += length

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

    def _renew_access(self) -> None:
        if monotonic() - self._renewed_at >= ACCESS_RENEWAL_INTERVAL:
            self._renewed_at = monotonic()
            self._accesses.touch(self._cached.object_id)
