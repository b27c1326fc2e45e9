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
from services.api.assets.hot import HotObject
from services.api.assets.reading import is_cached, read_piece
from services.api.assets.sender import ACCESS_RENEWAL

_OF_THE_NETWORK = (errno.ENOTCONN, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH)
AT_ONCE = 1024 * 1024
"""Bytes handed to the socket before other connections have their turn."""
_READ_AHEAD = 4 * 1024 * 1024
_COLD_PIECE = 512 * 1024
_BUFFERED_PIECE = 32 * 1024
"""Bytes that wait in the connection's own buffer while the socket is full: it tells us when there is room again."""

logger = structlog.get_logger()


class FileShort(Exception):
    """The file gives fewer bytes than the object has, or none at all: the disk fails, or it was cut short."""


def send_file(hot: HotObject, descriptor: int, first: int, length: int) -> int:
    """Hand bytes of the file to the socket `descriptor`; how many it took, 0 if it is full. FileShort;
    ConnectionError if the client has left."""
    try:
        sent = os.sendfile(descriptor, hot.descriptor, first, length)
    except BlockingIOError:
        return 0
    except OSError as error:
        if isinstance(error, ConnectionError):
            raise
        if isinstance(error, TimeoutError) or error.errno in _OF_THE_NETWORK:
            raise ConnectionResetError(error.errno, error.strerror) from error
        logger.error("object_unreadable", object_id=hot.object_id, reason=error.strerror)
        raise FileShort(hot.object_id) from error
    if not sent:
        logger.error("object_truncated", object_id=hot.object_id, size=hot.size)
        raise FileShort(hot.object_id)
    return sent


@dataclass(slots=True)
class Connection:
    """The far end: `transport` buffers and tells when it is empty (`writable`), `descriptor` is its socket."""

    transport: asyncio.Transport
    writable: asyncio.Event
    descriptor: int


class BodySender:
    """One body, of an object whose send has begun (`HotObject.begin_send`). `sent`: bytes of it that have left;
    `begun`: the client has been told something, `began_at` when."""

    def __init__(
        self, hot: HotObject, first: int, length: int, accesses: AccessCounter, sent: int = 0
    ) -> None:
        if hot.found is None:
            raise ValueError("an object in memory is written at once")
        self._hot = hot
        self._file = hot.found.descriptor
        self._first = first
        self._length = length
        self._accesses = accesses
        self._renewed = monotonic()
        self._cached_until = 0
        self.sent = sent
        self.begun = sent > 0
        self.began_at = perf_counter()

    async def send_from_disk(self, connection: Connection, head: bytes) -> None:
        """As `send`; the beginning is read before the head is sent, so that a failing disk costs no answer:
        FileShort then with `begun` false."""
        piece = bytes(await self._read(min(_COLD_PIECE, self._length)))
        self.sent = len(piece)
        await self.send(connection, head + piece)

    async def send(self, connection: Connection, head: bytes = b"") -> None:
        """Everything that has not been sent. FileShort; ConnectionError once the client has left."""
        if not self.begun:
            self.begun, self.began_at = True, perf_counter()
        transport = connection.transport
        transport.set_write_buffer_limits(high=0)
        try:
            if head:
                await self._write(connection, head)
            while self.sent < self._length:
                if transport.is_closing():
                    raise ConnectionResetError(errno.ECONNRESET, "the client has left")
                await self._send_some(connection)
                self._note_access()
        finally:
            if not transport.is_closing():
                transport.set_write_buffer_limits(high=64 * 1024, low=16 * 1024)

    async def _send_some(self, connection: Connection) -> None:
        left = self._length - self.sent
        position = self._first + self.sent
        if position >= self._cached_until and not self._look_ahead(position, left):
            await self._write_piece(connection, min(_COLD_PIECE, left))
            return
        wanted = min(left, self._cached_until - position)
        sent = send_file(self._hot, connection.descriptor, position, wanted)
        self.sent += sent
        if sent < wanted:
            await self._write_piece(connection, min(_BUFFERED_PIECE, left - sent))
        else:
            # Where the client takes all at once nothing waits here, and others would
            await asyncio.sleep(0)

    def _look_ahead(self, position: int, left: int) -> bool:
        """False if what comes next has to be read from the disk; then more of it is on its way into memory."""
        window = min(left, AT_ONCE)
        if is_cached(self._file, position, window):
            self._cached_until = position + window
            return True
        os.posix_fadvise(self._file, position, min(left, _READ_AHEAD), os.POSIX_FADV_WILLNEED)
        return False

    async def _write_piece(self, connection: Connection, length: int) -> None:
        await self._write(connection, await self._read(length))
        self.sent += length

    async def _write(self, connection: Connection, piece: bytes | memoryview) -> None:
        connection.transport.write(piece)
        await connection.writable.wait()

    async def _read(self, length: int) -> memoryview:
        try:
            piece = await read_piece(self._file, self._first + self.sent, length)
        except OSError as error:
            logger.error("object_unreadable", object_id=self._hot.object_id, reason=error.strerror)
            raise FileShort(self._hot.object_id) from error
        if len(piece) < length:
            logger.error("object_truncated", object_id=self._hot.object_id, size=self._hot.size)
            raise FileShort(self._hot.object_id)
        return piece

    def _note_access(self) -> None:
        if monotonic() - self._renewed >= ACCESS_RENEWAL:
            self._renewed = monotonic()
            self._accesses.touch(self._hot.object_id)
