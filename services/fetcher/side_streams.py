"""Side streams of one fetch: they fill gaps in front of viewers, while the main stream reads from the first byte on.

1. API processes report the bytes that viewers wait for. `SideStreams` looks for such reports several times a second.
2. The gaps in front of these bytes that no stream fills get one stream each, the one nearest to its viewer first, as
   long as the process has places for more.
3. A stream ends where the next extent, or the next stream, begins: no byte is read twice.
4. What was written is synced, and then named in the partial file's sidecar. Viewers follow what it names.
5. The main stream, too, ends where an extent or a stream begins. It goes on behind all that follows that without a gap.

Only objects with a content hash have side streams. Their bytes are read again and verified when all of them are there.

A large object has a window, too (`ViewerWindow`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from distributor_node.services.fetcher.admission import FetchTask, LeaseLost
from distributor_node.services.fetcher.window import ViewerWindow
from distributor_node.shared.adapters.sources.client import SourceResponse
from distributor_node.shared.adapters.sources.failover import FailoverReader, Preference
from distributor_node.shared.adapters.volume import PartialFile
from distributor_node.shared.domain.errors import AllSourcesFailed, StateStoreUnavailable, VolumeError
from distributor_node.shared.domain.extents import BLOCK, Extent, Extents
from distributor_node.shared.domain.space import RECORD_BYTES
from distributor_node.shared.observability.metrics import (
    SIDE_STREAMS,
    SIDE_STREAMS_IN_PROGRESS,
)
from distributor_node.shared.ports.state_store import Announcement, StateStore, Topic
from distributor_node.shared.runtime.threads import BlockingPool
from distributor_node.shared.waiting import background, cancel_and_wait

MIN_SIZE = 4 * 1024 * 1024
"""Bytes of the smallest object that has side streams: no range of a smaller one is far."""

STEER_INTERVAL, IDLE_STEER_INTERVAL = 0.1, 0.25
"""Seconds between two looks at what viewers wait for; the second while they have waited for nothing lately."""

NAMING_INTERVAL = 0.02
"""Seconds between two versions of the sidecar, at least."""

MAX_AHEAD = 8 * 1024 * 1024
"""Bytes between a viewer and the gap in front of it up to which it is worth a stream."""

_MIN_MISSING = 64 * 1024
"""Bytes of which the main stream reads the last ones."""

_GATHERING = 0.05
"""Seconds for which more viewers are awaited before a stream begins: one that ends early reads some bytes in vain."""

_RETRY_AFTER = 3.0  # seconds after a stream has failed
_IDLE_AFTER = 3.0
_UNUSED_AFTER = 3.0
"""Seconds after which a side stream that no viewer needs ends."""
_MAX_FAILED = 64

logger = structlog.get_logger()


class Writer(Protocol):
    """As PartialWriter."""

    on_written: Callable[[int, int], None] | None

    def writing(self, offset: int) -> AbstractAsyncContextManager[None]:
        """Within the block, `put` the bytes that follow `offset`."""

    async def put(self, data: bytes | memoryview) -> None:
        """Hand over the next bytes."""


class SideStreamPlaces:
    """How many side streams one process has at once, over all of its fetches."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0

    @property
    def free(self) -> int:
        return max(0, self.most - self.taken)


@dataclass(slots=True)
class SentPart:
    """Bytes `first` to `end` (exclusive), which one source has sent."""

    source: str  # URL
    first: int
    end: int


@dataclass(slots=True, eq=False)
class _Stream:
    first: int
    position: int  # of the next byte to read
    sent: list[SentPart] = field(default_factory=list)
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    def advance(self, source: str, length: int) -> None:
        """`length` bytes of this source were read."""
        if not self.sent or self.sent[-1].source != source:
            self.sent.append(SentPart(source, self.position, self.position))
        self.position += length
        self.sent[-1].end = self.position


def gaps_to_fill(
    wanted: Sequence[int], there: Extents, filling: Iterable[int], size: int, at_most: int
) -> list[Extent]:
    """Return the gaps that get a stream, the nearest to a viewer first.

    `wanted`: offsets for which viewers wait. `there`: what was read, written or not. `filling`: offsets of the next
    bytes of all streams. A gap begins at a whole block if it can: only whole blocks can be named.
    """
    filled = set(filling)
    found: dict[int, tuple[int, Extent]] = {}
    for position in wanted:
        gap = there.gap_at(position, size) if 0 <= position < size else None
        if gap is None or gap.first - position > MAX_AHEAD:
            continue
        first = max(gap.first // BLOCK * BLOCK, there.nearest_end(gap.first))
        distance = gap.first - position
        if first not in filled and (first not in found or distance < found[first][0]):
            found[first] = distance, Extent(first, gap.end)
    nearest = sorted(found.values(), key=lambda entry: (entry[0], entry[1].first))
    return [gap for _, gap in nearest[:at_most]]


class SideStreams:
    """The side streams of one attempt at one object, and the extents that all of its streams have written."""

    def __init__(
        self,
        state: StateStore,
        failover_reader: FailoverReader,
        disk: BlockingPool,
        task: FetchTask,
        partial: PartialFile,
        places: SideStreamPlaces,
        make_writer: Callable[[], Writer],
    ) -> None:
        self._state = state
        self._failover_reader = failover_reader
        self._disk = disk
        self._partial = partial
        self._size = partial.record.size
        self._object = task.media_object
        self._preference = Preference(peers=task.peer_use)
        self._renewer = task.renewer
        self._slot = task.slot
        self._places = places
        self._make_writer = make_writer
        self._window: ViewerWindow | None = None
        self.written = partial.extents
        self._main: _Stream | None = _Stream(partial.size, partial.size)  # None: it waits for others
        self._streams: list[_Stream] = []
        self._all = [self._main]  # that there were
        self._failed: dict[int, float] = {}  # where streams have failed, and when
        self._ranges_ignored = False  # by a source: then there are no more side streams
        self._named = Extents()
        self._unnamed = asyncio.Event()
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def running(
        self, sources: Sequence[str], window: ViewerWindow | None = None
    ) -> AsyncIterator[None]:
        """Within the block, read what viewers want. At its end all that was written is named.

        `window`: how far ahead of them. None: to the end.
        """
        self._window = window
        try:
            async with (
                background(self._steer(sources), "side-streams"),
                background(self._name_written(), "extents"),
            ):
                yield
        finally:
            await cancel_and_wait(*(stream.task for stream in self._streams if stream.task is not None))
            if self._partial.is_sparse and self._renewer.is_valid and self.written != self._named:
                await self._name()

    # The main stream

    def limit(self, position: int, own: _Stream | None = None, *, begun: bool = True) -> int:
        """Return where a stream that reads at `position` has to end: where the next extent or other stream begins.

        `begun`: a stream that has read nothing yet does not count. It is overtaken.
        """
        extents = self.written.extents
        if not self._streams and (not extents or extents[-1].first < position):
            return self._size  # the usual case, once for each chunk
        firsts = [extent.first for extent in extents]
        firsts += [
            stream.first for stream in self._streams if stream is not own and (stream.sent or not begun)
        ]
        return min((first for first in firsts if first >= position), default=self._size)

    def on_read(self, source: str, length: int) -> None:
        """The main stream has read so many bytes."""
        if self._main is not None:
            self._main.advance(source, length)

    def on_written(self, first: int, end: int) -> None:
        """Any stream has written some bytes."""
        self.written = self.written.adding(first, end)
        self._unnamed.set()
        self._notify()

    async def prefix(self) -> int:
        """Return how many bytes were written from the first one on, once no stream adds to them.

        The main stream, which has ended, goes on there.
        """
        self._main = None
        if self._prefix_grows() and self._window is not None:
            with self._window.main_stream_held(self._size - self.written.total):
                await self._until_prefix_stays()
        else:
            await self._until_prefix_stays()
        prefix = self.written.prefix
        self._main = _Stream(prefix, prefix)
        self._all.append(self._main)
        return prefix

    def _prefix_grows(self) -> bool:
        return any(stream.first <= self.written.prefix <= stream.position for stream in self._streams)

    async def _until_prefix_stays(self) -> None:
        while self._prefix_grows():
            await self._changed.wait()

    async def until_needed(self) -> None:
        """Wait while the main stream is too far ahead of the viewers. Meant to be called before each read."""
        window, main = self._window, self._main
        if window is None or main is None or self._may_read(main):
            return
        with window.main_stream_held(self._size - self.written.total):
            window.look_now()
            while not self._may_read(main):
                await window.change()

    async def _is_needed(self, stream: _Stream) -> bool:
        """As `until_needed`, for a side stream. False: no viewer has needed it for a while."""
        window = self._window
        if window is None or self._may_read(stream):
            return True
        needed_at = time.monotonic()
        with window.side_stream(-1):
            window.look_now()
            while not self._may_read(stream):
                await window.change()
                if window.rule.has_viewer_of(stream.position, self._read()):
                    needed_at = time.monotonic()
                elif time.monotonic() - needed_at >= _UNUSED_AFTER:
                    return False
        return True

    def _may_read(self, stream: _Stream) -> bool:
        if self._window is None or self._window.rule.completion is not None:
            return True
        filling = [other.position for other in self._running() if other is not stream]
        main = stream is self._main
        return self._window.rule.may_read(stream.position, self._read(), filling, main=main)

    def _running(self) -> list[_Stream]:
        return [*self._streams] if self._main is None else [*self._streams, self._main]

    def _read(self) -> Extents:
        """What was read, written or not."""
        return Extents.of(
            *((extent.first, extent.end) for extent in self.written),
            *((stream.first, stream.position) for stream in self._running()),
        )

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # Steering

    async def _steer(self, sources: Sequence[str]) -> None:
        if not self._places.most:
            return
        wanted_at = time.monotonic()
        while True:
            now = time.monotonic()
            await asyncio.sleep(STEER_INTERVAL if now - wanted_at < _IDLE_AFTER else IDLE_STEER_INTERVAL)
            if not self.written.total or self._size - self.written.total < _MIN_MISSING:
                continue  # the first bytes say which type the others are of, and the last ones are on their way
            try:
                wanted = await self._wanted()
                if wanted:
                    wanted_at = time.monotonic()
                if self._gaps(wanted) and await self._may_write_anywhere():
                    # Viewers often come together, and a stream that is begun later takes the rest of another one.
                    await asyncio.sleep(_GATHERING)
                    wanted = await self._wanted()
                    for gap in self._gaps(wanted):
                        self._begin(gap, sources)
            except StateStoreUnavailable:
                continue  # viewers are served from sources

    async def _wanted(self) -> Sequence[int]:
        (wanted,) = await self._state.wanted_positions([self._object.object_id])
        return wanted

    async def _may_write_anywhere(self) -> bool:
        if self._partial.is_sparse:
            return True
        try:
            await self._renewer.ensure_valid()
            await self._disk.run(self._partial.make_sparse, self.written.prefix)
        except (VolumeError, LeaseLost, StateStoreUnavailable) as error:
            logger.warning("partial_not_sparse", reason=str(error))
            return False
        self._unnamed.set()
        self._notify()
        return True

    def _gaps(self, wanted: Sequence[int]) -> list[Extent]:
        if self._ranges_ignored:
            return []
        oldest = time.monotonic() - _RETRY_AFTER
        self._failed = {first: at for first, at in self._failed.items() if at > oldest}
        filling = [*(stream.position for stream in self._running()), *self._failed]
        return gaps_to_fill(wanted, self._read(), filling, self._size, self._places.free)

    def _begin(self, gap: Extent, sources: Sequence[str]) -> None:
        stream = _Stream(gap.first, gap.first)
        self._streams.append(stream)
        self._all.append(stream)
        self._places.taken += 1
        stream.task = asyncio.create_task(self._fill(stream, sources), name="side-stream")

    async def _fill(self, stream: _Stream, sources: Sequence[str]) -> None:
        """Read from the stream's first byte to where the next extent begins."""
        slot = None if self._slot is None else self._slot.beside()

        def on_source(url: str, response: SourceResponse) -> None:
            if slot is not None:
                slot.move_to(url)
            # It skips to the range, which is not far. The main stream could not go on behind what it brings.
            self._ranges_ignored = self._ranges_ignored or "Content-Range" not in response.headers

        end, outcome = self.limit(stream.first, stream, begun=False), "failed"
        writer = self._make_writer()
        writer.on_written = self.on_written
        chunks = self._failover_reader.stream(
            self._object, stream.first, end - 1, sources, on_source, preference=self._preference
        )
        SIDE_STREAMS_IN_PROGRESS.inc()
        counted = nullcontext() if self._window is None else self._window.side_stream()
        try:
            with counted:
                async with aclosing(chunks), writer.writing(stream.first):
                    async for chunk in chunks:
                        if self._ranges_ignored or self._is_overtaken(stream):
                            break
                        limit = self.limit(stream.position, stream)
                        data = chunk.data[: limit - stream.position]
                        stream.advance(chunk.source, len(data))
                        if data:
                            await writer.put(data)
                        if stream.position == limit < end:
                            break
                        if stream.position < limit and not await self._is_needed(stream):
                            break
            outcome = "failed" if self._ranges_ignored else "done"
        except (AllSourcesFailed, VolumeError, LeaseLost, StateStoreUnavailable) as error:
            # The fetch goes on: its main stream meets the same failure, or gets here.
            logger.info("side_stream_failed", at=stream.position, reason=str(error)[:500])
            self._note_failure(stream.position)
            if isinstance(error, AllSourcesFailed):
                self._ranges_ignored = self._ranges_ignored or error.ranges_ignored
        except asyncio.CancelledError:
            outcome = "stopped"
            raise
        finally:
            SIDE_STREAMS_IN_PROGRESS.dec()
            SIDE_STREAMS.labels(end=outcome).inc()
            self._streams.remove(stream)
            self._places.taken -= 1
            if slot is not None:
                slot.release()
            self._notify()

    def _is_overtaken(self, stream: _Stream) -> bool:
        """Whether another stream, which may have ended, has read what this one was about to begin with.

        It must not write then: these bytes may have been hashed.
        """
        if stream.sent:
            return False
        read = any(other.first <= stream.first < other.position for other in self._running())
        return read or self.written.contains(stream.first, stream.first + 1)

    def _note_failure(self, position: int) -> None:
        self._failed[position] = time.monotonic()
        while len(self._failed) > _MAX_FAILED:
            del self._failed[next(iter(self._failed))]

    # What viewers may believe

    async def _name_written(self) -> None:
        """Name what was written, again and again, while the file is sparse."""
        while True:
            await self._unnamed.wait()
            self._unnamed.clear()
            if not self._partial.is_sparse:
                continue
            if await self._name():
                await asyncio.sleep(NAMING_INTERVAL)
            else:
                self._unnamed.set()
                await asyncio.sleep(_RETRY_AFTER)

    async def _name(self) -> bool:
        """Name what was written. Returns False if the disk, or the lease, does not let it."""
        written = self.written
        if self._size - written.total < 2 * RECORD_BYTES:
            return True  # all is verified soon, and there is no room beside it for a draft of the sidecar
        try:
            await self._renewer.ensure_valid()
            await self._disk.run(self._partial.name_extents, written)
        except (VolumeError, LeaseLost, StateStoreUnavailable) as error:
            logger.warning("extents_not_named", reason=str(error))
            return False
        before, self._named = self._named, written
        if len(written) != len(before):  # viewers wait for the first bytes of an extent
            await self._state.announce(Announcement(Topic.FETCH_CHANGED, self._object.object_id))
        return True

    # Which sources have sent what

    @property
    def parts(self) -> list[SentPart]:
        """What was read, by source."""
        return [part for stream in self._all for part in stream.sent if part.end > part.first]

    @property
    def contributors(self) -> set[str]:
        """URLs of the sources that have sent bytes."""
        return {part.source for part in self.parts}
