"""Hits: complete objects, sent from the volume."""

from __future__ import annotations

from time import monotonic

import structlog
from sanic import HTTPResponse, Request

from services.api.accesses import AccessCounter
from services.api.assets.answer import CHUNK_BYTES, StreamingResponse, head_response
from services.api.assets.decision import AssetRequest, Representation, Span, select_range
from services.api.assets.hand_over import ACCEL_REQUEST_HEADER, AccelRedirect
from services.api.assets.heads import HIT, CacheOutcome, content_head, precondition_response
from services.api.assets.reading import read_chunk
from services.api.assets.timing import observe_first_byte
from services.api.errors import AbortResponse
from services.api.exchange import request_record
from shared.adapters.volume import OpenObject
from shared.domain.errors import VolumeError
from shared.observability.metrics import SENT_BYTES

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
