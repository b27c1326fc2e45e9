"""Proxying: bytes of an object from a source to the client, verified while they pass where that can be."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace

import structlog

from services.api.assets.answer import AnswerStream
from services.api.assets.decision import Description, Span
from services.api.assets.heads import CacheOutcome, content_head
from services.api.assets.hold_back import VerifiedPassage
from services.api.errors import RETRY_LATER, AbortResponse, HttpError
from shared.adapters.sources import SourceResponse
from shared.adapters.sources.checks import MAX_SKIP
from shared.adapters.sources.relay import FailoverReader
from shared.adapters.volume import PartialReader
from shared.domain.errors import AllSourcesFailed, VolumeError
from shared.domain.objects import MediaObject, source_name
from shared.observability.metrics import PROXIED_IN_PROGRESS, SOURCE_FAILURES, source_label
from shared.settings.model import PublicApi

_HASHED_AT_ONCE = 1024 * 1024

logger = structlog.get_logger()


@dataclass(slots=True)
class Passing:
    """What is being sent to one client. `preferred`: the source to ask first, the one that the object's fetch uses.

    `used`: the sources whose bytes passed; `media_type`: the first one's word; `deadline`: of the first byte.
    """

    answer: AnswerStream
    known: MediaObject
    described: Description
    span: Span
    outcome: CacheOutcome
    preferred: str | None = None
    used: set[str] = field(default_factory=set)
    media_type: str | None = None
    deadline: asyncio.Timeout | None = None

    def learn(self, url: str, response: SourceResponse) -> None:
        """A source has begun to answer: it may know what the catalog does not."""
        if not self.answer.begun:
            self.media_type = response.media_type
            if self.span.last is None and response.total is not None:
                self.span = replace(self.span, last=response.total - 1, size=response.total)
                self.answer.note_size(response.total)

    async def emit(self, pieces: Iterable[bytes | memoryview]) -> None:
        for piece in pieces:
            if self.answer.begun:
                await self.answer.send(piece, "external")
            else:
                await self._begin(piece)

    async def finish(self) -> None:
        if not self.answer.begun:
            await self._begin(b"")
        await self.answer.finish()

    async def _begin(self, piece: bytes | memoryview) -> None:
        if self.deadline is not None:
            self.deadline.reschedule(None)  # from here on the client's pace counts
        head = content_head(self.described, self.outcome, self.span, "external", self.media_type)
        await self.answer.begin(head, piece)


class Proxy:
    """One for each process: it bounds how many answers are proxied at once."""

    def __init__(self, failover_reader: FailoverReader, settings: PublicApi) -> None:
        self._failover_reader = failover_reader
        self._free = settings.max_proxied
        self._first_byte_wait = settings.proxied_first_byte_wait
        self._farthest = min(settings.far_range_distance, MAX_SKIP)

    async def answer(self, passing: Passing) -> None:
        """Answer from a source. HttpError while nothing has been sent: 502, 504, or 503 if too many are proxied.

        All sources together have `proxied_first_byte_wait` for the first byte: a client that waits longer gives up.
        """
        with self._place(begun=False):
            try:
                async with asyncio.timeout(self._first_byte_wait) as passing.deadline:
                    await self._answer_rightly(passing)
            except TimeoutError as error:
                if passing.deadline is None or not passing.deadline.expired():
                    raise
                raise _too_slow() from error

    async def _answer_rightly(self, passing: Passing) -> None:
        sources = sorted(passing.known.sources, key=lambda url: url != passing.preferred)
        while True:
            passage = self._passage(passing.known, passing.span)
            first = passing.span.first if passage is None else 0
            if await self._attempt(passing, sources, passage, first):
                return
            # Nothing has been sent yet: another source may hold the right bytes.
            sources = [url for url in sources if url not in passing.used]
            if not sources:
                raise HttpError(502, "Every source holds wrong bytes", "sources_failed")
            passing.used = set()

    def _passage(self, known: MediaObject, span: Span) -> VerifiedPassage | None:
        """What reaches the object's end is verified from its first byte, unless that is far: such a range, and an inner
        one, is passed on as it is, marked short-lived."""
        if known.content_hash is None or not span.reaches_end or span.first > self._farthest:
            return None
        return VerifiedPassage(known.content_hash, known.size, first=span.first)

    async def go_on(self, passing: Passing, reader: PartialReader) -> None:
        """Send what is missing of an answer whose growing file has stopped growing; AbortResponse if that fails.

        What completes an object must be verified: what lies on disk, and so what was sent, is hashed first.
        """
        with self._place(begun=True):
            known, span = passing.known, passing.span
            position = span.first + passing.answer.sent
            passage = None
            if span.reaches_end and known.content_hash is not None:
                passage = VerifiedPassage(known.content_hash, known.size)
                try:
                    await asyncio.to_thread(_hash_file, reader, position, passage)
                except (OSError, VolumeError) as error:
                    raise AbortResponse("object_unreadable") from error
                if reader.state().unlinked:
                    raise AbortResponse("object_gone")
            await self._attempt(passing, known.sources, passage, position)

    async def _attempt(
        self, passing: Passing, sources: Sequence[str], passage: VerifiedPassage | None, first: int
    ) -> bool:
        """True when all was sent; False if the bytes were wrong and the client has got nothing at all."""
        last = passing.span.last
        try:
            async with aclosing(
                self._failover_reader.stream(passing.known, first, last, sources, passing.learn)
            ) as pieces:
                async for piece in pieces:
                    passing.used.add(piece.source)
                    await passing.emit(passage.push(piece.data) if passage else (piece.data,))
        except AllSourcesFailed as error:
            raise _failed(error, passing.answer) from error
        if passage is not None:
            if not passage.verify():
                self._note_wrong(passing, resumed=passage.resumed)
                if passing.answer.begun:
                    raise AbortResponse("verification_failed")
                return False
            await passing.emit(passage.rest())
        await passing.finish()
        return True

    def _note_wrong(self, passing: Passing, *, resumed: bool) -> None:
        logger.warning(
            "proxied_bytes_corrupt",
            object_id=passing.known.object_id,
            sources=sorted(source_name(url) for url in passing.used),
            resumed=resumed,
        )
        if resumed:
            return  # the wrong bytes may be those that came from elsewhere
        # Of several nobody knows who lied
        corrupted = passing.known.object_id if len(passing.used) == 1 else None
        for url in passing.used:
            SOURCE_FAILURES.labels(source=source_label(url), reason="invalid_response").inc()
            self._failover_reader.report_corrupt(url, corrupted)

    @contextmanager
    def _place(self, *, begun: bool) -> Iterator[None]:
        if self._free <= 0:
            if begun:
                raise AbortResponse("too_many_proxied")
            raise HttpError(503, "Too many answers are being proxied", "unavailable", RETRY_LATER)
        self._free -= 1
        PROXIED_IN_PROGRESS.inc()
        try:
            yield
        finally:
            self._free += 1
            PROXIED_IN_PROGRESS.dec()


def _hash_file(reader: PartialReader, end: int, passage: VerifiedPassage) -> None:
    """Take the first `end` bytes on disk into account. OSError, or VolumeError if there are fewer."""
    position = 0
    while position < end:
        data = reader.read(position, min(_HASHED_AT_ONCE, end - position))
        if not data:
            raise VolumeError(f"the partial file of {reader.object_id} was cut short")
        passage.skip(data)
        position += len(data)


def _failed(error: AllSourcesFailed, answer: AnswerStream) -> HttpError | AbortResponse:
    if answer.begun:
        return AbortResponse("source_failed")
    if error.too_slow:
        return _too_slow()
    return HttpError(502, "No source could give the object", "sources_failed")


def _too_slow() -> HttpError:
    return HttpError(504, "Every source is too slow", "sources_too_slow")
