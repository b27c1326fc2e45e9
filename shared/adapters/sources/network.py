"""TCP and TLS connections to sources: streams from which heads of responses and bytes are read."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import weakref
from collections import deque
from collections.abc import Callable

import httpx
import structlog
from aiohappyeyeballs import AddrInfoType, start_connection

# Bytes received but not yet read at which reading from the socket pauses. It is what the event loop reads at once.
_MAX_BUFFERED = 256 * 1024
_CONNECTION_ATTEMPT_DELAY = (
    0.25  # seconds before the next address is tried beside a silent one (RFC 8305 section 5)
)
_HEAD_END = re.compile(rb"\n\r?\n")
_INTERIM = re.compile(rb"HTTP/1\.[01] 1(?!01)")  # after 101 no other response follows

# Bounds on the work that one response can cause.
_MAX_INTERIM_RESPONSES = 8
_MAX_HEAD_BYTES = 64 * 1024
_MAX_HEAD_LINES = 256
logger = structlog.get_logger()

_STATUS_BYTES = len(b"HTTP/1.1 200")
# Segments that arrive one after the other, each with its own wake-up. Beyond the free ones, and while the average is
# below `_BYTES_PER_READ`, the kernel collects what arrives for `_COLLECT_SECONDS`.
_FREE_READS = 64
_BYTES_PER_READ = 1024
_COLLECT_SECONDS = 0.005


_contexts: weakref.WeakSet[ssl.SSLContext] = weakref.WeakSet()


async def make_tls_context() -> ssl.SSLContext:
    """Read the trusted certificates: of the system, or of SSL_CERT_FILE and SSL_CERT_DIR."""
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


class SourceNetwork:
    """Connects to sources, and only to the addresses that `allow_address` accepts."""

    def __init__(self, allow_address: Callable[[str], bool] | None = None) -> None:
        """`allow_address`: takes an IP address as text. None: every address is accepted."""
        self._allow_address = allow_address

    async def connect(self, host: str, port: int, timeout: float | None = None) -> SourceStream:
        """Raise httpx's ConnectTimeout or ConnectError if no connection is made."""
        try:
            async with asyncio.timeout(timeout):
                protocol = await _attach(await connect(host, port, self._allow_address))
        except TimeoutError as error:
            raise httpx.ConnectTimeout(str(error)) from error
        except (
            OSError,
            RuntimeError,
        ) as error:  # RuntimeError: what uvloop raises for some failures of connect
            raise httpx.ConnectError(str(error)) from error
        return SourceStream(protocol)


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


class SourceStream:
    """One connection: requests are written, and heads of responses and bytes of bodies are read."""

    def __init__(self, protocol: _SourceProtocol) -> None:
        self._protocol = protocol

    async def read_head(self, timeout: float | None = None) -> bytes:
        """Return the head of the final response to what was written, with its empty line. Interim ones are passed over.

        `timeout` applies to the first bytes after a request alone, be they of an interim response (RFC 9110 section
        15.2): they show that the server works on it.

        Raises httpx's ReadError for a broken connection, RemoteProtocolError for one that was closed, ReadTimeout after
        `timeout` seconds, and ExcessiveEvents.
        """
        bounds, head, data = _HeadBounds(), bytearray(), await self._first_data(timeout)
        while True:
            if not data:
                raise httpx.RemoteProtocolError("server disconnected without sending a response")
            tail = bytes(head[-2:])  # in which its last line break may lie
            end = _HEAD_END.search(tail + data if tail else data)
            length = len(data) if end is None else end.end() - len(tail)
            bounds.add(data[:length])
            head += data[:length]
            if end is None:
                data = await self.receive()
                continue
            data = data[length:]
            if not bounds.end():
                self.unread(data)
                return bytes(head)
            head.clear()
            data = data or await self.receive()

    async def _first_data(self, timeout: float | None) -> bytes:
        try:
            async with asyncio.timeout(timeout):
                return await self.receive()
        except TimeoutError as error:
            raise httpx.ReadTimeout(f"no bytes within {timeout:g} s") from error

    def unread(self, data: bytes) -> None:
        """Put bytes back: the next read returns them."""
        if data:
            self._protocol.unread(data)

    async def receive(self) -> bytes:
        """Return all bytes that are buffered, and wait for some if there are none; empty at the end of the stream."""
        return await self._protocol.read_chunk()

    def write(self, data: bytes) -> None:
        """Send without waiting: requests are short. Raises httpx's WriteError if the connection is closed."""
        self._protocol.send(data)

    def abort(self) -> None:
        """Close the connection now. What is being read fails or ends."""
        self._protocol.abort()

    async def start_tls(
        self, context: ssl.SSLContext, server_hostname: str, timeout: float | None = None
    ) -> None:
        """Raise httpx's ConnectTimeout or ConnectError, and close the connection, if the handshake fails."""
        try:
            async with asyncio.timeout(timeout):
                await self._protocol.start_tls(context, server_hostname)
        except TimeoutError as error:
            raise httpx.ConnectTimeout(str(error)) from error
        except OSError as error:  # ssl.SSLError is an OSError
            raise httpx.ConnectError(str(error)) from error
        finally:
            if not self._protocol.secured:
                self.abort()

    @property
    def is_readable(self) -> bool:
        """True for an idle connection means that the source has closed it, or sends what was not asked for."""
        return self._protocol.is_readable


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


class _SourceProtocol(asyncio.Protocol):
    """Buffers what has been received and not yet read. One reader at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._full = False
        self._collecting: asyncio.TimerHandle | None = None  # while the kernel collects small segments
        self._reads = 0  # since the last request was sent
        self._read_bytes = 0
        self._ended = False
        self._error: Exception | None = None
        self._data_waiter: asyncio.Future[None] | None = None
        self._aborted = False
        self.secured = False

    # Called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's class is not a subclass

    def data_received(self, data: bytes) -> None:
        self._buffer.append(data)
        self._buffered_bytes += len(data)
        self._reads += 1
        self._read_bytes += len(data)
        if self._transport is not None and not self._paused:
            if self._buffered_bytes >= _MAX_BUFFERED:
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
        self._ended = True
        self._error = exc or (ConnectionAbortedError("closed by this side") if self._aborted else None)
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
        return bool(self._ended or self._buffer or self._transport is None or self._transport.is_closing())

    async def read_chunk(self) -> bytes:
        """Return what the event loop got by one read; empty at the end. Raises httpx's ReadError if broken."""
        while not self._buffer:
            if self._ended:
                if self._error is not None:
                    raise httpx.ReadError(str(self._error)) from self._error
                return b""
            self._data_waiter = asyncio.get_running_loop().create_future()
            try:
                await self._data_waiter
            finally:
                self._data_waiter = None
        data = self._buffer.popleft()
        self._buffered_bytes -= len(data)
        if self._full and self._buffered_bytes < _MAX_BUFFERED:
            self._full = False
            self._resume_reading()
        return data

    def unread(self, data: bytes) -> None:
        """Put bytes back: the next read returns them."""
        self._buffer.appendleft(data)
        self._buffered_bytes += len(data)

    def send(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            raise httpx.WriteError("the connection is closed")
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
        self._aborted = True  # a body without a stated length must not seem to have ended
        if self._transport is not None:
            self._transport.abort()
