"""Proxying: bytes of an object from a source to the client, verified while they pass where that can be."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace

import structlog

from services.api.assets.answer import AnswerStream
from services.api.assets.decision import Description, Span
from services.api.assets.heads import Standing, content_head
from services.api.assets.hold_back import VerifiedPassage
from services.api.errors import CutAnswer, ErrorAnswer
from shared.adapters.sources import SourceAnswer
from shared.adapters.sources.relay import Relay
from shared.adapters.volume import PartialReader
from shared.domain.errors import AllSourcesFailed
from shared.domain.objects import MediaObject, source_name
from shared.observability.metrics import PROXIED_IN_PROGRESS, SOURCE_FAILURES, source_label

_HASHED_AT_ONCE = 1024 * 1024
_RETRY_SECONDS = "5"

logger = structlog.get_logger()


@dataclass(slots=True)
class Passing:
    """What is being sent to one client. `preferred`: the source to ask first, the one that the object's fetch uses.

    `used`: the sources whose bytes passed; `media_type`: the first one's word.
    """

    answer: AnswerStream
    known: MediaObject
    described: Description
    span: Span
    standing: Standing
    preferred: str | None = None
    used: set[str] = field(default_factory=set)
    media_type: str | None = None

    def learn(self, url: str, told: SourceAnswer) -> None:
        """A source has begun to answer: it may know what the catalog does not."""
        if not self.answer.begun:
            self.media_type = told.media_type
            if self.span.last is None and told.total is not None:
                self.span = replace(self.span, last=told.total - 1, size=told.total)
                self.answer.note_size(told.total)

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
        head = content_head(self.described, self.standing, self.span, "external", self.media_type)
        await self.answer.begin(head, piece)


class Proxy:
    """One for each process: it bounds how many answers are proxied at once."""

    def __init__(self, relay: Relay, max_proxied: int) -> None:
        self._relay = relay
        self._free = max_proxied

    async def answer(self, passing: Passing) -> None:
        """Answer from a source. ErrorAnswer while nothing has been sent: 502, 504, or 503 if too many are proxied."""
        with self._place(begun=False):
            known, span = passing.known, passing.span
            sources = sorted(known.sources, key=lambda url: url != passing.preferred)
            while not await self._attempt(passing, sources, _passage(known, span), span.first):
                # Nothing has been sent yet: another source may hold the right bytes.
                sources = [url for url in sources if url not in passing.used]
                if not sources:
                    raise ErrorAnswer(502, "Every source holds wrong bytes", "sources_failed")
                passing.used = set()

    async def go_on(self, passing: Passing, reader: PartialReader) -> None:
        """Send what is missing of an answer whose growing file has stopped growing; CutAnswer if that fails.

        What completes an object must be verified: what lies on disk, and so what was sent, is hashed first.
        """
        with self._place(begun=True):
            known, span = passing.known, passing.span
            position = span.first + passing.answer.sent
            passage = None
            if span.reaches_end and known.content_hash is not None:
                passage = VerifiedPassage(known.content_hash, known.size)
                await asyncio.to_thread(_hash_file, reader, position, passage)
                if reader.state().gone:
                    raise CutAnswer("object_gone")
            await self._attempt(passing, known.sources, passage, position)

    async def _attempt(
        self, passing: Passing, sources: Sequence[str], passage: VerifiedPassage | None, first: int
    ) -> bool:
        """True when all was sent; False if the bytes were wrong and the client has got nothing at all."""
        last = passing.span.last
        try:
            async with aclosing(
                self._relay.stream(passing.known, first, last, sources, passing.learn)
            ) as pieces:
                async for piece in pieces:
                    passing.used.add(piece.source)
                    await passing.emit(passage.push(piece.data) if passage else (piece.data,))
        except AllSourcesFailed as error:
            raise _failed(error, passing.answer) from error
        if passage is not None:
            if not passage.verify():
                self._blame(passing)
                if passing.answer.begun:
                    raise CutAnswer("verification_failed")
                return False
            await passing.emit(passage.rest())
        await passing.finish()
        return True

    def _blame(self, passing: Passing) -> None:
        # Of several nobody knows who lied
        corrupted = passing.known.object_id if len(passing.used) == 1 else None
        for url in passing.used:
            SOURCE_FAILURES.labels(source=source_label(url), reason="wrong").inc()
            self._relay.blame(url, corrupted)
        logger.warning(
            "proxied_bytes_wrong",
            object_id=passing.known.object_id,
            sources=sorted(source_name(url) for url in passing.used),
        )

    @contextmanager
    def _place(self, *, begun: bool) -> Iterator[None]:
        if self._free <= 0:
            if begun:
                raise CutAnswer("too_many_proxied")
            raise ErrorAnswer(
                503, "Too many answers are being proxied", "unavailable", {"Retry-After": _RETRY_SECONDS}
            )
        self._free -= 1
        PROXIED_IN_PROGRESS.inc()
        try:
            yield
        finally:
            self._free += 1
            PROXIED_IN_PROGRESS.dec()


def _passage(known: MediaObject, span: Span) -> VerifiedPassage | None:
    """A range cannot be verified by itself: it is passed on, marked short-lived."""
    if known.content_hash is None or not span.whole:
        return None
    return VerifiedPassage(known.content_hash, known.size)


def _hash_file(reader: PartialReader, end: int, passage: VerifiedPassage) -> None:
    """Take the first `end` bytes on disk into account. A short read makes the verification fail, as it should."""
    position = 0
    while position < end:
        data = reader.read(position, min(_HASHED_AT_ONCE, end - position))
        if not data:
            return
        passage.skip(data)
        position += len(data)


def _failed(error: AllSourcesFailed, answer: AnswerStream) -> ErrorAnswer | CutAnswer:
    if answer.begun:
        return CutAnswer("source_failed")
    if error.too_slow:
        return ErrorAnswer(504, "Every source is too slow", "sources_too_slow")
    return ErrorAnswer(502, "No source could give the object", "sources_failed")
