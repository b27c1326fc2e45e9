"""Hits: complete objects, sent from the volume."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from time import monotonic
from typing import cast

import structlog
from sanic import HTTPResponse, Request
from sanic.http import Http, Stage

from distributor_node.services.api.accesses import AccessCounter
from distributor_node.services.api.assets.decision import AssetRequest, Representation, Span, select_range
from distributor_node.services.api.assets.headers import (
    CONTENT_LENGTH,
    HIT,
    CacheOutcome,
    ResponseHead,
    content_head,
    precondition_response,
)
from distributor_node.services.api.assets.page_cache import read_chunk
from distributor_node.services.api.errors import AbortResponse
from distributor_node.services.api.headers import DataSource
from distributor_node.services.api.request_log import observe_first_byte, request_record
from distributor_node.shared.adapters.volume import OpenObject
from distributor_node.shared.adapters.volume.layout import object_path
from distributor_node.shared.domain.conditionals import Conditions
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.observability.metrics import SENT_BYTES

ACCESS_RENEWAL_INTERVAL = 5.0
"""Seconds between the notes that a long send goes on."""

logger = structlog.get_logger()


class HitResponder:
    """Answers from complete objects. The caller closes the object."""

    def __init__(self, accesses: AccessCounter, accel_redirect: AccelRedirect) -> None:
        self._accesses = accesses
        self._accel_redirect = accel_redirect

    async def respond(
        self, request: Request, asset_request: AssetRequest, file: OpenObject
    ) -> HTTPResponse | None:
        """The answer, or None if it was streamed; VolumeError if nothing could be read. A HEAD leaves no trace."""
        representation = Representation.from_record(file.record, complete=True)
        request_record(request).size = representation.size
        span = select_range(asset_request, representation)
        if not isinstance(span, Span):
            return precondition_response(span, representation, HIT)
        if asset_request.is_head:
            return await head_response(request, content_head(representation, HIT, span, None))
        if self._accel_redirect.applies(asset_request, span, request.headers.get(ACCEL_REQUEST_HEADER)):
            return self._redirect_response(request, representation, span)
        return await self.send(request, file, representation, span, HIT)

    def _redirect_response(
        self, request: Request, representation: Representation, span: Span
    ) -> HTTPResponse:
        """Counted as if we had sent it."""
        head, length = content_head(representation, HIT, span, "local"), span.length or 0
        self._accesses.record_request(representation.object_id)
        observe_first_byte(request, head.result)
        request_record(request).sent = length
        SENT_BYTES.labels(source="local").inc(length)
        headers = self._accel_redirect.headers(representation.object_id, span, head.headers)
        return HTTPResponse(status=head.status, headers=headers)

    async def send(
        self,
        request: Request,
        file: OpenObject,
        representation: Representation,
        span: Span,
        outcome: CacheOutcome,
    ) -> HTTPResponse | None:
        """Send a span, whatever the cache result was when the request came. VolumeError: nothing was sent."""
        head = content_head(representation, outcome, span, "local")
        length = span.length or 0
        if length > CHUNK_BYTES and not file.lock_shared():
            # Its bytes may go at any moment: an answer that begins with them might never end
            raise VolumeError(f"{representation.object_id} is being removed")
        # Before anything is said to the client: a disk that fails now costs no answer.
        chunk = await self._read(file, span.first, min(CHUNK_BYTES, length))
        self._accesses.record_request(representation.object_id)
        if len(chunk) == length:
            observe_first_byte(request, outcome.result)
            SENT_BYTES.labels(source="local").inc(length)
            return HTTPResponse(chunk.obj, status=head.status, headers=head.headers)
        response = StreamingResponse(request)
        await response.start(head, chunk)
        await self._send_rest(response, file, span.first, length)
        await response.finish()
        return None

    async def _send_rest(
        self, response: StreamingResponse, file: OpenObject, first: int, length: int
    ) -> None:
        renewed_at = monotonic()
        while response.sent < length:
            if monotonic() - renewed_at >= ACCESS_RENEWAL_INTERVAL:
                renewed_at = monotonic()
                self._accesses.touch(file.record.object_id)
            try:
                chunk = await self._read(
                    file, first + response.sent, min(CHUNK_BYTES, length - response.sent)
                )
            except VolumeError as error:
                raise AbortResponse("object_unreadable") from error
            await response.send(chunk, "local")

    async def _read(self, file: OpenObject, offset: int, length: int) -> memoryview:
        """Exactly these bytes; VolumeError if the disk fails, or the file was cut short behind our back (what is
        missing is never made up)."""
        object_id = file.record.object_id
        try:
            chunk = await read_chunk(file.descriptor, offset, length)
        except OSError as error:
            logger.error("object_unreadable", object_id=object_id, reason=error.strerror)
            raise VolumeError(f"read {object_id}: {error.strerror}") from error
        if len(chunk) < length:
            logger.error("object_truncated", object_id=object_id, size=file.record.size)
            raise VolumeError(f"{object_id} was cut short")
        return chunk


# An answer whose body goes out piece by piece, at the client's pace.

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


# Hits whose bytes a web server in front sends by itself, from the shared volume (nginx's X-Accel-Redirect).
#
# The answer says where the file lies, and carries the headers as always; nginx adds the body. It judges ranges by
# itself,
# and would judge preconditions by its own idea of the file's validators: only requests without preconditions are
# handed
# over, and a range only if it is one that both read alike.

ACCEL_REQUEST_HEADER, ACCEL_RESPONSE_HEADER = "x-sendfile-type", "X-Accel-Redirect"
"""What the web server in front adds to a request that it can take over; no other is handed over, since its client would
be left without a body."""

_NO_CONDITIONS = Conditions()
# nginx states these of what it sends; Accept-Ranges of whole objects alone, and of those twice if we say it too.
_BODY_HEADERS = frozenset({"content-length", "content-range"})
_FULL_BODY_HEADERS = _BODY_HEADERS | {"accept-ranges"}


class AccelRedirect:
    """`prefix`: of the internal location through which the web server in front sees the volume; "": nothing is
    handed over."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.rstrip("/")

    def applies(self, asset_request: AssetRequest, span: Span, offer: str | None) -> bool:
        """Whether the bytes of this answer may be sent by whoever made this `offer` (the header's value)."""
        return (
            bool(self._prefix)
            and offer == ACCEL_RESPONSE_HEADER
            and not asset_request.is_head
            and asset_request.conditions == _NO_CONDITIONS
            and asset_request.if_range is None
            and (asset_request.range_header is None or span.partial)
        )

    def headers(self, object_id: ObjectId, span: Span, headers: Mapping[str, str]) -> dict[str, str]:
        """The headers of an answer without its body, with the place of the body."""
        left_to_nginx = _BODY_HEADERS if span.partial else _FULL_BODY_HEADERS
        remaining = {name: value for name, value in headers.items() if name.lower() not in left_to_nginx}
        return {**remaining, ACCEL_RESPONSE_HEADER: f"{self._prefix}/{object_path(object_id)}"}
