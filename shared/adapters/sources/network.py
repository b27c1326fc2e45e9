"""TCP and TLS to sources for the HTTP library: fewer copies and wake-ups than its own, and a body that can be read past
it."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import httpcore

from shared.adapters.sources.dialling import dial

_MOST_WAITING = 256 * 1024
"""Bytes received and not yet read at which the source has to wait: what the event loop reads at once."""

_HEAD_END = re.compile(rb"\n\r?\n")
"""As h11 looks for it."""


class SourceNetwork(httpcore.AsyncNetworkBackend):
    """Makes the connections; to addresses that `admits` says yes to, if it is given."""

    def __init__(self, admits: Callable[[str], bool] | None = None) -> None:
        self._admits = admits

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
                wire = await _attached(await dial(host, port, self._admits))
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        return SourceStream(wire)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def _attached(connected: socket.socket) -> _Wire:
    try:
        _, wire = await asyncio.get_running_loop().create_connection(_Wire, sock=connected)
    except BaseException:
        connected.close()
        raise
    return wire


class SourceStream(httpcore.AsyncNetworkStream):
    """One connection. The head of an answer is handed out by itself, so that nobody has taken any of the body yet when
    the head has been understood: then `at_body`, and `receive` gives what follows."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire
        self._tail: bytes | None = None
        self.at_body = False

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Empty at the end. The library's ReadError if the connection broke, ReadTimeout after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                data = await self.receive()
        except TimeoutError as error:
            raise httpcore.ReadTimeout(str(error)) from error
        at_most = min(max_bytes, self._head_length(data))
        if at_most < len(data):
            self._wire.put_back(data[at_most:])
            data = data[:at_most]
        return data

    async def receive(self) -> bytes:
        """As `read`, without a bound but that of what waits."""
        return await self._wire.next_piece()

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
            self._wire.send(buffer)
            self._tail, self.at_body = b"", False

    async def aclose(self) -> None:
        self._wire.abort()
        await asyncio.sleep(0)  # the event loop closes the socket

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> SourceStream:
        """The library's ConnectTimeout or ConnectError if that fails; the connection is closed then."""
        try:
            async with asyncio.timeout(timeout):
                await self._wire.start_tls(ssl_context, server_hostname)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(str(error)) from error
        except OSError as error:  # TLS errors are such, too
            raise httpcore.ConnectError(str(error)) from error
        finally:
            if not self._wire.secured:
                await self.aclose()
        return SourceStream(self._wire)

    def get_extra_info(self, info: str) -> Any:
        """`is_readable`: an idle connection of which that is true has been closed by the source."""
        match info:
            case "is_readable":
                return self._wire.has_news
            case "ssl_object" | "socket":
                return self._wire.told(info)
            case "client_addr":
                return self._wire.told("sockname")
            case "server_addr":
                return self._wire.told("peername")
        return None


class _Wire(asyncio.Protocol):
    """What has arrived and was not yet read. One reader at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._paused = False
        self._ended = False
        self._error: Exception | None = None
        self._news: asyncio.Future[None] | None = None
        self.secured = False

    # Called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= _MOST_WAITING and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._tell()

    def eof_received(self) -> bool:
        self._ended = True
        self._tell()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended, self._error = True, exc
        self._transport = None
        self._tell()

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    # Called by the stream

    @property
    def has_news(self) -> bool:
        return bool(self._ended or self._waiting or self._transport is None or self._transport.is_closing())

    async def next_piece(self) -> bytes:
        """All of one read of the event loop; empty at the end. The library's ReadError if the connection broke."""
        while not self._waiting:
            if self._ended:
                if self._error is not None:
                    raise httpcore.ReadError(str(self._error)) from self._error
                return b""
            self._news = asyncio.get_running_loop().create_future()
            try:
                await self._news
            finally:
                self._news = None
        data = self._waiting.popleft()
        self._waiting_bytes -= len(data)
        if self._paused and self._waiting_bytes < _MOST_WAITING:
            self._paused = False
            if self._transport is not None:
                self._transport.resume_reading()
        return data

    def put_back(self, data: bytes) -> None:
        """To be the next piece again."""
        self._waiting.appendleft(data)
        self._waiting_bytes += len(data)

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

    def told(self, name: str) -> Any:
        return None if self._transport is None else self._transport.get_extra_info(name)
