"""Following a growing file: its size is its progress, its mode says when it is verified."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from enum import Enum, auto
from time import monotonic

from services.api.accesses import AccessCounter
from services.api.assets.answer import CHUNK_BYTES, StreamingResponse
from services.api.assets.decision import Representation, Span, sendable_end
from services.api.assets.heads import CacheOutcome, content_head
from services.api.assets.reading import read_chunk
from services.api.assets.sender import ACCESS_RENEWAL_INTERVAL
from services.api.assets.watch import FetchPoller
from shared.adapters.volume import OpenObject, PartialReader, Volume

LOCK_RETRY_INTERVAL = 0.5
"""Seconds between attempts to keep an object from being removed, if no word of the worker comes before; less than
anybody's evictor.min_idle."""


class StreamEnd(Enum):
    """Why following ended: all was sent; the bytes sent are no longer those of the file; nobody writes it any more."""

    DONE = auto()
    FILE_REPLACED = auto()
    FETCH_ENDED = auto()


class PartialFileStreamer:
    """Follows the file of one object for one request."""

    def __init__(
        self,
        volume: Volume,
        accesses: AccessCounter,
        poller: FetchPoller,
        representation: Representation,
        span: Span,
        stall_timeout: float,
    ) -> None:
        """`stall_timeout`: seconds without a further byte after which a fetch counts as dead, whatever the store
        says."""
        self._volume = volume
        self._accesses = accesses
        self._poller = poller
        self._representation = representation
        self._span = span
        self._stall_timeout = stall_timeout
        self._media_type: str | None = None

    async def wait_for_first_byte(
        self, deadline: float, publish_failed: asyncio.Event
    ) -> OpenObject | PartialReader | None:
        """The file from which the span's first byte can be sent; None if there is none by `deadline` (monotonic), or
        the fetch is over or `publish_failed`. The caller closes it. VolumeError if the disk fails."""
        reader: PartialReader | None = None
        handed_out = False
        try:
            while True:
                reader = self._close_if_gone(reader) or self._volume.open_partial(
                    self._representation.object_id
                )
                on_disk = 0
                if reader is None:
                    # In this order: a file that became complete in between is seen now.
                    found = self._volume.open_object(self._representation.object_id)
                    if found is not None:
                        return self._if_matching(found)
                else:
                    state = reader.state()
                    on_disk = state.size
                    ready = sendable_end(self._span, on_disk, verified=state.verified) > self._span.first
                    if ready and not state.unlinked and self._matches_representation(verified=state.verified):
                        handed_out = True
                        return reader
                remaining = deadline - monotonic()
                if remaining <= 0 or publish_failed.is_set() or await self._poller.has_ended():
                    return None
                await self._poller.wait(on_disk, remaining)
        finally:
            if reader is not None and not handed_out:
                reader.close()

    async def stream(
        self, response: StreamingResponse, reader: PartialReader, outcome: CacheOutcome
    ) -> StreamEnd:
        """Send from the file until the span is sent or the file fails us. Nothing is sent beyond what may be."""
        async with self._locked_once_verified(reader):
            return await self._stream(response, reader, outcome)

    async def _stream(
        self, response: StreamingResponse, reader: PartialReader, outcome: CacheOutcome
    ) -> StreamEnd:
        span, object_id = self._span, self._representation.object_id
        end = span.first + (span.length or 0)
        renewed_at = monotonic()
        while (position := span.first + response.sent) < end:
            state = reader.state()
            # A client that took long to take the last piece must not make the fetch look dead.
            self._poller.observe(state.size)
            if state.unlinked or state.size < position:
                return StreamEnd.FILE_REPLACED
            if state.verified:
                reader.lock_shared()
            sendable = sendable_end(span, state.size, verified=state.verified)
            if sendable <= position:
                if self._poller.idle > self._stall_timeout or await self._poller.has_ended():
                    return StreamEnd.FETCH_ENDED
                await self._poller.wait(state.size)
                continue
            chunk = await self._read(reader, position, min(CHUNK_BYTES, sendable - position))
            if not chunk:
                return StreamEnd.FILE_REPLACED
            await self._send(response, chunk, outcome)
            if monotonic() - renewed_at >= ACCESS_RENEWAL_INTERVAL:
                renewed_at = monotonic()
                self._accesses.touch(object_id)
        self._accesses.touch(object_id)
        await response.finish()
        return StreamEnd.DONE

    async def _send(self, response: StreamingResponse, chunk: memoryview, outcome: CacheOutcome) -> None:
        if response.started:
            await response.send(chunk, "local")
            return
        head = content_head(self._representation, outcome, self._span, "local", self._media_type)
        await response.start(head, chunk)

    async def _read(self, reader: PartialReader, offset: int, length: int) -> memoryview:
        """Empty if the file was emptied between looking and reading, or the disk fails."""
        try:
            return await read_chunk(reader.descriptor, offset, length)
        except OSError:
            return memoryview(b"")

    def on_disk(self) -> int:
        """Bytes of the partial file now."""
        reader = self._volume.open_partial(self._representation.object_id)
        if reader is None:
            return 0
        with closing(reader):
            return reader.state().size

    def _close_if_gone(self, reader: PartialReader | None) -> PartialReader | None:
        if reader is not None and reader.state().unlinked:
            reader.close()
            return None
        return reader

    def _matches_representation(self, *, verified: bool) -> bool:
        """False if the file is going to be something else than the headers would say (the catalog has changed).

        The sidecar tells the source's media type too, from before the first byte.
        """
        object_id = self._representation.object_id
        expected = self._volume.partial_record(object_id)
        if expected is None:
            # The sidecar goes away once the file is complete, and with it the difference: the file is verified.
            stored = self._volume.read_record(object_id) if verified else None
            self._media_type = stored.media_type if stored is not None else None
            return verified
        self._media_type = expected.media_type
        return (expected.size, expected.etag) == (self._representation.size, self._representation.etag)

    def _if_matching(self, found: OpenObject) -> OpenObject | None:
        if (found.record.size, found.record.etag) == (self._representation.size, self._representation.etag):
            return found
        found.close()
        return None

    @asynccontextmanager
    async def _locked_once_verified(self, reader: PartialReader) -> AsyncIterator[None]:
        """A client that takes nothing for a while must not find the object, complete meanwhile, evicted: it is held as
        soon as the worker says that it is right, before the worker's own lock goes."""

        async def lock() -> None:
            while not (reader.state().verified and reader.lock_shared()):
                await self._poller.wait_for_event(LOCK_RETRY_INTERVAL)

        locking = asyncio.create_task(lock())
        try:
            yield
        finally:
            locking.cancel()
            await asyncio.wait({locking})
