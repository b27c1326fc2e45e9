"""TCP and TLS to sources for the HTTP library: fewer copies and wake-ups than its own, and a body that can be read past
it."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain, zip_longest
from typing import Any

import httpcore

_MAX_BUFFERED = 256 * 1024
"""Bytes received and not yet read at which the source has to wait: what the event loop reads at once."""

_HEAD_END = re.compile(rb"\n\r?\n")
"""As h11 looks for it."""


class SourceNetwork(httpcore.AsyncNetworkBackend):
    """Makes the connections; to addresses that `allow_address` says yes to, if it is given."""

    def __init__(self, allow_address: Callable[[str], bool] | None = None) -> None:
        self._allow_address = allow_address

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> SourceStream:
        """The library's ConnectTimeout or ConnectError if there is no connection. Neither `local_address` nor options
        are ever given here."""
        try:
            async with asyncio.timeout(timeout):
                protocol = await _attach(await connect(host, port, self._allow_address))
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(str(error)) from error
        except OSError as error:
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


class SourceStream(httpcore.AsyncNetworkStream):
    """One connection. The head of an answer is handed out by itself, so that nobody has taken any of the body yet when
    the head has been understood: then `at_body`, and `receive` gives what follows."""

    def __init__(self, protocol: _SourceProtocol) -> None:
        self._protocol = protocol
        self._tail: bytes | None = None
        self.at_body = False

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Empty at the end. The library's ReadError if the connection broke, ReadTimeout after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                data = await self.receive()
        except TimeoutError as error:
            raise httpcore.ReadTimeout(str(error)) from error
        length = min(max_bytes, self._head_length(data))
        if length < len(data):
            self._protocol.unread(data[length:])
            data = data[:length]
        return data

    async def receive(self) -> bytes:
        """As `read`, without a bound but that of what waits."""
        return await self._protocol.read_chunk()

    def _head_length(self, data: bytes) -> int:
        """Bytes of `data` that belong to the head that is awaited; all of them, if none is."""
        self.at_body = False
        if self._tail is None:
            return len(data)
        end = _HEAD_END.search(self._tail + data)
        if end is None:
            self._tail = (self._tail + data)[-2:]
            return len(data)
        length = end.end() - len(self._tail)
        # Only once: what follows an interim answer is left to the library, head and body together.
        self._tail, self.at_body = None, True
        return length

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Requests are short: nothing waits. The library's WriteError if the connection is closed."""
        if buffer:
            self._protocol.send(buffer)
            self._tail, self.at_body = b"", False

    async def aclose(self) -> None:
        self._protocol.abort()
        await asyncio.sleep(0)  # the event loop closes the socket

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> SourceStream:
        """The library's ConnectTimeout or ConnectError if that fails; the connection is closed then."""
        try:
            async with asyncio.timeout(timeout):
                await self._protocol.start_tls(ssl_context, server_hostname)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(str(error)) from error
        except OSError as error:  # TLS errors are such, too
            raise httpcore.ConnectError(str(error)) from error
        finally:
            if not self._protocol.secured:
                await self.aclose()
        return SourceStream(self._protocol)

    def get_extra_info(self, info: str) -> Any:
        """`is_readable`: an idle connection of which that is true has been closed by the source."""
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


class _SourceProtocol(asyncio.Protocol):
    """What has arrived and was not yet read. One reader at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._paused = False
        self._ended = False
        self._error: Exception | None = None
        self._data_waiter: asyncio.Future[None] | None = None
        self.secured = False

    # Called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._buffer.append(data)
        self._buffered_bytes += len(data)
        if self._buffered_bytes >= _MAX_BUFFERED and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake_reader()

    def eof_received(self) -> bool:
        self._ended = True
        self._wake_reader()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended, self._error = True, exc
        self._transport = None
        self._wake_reader()

    def _wake_reader(self) -> None:
        if self._data_waiter is not None and not self._data_waiter.done():
            self._data_waiter.set_result(None)

    # Called by the stream

    @property
    def is_readable(self) -> bool:
        return bool(self._ended or self._buffer or self._transport is None or self._transport.is_closing())

    async def read_chunk(self) -> bytes:
        """All of one read of the event loop; empty at the end. The library's ReadError if the connection broke."""
        while not self._buffer:
            if self._ended:
                if self._error is not None:
                    raise httpcore.ReadError(str(self._error)) from self._error
                return b""
            self._data_waiter = asyncio.get_running_loop().create_future()
            try:
                await self._data_waiter
            finally:
                self._data_waiter = None
        data = self._buffer.popleft()
        self._buffered_bytes -= len(data)
        if self._paused and self._buffered_bytes < _MAX_BUFFERED:
            self._paused = False
            if self._transport is not None:
                self._transport.resume_reading()
        return data

    def unread(self, data: bytes) -> None:
        """To be the next piece again."""
        self._buffer.appendleft(data)
        self._buffered_bytes += len(data)

    def send(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            raise httpcore.WriteError("the connection is closed")
        self._transport.write(data)

    async def start_tls(self, context: ssl.SSLContext, server_hostname: str | None) -> None:
        """OSError if that fails."""
        if self._transport is None:
            raise ConnectionResetError("closed before TLS")
        loop = asyncio.get_running_loop()
        secured = await loop.start_tls(self._transport, self, context, server_hostname=server_hostname)
        if secured is None:
            raise ConnectionResetError("closed during TLS")
        self._transport, self.secured = secured, True

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def extra_info(self, name: str) -> Any:
        return None if self._transport is None else self._transport.get_extra_info(name)


# A TCP connection to the first of a host's addresses that takes one (RFC 8305).

_CONNECTION_ATTEMPT_DELAY = 0.25
"""Seconds that an address has for itself before the next one is tried beside it (RFC 8305 section 5)."""

Address = tuple[int, Any]
"""Family and address, as the socket module knows them."""


async def connect(host: str, port: int, allow_address: Callable[[str], bool] | None = None) -> socket.socket:
    """A connected, non-blocking socket. OSError if no address takes a connection; no bound in time of its own.

    `allow_address`: whether an address, as text, may be connected to at all; it is asked of what is connected to, so
    that a resolver that says another thing the next moment changes nothing.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = interleave([(family, address) for family, _, _, _, address in found])
    if allow_address is not None:
        addresses = [address for address in addresses if allow_address(address[1][0])]
        if not addresses:
            raise OSError("at a private address")
    if not addresses:
        raise OSError(f"no address of {host}")
    if len(addresses) == 1:
        return await _connected(addresses[0])
    return await _first_connected(addresses)


def interleave(addresses: Iterable[Address]) -> list[Address]:
    """Each once, the families by turns, the first one's first (RFC 8305 section 4). Pure."""
    by_family: dict[int, list[Address]] = {}
    for address in dict.fromkeys(addresses):
        by_family.setdefault(address[0], []).append(address)
    turns = chain.from_iterable(zip_longest(*by_family.values()))
    return [address for address in turns if address is not None]


async def _first_connected(addresses: Iterable[Address]) -> socket.socket:
    remaining, attempts = deque(addresses), set[asyncio.Task[socket.socket]]()
    failure: BaseException | None = None
    try:
        while remaining or attempts:
            if remaining:
                attempts.add(asyncio.create_task(_connected(remaining.popleft()), name="connect"))
            delay = _CONNECTION_ATTEMPT_DELAY if remaining else None
            await asyncio.wait(attempts, timeout=delay, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in attempts if task.done()]:
                attempts.discard(task)
                if task.exception() is None:
                    return task.result()
                failure = failure or task.exception()
    finally:
        await _close_others(attempts)
    raise failure or OSError("no address")


async def _close_others(attempts: set[asyncio.Task[socket.socket]]) -> None:
    """Close what the others come to."""
    for task in attempts:
        task.cancel()
    for outcome in await asyncio.gather(*attempts, return_exceptions=True):
        if isinstance(outcome, socket.socket):
            outcome.close()


async def _connected(address: Address) -> socket.socket:
    family, where = address
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, where)
    except BaseException:
        sock.close()
        raise
    return sock
