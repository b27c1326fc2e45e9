"""HTTP connections to sources, their limits, and the HTTP library's errors as SourceErrors.

This is where httpx reaches sources. A server that is not ours may send anything: the last part bounds the work that one
response causes.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import httpcore
import httpx

from distributor_node.shared.adapters.sources.network import (
    ExcessiveEvents,
    SourceNetwork,
    SourceStream,
    make_tls_context,
)
from distributor_node.shared.domain.errors import (
    ConfigurationError,
    InvalidInput,
    SourceError,
    SourceTooSlow,
    SourceUnreachable,
    SourceWrong,
    TooManyOpenFiles,
)
from distributor_node.shared.domain.urls import is_public, redirect_target


@dataclass(frozen=True, slots=True)
class SourceLimits:
    """Limits of one client. Times are seconds of waiting for the source."""

    connect_timeout: float = 3.0  # for TCP, and again for TLS
    first_byte_timeout: float = 5.0  # from the request to the end of the response's headers
    first_data_timeout: float | None = None  # to any bytes of a response, also of an interim one (1xx)
    stall_timeout: float = 10.0  # the window in which `minimum_rate` is measured
    minimum_rate: int = 8 * 1024  # bytes a second; a source below it is too slow
    max_connections: int = 200
    follow_to_other_hosts: bool = True  # whether a redirect may lead to another host than the one asked
    large_reads: bool = False  # large bodies come as views of up to 1 MiB, each to be dropped soon
    refuse_private: bool = False  # a source at an address that is not public counts as unreachable

    @property
    def minimum_bytes(self) -> int:
        """Bytes that must arrive within any `stall_timeout`."""
        return int(self.minimum_rate * self.stall_timeout)

    def __post_init__(self) -> None:
        if min(self.connect_timeout, self.first_byte_timeout, self.stall_timeout) <= 0:
            raise ConfigurationError(f"time limits of sources must be above 0, got {self}")
        if self.minimum_rate < 0 or self.max_connections < 1:
            raise ConfigurationError(
                f"minimum_rate must be at least 0 and max_connections at least 1, got {self}"
            )


MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_parsed = lru_cache(512)(httpx.URL)  # parts of one large object are asked for again and again
# httpcore's 64 KiB cost a third of the throughput on a fast link. The event loop reads 256 KiB at once anyway.
_READ_BYTES = 256 * 1024


class map_http_errors:  # noqa: N801 - used as a function
    """A context that raises SourceUnreachable for the library's exceptions, which are chained; SourceWrong for too many
    events.

    TooManyOpenFiles if this process could not even make a socket: the source is not to blame. A class, since a
    generator takes four times as long to enter and to leave (1.8 and 0.45 µs), several times in each request.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None:
            return
        if isinstance(error, ExcessiveEvents):
            raise SourceWrong(str(error)) from error
        if isinstance(error, httpx.HTTPError | httpx.InvalidURL | httpcore.ReadError | ssl.SSLError):
            if isinstance(error, httpx.ConnectError) and _lacks_descriptors(error):
                raise TooManyOpenFiles("no descriptor is left for a connection to a source") from error
            timed_out = isinstance(error, httpx.ConnectTimeout | httpx.ReadTimeout)
            raise SourceUnreachable(_describe(error), timed_out=timed_out) from error


def _lacks_descriptors(error: BaseException) -> bool:
    """Whether a failure to connect is due to this process. A failed look-up of a name does not tell: a trial does."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
            return True
        cause = cause.__cause__
    try:
        os.close(os.dup(0))
    except OSError as lacking:
        return lacking.errno in (errno.EMFILE, errno.ENFILE)
    return False


class Connections:
    """Connections to all sources. Call `open` before use.

    A semaphore limits their number, not httpcore's pool: when a request is cancelled while that pool is contended, its
    slot can be lost for ever.
    """

    def __init__(self, limits: SourceLimits) -> None:
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.max_connections)
        self._reusing: BoundedTransport | None = None
        self._fresh: BoundedTransport | None = None

    async def open(self) -> None:
        # httpcore has these settings only for the whole process.
        httpcore.AsyncHTTP11Connection.READ_NUM_BYTES = _READ_BYTES
        # Its own locks, anyio's, give the loop back each time they are taken, three times in a request, also when they
        # are free.
        for module in (httpcore._async.connection, httpcore._async.http11):
            module.AsyncLock = asyncio.Lock  # type: ignore[attr-defined]
        context = await make_tls_context()  # reads the certificates
        network = SourceNetwork(is_public if self._limits.refuse_private else None)
        self._reusing = BoundedTransport(context, self._limits.max_connections, network)
        self._fresh = BoundedTransport(context, 0, network)

    async def close(self) -> None:
        """Close every connection. Responses that are being read fail."""
        for transport in (self._reusing, self._fresh):
            if transport is not None:
                await transport.aclose()
        self._reusing = self._fresh = None

    @asynccontextmanager
    async def request(
        self, url: str, headers: dict[str, str], method: Literal["GET", "HEAD"] = "GET"
    ) -> AsyncIterator[httpx.Response]:
        """Send a request and yield the response when its headers have arrived.

        Redirects are followed, at most MAX_REDIRECTS of them. Each goes through the checks of a source's URL, and its
        connection through those of a source's address. Raises SourceWrong for one that must not be followed.
        """
        await self._take_slot()
        try:
            response = await self._send(method, url, headers)
            try:
                for _ in range(MAX_REDIRECTS):
                    if response.status_code not in _REDIRECTS:
                        break
                    url = self._redirect_target(url, response)
                    await response.aclose()
                    response = await self._send(method, url, headers)
                if response.status_code in _REDIRECTS:
                    raise SourceWrong(f"redirected more than {MAX_REDIRECTS} times")
                yield response
            finally:
                await response.aclose()
        finally:
            self._slots.release()

    def _redirect_target(self, url: str, response: httpx.Response) -> str:
        try:
            return redirect_target(
                url,
                response.headers.get("Location", ""),
                to_other_hosts=self._limits.follow_to_other_hosts,
            )
        except InvalidInput as error:
            raise SourceWrong(f"redirect not followed: {error}") from error

    async def _take_slot(self) -> None:
        if self._slots.locked():
            try:
                async with asyncio.timeout(self._limits.first_byte_timeout):
                    await self._slots.acquire()
            except TimeoutError as error:
                raise SourceError(f"all {self._limits.max_connections} connections are in use") from error
        else:
            await self._slots.acquire()  # at once

    async def _send(self, method: str, url: str, headers: dict[str, str]) -> httpx.Response:
        if self._reusing is None or self._fresh is None:
            raise SourceUnreachable("the source client is not open")
        try:
            return await self._send_on(self._reusing, method, url, headers)
        except _ReusedConnectionFailed:
            # A source may close an idle connection while we send. That is not a failure of the source.
            return await self._send_on(self._fresh, method, url, headers)

    async def _send_on(
        self, transport: BoundedTransport, method: str, url: str, headers: dict[str, str]
    ) -> httpx.Response:
        # httpx's read timeout applies to each read: headers could trickle in for ever, and it would apply to the body
        # too. `progress.deadline` limits all headers together. httpx limits the time to connect, for TCP and TLS each.
        # It leaks the socket of a handshake that is cancelled from outside, so our limit on that is a last resort.
        progress = _Progress(self._limits.first_byte_timeout)
        connect = self._limits.connect_timeout
        timeouts = {"connect": connect, "read": self._limits.first_data_timeout}  # see SourceStream.read
        extensions: dict[str, Any] = {"timeout": timeouts, "trace": progress.trace}
        try:
            with map_http_errors():
                request = httpx.Request(method, _parsed(url), headers=headers, extensions=extensions)
                async with asyncio.timeout(2 * connect + 1.0) as progress.deadline:
                    return await transport.handle_async_request(request)
        except TimeoutError as error:
            if progress.sending:
                raise SourceTooSlow(
                    f"no response headers within {self._limits.first_byte_timeout:g} s"
                ) from error
            raise SourceUnreachable(
                f"no connection within {2 * connect + 1.0:g} s", timed_out=True
            ) from error
        except SourceUnreachable as error:
            if progress.sending and not progress.connecting and not error.timed_out:
                raise _ReusedConnectionFailed(str(error)) from error
            raise


class _ReusedConnectionFailed(SourceUnreachable):
    """A request failed before its response, on a connection that had served other requests."""


class _Progress:
    """Follows the steps of one request, and sets its deadline."""

    def __init__(self, first_byte_timeout: float) -> None:
        """`first_byte_timeout`: seconds from sending the request to the end of the response's headers."""
        self.connecting = False
        self.sending = False
        self.deadline: asyncio.Timeout | None = None
        self._first_byte_timeout = first_byte_timeout

    async def trace(self, event: str, _: dict[str, Any]) -> None:
        """Called by httpcore at each step."""
        if event == "connection.connect_tcp.started":
            self.connecting = True
        elif event == "http11.send_request_headers.started" and self.deadline is not None:
            self.sending = True
            self.deadline.reschedule(asyncio.get_running_loop().time() + self._first_byte_timeout)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


_KEEP_ALIVE = 4.0  # seconds; Colossus closes idle connections after 5 s (Node's default)


class BoundedTransport(httpx.AsyncHTTPTransport):
    """A transport over SourceNetwork. It takes nothing from the environment: no proxy, no .netrc credentials."""

    def __init__(self, context: ssl.SSLContext, max_idle: int, network: SourceNetwork) -> None:
        super().__init__(verify=context, trust_env=False)
        # httpx has no parameter for the network backend of its pool, so the pool, still empty, is replaced.
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=None,
            max_keepalive_connections=max_idle,
            keepalive_expiry=_KEEP_ALIVE,
            network_backend=network,
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        stream, body = response.extensions.get("network_stream"), response.stream
        if (
            isinstance(stream, SourceStream)
            and isinstance(body, httpx.AsyncByteStream)
            and stream.at_body
            and _is_chunked(request, response)
        ):
            response.stream = _ChunkedStream(stream, body)
        return response


def _is_chunked(request: httpx.Request, response: httpx.Response) -> bool:
    """Whether a chunked body follows. h11 has refused every other transfer coding."""
    has_body = request.method != "HEAD" and response.status_code not in (204, 304)
    return has_body and "Transfer-Encoding" in response.headers


class _ChunkedStream(httpx.AsyncByteStream):
    """The content of a chunked body: all that one read of the connection holds is one piece."""

    def __init__(self, stream: SourceStream, body: httpx.AsyncByteStream) -> None:
        """`body`: the library's view of the same body."""
        self._stream = stream
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async with aclosing(self._decoded()) as pieces:
            async for piece in pieces:
                yield piece

    async def _decoded(self) -> AsyncGenerator[bytes]:
        decoder = ChunkedDecoder()
        while not decoder.complete:
            try:
                data = await self._stream.receive()
            except httpcore.ReadError as error:
                raise httpx.ReadError(str(error)) from error
            if not data:
                raise httpx.RemoteProtocolError("connection closed before the end of the chunked body")
            if piece := decoder.feed(data):
                yield piece
        # The library reads an empty body instead, and can use the connection for the next request.
        self._stream.unread(_END_OF_BODY + decoder.rest)
        async for _ in self._body:
            pass

    async def aclose(self) -> None:
        await self._body.aclose()


# Decoding. Pure.

_FREE_CHUNKS = 512
_BYTES_PER_CHUNK = 64  # on average, beyond the free chunks
_MAX_LINE = 4 * 1024  # bytes of a chunk's size line with its extensions, and of all trailers
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?", re.ASCII)
_END_OF_BODY = b"0\r\n\r\n"


class ChunkedDecoder:
    """Decodes one chunked body (RFC 9112 section 7.1). `rest`: what follows it, once `complete`."""

    def __init__(self) -> None:
        self.complete = False
        self.rest = b""
        self._pending = b""  # a line that is not complete
        self._left = 0  # bytes of the current chunk that are to come
        self._chunk_ends = False  # the line break after a chunk's content is due
        self._trailers = False
        self._chunks = 0
        self._bytes = 0

    def feed(self, data: bytes) -> bytes:
        """Return the content in `data`. Raises httpx.RemoteProtocolError, ExcessiveEvents."""
        if self._pending:
            data, self._pending = self._pending + data, b""
        content: list[bytes] = []
        position = 0
        while position < len(data) and not self.complete:
            if self._left:
                piece = data[position : position + self._left]
                position += len(piece)
                self._left -= len(piece)
                self._bytes += len(piece)
                content.append(piece)
                continue
            end = data.find(b"\r\n", position, position + _MAX_LINE)
            if end < 0:
                self._keep(data[position:])
                break
            self._take_line(data[position:end])
            position = end + 2
        if self.complete:
            self.rest = data[position:]
        return b"".join(content)

    def _keep(self, line: bytes) -> None:
        if len(line) >= _MAX_LINE:
            raise httpx.RemoteProtocolError(f"chunked body: a line has more than {_MAX_LINE} bytes")
        self._pending = line

    def _take_line(self, line: bytes) -> None:
        if self._trailers:
            self.complete = not line
            self._count()
        elif self._chunk_ends:
            if line:
                raise httpx.RemoteProtocolError("chunked body: expected a line break after a chunk")
            self._chunk_ends = False
        else:
            size = _SIZE.fullmatch(line)
            if size is None:
                raise httpx.RemoteProtocolError(f"chunked body: expected a chunk size, got {line[:20]!r}")
            self._left = int(size[1], 16)
            self._trailers = not self._left
            self._chunk_ends = not self._trailers
            self._count()

    def _count(self) -> None:
        self._chunks += 1
        if self._chunks > _FREE_CHUNKS + self._bytes // _BYTES_PER_CHUNK:
            raise ExcessiveEvents(
                f"chunked body: expected {_BYTES_PER_CHUNK} bytes or more per chunk, "
                f"got {self._chunks} chunks for {self._bytes} bytes"
            )
