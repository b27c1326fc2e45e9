"""Following a growing file: its size is its progress, its mode says when it is verified."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from enum import Enum, auto
from time import monotonic

from services.api.accesses import AccessCounter
from services.api.assets.answer import PIECE_BYTES, AnswerStream
from services.api.assets.decision import Description, Span, sendable_end
from services.api.assets.heads import CacheOutcome, content_head
from services.api.assets.reading import read_piece
from services.api.assets.sender import ACCESS_RENEWAL
from services.api.assets.watch import FetchWatch
from shared.adapters.volume import OpenObject, PartialReader, Volume

HOLD_INTERVAL = 0.5
"""Seconds between attempts to keep an object from being removed, if no word of the worker comes before; less than
anybody's evictor.min_idle."""


class FollowEnd(Enum):
    """Why following ended: all was sent; the bytes sent are no longer those of the file; nobody writes it any more."""

    DONE = auto()
    TORN = auto()
    STOPPED = auto()


class Follower:
    """Follows the file of one object for one request."""

    def __init__(
        self,
        volume: Volume,
        accesses: AccessCounter,
        watch: FetchWatch,
        described: Description,
        span: Span,
        patience: float,
    ) -> None:
        """`patience`: seconds without a further byte after which a fetch counts as dead, whatever the store says."""
        self._volume = volume
        self._accesses = accesses
        self._watch = watch
        self._described = described
        self._span = span
        self._patience = patience
        self._media_type: str | None = None

    async def wait_for_first_byte(
        self, deadline: float, abandoned: asyncio.Event
    ) -> OpenObject | PartialReader | None:
        """The file from which the span's first byte can be sent; None if there is none by `deadline` (monotonic), or
        the fetch is over or `abandoned`. The caller closes it. VolumeError if the disk fails."""
        reader: PartialReader | None = None
        given = False
        try:
            while True:
                reader = self._still_there(reader) or self._volume.open_partial(self._described.object_id)
                on_disk = 0
                if reader is None:
                    # In this order: a file that became complete in between is seen now.
                    found = self._volume.open_object(self._described.object_id)
                    if found is not None:
                        return self._if_same(found)
                else:
                    state = reader.state()
                    on_disk = state.size
                    ready = sendable_end(self._span, on_disk, verified=state.verified) > self._span.first
                    if ready and not state.unlinked and self._is_what_we_described(verified=state.verified):
                        given = True
                        return reader
                left = deadline - monotonic()
                if left <= 0 or abandoned.is_set() or await self._watch.is_over():
                    return None
                await self._watch.pause(on_disk, left)
        finally:
            if reader is not None and not given:
                reader.close()

    async def follow(self, answer: AnswerStream, reader: PartialReader, outcome: CacheOutcome) -> FollowEnd:
        """Send from the file until the span is sent or the file fails us. Nothing is sent beyond what may be."""
        async with self._held_once_verified(reader):
            return await self._follow(answer, reader, outcome)

    async def _follow(self, answer: AnswerStream, reader: PartialReader, outcome: CacheOutcome) -> FollowEnd:
        span, object_id = self._span, self._described.object_id
        end = span.first + (span.length or 0)
        renewed = monotonic()
        while (position := span.first + answer.sent) < end:
            state = reader.state()
            # A client that took long to take the last piece must not make the fetch look dead.
            self._watch.note(state.size)
            if state.unlinked or state.size < position:
                return FollowEnd.TORN
            if state.verified:
                reader.lock_shared()
            sendable = sendable_end(span, state.size, verified=state.verified)
            if sendable <= position:
                if self._watch.idle > self._patience or await self._watch.is_over():
                    return FollowEnd.STOPPED
                await self._watch.pause(state.size)
                continue
            piece = await self._read(reader, position, min(PIECE_BYTES, sendable - position))
            if not piece:
                return FollowEnd.TORN
            await self._send(answer, piece, outcome)
            if monotonic() - renewed >= ACCESS_RENEWAL:
                renewed = monotonic()
                self._accesses.touch(object_id)
        self._accesses.touch(object_id)
        await answer.finish()
        return FollowEnd.DONE

    async def _send(self, answer: AnswerStream, piece: memoryview, outcome: CacheOutcome) -> None:
        if answer.begun:
            await answer.send(piece, "local")
            return
        head = content_head(self._described, outcome, self._span, "local", self._media_type)
        await answer.begin(head, piece)

    async def _read(self, reader: PartialReader, offset: int, length: int) -> memoryview:
        """Empty if the file was emptied between looking and reading, or the disk fails."""
        try:
            return await read_piece(reader.descriptor, offset, length)
        except OSError:
            return memoryview(b"")

    def on_disk(self) -> int:
        """Bytes of the partial file now."""
        reader = self._volume.open_partial(self._described.object_id)
        if reader is None:
            return 0
        with closing(reader):
            return reader.state().size

    def _still_there(self, reader: PartialReader | None) -> PartialReader | None:
        if reader is not None and reader.state().unlinked:
            reader.close()
            return None
        return reader

    def _is_what_we_described(self, *, verified: bool) -> bool:
        """False if the file is going to be something else than the headers would say (the catalog has changed).

        The sidecar tells the source's media type too, from before the first byte.
        """
        object_id = self._described.object_id
        expected = self._volume.partial_record(object_id)
        if expected is None:
            # The sidecar goes away once the file is complete, and with it the difference: the file is verified.
            stored = self._volume.read_record(object_id) if verified else None
            self._media_type = stored.media_type if stored is not None else None
            return verified
        self._media_type = expected.media_type
        return (expected.size, expected.etag) == (self._described.size, self._described.etag)

    def _if_same(self, found: OpenObject) -> OpenObject | None:
        if (found.record.size, found.record.etag) == (self._described.size, self._described.etag):
            return found
        found.close()
        return None

    @asynccontextmanager
    async def _held_once_verified(self, reader: PartialReader) -> AsyncIterator[None]:
        """A client that takes nothing for a while must not find the object, complete meanwhile, evicted: it is held as
        soon as the worker says that it is right, before the worker's own lock goes."""

        async def hold() -> None:
            while not (reader.state().verified and reader.lock_shared()):
                await self._watch.woken(HOLD_INTERVAL)

        holding = asyncio.create_task(hold())
        try:
            yield
        finally:
            holding.cancel()
            await asyncio.wait({holding})
