"""TCP and TLS connections to sources, as the network backend of httpcore.

httpcore's own backend copies each byte more often and wakes the reader more often. With this one, a large body can also
be read directly from the connection, without the library (`SourceStream.receive`).
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import anyio.lowlevel
import httpcore
import httpx
import structlog
from aiohappyeyeballs import AddrInfoType, start_connection

# What one read of the socket returns at most, and the bytes received but not yet taken at which reading pauses.
_READ_BYTES = 256 * 1024
# The same in a large body. It lies in slabs of this size, each filled by several reads.
_SLAB_BYTES = 1024 * 1024
_MIN_SLAB_READ = 128 * 1024  # free bytes below which the next slab is begun
_CONNECTION_ATTEMPT_DELAY = (
    0.25  # seconds before the next address is tried beside a silent one (RFC 8305 section 5)
)
_HEAD_END = re.compile(rb"\n\r?\n")  # the pattern that h11 uses
_INTERIM = re.compile(rb"HTTP/1\.[01] 1(?!01)")  # after 101 no other response follows

# Bounds on the work that one response can cause. They stand in front of the HTTP library, which has none.
_MAX_INTERIM_RESPONSES = 8
_MAX_HEAD_BYTES = 64 * 1024
_MAX_HEAD_LINES = 256
logger = structlog.get_logger()

Received = TypeVar("Received", bytes, bytes | memoryview)

_STATUS_BYTES = len(b"HTTP/1.1 200")
# Segments that arrive one after the other, each with its own wake-up. Beyond the free ones, and while the average is
# below `_BYTES_PER_READ`, the kernel collects what arrives for `_COLLECT_SECONDS`.
_FREE_READS = 64
_BYTES_PER_READ = 1024
_COLLECT_SECONDS = 0.005


_contexts: weakref.WeakSet[ssl.SSLContext] = weakref.WeakSet()


async def make_tls_context() -> ssl.SSLContext:
    """Read the trusted certificates: of the system, or of SSL_CERT_FILE and SSL_CERT_DIR.

    Also loads what the HTTP library would load in the middle of its first request, for which all others would wait.
    """
    await anyio.lowlevel.checkpoint()
    context = await asyncio.to_thread(httpx.create_ssl_context)
    _contexts.add(context)
    return context


async def reload_certificates() -> None:
    """Trust the certificates that are there now too, in connections made from now on.

    One that was taken away stays trusted until the process ends: OpenSSL cannot forget it.
    """
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if file is None and folder is None:
        paths = ssl.get_default_verify_paths()
        file, folder = paths.cafile, paths.capath
    try:
        for context in list(_contexts):
            if file is not None or folder is not None:
                await asyncio.to_thread(context.load_verify_locations, file, folder)
    except (OSError, ssl.SSLError) as error:
        logger.error("certificates_rejected", file=file, directory=folder, reason=str(error))
    else:
        logger.info("certificates_read", file=file, directory=folder)


class ExcessiveEvents(httpx.ProtocolError):
    """A response is made of so many parts that reading it would occupy the event loop."""


class SourceNetwork(httpcore.AsyncNetworkBackend):
    """Connects to sources, and only to the addresses that `allow_address` accepts."""

    def __init__(self, allow_address: Callable[[str], bool] | None = None) -> None:
        """`allow_address`: takes an IP address as text. None: every address is accepted."""
        self._allow_address = allow_address

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> SourceStream:
        """Raise httpcore's ConnectTimeout or ConnectError if no connection is made.

        `local_address` and `socket_options` are part of the interface. The pool here never sets them.
        """
        try:
            async with asyncio.timeout(timeout):
                protocol = await _attach(await connect(host, port, self._allow_address))
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(str(error)) from error
        except (
            OSError,
            RuntimeError,
        ) as error:  # RuntimeError: what uvloop raises for some failures of connect
            raise httpcore.ConnectError(str(error)) from error
        return SourceStream(protocol)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def _attach(connected: socket.socket) -> _SourceProtocol:
    try:
        _, protocol = await asyncio.get_running_loop().create_connection(_SourceProtocol, sock=connected)
    except BaseException:
        connected.close()
        raise
    return protocol


async def connect(host: str, port: int, allow_address: Callable[[str], bool] | None = None) -> socket.socket:
    """Return a non-blocking socket, connected to the first address of `host` that accepts (RFC 8305).

    There is no time limit: the caller sets one. The addresses that are checked are the ones that are connected to: a
    resolver that gives another answer a moment later cannot get around `allow_address`.

    Raises:
        OSError: no address accepted the connection, or `allow_address` accepted none of them.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(found))
    if not addresses:
        raise OSError(f"{host} has no address")
    if allow_address is not None:
        addresses = [address for address in addresses if allow_address(str(address[4][0]))]
        if not addresses:
            raise OSError("at a private address")
    return await start_connection(
        addresses, happy_eyeballs_delay=_CONNECTION_ATTEMPT_DELAY, socket_factory=_make_socket
    )


def _make_socket(address: AddrInfoType) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


class SourceStream(httpcore.AsyncNetworkStream):
    """One connection.

    `read` returns the head of a response by itself. So httpcore has parsed the head before any byte of the body has
    been read: `at_body` is then True, and `receive` returns the body.
    """

    def __init__(self, protocol: _SourceProtocol) -> None:
        self._protocol = protocol
        # The end of what has been read of an awaited head, in which its last line break may lie. None: no head is due.
        self._tail: bytes | None = None
        self._head = _HeadBounds()
        self._unanswered = False  # nothing has come since the last request
        self.at_body = False

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return up to `max_bytes`; empty at the end of the stream.

        `timeout` applies to the first bytes after a request alone, be they of an interim response (RFC 9110 section
        15.2): they show that the server works on it.

        Raises httpcore's ReadError for a broken connection, ReadTimeout after `timeout` seconds, and ExcessiveEvents.
        """
        try:
            async with asyncio.timeout(timeout if self._unanswered else None):
                data = await self.receive()
        except TimeoutError as error:
            raise httpcore.ReadTimeout(f"no bytes within {timeout:g} s") from error
        self._unanswered = False
        length = min(max_bytes, self._head_length(data))
        if length < len(data):
            self.unread(data[length:])
            data = data[:length]
        return data

    def unread(self, data: bytes) -> None:
        """Put bytes back: the next read returns them."""
        if data:
            self._protocol.unread(data)

    async def receive(self) -> bytes:
        """Return bytes that are buffered, and wait for some if there are none; empty at the end of the stream."""
        return await self._protocol.read_chunk()

    async def receive_large(self) -> bytes | memoryview:
        """As `receive`, up to 1 MiB. Nothing else can be read from the connection after that.

        A view is of memory that is written again once no view of it is left.
        """
        return await self._protocol.read_large()

    def _head_length(self, data: bytes) -> int:
        """Return how many bytes of `data` belong to the awaited head: all of them, if no head is awaited."""
        self.at_body = False
        if self._tail is None:
            return len(data)
        end = _HEAD_END.search(self._tail + data)
        if end is None:
            self._tail = (self._tail + data)[-2:]
            self._head.add(data)
            return len(data)
        length = end.end() - len(self._tail)
        self._head.add(data[:length])
        if self._head.end():
            self._tail = b""  # of an interim response: another head follows
        else:
            self._tail, self.at_body = None, True
        return length

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send without waiting: requests are short. Raises httpcore's WriteError if the connection is closed."""
        if buffer:
            self._protocol.send(buffer)
            self._tail, self.at_body = b"", False
            self._unanswered = True
            self._head = _HeadBounds()

    async def aclose(self) -> None:
        self._protocol.abort()
        await asyncio.sleep(0)  # the event loop closes the socket

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> SourceStream:
        """Raise httpcore's ConnectTimeout or ConnectError, and close the connection, if the handshake fails."""
        try:
            async with asyncio.timeout(timeout):
                await self._protocol.start_tls(ssl_context, server_hostname)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(str(error)) from error
        except OSError as error:  # ssl.SSLError is an OSError
            raise httpcore.ConnectError(str(error)) from error
        finally:
            if not self._protocol.secured:
                await self.aclose()
        return SourceStream(self._protocol)

    def get_extra_info(self, info: str) -> Any:
        """See httpcore. `is_readable`: True for an idle connection means that the source has closed it."""
        match info:
            case "is_readable":
                return self._protocol.is_readable
            case "ssl_object" | "socket":
                return self._protocol.extra_info(info)
            case "client_addr":
                return self._protocol.extra_info("sockname")
            case "server_addr":
                return self._protocol.extra_info("peername")
        return None


class _HeadBounds:
    """Counts the heads of one response, interim ones (1xx) included. Raises ExcessiveEvents."""

    def __init__(self) -> None:
        self._interim = 0
        self._start = b""
        self._bytes = 0
        self._lines = 0

    def add(self, data: bytes) -> None:
        """Count bytes of the current head."""
        if len(self._start) < _STATUS_BYTES:
            self._start = (self._start + data[:_STATUS_BYTES])[:_STATUS_BYTES]
        self._bytes += len(data)
        self._lines += data.count(b"\n")
        if self._bytes > _MAX_HEAD_BYTES or self._lines > _MAX_HEAD_LINES:
            raise ExcessiveEvents(
                f"response head: expected at most {_MAX_HEAD_BYTES} bytes and {_MAX_HEAD_LINES} lines, "
                f"got {self._bytes} bytes and {self._lines} lines"
            )

    def end(self) -> bool:
        """End the current head. Return whether it was interim, so that another one follows."""
        if not _INTERIM.match(self._start):
            return False
        self._interim += 1
        self._start, self._bytes, self._lines = b"", 0, 0
        if self._interim > _MAX_INTERIM_RESPONSES:
            raise ExcessiveEvents(
                f"interim responses: expected at most {_MAX_INTERIM_RESPONSES} before the final one"
            )
        return True


_scratch = memoryview(bytearray(_READ_BYTES))
"""What was read last. The event loop's thread copies from it before it reads from another connection."""


class _Slabs:
    """Memory that a large body is received into, without a copy. A slab is used again once all views of it are gone."""

    def __init__(self) -> None:
        self._slabs: list[bytearray] = []
        self._full: deque[memoryview] = deque()
        self._view = memoryview(b"")  # of the slab that is being filled
        self._first = self._end = 0  # of the bytes in it that were not taken

    def free(self) -> memoryview:
        """Return where the next bytes go."""
        if not self._view:
            self._view, self._first, self._end = memoryview(self._unused()), 0, 0
        return self._view[self._end :]

    def fill(self, count: int) -> None:
        """Note that so many bytes have been received there."""
        self._end += count
        if len(self._view) - self._end < _MIN_SLAB_READ:
            self._full.append(self._view[self._first : self._end])
            self._view = memoryview(b"")  # `free` begins the next one

    def take(self) -> memoryview:
        """Return the oldest bytes, as many as lie together."""
        if self._full:
            return self._full.popleft()
        first, self._first = self._first, self._end
        return self._view[first : self._end]

    def _unused(self) -> bytearray:
        for slab in self._slabs:
            try:
                slab.append(slab.pop())  # an array of which there are views cannot change its size
            except BufferError:
                continue
            return slab
        self._slabs.append(bytearray(_SLAB_BYTES))
        return self._slabs[-1]


class _SourceProtocol(asyncio.BufferedProtocol):
    """Buffers what has been received and not yet read. One reader at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer: deque[bytes] = deque()
        self._slabs: _Slabs | None = None  # of a large body; what they hold follows what `_buffer` holds
        self._buffered_bytes = 0
        self._max_buffered = _READ_BYTES
        self._full = False
        self._collecting: asyncio.TimerHandle | None = None  # while the kernel collects small segments
        self._reads = 0  # since the last request was sent
        self._read_bytes = 0
        self._ended = False
        self._error: Exception | None = None
        self._data_waiter: asyncio.Future[None] | None = None
        self.secured = False

    # Called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's class is not a subclass

    def get_buffer(self, sizehint: int) -> memoryview:
        return _scratch if self._slabs is None else self._slabs.free()

    def buffer_updated(self, nbytes: int) -> None:
        if self._slabs is None:
            self._buffer.append(bytes(_scratch[:nbytes]))
        else:
            self._slabs.fill(nbytes)
        self._buffered_bytes += nbytes
        self._reads += 1
        self._read_bytes += nbytes
        if self._transport is not None and not self._paused:
            if self._buffered_bytes >= self._max_buffered:
                self._full = True
                self._transport.pause_reading()
            elif self._reads > _FREE_READS + self._read_bytes // _BYTES_PER_READ:
                self._transport.pause_reading()
                self._collecting = asyncio.get_running_loop().call_later(
                    _COLLECT_SECONDS, self._end_collecting
                )
        self._wake_reader()

    @property
    def _paused(self) -> bool:
        return self._full or self._collecting is not None

    def _end_collecting(self) -> None:
        self._collecting = None
        self._resume_reading()

    def _resume_reading(self) -> None:
        if not self._paused and self._transport is not None:
            self._transport.resume_reading()

    def eof_received(self) -> bool:
        self._ended = True
        self._wake_reader()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended, self._error = True, exc
        self._transport = None
        if self._collecting is not None:
            self._collecting.cancel()
        self._wake_reader()

    def _wake_reader(self) -> None:
        if self._data_waiter is not None and not self._data_waiter.done():
            self._data_waiter.set_result(None)

    # Called by the stream

    @property
    def is_readable(self) -> bool:
        return bool(
            self._ended or self._buffered_bytes or self._transport is None or self._transport.is_closing()
        )

    async def read_chunk(self) -> bytes:
        """Return what the event loop got by one read; empty at the end. Raises httpcore's ReadError if broken."""
        await self._wait_for_bytes()
        return self._note_taken(self._buffer.popleft()) if self._buffer else b""

    async def read_large(self) -> bytes | memoryview:
        """Return what was received before the first call by itself, then what lies together in a slab."""
        if self._slabs is None:
            self._slabs, self._max_buffered = _Slabs(), _SLAB_BYTES
        await self._wait_for_bytes()
        return self._note_taken(self._buffer.popleft() if self._buffer else self._slabs.take())

    async def _wait_for_bytes(self) -> None:
        while not self._buffered_bytes:
            if self._ended:
                if self._error is not None:
                    raise httpcore.ReadError(str(self._error)) from self._error
                return
            self._data_waiter = asyncio.get_running_loop().create_future()
            try:
                await self._data_waiter
            finally:
                self._data_waiter = None

    def _note_taken(self, data: Received) -> Received:
        self._buffered_bytes -= len(data)
        if self._full and self._buffered_bytes < self._max_buffered:
            self._full = False
            self._resume_reading()
        return data

    def unread(self, data: bytes) -> None:
        """Put bytes back: the next read returns them."""
        self._buffer.appendleft(data)
        self._buffered_bytes += len(data)

    def send(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            raise httpcore.WriteError("the connection is closed")
        self._reads = self._read_bytes = 0
        self._transport.write(data)

    async def start_tls(self, context: ssl.SSLContext, server_hostname: str | None) -> None:
        """Raise OSError if the handshake fails."""
        if self._transport is None:
            raise ConnectionResetError("connection closed before the TLS handshake")
        loop = asyncio.get_running_loop()
        secured = await loop.start_tls(self._transport, self, context, server_hostname=server_hostname)
        if secured is None:
            raise ConnectionResetError("connection closed during the TLS handshake")
        self._transport, self.secured = secured, True

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def extra_info(self, name: str) -> Any:
        return None if self._transport is None else self._transport.get_extra_info(name)
