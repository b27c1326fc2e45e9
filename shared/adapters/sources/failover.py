"""The bytes of one object from the first source that gives them; a source that fails is replaced at the same byte."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from distributor_node.shared.adapters.sources.client import SourceClient, SourceResponse
from distributor_node.shared.adapters.sources.health import SourceHealthRegistry
from distributor_node.shared.domain.errors import (
    AllSourcesFailed,
    SourceError,
    SourceRefused,
    SourceTooSlow,
    SourceUnreachable,
    SourceWrong,
)
from distributor_node.shared.domain.objects import MediaObject, ObjectId, source_name
from distributor_node.shared.domain.ranges import ByteRange

OnSource = Callable[[str, SourceResponse], None]
"""Told of each source in turn, by its URL, when its answer has begun and before its first byte is handed out."""

_OPEN_END = 10**15  # beyond any object; used only where nobody knows the size

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some bytes of the object, beginning at `offset`, and the URL of the source that gave them."""

    source: str
    offset: int
    data: bytes


class FailoverReader:
    """Reads objects through one client, and keeps the health of the sources by how they do."""

    def __init__(
        self, client: SourceClient, health: SourceHealthRegistry, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client = client
        self._health = health
        self._clock = clock

    async def stream(
        self,
        media_object: MediaObject,
        first: int,
        last: int | None,
        sources: Sequence[str],
        on_source: OnSource | None = None,
    ) -> AsyncGenerator[Chunk]:
        """Bytes `first` to `last` (both included; None: to the end) in order, without gap or overlap. Close it
        (`contextlib.aclosing`) when leaving early.

        Raises AllSourcesFailed when no source is left to ask; what was handed out until then is what the sources said.
        Where neither the catalog nor the first answer knows the size, nothing is switched after the first byte: what
        another source holds could be something else. A source that gave wrong bytes for this object is passed over.
        """
        span = _Span(media_object.size, first, last)
        rotation = _Rotation(self._health.best_first(sources, media_object.object_id))
        while not span.complete and (url := rotation.next_source()) is not None:
            began_at = span.position
            try:
                async with aclosing(self._from_one(url, span, on_source)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                self._health.record_success(url)
                return
            except SourceError as error:
                rotation.record_failure_of(url, error, sent_bytes=span.position > began_at)
                self._record_failure(url, error, span)
                if span.size is None and span.position > first:
                    break
        if not span.complete:
            raise AllSourcesFailed(rotation.errors)

    def report_corrupt(self, url: str, object_id: ObjectId | None) -> None:
        """The source's bytes turned out to be wrong: others are asked before it for a while, and it is not asked for
        `object_id` again (None: another source may be the one that lied)."""
        self._health.record_failure(url)
        if object_id is not None:
            self._health.record_corrupted(object_id, url)

    async def _from_one(self, url: str, span: _Span, on_source: OnSource | None) -> AsyncGenerator[Chunk]:
        asked_at = self._clock()
        async with self._client.get(url, span.byte_range, span.size) as answer:
            self._health.record_first_byte(url, self._clock() - asked_at)
            if on_source is not None:
                on_source(url, answer)
            async for data in answer.chunks:
                span.update_from(answer)
                offset, span.position = span.position, span.position + len(data)
                yield Chunk(url, offset, data)

    def _record_failure(self, url: str, error: SourceError, span: _Span) -> None:
        logger.info(
            "source_failed", source=source_name(url), reason=error.reason, detail=str(error), at=span.position
        )
        # That one object is not there, or that we have no free connection, says nothing of the source's other objects.
        missing = isinstance(error, SourceRefused) and 400 <= error.status < 500
        if type(error) is not SourceError and not missing:
            self._health.record_failure(url)


class _Span:
    """What is still to be read. `position`: the next byte; `size`: of the object, None while nobody has said it."""

    def __init__(self, size: int | None, first: int, last: int | None) -> None:
        self.size = size
        self.position = first
        self._last = last if last is not None or size is None else size - 1

    @property
    def complete(self) -> bool:
        return self._last is not None and self.position > self._last

    @property
    def byte_range(self) -> ByteRange | None:
        """What to ask for; None: the whole object."""
        to_the_end = self._last is None or (self.size is not None and self._last == self.size - 1)
        if self.position == 0 and to_the_end:
            return None
        return ByteRange(self.position, _OPEN_END if self._last is None else self._last)

    def update_from(self, answer: SourceResponse) -> None:
        """The first answer may know what the catalog does not."""
        if self.size is None and answer.total is not None:
            self.size = answer.total
            end = answer.total - 1
            self._last = end if self._last is None else min(self._last, end)


class _Rotation:
    """Each source has one turn, and a second one after all others have failed too, if it may do better then."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._waiting = deque((url, 1) for url in urls)
        self._round = 0
        self.errors: dict[str, SourceError] = {}

    def next_source(self) -> str | None:
        if not self._waiting:
            return None
        url, self._round = self._waiting.popleft()
        return url

    def record_failure_of(self, url: str, error: SourceError, *, sent_bytes: bool) -> None:
        self.errors[url] = error
        if self._round == 1 and _is_worth_retrying(error, sent_bytes=sent_bytes):
            self._waiting.append((url, 2))


def _is_worth_retrying(error: SourceError, *, sent_bytes: bool) -> bool:
    """A source that had begun well, could not be reached, or says that it is its own fault (5xx), is worth a second
    turn; one that was too slow to begin, or to take a connection, would only cost the same time again."""
    if isinstance(error, SourceTooSlow):
        return sent_bytes
    if isinstance(error, SourceRefused):
        return error.status >= 500
    if isinstance(error, SourceUnreachable):
        return not error.timed_out
    return not isinstance(error, SourceWrong)
