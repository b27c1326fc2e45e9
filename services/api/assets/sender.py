"""Hits: complete objects, sent from the volume."""

from __future__ import annotations

from time import monotonic

import structlog
from sanic import HTTPResponse, Request

from services.api.accesses import AccessCounter
from services.api.assets.answer import PIECE_BYTES, AnswerStream, answer_head
from services.api.assets.decision import Asked, Description, Span, select
from services.api.assets.hand_over import OFFER, HandOver
from services.api.assets.heads import HIT, CacheOutcome, content_head, refuse
from services.api.assets.reading import read_piece
from services.api.assets.timing import note_first_byte
from services.api.errors import AbortResponse
from services.api.exchange import request_record
from shared.adapters.volume import OpenObject
from shared.domain.errors import VolumeError
from shared.observability.metrics import SENT_BYTES

ACCESS_RENEWAL = 5.0
"""Seconds between the notes that a long send goes on."""

logger = structlog.get_logger()


class ObjectSender:
    """Answers from complete objects. The caller closes the object."""

    def __init__(self, accesses: AccessCounter, hand_over: HandOver) -> None:
        self._accesses = accesses
        self._hand_over = hand_over

    async def answer(self, request: Request, asked: Asked, found: OpenObject) -> HTTPResponse | None:
        """The answer, or None if it was streamed; VolumeError if nothing could be read. A HEAD leaves no trace."""
        described = Description.of_record(found.record, complete=True)
        request_record(request).size = described.size
        span = select(asked, described)
        if not isinstance(span, Span):
            return refuse(span, described, HIT)
        if asked.head:
            return await answer_head(request, content_head(described, HIT, span, None))
        if self._hand_over.suits(asked, span, request.headers.get(OFFER)):
            return self._handed_over(request, described, span)
        return await self.send(request, found, described, span, HIT)

    def _handed_over(self, request: Request, described: Description, span: Span) -> HTTPResponse:
        """Counted as if we had sent it."""
        head, length = content_head(described, HIT, span, "local"), span.length or 0
        self._accesses.record_request(described.object_id)
        note_first_byte(request, head.result)
        request_record(request).sent = length
        SENT_BYTES.labels(source="local").inc(length)
        headers = self._hand_over.headers(described.object_id, span, head.headers)
        return HTTPResponse(status=head.status, headers=headers)

    async def send(
        self, request: Request, found: OpenObject, described: Description, span: Span, outcome: CacheOutcome
    ) -> HTTPResponse | None:
        """Send a span, whatever the cache result was when the request came. VolumeError: nothing was sent."""
        head = content_head(described, outcome, span, "local")
        length = span.length or 0
        if length > PIECE_BYTES and not found.lock_shared():
            # Its bytes may go at any moment: an answer that begins with them might never end
            raise VolumeError(f"{described.object_id} is being removed")
        # Before anything is said to the client: a disk that fails now costs no answer.
        piece = await self._read(found, span.first, min(PIECE_BYTES, length))
        self._accesses.record_request(described.object_id)
        if len(piece) == length:
            note_first_byte(request, outcome.result)
            SENT_BYTES.labels(source="local").inc(length)
            return HTTPResponse(piece.obj, status=head.status, headers=head.headers)
        answer = AnswerStream(request)
        await answer.begin(head, piece)
        await self._send_rest(answer, found, span.first, length)
        await answer.finish()
        return None

    async def _send_rest(self, answer: AnswerStream, found: OpenObject, first: int, length: int) -> None:
        renewed = monotonic()
        while answer.sent < length:
            if monotonic() - renewed >= ACCESS_RENEWAL:
                renewed = monotonic()
                self._accesses.touch(found.record.object_id)
            try:
                piece = await self._read(found, first + answer.sent, min(PIECE_BYTES, length - answer.sent))
            except VolumeError as error:
                raise AbortResponse("object_unreadable") from error
            await answer.send(piece, "local")

    async def _read(self, found: OpenObject, offset: int, length: int) -> memoryview:
        """Exactly these bytes; VolumeError if the disk fails, or the file was cut short behind our back (what is
        missing is never made up)."""
        object_id = found.record.object_id
        try:
            piece = await read_piece(found.descriptor, offset, length)
        except OSError as error:
            logger.error("object_unreadable", object_id=object_id, reason=error.strerror)
            raise VolumeError(f"read {object_id}: {error.strerror}") from error
        if len(piece) < length:
            logger.error("object_truncated", object_id=object_id, size=found.record.size)
            raise VolumeError(f"{object_id} was cut short")
        return piece
