"""One HTTP/1.1 server connection at the level of bytes, so that invalid responses can be sent too."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from distributor_node.shared.waiting import wait_event

MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 1024 * 1024
_WRITE_BUFFER_BYTES = 1024 * 1024


class ConnectionLost(Exception):
    """The connection has ended."""


class MalformedRequest(Exception):
    """The client has sent an invalid request, or one that this server does not support."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request. Header names are in lower case, and repeated headers are joined by commas."""

    method: str
    target: str
    headers: dict[str, str]
    keep_alive: bool
    body: bytes = b""

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]


def parse_head(head: bytes) -> Request:
    """Parse a request line and headers, without the empty line after them. Raises MalformedRequest."""
    line, *fields = head.decode("latin-1").split("\r\n")
    words = line.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise MalformedRequest(f"not a request line: {line[:100]!r}")
    headers: dict[str, str] = {}
    for item in fields:
        name, colon, value = item.partition(":")
        if not colon or not name or name != name.strip():
            raise MalformedRequest(f"not a header: {item[:100]!r}")
        name, value = name.lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    options = headers.get("connection", "").lower()
    keep_alive = "close" not in options and (words[2] != "HTTP/1.0" or "keep-alive" in options)
    return Request(words[0], words[1], headers, keep_alive)


class HttpConnection(asyncio.Protocol):
    """The server's side of one connection. All waits raise ConnectionLost when the client closes it."""

    def __init__(self, opened: Callable[[HttpConnection], None]) -> None:
        self._opened = opened
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._arrived = asyncio.Event()
        self._writable = asyncio.Event()
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        self._writable.set()
        self._opened(self)

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        self._received += data
        self._arrived.set()
        if len(self._received) > MAX_HEAD_BYTES + MAX_BODY_BYTES:
            self.transport.pause_reading()

    def pause_writing(self) -> None:
        """Called by the loop."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Called by the loop."""
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop. The waiters do not need the reason."""
        self.lost.set()
        self._arrived.set()
        self._writable.set()

    @property
    def transport(self) -> asyncio.Transport:
        """The transport of an open connection."""
        if self._transport is None:
            raise ConnectionLost("not connected yet")
        return self._transport

    @property
    def unsent(self) -> int:
        """Bytes written, but not yet passed to the kernel."""
        return self.transport.get_write_buffer_size()

    async def read_request(self, idle_seconds: float) -> Request | None:
        """Return the next request. None: the client closed, or was idle for too long. Raises MalformedRequest."""
        try:
            async with asyncio.timeout(idle_seconds):
                while (end := self._received.find(b"\r\n\r\n")) < 0:
                    if len(self._received) > MAX_HEAD_BYTES:
                        raise MalformedRequest(
                            f"the head of the request has more than {MAX_HEAD_BYTES} bytes"
                        )
                    await self._more()
                request = parse_head(bytes(self._received[:end]))
                del self._received[: end + 4]
                body = await self._read_body(request)
        except (TimeoutError, ConnectionLost):
            return None
        return Request(request.method, request.target, request.headers, request.keep_alive, body)

    async def _read_body(self, request: Request) -> bytes:
        length = request.headers.get("content-length", "0")
        if "transfer-encoding" in request.headers or not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            raise MalformedRequest("a request body needs a Content-Length of at most 1 MiB")
        while len(self._received) < int(length):
            await self._more()
        body = bytes(self._received[: int(length)])
        del self._received[: int(length)]
        return body

    async def _more(self) -> None:
        self._arrived.clear()
        if not self.lost.is_set():
            await self._arrived.wait()
        if self.lost.is_set():
            raise ConnectionLost("the client closed the connection")

    async def write(self, data: bytes) -> None:
        """Send, and wait while the client does not read."""
        if not self.lost.is_set():
            self.transport.write(data)
            if not self._writable.is_set():
                await self._writable.wait()
            elif self.transport.is_closing():
                await asyncio.sleep(0)  # the client has left, which the loop tells in its next turn
        if self.lost.is_set():
            raise ConnectionLost("the client closed the connection")

    async def flush(self) -> None:
        """Wait until everything written has been passed to the kernel."""
        self.transport.set_write_buffer_limits(high=0)
        await self.write(b"")
        self.transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)

    async def sleep(self, seconds: float) -> None:
        """Wait for some time, which may be infinite. Raises ConnectionLost as soon as the client closes."""
        if seconds > 0 and await wait_event(self.lost, seconds):
            raise ConnectionLost("the client closed the connection")

    def close(self) -> None:
        """Close the connection after everything written has been sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self, *, reset: bool = False) -> None:
        """Close the connection at once, without sending the rest; by a TCP reset if requested."""
        if self._transport is None:
            return
        connection = self._transport.get_extra_info("socket")
        if reset and connection is not None and connection.fileno() >= 0:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()
