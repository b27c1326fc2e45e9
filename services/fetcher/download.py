"""Bytes from the sources into a partial file, written and hashed while more are received.

1. `Download.run` reads the missing bytes from one group of sources after the other, and verifies size and hash.
2. `PartialWriter` writes and hashes each batch in a thread while the next is received.
3. `groups_after_corruption` says which sources are tried after corrupt bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from collections.abc import Set as AbstractSet
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from typing import Any

import structlog

from distributor_node.services.fetcher.admission import FetchTask, LeaseRenewer
from distributor_node.services.fetcher.side_streams import MIN_SIZE, SentPart, SideStreamPlaces, SideStreams
from distributor_node.services.fetcher.window import ViewerWindow, WindowLimits
from distributor_node.shared.adapters.sources.client import Expected, SourceResponse
from distributor_node.shared.adapters.sources.failover import Chunk, FailoverReader, Preference
from distributor_node.shared.adapters.volume import PartialFile
from distributor_node.shared.domain.conditionals import NO_VALIDATORS
from distributor_node.shared.domain.errors import AllSourcesFailed, NotStorable, SourceWrong, VolumeError
from distributor_node.shared.domain.http_caching import (
    CachingRules,
    Freshness,
    freshness_of,
    is_useful,
    why_not_stored,
)
from distributor_node.shared.domain.media_types import media_type_or_none
from distributor_node.shared.domain.objects import Hasher, source_name
from distributor_node.shared.domain.peers import PeerUse
from distributor_node.shared.observability import tracing
from distributor_node.shared.observability.metrics import (
    PHASE,
    SOURCE_FAILURES,
    WINDOWED_FETCHES,
    WRITTEN_BYTES,
    source_label,
)
from distributor_node.shared.ports.state_store import Announcement, StateStore, Topic
from distributor_node.shared.runtime.threads import BlockingPool, ThreadCall, hash_through, wait_uncancellable
from distributor_node.shared.waiting import Backoff, wait_event

REHASH_CHUNK = 4 * 1024 * 1024

_MAX_RESTARTS = 2
"""How often one job begins again at the first byte, because nothing proves that the rest is of the same version."""

MAX_BATCH = 1024 * 1024
"""Bytes that are written without waiting for more."""

HIGH_WATER = 2 * MAX_BATCH
"""Received and unwritten bytes at which `put` waits, and with it the source."""

MAX_LATENCY = 0.05
"""Seconds after which received bytes are written, however few: clients of a slow source wait for them."""

_UNBATCHED_BYTES = 64 * 1024
"""The first bytes of a stream, which are written at once, unless they are the whole object."""

_SHORT_WRITE = 256 * 1024
"""Bytes that the event loop itself may write and hash. The first read of a connection seldom has more."""

_WRITEBACK_BYTES = 16 * 1024 * 1024
"""Written bytes that the disk is told to take, so that the sync at the end finds little left to do."""

_WRITEBACK_AFTER = 64 * 1024 * 1024
"""Bytes of a stream from which on the disk is told. So many are synced in a moment. While they arrive, a client may
wait for them, and where it takes the same CPUs, it would wait for the disk too."""

_WRITEBACK_AT_ONCE = 256 * 1024 * 1024
"""Bytes of an object from which on the disk is told from the beginning: a fetch of so many ends no sooner than the disk
has taken them."""

_MIN_WRITE = 64 * 1024
"""Mean bytes of a piece below which the pieces of a batch are joined. Joining copies, so larger ones are not."""

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """What may be stored."""

    largest_size: int = 2**63 - 1  # bytes of the largest object that is cached
    space_wait: float = 10.0  # seconds to wait for space for more bytes of an object of unknown length
    caching_rules: CachingRules | None = None  # if the objects are those of an HTTP origin
    side_streams: SideStreamPlaces = field(default_factory=lambda: SideStreamPlaces(0))
    window: WindowLimits | None = None  # None: all of each object is read


class AllSourcesCorrupt(SourceWrong):
    """Every source sent the whole object, and none sent the correct bytes."""


class Download:
    """Fills the partial file of one object with verified bytes.

    Space for an object of unknown length is reserved in steps, each before its bytes are written. Its length is known
    from the source's response, or at the end of that.
    """

    def __init__(
        self,
        state: StateStore,
        failover_reader: FailoverReader,
        disk: BlockingPool,
        task: FetchTask,
        partial: PartialFile,
        limits: FetchLimits,
    ) -> None:
        self._state = state
        self._limits = limits
        self._failover_reader = failover_reader
        self._disk = disk
        self._task = task
        self._object = task.media_object
        self._partial = partial
        self._renewer = task.renewer
        self._slot = task.slot
        self._peer_use = task.peer_use
        self._early = task.early
        self._window = self._make_window()
        self._total: int | None = None  # the length, as the source states it
        self._span = tracing.current_span()  # threads do not know it
        self._blamed: set[str] = set()  # sources of wrong bytes, each reported once
        self._suspects: list[tuple[SentPart, bytes]] = []  # of attempts with a wrong hash; SHA-256 of each

    async def run(self) -> None:
        """Read the missing bytes. On return, size and hash are correct and the file is marked as verified.

        Raises:
            AllSourcesFailed: the received bytes are kept.
            AllSourcesCorrupt: the file is empty again.
            LeaseLost: nothing was written after the loss.
            FetchPaused: there were no viewers for long, or others need its place. The received bytes are kept.
            VolumeError
        """
        groups: SourceGroups = (self._object.sources,)
        restarts = 0
        while groups:
            contributors: set[str] = set()
            resumed = self._partial.total > 0
            try:
                verified = await self._read_from(groups[0], contributors)
            except AllSourcesFailed as error:
                if self._must_start_over(error) and restarts < _MAX_RESTARTS:
                    restarts += 1
                elif len(groups) == 1:
                    raise
                else:
                    groups = groups[1:]
            else:
                if verified:
                    await self.announce()
                    await self._blame_by_extent()
                    if self._window is not None:
                        WINDOWED_FETCHES.labels(reason=self._window.rule.completion or "in_window").inc()
                    return
                self._report_corruption(contributors, resumed=resumed)
                if self._peer_use is PeerUse.COPY:
                    break  # no source is asked for a second copy
                self._peer_use = PeerUse.NONE  # one of them may have sent the corrupt bytes
                groups = groups_after_corruption(groups, contributors, resumed=resumed)
            await self._disk.run(self._partial.restart)
            await self.announce()
        raise AllSourcesCorrupt("all sources sent corrupt bytes")

    def _must_start_over(self, error: AllSourcesFailed) -> bool:
        """Whether no source can continue the bytes on disk, although one may send the object from its beginning."""
        if not self._partial.size or self._object.content_hash is not None or error.contradicts_size:
            return False
        if self._partial.record.growing:
            return True
        return error.contradicts_catalog or not self._partial.record.version.is_strong

    async def announce(self) -> None:
        """Wake the responses that wait for a change of the partial file."""
        await self._state.announce(Announcement(Topic.FETCH_CHANGED, self._object.object_id))

    async def _read_from(self, sources: Sequence[str], contributors: set[str]) -> bool:
        """Read the missing bytes and verify the whole. Returns whether it is correct.

        The sources that sent bytes are added to `contributors`.
        """
        expected = self._object.content_hash
        hasher = expected.hasher() if expected is not None else None
        offset = self._partial.size
        await self._hash_from_disk(hasher, 0, offset)
        if self._may_have_side_streams():
            return await self._read_all_extents(sources, contributors, hasher, offset)
        verified, _ = await self._read_in_order(sources, contributors, hasher, offset)
        if self._partial.record.growing:
            await self._end_growth()
        if self._partial.size != self._partial.record.size:
            return False
        return await self._disk.run(self._verify, hasher) if verified is None else verified

    def _make_window(self) -> ViewerWindow | None:
        """Not for objects without a hash: what was read of one may be no use once the source has another version."""
        size, limits = self._object.size, self._limits.window
        if limits is None or size is None or size <= limits.above or self._object.content_hash is None:
            return None
        return ViewerWindow(self._state, self._task, size, limits)

    def _may_have_side_streams(self) -> bool:
        if self._partial.is_sparse or self._window is not None:
            return True  # an earlier attempt had some, or this one needs to know what was read
        known = self._object.content_hash is not None and self._object.size is not None
        return known and self._limits.side_streams.most > 0 and self._partial.record.size >= MIN_SIZE

    async def _read_all_extents(
        self, sources: Sequence[str], contributors: set[str], hasher: Hasher | None, position: int
    ) -> bool:
        """Read in order, and skip what side streams have read. That is hashed from the disk."""
        side = SideStreams(
            self._state,
            self._failover_reader,
            self._disk,
            replace(self._task, peer_use=self._peer_use),
            self._partial,
            self._limits.side_streams,
            lambda: PartialWriter(self._partial, None, self._renewer, self._disk),
        )
        size, verified = self._partial.record.size, None
        window = (
            nullcontext() if self._window is None else self._window.running(resumed=self._partial.total > 0)
        )
        async with window, side.running(sources, self._window):
            try:
                while position < size and verified is None:
                    verified, position = await self._read_in_order(
                        sources, contributors, hasher, position, side
                    )
                    end = await side.prefix()
                    await self._hash_from_disk(hasher, position, end)
                    position = end
            finally:
                contributors.update(side.contributors)
        correct = await self._disk.run(self._verify, hasher) if verified is None else verified
        if not correct:
            for part in side.parts:
                self._suspects.append((part, await self._digest_of(part)))
        return correct

    async def _digest_of(self, part: SentPart) -> bytes:
        hasher = sha256()
        await self._hash_from_disk(hasher, part.first, part.end)
        return hasher.digest()

    async def _blame_by_extent(self) -> None:
        """Compare what sources sent in attempts that failed with the right bytes, which are on disk now."""
        corrupt: dict[str, list[str]] = {}
        for part, digest in self._suspects:
            if await self._digest_of(part) != digest:
                corrupt.setdefault(part.source, []).append(f"{part.first}-{part.end - 1}")
        for url, extents in corrupt.items():
            logger.warning("source_corrupt", source=source_name(url), extents=extents)
            self._blame(url)

    def _blame(self, url: str) -> None:
        if url not in self._blamed:
            self._blamed.add(url)
            self._failover_reader.report_corrupt(url, self._object.object_id)

    async def _read_in_order(
        self,
        sources: Sequence[str],
        contributors: set[str],
        hasher: Hasher | None,
        offset: int,
        side: SideStreams | None = None,
    ) -> tuple[bool | None, int]:
        """Read from `offset` on, to the end or to where an extent of a side stream begins.

        Returns whether all bytes are correct, None if they were not verified, and the end of what was read.
        """
        writer = PartialWriter(
            self._partial,
            hasher,
            self._renewer,
            self._disk,
            self.announce,
            partial(self._verify, hasher),
            self._reserve if self._object.size is None else None,
        )
        if side is not None:
            writer.on_written = side.on_written
            await side.until_needed()
        limit = self._partial.record.size if side is None else side.limit(offset, begun=False)
        asked_at = time.monotonic()
        early, self._early = self._early, None
        if early is not None and (offset or side is not None):
            await early.close()
        if early is not None and early.is_closed:
            early = None
        stream = self._stream(sources, offset, limit) if early is None else early.chunks(self._on_source)
        async with writer.writing(offset), aclosing(stream) as chunks:
            async for chunk in chunks:
                if not contributors:
                    waited = None if early is None else early.first_chunk_after
                    PHASE.labels("source_first_byte").observe(waited or time.monotonic() - asked_at)
                contributors.add(chunk.source)
                if side is None:
                    await writer.put(chunk.data)
                    continue
                meets = side.limit(offset)
                data = chunk.data[: meets - offset]
                side.on_read(chunk.source, len(data))
                offset += len(data)
                if data:
                    await writer.put(data)
                if offset == meets < limit:
                    break
                if offset < meets:
                    await side.until_needed()
        return writer.verified, offset

    def _stream(self, sources: Sequence[str], offset: int, limit: int) -> AsyncGenerator[Chunk]:
        """Ask the sources for the bytes from `offset` to `limit` (exclusive)."""
        first_choice = None if self._slot is None else self._slot.url
        # From the beginning, any version that a source has now is as good as the one that the catalog has seen. All
        # that follows must be of the same one.
        wanted = replace(
            self._object, validators=self._partial.record.validators if offset else NO_VALIDATORS
        )
        return self._failover_reader.stream(
            wanted,
            offset,
            None if limit == self._partial.record.size else limit - 1,
            sources,
            self._on_source,
            expected=Expected(must_match=offset > 0),
            preference=Preference(lambda url: url != first_choice, self._peer_use),
        )

    async def _reserve(self, end: int) -> None:
        """Make sure that `end` bytes of an object of unknown length are reserved. Called before they are written.

        Raises NotStorable if it is too large, VolumeError if there is no space in time.
        """
        reserved, total = self._partial.record.size, self._total
        if total is not None and self._partial.record.growing:
            # Known from the response: before the first byte, so that clients are told.
            await self._resize(total)
            self._partial.set_size(total, growing=False)
        elif end > reserved:
            step = max(end, min(2 * reserved, self._limits.largest_size))
            await self._resize(step)
            self._partial.set_size(step, growing=True)

    async def _resize(self, size: int) -> None:
        if size > self._limits.largest_size:
            raise NotStorable(f"larger than {self._limits.largest_size} bytes")
        lease, deadline = self._renewer.lease, time.monotonic() + self._limits.space_wait
        poll = Backoff(0.05, 0.5, jitter=False)
        while not await self._state.resize(lease, size):
            await self._renewer.ensure_valid()
            if time.monotonic() >= deadline:
                raise VolumeError(f"no space for {size} bytes of {self._object.object_id}")
            missing = size - self._partial.record.size
            await self._state.request_space(self._object.object_id, missing, self._limits.space_wait)
            await poll.wait()

    async def _end_growth(self) -> None:
        """The response has ended: release what is reserved beyond its length."""
        size = self._partial.size
        await self._resize(size)
        self._partial.set_size(size, growing=False)
        await self._disk.run(self._partial.write_sidecar)

    async def _hash_from_disk(self, hasher: Hasher | None, first: int, end: int) -> None:
        """Feed the hasher with bytes `first` to `end` (exclusive), which others have written."""
        if hasher is None or first >= end:
            return

        def read(offset: int, length: int) -> bytes:
            return self._partial.read(first + offset, min(length, end - first - offset))

        hashed = await hash_through(self._disk.run, read, hasher, chunk=REHASH_CHUNK)
        if hashed != end - first:
            raise VolumeError(
                f"partial file of {self._object.object_id}: expected {end - first} bytes, read {hashed}"
            )

    def _on_source(self, url: str, response: SourceResponse) -> None:
        """Called when a source starts to send."""
        self._renewer.set_source(url)
        if self._slot is not None:
            self._slot.move_to(url)
        if not self._partial.size:
            self._partial.set_version(response.validators, self._freshness_of(response))
            self._total = response.total
        if response.media_type is None or media_type_or_none(self._object.media_type) is not None:
            return
        # A response states its type with its first byte. Once the file has bytes, its type must not change.
        if self._partial.record.media_type is None or not self._partial.size:
            self._partial.set_media_type(response.media_type)

    def _freshness_of(self, response: SourceResponse) -> Freshness | None:
        """Return the freshness of an object of an HTTP origin. Raises NotStorable if it must not be stored."""
        if self._limits.caching_rules is None or self._object.content_hash is not None:
            return None
        why = why_not_stored(response.status, response.headers)
        freshness = freshness_of(response.headers, time.time(), response.delay, self._limits.caching_rules)
        if why is None and not is_useful(freshness, response.validators):
            why = "stale on arrival, without a validator"
        if why is not None:
            raise NotStorable(why)
        return freshness

    def _verify(self, hasher: Hasher | None) -> bool:
        """Compare the hash of the complete file. If correct, responses may send the last bytes. Blocking."""
        expected = self._object.content_hash
        with tracing.span("verification", parent=self._span) as span:
            if hasher is not None and expected is not None and hasher.digest() != expected.digest:
                span.fail("the bytes are not those of the content hash")
                return False
            self._partial.mark_verified()
        return True

    def _report_corruption(self, contributors: set[str], *, resumed: bool) -> None:
        logger.warning(
            "fetched_bytes_corrupt", sources=sorted(source_name(url) for url in contributors), resumed=resumed
        )
        for url in contributors:
            SOURCE_FAILURES.labels(source_label(url), SourceWrong.reason).inc()
        if resumed:
            return  # the corrupt bytes may be those on disk
        for url in contributors:
            # With several contributors the corrupt one is unknown. A peer among them is not asked again: one that
            # always cuts its answers would never be the only contributor, and the object can be had without it.
            if len(contributors) == 1 or self._failover_reader.is_of_peer(url):
                self._blame(url)


class PartialWriter:
    """Writes one batch while the next is received. Memory is bounded by HIGH_WATER and the batch being written."""

    def __init__(
        self,
        partial: PartialFile,
        hasher: Hasher | None,
        renewer: LeaseRenewer,
        disk: BlockingPool,
        on_first_bytes: Callable[[], Coroutine[Any, Any, None]] | None = None,
        on_complete: Callable[[], bool] | None = None,
        reserve: Callable[[int], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """Callbacks:

        - `on_first_bytes` is called once, when the first bytes are on disk and more are to come, and the kernel has
          told followers. It must not raise.
        - `on_complete` is called in the thread that wrote the object's last byte, so that clients wait for one thread
          switch instead of two. Its result is stored in `verified`. Not called while the length is unknown.
        - `reserve` is called before bytes are written, with the size that the file will have.
        - `on_written`, an attribute, is called after bytes were written, with the first one and their end.
        """
        self._partial = partial
        self._hasher = hasher
        self._renewer = renewer
        self._disk = disk
        self._on_first_bytes = on_first_bytes
        self._on_complete = on_complete
        self._reserve = reserve
        self.on_written: Callable[[int, int], None] | None = None
        self.verified: bool | None = (
            None  # None: `on_complete` was not called, for nothing was missing at the start
        )
        self._pending: list[bytes | memoryview] = []
        self._pending_bytes = 0
        self._small_rest = (
            0  # bytes of a small object, which make one batch: nothing is sent before all are there
        )
        self._began_at = self._offset = (
            0  # of the first byte that is given to `put`, and of the next one to write
        )
        self._received = 0
        self._closed = False
        self._writer: asyncio.Task[None] | None = None
        self._notify_task: asyncio.Task[None] | None = None
        self._writeback: asyncio.Task[None] | None = None
        self._has_data, self._batch_ready, self._has_room = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def writing(self, offset: int) -> AsyncIterator[None]:
        """Within the block, `put` the bytes that follow `offset`.

        When the block has ended, for any reason, all bytes given to `put` are on disk, unless the lease was lost, the
        disk failed, or `put` was cancelled. Errors of the disk are raised here or by `put`.
        """
        record = self._partial.record
        if record.size <= _UNBATCHED_BYTES and not record.growing and self._reserve is None:
            self._small_rest = record.size - offset
        self._began_at = self._offset = offset
        try:
            yield
        finally:
            failure = await self._end()
        if failure is not None:
            raise failure

    async def _end(self) -> BaseException | None:
        """Wait until all is written. Returns the writer's error."""
        self._closed = True
        self._has_data.set()
        self._batch_ready.set()
        try:
            if self._writer is not None:
                await wait_uncancellable(self._writer)
        finally:
            for task in (self._notify_task, self._writeback):
                if task is not None:
                    await wait_uncancellable(task)
        return None if self._writer is None else self._writer.exception()

    async def put(self, data: bytes | memoryview) -> None:
        """Hand over the next bytes. Waits while HIGH_WATER bytes are unwritten.

        What clients wait for is written at once, without the writer's task: the first piece of a stream, or a small
        object that is there as a whole.
        """
        self._pending.append(data)
        self._pending_bytes += len(data)
        self._received += len(data)
        if self._writer is None:
            is_first = self._pending_bytes == self._received
            if is_first and self._small_rest <= self._pending_bytes:
                is_short = self._pending_bytes <= _SHORT_WRITE and not self._partial.may_wait_for_sync
                await self._write_batch(self._disk.run_short if is_short else self._disk.run)
                return
            self._writer = asyncio.create_task(self._write_batches(), name="partial-writer")
            self._writer.add_done_callback(lambda _: self._has_room.set())
        self._has_data.set()
        if self._pending_bytes >= (self._small_rest or batch_size(self._received)):
            self._batch_ready.set()
        while self._pending_bytes >= HIGH_WATER and not self._writer.done():
            self._has_room.clear()
            await self._has_room.wait()
        if self._writer.done():
            self._writer.result()

    async def _write_batches(self) -> None:
        handed_over = self._began_at
        writeback_after = 0 if self._partial.record.size >= _WRITEBACK_AT_ONCE else _WRITEBACK_AFTER
        while await self._wait_for_batch():
            self._has_data.clear()
            self._batch_ready.clear()
            await self._write_batch(self._disk.run_short if self._small_rest else self._disk.run)
            if (
                self._offset - self._began_at > writeback_after
                and self._offset - handed_over >= _WRITEBACK_BYTES
                and (self._writeback is None or self._writeback.done())
            ):
                # In a thread of its own: where the disk is slow it blocks, and clients wait for the bytes that follow.
                work = self._disk.run(self._partial.start_writeback, handed_over, self._offset)
                self._writeback, handed_over = asyncio.create_task(work, name="writeback"), self._offset

    async def _write_batch(self, call: ThreadCall) -> None:
        """Write all that was put."""
        batch, self._pending = self._pending, []
        length, self._pending_bytes = self._pending_bytes, 0
        self._has_room.set()
        await self._renewer.ensure_valid()
        if self._reserve is not None:
            await self._reserve(self._offset + length)
        await call(self._write, self._offset, batch, length)
        first, self._offset = self._offset, self._offset + length
        WRITTEN_BYTES.inc(length)
        if self.on_written is not None:
            self.on_written(first, self._offset)
        notify, self._on_first_bytes = self._on_first_bytes, None
        if notify is not None and self.verified is None:
            # In the background, so that writing goes on. Where all bytes are written, `on_complete` has told of them.
            self._notify_task = asyncio.create_task(notify(), name="first-bytes")

    async def _wait_for_batch(self) -> bool:
        """Return True when a batch is to be written, False after the last one."""
        while not self._pending:
            if self._closed:
                return False
            await self._has_data.wait()
            self._has_data.clear()
        await wait_event(self._batch_ready, MAX_LATENCY)
        return True

    def _write(self, offset: int, batch: list[bytes | memoryview], length: int) -> None:
        """Blocking: call from a worker thread."""
        if length < len(batch) * _MIN_WRITE:
            batch = [b"".join(batch)]
        for data in batch:
            self._partial.write(offset, data)
            offset += len(data)
            if self._hasher is not None:
                self._hasher.update(data)
        complete = offset == self._partial.record.size and not self._partial.record.growing
        if complete and self._on_complete is not None:
            self.verified = self._on_complete()
        elif self._on_first_bytes is not None:
            self._partial.wake_followers()


def batch_size(received: int) -> int:
    """Return the bytes that make a batch, after `received` bytes of this stream.

    Any number for the first 64 KiB, which clients wait for. Then a quarter of the received bytes, so that clients that
    read the partial file are never far behind.
    """
    return 1 if received < _UNBATCHED_BYTES else min(received // 4, MAX_BATCH)


SourceGroups = tuple[tuple[str, ...], ...]
"""Groups of source URLs. Each group is one attempt at the whole object, with failover between its sources."""


def groups_after_corruption(
    groups: SourceGroups, contributors: AbstractSet[str], *, resumed: bool
) -> SourceGroups:
    """Return the groups to try after the first of `groups` sent corrupt bytes, which came from `contributors`.

    - If bytes of an earlier attempt were `resumed`, those may be the corrupt ones: all groups are tried again.
    - A single contributor is excluded.
    - With several contributors the corrupt one is unknown: first the other sources are tried together, then each
      contributor alone.
    """
    tried, *later = groups
    if resumed:
        return groups
    others = tuple(url for url in tried if url not in contributors)
    first = (others,) if others else ()
    suspects = tuple((url,) for url in tried if url in contributors) if len(contributors) > 1 else ()
    return (*first, *later, *suspects)
