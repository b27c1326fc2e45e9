"""An answer whose body goes out piece by piece, at the client's pace."""

from __future__ import annotations

import asyncio
from typing import cast

from sanic import HTTPResponse, Request
from sanic.http import Http, Stage

from services.api.assets.heads import CONTENT_LENGTH, ResponseHead
from services.api.assets.timing import observe_first_byte
from services.api.exchange import request_record
from services.api.headers import DataSource
from shared.observability.metrics import SENT_BYTES

CHUNK_BYTES = 256 * 1024


async def head_response(request: Request, head: ResponseHead) -> HTTPResponse | None:
    """Answer a HEAD with 200. Without a known length the GET would be chunked, and so this says."""
    response = HTTPResponse(status=head.status, headers=head.headers)
    if CONTENT_LENGTH in head.headers or request.stream is None:
        return response
    # Left alone, Sanic would state a length of 0; told to stream, it cannot end a HEAD by itself.
    await request.respond(response)
    await response.send(b"", end_stream=False)
    connection = cast("Http", request.stream)
    connection.response_func = None  # type: ignore[assignment]
    connection.stage = Stage.IDLE
    return None


class StreamingResponse:
    """One streamed answer. Headers leave together with the first piece of the body, so that until then everything can
    still become a proper error; after that the only way out is to finish, or to raise AbortResponse.

    How long a client may take nothing is the connection's business, as is noticing that it has left.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._response: HTTPResponse | None = None
        self.sent = 0

    @property
    def started(self) -> bool:
        """True once headers have left."""
        return self._response is not None

    def set_object_size(self, size: int) -> None:
        """The object turned out to have so many bytes."""
        request_record(self._request).size = size

    async def start(self, head: ResponseHead, chunk: bytes | memoryview) -> None:
        """Send the head and the first piece. The head has the body's length, unless nobody knows it."""
        observe_first_byte(self._request, head.result)
        self._response = await self._request.respond(HTTPResponse(status=head.status, headers=head.headers))
        await self._write(self._response, chunk, head.source or "local")

    async def send(self, chunk: bytes | memoryview, source: DataSource) -> None:
        """Send a piece once the client has taken the ones before."""
        if self._response is None:
            raise RuntimeError("start comes first")
        # Where the client takes all at once nothing below waits, and other requests would.
        await asyncio.sleep(0)
        await self._write(self._response, chunk, source)

    async def finish(self) -> None:
        if self._response is not None:
            await self._response.send(end_stream=True)

    async def _write(self, response: HTTPResponse, chunk: bytes | memoryview, source: DataSource) -> None:
        # Counted before: the connection may write its record as soon as the last byte is handed over.
        self.sent += len(chunk)
        request_record(self._request).sent = self.sent
        SENT_BYTES.labels(source=source).inc(len(chunk))
        await response.send(chunk)  # type: ignore[type-var]
