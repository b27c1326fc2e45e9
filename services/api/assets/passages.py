"""Passages of proxied objects: parts that are read once for many ranges, and kept briefly in memory.

A small range is answered from a passage when all of it is there. A longer range follows a stream, which other responses
may follow too, and of which the last bytes are kept.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import structlog

from distributor_node.services.api.assets.decision import UNVERIFIED_TAIL_BYTES, Span
from distributor_node.shared.adapters.sources import SourceResponse
from distributor_node.shared.adapters.sources.client import MAX_SKIP, Expected
from distributor_node.shared.adapters.sources.failover import (
    NO_PREFERENCE,
    FailoverReader,
    OnSource,
    Preference,
)
from distributor_node.shared.domain.conditionals import NO_VALIDATORS, Validators
from distributor_node.shared.domain.errors import AllSourcesFailed
from distributor_node.shared.domain.objects import ContentHash, MediaObject, ObjectId, source_name
from distributor_node.shared.domain.peers import PeerUse
from distributor_node.shared.observability.metrics import SOURCE_FAILURES, source_label
from distributor_node.shared.waiting import TurnBudget, cancel_and_wait

MAX_SMALL_RANGE = UNVERIFIED_TAIL_BYTES
"""The longest range that is answered from a passage, in bytes."""

STREAM_WINDOW = 1024 * 1024
"""Bytes of a stream that are kept for the responses that follow it."""

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
    arrived: _Received | None = None  # what is there of a range, if nothing of it can be verified
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # replaced at each change

    def notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


@dataclass(slots=True)
class _Received:
    """What one pass over the sources has brought."""

    first: int
    contributors: set[str] = field(default_factory=set)
    data: bytearray = field(default_factory=bytearray)
    media_type: str | None = None
    validators: Validators = NO_VALIDATORS

    def passage(self, *, verified: bool = False) -> Passage:
        return Passage(self.first, self.data, self.media_type, self.validators, verified=verified)


PassOn = Callable[[Passage], Awaitable[None]]
"""Is given what has arrived of a range, whenever more has."""


class _NoRoom(Exception):
    """A source ignored the range, and there is no room for what it sends instead."""


class _WholeIsBeingRead(Exception):
    """A source ignored the range, and another reading brings the whole object."""


def is_shareable(media_object: MediaObject, span: Span) -> bool:
    """Whether responses to ranges of this version may share bytes: a hash and a size tell which version it is."""
    known = media_object.content_hash is not None and media_object.size is not None
    return known and span.partial and (span.length or 0) > 0


def is_small(media_object: MediaObject, span: Span) -> bool:
    """Whether a range may be answered from a passage: it is short, and a hash and a size tell which bytes are right."""
    return is_shareable(media_object, span) and (span.length or 0) <= MAX_SMALL_RANGE


class _Stream:
    """A range that is being read, and the last STREAM_WINDOW bytes of it.

    It is read at the pace of the fastest response that follows it. One that falls behind by more than the window finds
    its next byte gone.
    """

    def __init__(self, key: _Key) -> None:
        self.key = key
        self.kept_from = self.end = key.first  # of the bytes kept
        self.response: tuple[str, SourceResponse] | None = None  # the first one
        self.task: asyncio.Task[None] | None = None
        self._error: AllSourcesFailed | None = None
        self._chunks: deque[bytes] = deque()
        self._followers: dict[object, int] = {}  # with the position of the next byte that each needs
        self._changed = asyncio.Event()

    def has_reached(self, position: int) -> bool:
        """Whether a response that needs the byte at `position` next can follow without waiting for others."""
        return self._error is None and self.kept_from <= position <= self.end and position < self.key.end

    @property
    def is_followed(self) -> bool:
        return bool(self._followers)

    @property
    def is_read(self) -> bool:
        """Whether all bytes of the range have arrived."""
        return self.end >= self.key.end

    def whole(self) -> bytes | None:
        """Return all bytes of the range, if they were read and are kept."""
        whole = (self.kept_from, self.end) == (self.key.first, self.key.end)
        return b"".join(self._chunks) if whole else None

    async def follow(self, position: int, last: int) -> AsyncGenerator[memoryview]:
        """Yield the bytes from `position` to `last` that this range has. Ends early where the next one is gone.

        Raises AllSourcesFailed.
        """
        follower = object()
        self._followers[follower] = position
        try:
            while position <= last and position < self.key.end:
                self._followers[follower] = position
                self._notify()
                while position >= self.end and self._error is None:
                    await self._changed.wait()
                if position >= self.end and self._error is not None:
                    raise self._error
                data = self._at(position)[: last + 1 - position]
                if not data:
                    return
                position += len(data)
                yield data
        finally:
            del self._followers[follower]
            self._notify()

    def _at(self, position: int) -> memoryview:
        offset = self.kept_from
        if position >= offset:
            for chunk in self._chunks:
                if position < offset + len(chunk):
                    return memoryview(chunk)[position - offset :]
                offset += len(chunk)
        return memoryview(b"")

    async def put(self, data: bytes) -> None:
        """Add the next bytes. Waits while that takes bytes from a response, unless another one waits for more."""
        while self._followers and self.end not in self._followers.values():
            if self.end + len(data) - min(self._followers.values()) <= STREAM_WINDOW:
                break
            await self._changed.wait()
        self._chunks.append(data)
        self.end += len(data)
        while self.end - self.kept_from - len(self._chunks[0]) >= STREAM_WINDOW:
            self.kept_from += len(self._chunks.popleft())
        self._notify()

    def fail(self, error: AllSourcesFailed) -> None:
        """End with an error, for those that have read all bytes before it."""
        self._error = error
        self._notify()

    def end_early(self) -> None:
        """No more bytes are read. Those that need more must not wait for them."""
        if self.end < self.key.end and self._error is None:
            self.fail(AllSourcesFailed({}))

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


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
        self._streams: list[_Stream] = []
        self._ended: list[_Stream] = []  # of which responses have not taken all bytes yet
        self._ignored: OrderedDict[MediaObject, float] = OrderedDict()  # until when its sources count as such

    @property
    def bytes_held(self) -> int:
        """What counts against `max_bytes`: passages that are kept, those being read as if complete, and streams."""
        kept = sum(_room_of(len(passage.data)) for passage, _ in self._kept.values())
        kept += (len(self._streams) + len(self._ended)) * STREAM_WINDOW
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

    def is_out_of_reach(self, media_object: MediaObject, first: int) -> bool:
        """Whether all sources have lately ignored a range that begins as far on as byte `first`.

        Asking again would fill their buffers for nothing.
        """
        return first > MAX_SKIP and self._ignored.get(media_object, 0.0) > self._clock()

    async def read_tail(self, media_object: MediaObject, sources: Sequence[str]) -> Passage | None:
        """Read and verify the whole object. Returns its last MAX_SMALL_RANGE bytes, None if there is no room.

        The whole object is kept while there is room to spare: a source that ignores ranges would send it again for the
        next range.
        """
        return await self._read_once(media_object, sources)

    async def read_range(
        self, media_object: MediaObject, sources: Sequence[str], span: Span, pass_on: PassOn | None = None
    ) -> Passage | None:
        """Read the span. It is not kept, unless a source ignores the range: then what it sends is kept instead.

        That is verified if it is the whole object. None: there is no room.

        `pass_on`: a range that a source sends as it was asked for is given on while it arrives, since it is not
        verified: from a slow source it takes seconds.
        """
        return await self._read_once(media_object, sources, span, pass_on)

    async def _read_once(
        self,
        media_object: MediaObject,
        sources: Sequence[str],
        span: Span | None = None,
        pass_on: PassOn | None = None,
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
            begun = _Reading(end - first, asyncio.create_task(work, name="passage"))
            begun.task.add_done_callback(lambda _: begun.notify())
            reading = self._readings[key] = begun
        try:
            return await self._result(reading, pass_on)
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

    async def _result(self, reading: _Reading, pass_on: PassOn | None = None) -> Passage:
        """Wait for a reading. It is cancelled when the last one that waits for it leaves."""
        task = reading.task
        reading.waiting += 1
        try:
            while not task.done():
                changed = reading.changed
                if reading.arrived is not None and pass_on is not None:
                    await pass_on(reading.arrived.passage())
                await changed.wait()
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
            self._keep(key, passage)
        return passage

    def _forget_reading(self, reading: _Reading) -> None:
        self._readings = {key: other for key, other in self._readings.items() if other is not reading}

    async def _read_correct(
        self, key: _Key, reading: _Reading, media_object: MediaObject, sources: Sequence[str]
    ) -> Passage:
        """Read from the first source whose bytes have the object's hash, as far as all of them are read."""
        left, preference = list(sources), NO_PREFERENCE
        while True:
            received = _Received(key.first)
            verifiable = await self._receive(key, reading, media_object, left, received, preference)
            if verifiable is not False:
                return received.passage(verified=verifiable is True)
            report_corruption(self._reader, key.object_id, received.contributors)
            preference = Preference(peers=PeerUse.NONE)
            if received.contributors <= set(left):  # else a peer may have sent the wrong bytes
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
        preference: Preference,
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
        await self._turns.take_request()
        async with aclosing(
            self._reader.stream(
                media_object,
                begin,
                key.end - 1,
                sources,
                on_source,
                expected=expected,
                preference=preference,
            )
        ) as chunks:
            async for chunk in chunks:
                await self._turns.take(len(chunk.data))
                received.contributors.add(chunk.source)
                hasher.update(chunk.data)
                received.data += memoryview(chunk.data)[max(0, received.first - chunk.offset) :]
                end = chunk.offset + len(chunk.data)
                if not key.is_tail and reading.length == key.end - key.first:
                    reading.arrived = received
                    reading.notify()
        return hasher.digest() == key.content_hash.digest if (begin, end) == (0, key.size) else None

    async def follow(
        self, media_object: MediaObject, sources: Sequence[str], span: Span, on_source: OnSource
    ) -> AsyncGenerator[memoryview]:
        """Yield the bytes of a range, from a stream that may serve other ranges too. Ends early if there is no room.

        `on_source` is called before the first bytes. Raises AllSourcesFailed.
        """
        position, last = span.first, span.first + (span.length or 0) - 1
        while position <= last:
            stream = self._find_stream(media_object, position) or self._begin_stream(
                media_object, sources, position, last
            )
            if stream is None:
                return
            try:
                async with aclosing(stream.follow(position, last)) as parts:
                    async for part in parts:
                        if position == span.first and stream.response is not None:
                            on_source(*stream.response)
                        position += len(part)
                        yield part
            finally:
                if stream in self._ended and not stream.is_followed:
                    self._ended.remove(stream)
                # A stream that has all its bytes only closes its response, and then they are kept for others.
                if not (stream.is_followed or stream.is_read or stream.task is None or stream.task.done()):
                    # A request that comes now must not follow a task that is being cancelled.
                    self._forget_stream(stream)
                    await cancel_and_wait(stream.task)

    def _find_stream(self, media_object: MediaObject, position: int) -> _Stream | None:
        version = (media_object.object_id, media_object.content_hash, media_object.size)
        for stream in self._streams:
            key = stream.key
            if (key.object_id, key.content_hash, key.size) == version and stream.has_reached(position):
                return stream
        return None

    def _begin_stream(
        self, media_object: MediaObject, sources: Sequence[str], first: int, last: int
    ) -> _Stream | None:
        """None: there is no room, or nothing tells which bytes are right."""
        content_hash, size = media_object.content_hash, media_object.size
        if content_hash is None or size is None or not self._make_room(STREAM_WINDOW):
            return None
        stream = _Stream(_Key(media_object.object_id, content_hash, size, first, end=last + 1, is_tail=False))
        self._streams.append(stream)
        work = self._fill_stream(stream, media_object, sources)
        stream.task = asyncio.create_task(work, name="shared-range")
        return stream

    async def _fill_stream(self, stream: _Stream, media_object: MediaObject, sources: Sequence[str]) -> None:
        def on_source(url: str, response: SourceResponse) -> None:
            stream.response = stream.response or (url, response)

        key = stream.key
        try:
            await self._turns.take_request()
            async with aclosing(
                self._reader.stream(media_object, key.first, key.end - 1, sources, on_source)
            ) as chunks:
                async for chunk in chunks:
                    await stream.put(bytes(chunk.data))
        except AllSourcesFailed as error:
            stream.fail(error)
        finally:
            self._forget_stream(stream)
            stream.end_early()
            if stream.is_followed:
                self._ended.append(stream)
        data = stream.whole()
        if data is not None and stream.response is not None and key.end < key.size:
            source = stream.response[1]
            self._keep(key, Passage(key.first, data, source.media_type, source.validators, verified=False))
            self._make_room(0)

    def _forget_stream(self, stream: _Stream) -> None:
        if stream in self._streams:
            self._streams.remove(stream)

    def _keep(self, key: _Key, passage: Passage) -> None:
        self._kept.pop(key, None)
        self._kept[key] = (passage, self._clock() + self._keep_seconds)
        asyncio.get_running_loop().call_later(self._keep_seconds + _EXPIRY_MARGIN, self._expire)

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
    for url in contributors:
        SOURCE_FAILURES.labels(source=source_label(url), reason="invalid_response").inc()
        # With several contributors the corrupt one is unknown. A peer among them is not asked again: one that always
        # cuts its answers would never be the only contributor, and the object can be had without it.
        certain = len(contributors) == 1 or reader.is_of_peer(url)
        reader.report_corrupt(url, object_id if certain else None)
