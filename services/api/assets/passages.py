"""Passages of proxied objects: short parts that are read once for many small ranges, and kept briefly in memory."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import structlog

from distributor_node.services.api.assets.decision import UNVERIFIED_TAIL_BYTES, Span
from distributor_node.shared.adapters.sources import SourceResponse
from distributor_node.shared.adapters.sources.client import MAX_SKIP, Expected
from distributor_node.shared.adapters.sources.failover import FailoverReader
from distributor_node.shared.domain.conditionals import NO_VALIDATORS, Validators
from distributor_node.shared.domain.objects import ContentHash, MediaObject, ObjectId, source_name
from distributor_node.shared.observability.metrics import SOURCE_FAILURES, source_label
from distributor_node.shared.waiting import TurnBudget, cancel_and_wait

MAX_SMALL_RANGE = UNVERIFIED_TAIL_BYTES
"""The longest range that is answered from a passage, in bytes."""

_MAX_BYTES = 16 * 1024 * 1024
_KEEP_SECONDS = 20.0
_EXPIRY_MARGIN = 0.1
_MAX_IGNORED = 1000

logger = structlog.get_logger()


class NoCorrectSource(Exception):
    """Every source that could deliver the object sent bytes that do not match its hash."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Bytes of one object from `first` on."""

    first: int
    data: bytes | bytearray
    media_type: str | None  # as the source stated it
    validators: Validators
    verified: bool  # the whole object was read, and has the hash

    def covers(self, span: Span) -> bool:
        """Whether all bytes of the span are here."""
        return span.last is not None and self.first <= span.first and span.last < self.first + len(self.data)

    def bytes_of(self, span: Span) -> bytes:
        """Return a copy of the span's bytes."""
        begin = span.first - self.first
        return bytes(memoryview(self.data)[begin : begin + (span.length or 0)])

    def tail(self) -> Passage:
        """Return the last MAX_SMALL_RANGE bytes of it."""
        dropped = max(0, len(self.data) - MAX_SMALL_RANGE)
        return replace(self, first=self.first + dropped, data=bytes(self.data[dropped:]))


@dataclass(frozen=True, slots=True)
class _Key:
    """The version of an object, and where the passage begins and ends (exclusive)."""

    object_id: ObjectId
    content_hash: ContentHash
    size: int
    first: int
    end: int
    is_tail: bool

    def is_of_same_version(self, other: _Key) -> bool:
        return (self.object_id, self.content_hash, self.size) == (
            other.object_id,
            other.content_hash,
            other.size,
        )


@dataclass(slots=True)
class _Reading:
    length: int  # bytes of the passage
    task: asyncio.Task[Passage]
    waiting: int = 0
    is_whole: bool = False  # the passage will be the whole object


@dataclass(slots=True)
class _Received:
    """What one pass over the sources has brought."""

    first: int
    contributors: set[str] = field(default_factory=set)
    data: bytearray = field(default_factory=bytearray)
    media_type: str | None = None
    validators: Validators = NO_VALIDATORS


class _NoRoom(Exception):
    """A source ignored the range, and there is no room for what it sends instead."""


class _WholeIsBeingRead(Exception):
    """A source ignored the range, and another reading brings the whole object."""


def is_small(media_object: MediaObject, span: Span) -> bool:
    """Whether a range may be answered from a passage: it is short, and a hash and a size tell which bytes are right."""
    known = media_object.content_hash is not None and media_object.size is not None
    return known and span.partial and 0 < (span.length or 0) <= MAX_SMALL_RANGE


class Passages:
    """Reads passages, each once for all who wait for it, and keeps them. One per process, used by one event loop."""

    def __init__(
        self,
        reader: FailoverReader,
        max_bytes: int = _MAX_BYTES,
        keep_seconds: float = _KEEP_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        turns: TurnBudget | None = None,
    ) -> None:
        """`max_bytes`: of all passages that are kept or being read, each counted as at least MAX_SMALL_RANGE. So the
        number of tiny ones is bounded too. `clock`: in seconds. `turns`: of all bodies that are streamed."""
        self._reader = reader
        self._max_bytes = max_bytes
        self._keep_seconds = keep_seconds
        self._clock = clock
        self._turns = turns or TurnBudget()
        self._kept: dict[
            _Key, tuple[Passage, float]
        ] = {}  # with the time when it expires, the next one first
        self._readings: dict[_Key, _Reading] = {}
        self._ignored: OrderedDict[MediaObject, float] = OrderedDict()  # until when its sources count as such

    @property
    def bytes_held(self) -> int:
        """What counts against `max_bytes`: the passages that are kept, and those being read as if complete."""
        kept = sum(_room_of(len(passage.data)) for passage, _ in self._kept.values())
        return kept + sum(_room_of(reading.length) for reading in self._readings.values())

    def find(self, media_object: MediaObject, span: Span) -> Passage | None:
        """Return a kept passage of this version of the object that covers the span."""
        self._expire()
        version = (media_object.object_id, media_object.content_hash, media_object.size)
        for key, (passage, _) in self._kept.items():
            if (key.object_id, key.content_hash, key.size) != version or not passage.covers(span):
                continue
            if passage.verified or not span.reaches_end:
                return passage
        return None

    def note_ranges_ignored(self, media_object: MediaObject) -> None:
        """Remember that no source sends a range of this object that begins beyond MAX_SKIP."""
        self._ignored[media_object] = self._clock() + self._keep_seconds
        self._ignored.move_to_end(media_object)
        if len(self._ignored) > _MAX_IGNORED:
            self._ignored.popitem(last=False)

    def is_out_of_reach(self, media_object: MediaObject, span: Span) -> bool:
        """Whether all sources have lately ignored such a range. Asking again would fill their buffers for nothing."""
        return span.first > MAX_SKIP and self._ignored.get(media_object, 0.0) > self._clock()

    async def read_tail(self, media_object: MediaObject, sources: Sequence[str]) -> Passage | None:
        """Read and verify the whole object. Returns its last MAX_SMALL_RANGE bytes, None if there is no room.

        The whole object is kept while there is room to spare: a source that ignores ranges would send it again for the
        next range.
        """
        return await self._read_once(media_object, sources)

    async def read_range(
        self, media_object: MediaObject, sources: Sequence[str], span: Span
    ) -> Passage | None:
        """Read the span. It is not kept, unless a source ignores the range: then what it sends is kept instead.

        That is verified if it is the whole object. None: there is no room.
        """
        return await self._read_once(media_object, sources, span)

    async def _read_once(
        self, media_object: MediaObject, sources: Sequence[str], span: Span | None = None
    ) -> Passage | None:
        """Read a passage, or wait for the reading of an equal one. Without `span` it is the tail.

        Raises AllSourcesFailed, and NoCorrectSource.
        """
        content_hash, size = media_object.content_hash, media_object.size
        if content_hash is None or size is None:
            return None
        first, end = max(0, size - MAX_SMALL_RANGE), size
        if span is not None:
            first, end = span.first, span.first + (span.length or 0)
        key = _Key(media_object.object_id, content_hash, size, first, end, is_tail=span is None)
        reading = self._readings.get(key) or (self._reading_of_whole(key) if span is None else None)
        if reading is None:
            if not self._make_room(_room_of(end - first)):
                return None
            work = self._read(key, media_object, sources)
            reading = self._readings[key] = _Reading(end - first, asyncio.create_task(work, name="passage"))
        try:
            return await self._result(reading)
        except _NoRoom:
            return None
        except _WholeIsBeingRead:
            whole = self._reading_of_whole(key)
            return None if whole is None else await self._result(whole)

    def _reading_of_whole(self, key: _Key) -> _Reading | None:
        """Return a reading that brings all bytes of this version of the object."""
        for other, reading in self._readings.items():
            if reading.is_whole and other.is_of_same_version(key):
                return reading
        return None

    async def _result(self, reading: _Reading) -> Passage:
        """Wait for a reading. It is cancelled when the last one that waits for it leaves."""
        task = reading.task
        reading.waiting += 1
        try:
            await asyncio.wait({task})
            return task.result()
        finally:
            reading.waiting -= 1
            if not reading.waiting and not task.done():
                # A request that comes now must not wait for a task that is being cancelled.
                self._forget_reading(reading)
                await cancel_and_wait(task)

    async def _read(self, key: _Key, media_object: MediaObject, sources: Sequence[str]) -> Passage:
        reading = self._readings[key]
        try:
            passage = await self._read_correct(key, reading, media_object, sources)
        finally:
            self._forget_reading(reading)
        if key.is_tail or passage.verified or len(passage.data) > key.end - key.first:
            self._kept.pop(key, None)
            self._kept[key] = (passage, self._clock() + self._keep_seconds)
            asyncio.get_running_loop().call_later(self._keep_seconds + _EXPIRY_MARGIN, self._expire)
        return passage

    def _forget_reading(self, reading: _Reading) -> None:
        self._readings = {key: other for key, other in self._readings.items() if other is not reading}

    async def _read_correct(
        self, key: _Key, reading: _Reading, media_object: MediaObject, sources: Sequence[str]
    ) -> Passage:
        """Read from the first source whose bytes have the object's hash, as far as all of them are read."""
        left = list(sources)
        while True:
            received = _Received(key.first)
            verifiable = await self._receive(key, reading, media_object, left, received)
            if verifiable is not False:
                return Passage(
                    received.first,
                    received.data,
                    received.media_type,
                    received.validators,
                    verified=verifiable is True,
                )
            report_corruption(self._reader, key.object_id, received.contributors)
            left = [url for url in left if url not in received.contributors]
            if not left or not received.contributors:
                raise NoCorrectSource

    async def _receive(
        self,
        key: _Key,
        reading: _Reading,
        media_object: MediaObject,
        sources: Sequence[str],
        received: _Received,
    ) -> bool | None:
        """Read once. Returns whether the bytes are right, None if they are not the whole object."""
        hasher, begin, end = key.content_hash.hasher(), 0 if key.is_tail else key.first, key.first

        def on_source(_: str, response: SourceResponse) -> None:
            nonlocal begin
            if received.contributors:
                return
            received.media_type, received.validators = response.media_type, response.validators
            length = response.length or 0
            if key.is_tail:
                if self.bytes_held - _room_of(reading.length) + _room_of(key.size) <= self._max_bytes // 2:
                    reading.length, reading.is_whole, received.first = key.size, True, 0
            elif length > key.end - key.first:
                if self._reading_of_whole(key) not in (None, reading):
                    raise _WholeIsBeingRead
                if not self._make_room(_room_of(length) - _room_of(reading.length)):
                    raise _NoRoom
                reading.length = max(reading.length, length)
                reading.is_whole = length == key.size
                begin = received.first = response.first

        expected = Expected(may_widen=not key.is_tail)
        async with aclosing(
            self._reader.stream(media_object, begin, key.end - 1, sources, on_source, expected=expected)
        ) as chunks:
            async for chunk in chunks:
                await self._turns.take(len(chunk.data))
                received.contributors.add(chunk.source)
                hasher.update(chunk.data)
                received.data += memoryview(chunk.data)[max(0, received.first - chunk.offset) :]
                end = chunk.offset + len(chunk.data)
        return hasher.digest() == key.content_hash.digest if (begin, end) == (0, key.size) else None

    def _expire(self) -> None:
        now = self._clock()
        while self._kept:
            key = next(iter(self._kept))
            if self._kept[key][1] > now:
                return
            del self._kept[key]

    def _make_room(self, room: int) -> bool:
        """Drop the oldest passages until `room` bytes are free. Returns False if those being read leave no room.

        Of whole objects, their tails are kept longer.
        """
        self._expire()
        for key, (passage, expires) in self._kept.items():
            if self.bytes_held + room <= self._max_bytes:
                return True
            if passage.verified and len(passage.data) > MAX_SMALL_RANGE:
                self._kept[key] = (passage.tail(), expires)
        while self.bytes_held + room > self._max_bytes:
            if not self._kept:
                return False
            del self._kept[next(iter(self._kept))]
        return True


def _room_of(length: int) -> int:
    """The bytes that a passage of `length` bytes counts as."""
    return max(length, MAX_SMALL_RANGE)


def report_corruption(
    reader: FailoverReader, object_id: ObjectId, contributors: set[str], *, resumed: bool = False
) -> None:
    """Log wrong bytes, and record them of the sources that sent them. `resumed`: some of the bytes were on disk."""
    logger.warning(
        "proxied_bytes_corrupt",
        object_id=object_id,
        sources=sorted(source_name(url) for url in contributors),
        resumed=resumed,
    )
    if resumed:
        return  # the corrupt bytes may be those on disk
    # With several contributors the corrupt one is unknown.
    corrupted = object_id if len(contributors) == 1 else None
    for url in contributors:
        SOURCE_FAILURES.labels(source=source_label(url), reason="invalid_response").inc()
        reader.report_corrupt(url, corrupted)
