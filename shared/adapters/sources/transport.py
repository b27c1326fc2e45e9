"""HTTP/1.1 from servers that are not ours: httpx on our own sockets, with a bound on the work that a response causes.

h11 spends tens of microseconds on each chunk of a body, and does not return to the event loop between chunks that have
arrived together. So chunked bodies are decoded here, all chunks of one read at once, and a body in very small chunks is
refused. `SourceStream` bounds heads, interim responses and small TCP segments.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import httpcore
import httpx

from distributor_node.shared.adapters.sources.network import ExcessiveEvents, SourceNetwork, SourceStream

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
