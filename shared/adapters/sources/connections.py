"""HTTP connections to sources, their limits, and the HTTP library's errors as SourceErrors.

Requests and responses are httpx's, the transport is ours. A server that is not ours may send anything: the last parts
bound the work that one response causes.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import ssl
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

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


@contextmanager
def map_http_errors() -> Iterator[None]:
    """Raise SourceUnreachable for the library's exceptions, which are chained; SourceWrong for too many events.

    TooManyOpenFiles if this process could not even make a socket: the source is not to blame.
    """
    try:
        yield
    except ExcessiveEvents as error:
        raise SourceWrong(str(error)) from error
    except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError) as error:
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

    A semaphore limits the number of requests, and with it that of the connections in use.
    """

    def __init__(self, limits: SourceLimits) -> None:
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.max_connections)
        self._reusing: BoundedTransport | None = None
        self._fresh: BoundedTransport | None = None

    async def open(self) -> None:
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
        async with self._slot():
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

    def _redirect_target(self, url: str, response: httpx.Response) -> str:
        try:
            return redirect_target(
                url,
                response.headers.get("Location", ""),
                to_other_hosts=self._limits.follow_to_other_hosts,
            )
        except InvalidInput as error:
            raise SourceWrong(f"redirect not followed: {error}") from error

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._limits.first_byte_timeout):
                await self._slots.acquire()
        except TimeoutError as error:
            raise SourceError(f"all {self._limits.max_connections} connections are in use") from error
        try:
            yield
        finally:
            self._slots.release()

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
        # `progress.deadline` limits all headers together. The time to connect is limited for TCP and TLS each:
        # the limit on all of it is a last resort.
        progress = _Progress(self._limits.first_byte_timeout)
        connect = self._limits.connect_timeout
        try:
            with map_http_errors():
                message = encode_get(url, headers, method)
                async with asyncio.timeout(2 * connect + 1.0) as progress.deadline:
                    return await transport.exchange(
                        message, method, connect, self._limits.first_data_timeout, progress
                    )
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

    def start_sending(self) -> None:
        """The connection is there."""
        self.sending = True
        if self.deadline is not None:
            self.deadline.reschedule(asyncio.get_running_loop().time() + self._first_byte_timeout)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# HTTP/1.1 (RFC 9112) over SourceNetwork: one request at a time on each connection.

_KEEP_ALIVE = 4.0  # seconds; Colossus closes idle connections after 5 s (Node's default)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_NO_BODY = frozenset({204, 304})


class BoundedTransport(httpx.AsyncBaseTransport):
    """Sends requests of httpx over SourceNetwork. It takes nothing from the environment: no proxy, no .netrc
    credentials.

    With httpx's own transport a small response took twice the CPU time, for what no source needs: HTTP/2, proxies, two
    kinds of event loop.
    """

    def __init__(self, context: ssl.SSLContext, max_idle: int, network: SourceNetwork) -> None:
        """`max_idle`: idle connections that are kept for other requests."""
        context.set_alpn_protocols(["http/1.1"])
        self._context = context
        self._network = network
        self._max_idle = max_idle
        # With what closes each. The last used one is last
        self._idle: OrderedDict[SourceConnection, asyncio.TimerHandle] = OrderedDict()
        self._open: set[SourceConnection] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Return the response once its head has arrived. Raises httpx's errors, and ExcessiveEvents.

        Of the request's extensions, `timeout` has `connect` and `read`: see `exchange`.
        """
        timeouts = request.extensions.get("timeout", {})
        message = encode_request(request, await request.aread())
        return await self.exchange(message, request.method, timeouts.get("connect"), timeouts.get("read"))

    async def exchange(
        self,
        message: Message,
        method: str,
        connect_timeout: float | None,
        read_timeout: float | None,
        progress: _Progress | None = None,
    ) -> httpx.Response:
        """Send an encoded request. Raises as `handle_async_request`. `progress` is told of each step.

        Timeouts in seconds: `connect_timeout` for TCP and TLS each, `read_timeout`: see SourceStream.read_head.
        """
        connection = self._take_idle(message.origin)
        if connection is None:
            if progress is not None:
                progress.connecting = True
            connection = await self._connect(message.origin, connect_timeout)
        try:
            if progress is not None:
                progress.start_sending()
            with suppress(httpx.WriteError):  # the server may have responded before it closed
                connection.stream.write(message.data)
            head = parse_head(await connection.stream.read_head(read_timeout), method)
        except BaseException:
            self._drop(connection)
            raise
        body = _Body(connection.stream, head, partial(self._release, connection))
        return httpx.Response(head.status, headers=head.headers, stream=body)

    async def _connect(self, origin: Origin, timeout: float | None) -> SourceConnection:
        scheme, host, port = origin
        stream = await self._network.connect(host, port, timeout)
        if scheme == "https":
            await stream.start_tls(self._context, host, timeout)
        connection = SourceConnection(stream, origin)
        self._open.add(connection)
        return connection

    def _take_idle(self, origin: Origin) -> SourceConnection | None:
        """Return the connection to this server that was used last, and drop those that it has closed."""
        for connection in [one for one in reversed(self._idle) if one.origin == origin]:
            self._idle.pop(connection).cancel()
            if not connection.stream.is_readable:
                return connection
            self._drop(connection)
        return None

    def _release(self, connection: SourceConnection, *, reusable: bool) -> None:
        """Keep the connection for another request, or close it."""
        if not reusable or not self._max_idle or connection not in self._open:
            self._drop(connection)
            return
        if len(self._idle) >= self._max_idle:
            self._drop(next(iter(self._idle)))
        self._idle[connection] = asyncio.get_running_loop().call_later(_KEEP_ALIVE, self._drop, connection)

    def _drop(self, connection: SourceConnection) -> None:
        expiry = self._idle.pop(connection, None)
        if expiry is not None:
            expiry.cancel()
        self._open.discard(connection)
        connection.stream.abort()

    async def aclose(self) -> None:
        """Close every connection. Responses that are being read fail."""
        for connection in list(self._open):
            self._drop(connection)
        await asyncio.sleep(0)  # the event loop closes the sockets


Origin = tuple[str, str, int]
"""Scheme, host and port."""


@dataclass(eq=False, slots=True)
class SourceConnection:
    """An open connection, in use by one request or idle."""

    stream: SourceStream
    origin: Origin


class _Body(httpx.AsyncByteStream):
    """The content of one body: all that one read of the connection holds is one piece."""

    def __init__(self, stream: SourceStream, head: ResponseHead, release: Callable[..., None]) -> None:
        """`release`: called once, when the body is not read any more, with whether the connection is `reusable`."""
        self._stream = stream
        self._head = head
        self._release: Callable[..., None] | None = release
        self._complete = head.length == 0

    def __aiter__(self) -> AsyncIterator[bytes]:
        if self._head.chunked:
            return self._read_chunked()
        return self._read_to_end() if self._head.length is None else self._read_length(self._head.length)

    async def _read_length(self, length: int) -> AsyncGenerator[bytes]:
        left = length
        while left:
            data = await self._stream.receive()
            if not data:
                raise httpx.RemoteProtocolError(f"connection closed after {length - left} of {length} bytes")
            if len(data) > left:
                self._stream.unread(data[left:])
                data = data[:left]
            left -= len(data)
            self._complete = not left
            yield data

    async def _read_to_end(self) -> AsyncGenerator[bytes]:
        while data := await self._stream.receive():
            yield data

    async def _read_chunked(self) -> AsyncGenerator[bytes]:
        decoder = ChunkedDecoder()
        while not self._complete:
            data = await self._stream.receive()
            if not data:
                raise httpx.RemoteProtocolError("connection closed before the end of the chunked body")
            piece = decoder.feed(data)
            if decoder.complete:
                self._stream.unread(decoder.rest)
                self._complete = True
            if piece:
                yield piece

    async def aclose(self) -> None:
        if self._release is not None:
            release, self._release = self._release, None
            reusable = self._complete and self._head.keep_alive
            release(reusable=reusable)
            if not reusable:
                await asyncio.sleep(0)  # the event loop closes the socket


# Messages. Pure.

_TARGET = re.compile(rb"[\x21-\x7e]+")
# No segment begins with a dot, so none is "." or "..", which httpx resolves.
_PLAIN_URL = re.compile(
    r"(https?)://([a-z0-9](?:[a-z0-9.-]{0,200}[a-z0-9])?)(?::([1-9][0-9]{0,4}))?((?:/(?:[\w~-][\w.~-]*)?)*)",
    re.ASCII,
)
_PLAIN_HEADER = re.compile(r"[!-~](?:[ -~]*[!-~])?")
_FORBIDDEN = re.compile(rb"[\r\n\0]")  # in a name or a value of a request's header
_STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?: [^\0\r\n]*)?")
_FIELD = re.compile(rb"([-!#$%&'*+.^_`|~0-9A-Za-z]+):[ \t]*((?:[^\0\s]+(?:[ \t]+[^\0\s]+)*)?)[ \t]*")
_FOLD = re.compile(rb"\r?\n[ \t]+")  # obsolete; a client reads it as a space (RFC 9112 section 5.2)
_LENGTH = re.compile(rb"[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Message:
    """A request, and the server that it is for."""

    origin: Origin
    data: bytes


def encode_request(request: httpx.Request, body: bytes) -> Message:
    """Encode a request. Raises httpx.LocalProtocolError for what would not be one request."""
    url = request.url
    if url.scheme not in _DEFAULT_PORTS:
        raise httpx.UnsupportedProtocol(f"URL: expected http or https, got {url.scheme[:20]!r}")
    if not _TARGET.fullmatch(url.raw_path):
        raise httpx.LocalProtocolError("target of the request: expected visible characters")
    origin = (url.scheme, url.raw_host.decode("ascii"), url.port or _DEFAULT_PORTS[url.scheme])
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), url.raw_path)]
    for name, value in request.headers.raw:
        if _FORBIDDEN.search(name) or _FORBIDDEN.search(value):
            raise httpx.LocalProtocolError("header of the request: expected no line break")
        lines.append(b"%b: %b" % (name, value))
    return Message(origin, b"\r\n".join((*lines, b"", body)))


def encode_get(url: str, headers: Mapping[str, str], method: str = "GET") -> Message:
    """Encode a request without a body, as `encode_request` does.

    httpx takes 150 µs to understand a URL and headers. Most URLs need no change, and are taken as they are.
    """
    plain = _PLAIN_URL.fullmatch(url)
    if plain is None or not all(map(_PLAIN_HEADER.fullmatch, headers.values())):
        return encode_request(httpx.Request(method, url, headers=headers), b"")
    scheme, host, stated, path = plain.groups()
    default = _DEFAULT_PORTS[scheme]
    port = int(stated) if stated else default
    netloc = host if port == default else f"{host}:{port}"
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"{method} {path or '/'} HTTP/1.1\r\nHost: {netloc}\r\n{fields}\r\n"
    return Message((scheme, host, port), head.encode("ascii"))


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """What a response says before its body, and how its body ends: after `length` bytes, by its last chunk if it is
    `chunked`, or with the connection if `length` is None."""

    status: int
    headers: list[tuple[bytes, bytes]]
    length: int | None
    chunked: bool
    keep_alive: bool  # the connection may serve another request


def parse_head(data: bytes, method: str) -> ResponseHead:
    """Read a head with its empty line, of a response to `method`. Raises httpx.RemoteProtocolError."""
    first, *lines = _FOLD.sub(b" ", data).rstrip(b"\r\n").split(b"\n")
    status_line = _STATUS_LINE.fullmatch(first.removesuffix(b"\r"))
    if status_line is None or data[data.find(b"\n") + 1] in b" \t":
        raise httpx.RemoteProtocolError(f"invalid status line: {first[:60]!r}")
    status, headers = int(status_line[2]), []
    lengths: set[bytes] = set()
    codings, options = [], []
    for line in lines:
        field = _FIELD.fullmatch(line.removesuffix(b"\r"))
        if field is None:
            raise httpx.RemoteProtocolError(f"invalid header line: {line[:60]!r}")
        name, value = field[1], field[2]
        match name.lower():
            case b"content-length":
                known, stated = bool(lengths), {one.strip() for one in value.split(b",")}
                lengths |= stated
                value = next(iter(stated))
                if len(lengths) != 1 or not _LENGTH.fullmatch(value):
                    raise httpx.RemoteProtocolError(f"invalid Content-Length: {field[2][:60]!r}")
                if known:
                    continue
            case b"transfer-encoding":
                codings.append(value.lower())
            case b"connection":
                options += [option.strip() for option in value.lower().split(b",")]
        headers.append((name, value))
    if codings and codings != [b"chunked"]:
        raise httpx.RemoteProtocolError(f"Transfer-Encoding: expected chunked, got {codings[0][:60]!r}")
    length = int(next(iter(lengths))) if lengths and not codings else None
    chunked = bool(codings)
    if method == "HEAD" or status in _NO_BODY or status < 200:
        length, chunked = 0, False
    delimited = (chunked or length is not None) and status >= 200
    keep_alive = delimited and status_line[1] != b"0" and b"close" not in options
    return ResponseHead(status, headers, length, chunked, keep_alive)


_FREE_CHUNKS = 512
_BYTES_PER_CHUNK = 64  # on average, beyond the free chunks
_MAX_LINE = 4 * 1024  # bytes of a chunk's size line with its extensions, and of all trailers
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?", re.ASCII)


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
