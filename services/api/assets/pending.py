"""Answers from a file that is still growing, with a source to fall back on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from enum import Enum, auto
from math import inf
from time import monotonic

import structlog
from sanic import HTTPResponse, Request

from distributor_node.services.api.accesses import AccessCounter
from distributor_node.services.api.assets.decision import (
    Representation,
    Span,
    is_far,
    may_resume,
    sendable_end,
)
from distributor_node.services.api.assets.fetch_start import look_up
from distributor_node.services.api.assets.headers import BYPASS, CacheOutcome, content_head
from distributor_node.services.api.assets.page_cache import read_chunk
from distributor_node.services.api.assets.proxy import ProxiedResponse, Proxy
from distributor_node.services.api.assets.response import (
    ACCESS_RENEWAL_INTERVAL,
    CHUNK_BYTES,
    HitResponder,
    StreamingResponse,
)
from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.errors import AbortResponse, HttpError
from distributor_node.services.api.fetch_events import FetchEvents
from distributor_node.shared.adapters.volume import OpenObject, PartialReader, Volume
from distributor_node.shared.domain.errors import StateStoreUnavailable, VolumeError
from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.ports.state_store import StateStore

_RESUME_GRACE = 5.0
"""Seconds beyond a dead worker's lease in which another one is expected to resume."""

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """A GET that needs bytes which are not on the volume yet. `media_object` is None where the volume told enough so
    far; `source` is the one that the fetch uses."""

    request: Request
    representation: Representation
    span: Span
    outcome: CacheOutcome
    media_object: MediaObject | None = None
    source: str | None = None


class PendingResponder:
    """Follows where that is quick, proxies where it is not."""

    def __init__(self, context: ApiContext, hit_responder: HitResponder, proxy: Proxy) -> None:
        self._context = context
        self._hit_responder = hit_responder
        self._proxy = proxy

    async def respond(
        self, pending: PendingRequest, publish_failed: asyncio.Event | None = None
    ) -> HTTPResponse | None:
        """Answer while the object is fetched; `publish_failed` is set when its job could not be published."""
        if pending.span.length == 0:
            head = content_head(pending.representation, pending.outcome, pending.span, "local")
            return HTTPResponse(b"", status=head.status, headers=head.headers)
        publish_failed = publish_failed or asyncio.Event()
        try:
            responded, response = await self._try_streaming(pending, publish_failed)
        except VolumeError as error:
            logger.error("volume_read_failed", object_id=pending.representation.object_id, reason=str(error))
            responded, response = False, None
        if responded:
            return response
        await self.proxy(replace(pending, outcome=BYPASS) if publish_failed.is_set() else pending)
        return None

    async def proxy(self, pending: PendingRequest, response: StreamingResponse | None = None) -> None:
        """Answer from a source."""
        await self._proxy.respond(
            await self._proxied_response(pending, response or StreamingResponse(pending.request))
        )

    async def _try_streaming(
        self, pending: PendingRequest, publish_failed: asyncio.Event
    ) -> tuple[bool, HTTPResponse | None]:
        """Whether it was answered, and the answer if it was not streamed. VolumeError: nothing was sent."""
        settings, span = self._context.settings.public_api, pending.span
        if not settings.follow_growing_files:
            return False, None
        streamer = self._streamer(pending)
        if is_far(span.first, streamer.on_disk(), settings.far_range_distance):
            return False, None
        deadline = monotonic() + settings.first_byte_wait
        while True:
            found = await streamer.wait_for_first_byte(deadline, publish_failed)
            if found is None:
                return False, None
            with closing(found):
                if isinstance(found, OpenObject):
                    representation = replace(pending.representation, media_type=found.record.media_type)
                    return True, await self._hit_responder.send(
                        pending.request, found, representation, span, pending.outcome
                    )
                if await self._stream(pending, streamer, found):
                    return True, None

    async def _stream(
        self, pending: PendingRequest, streamer: PartialFileStreamer, reader: PartialReader
    ) -> bool:
        """False: nothing was sent, and the file is not what it was; there may be a new one."""
        response = StreamingResponse(pending.request)
        end = await streamer.stream(response, reader, pending.outcome)
        if end is StreamEnd.FILE_REPLACED:
            if response.started:
                raise AbortResponse("object_gone")
            return False
        if end is StreamEnd.FETCH_ENDED:
            logger.warning(
                "fetch_ended_while_streaming", object_id=pending.representation.object_id, sent=response.sent
            )
            if response.started:
                await self._proxy.resume(await self._proxied_response(pending, response), reader)
            else:
                await self.proxy(pending, response)
        return True

    async def _proxied_response(
        self, pending: PendingRequest, response: StreamingResponse
    ) -> ProxiedResponse:
        try:
            media_object = pending.media_object or await self._look_up_matching(pending.representation)
        except HttpError as error:
            if response.started:
                raise AbortResponse("source_unknown") from error
            raise
        return ProxiedResponse(
            response, media_object, pending.representation, pending.span, pending.outcome, pending.source
        )

    async def _look_up_matching(self, representation: Representation) -> MediaObject:
        """The catalog's word on what the volume has described. HttpError 503 if that is something else by now."""
        media_object = await look_up(self._context, representation.object_id)
        if (media_object.size, media_object.etag) != (representation.size, representation.etag):
            raise HttpError(503, "The object has just changed", "unavailable", {"Retry-After": "1"})
        return media_object

    def _streamer(self, pending: PendingRequest) -> PartialFileStreamer:
        context, object_id = self._context, pending.representation.object_id
        poller = FetchPoller(object_id, context.state, context.fetch_events)
        stall_timeout = context.settings.fetch.lease + _RESUME_GRACE
        return PartialFileStreamer(
            context.volume, context.accesses, poller, pending.representation, pending.span, stall_timeout
        )


# Following a growing file: its size is its progress, its mode says when it is verified.

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


# Waiting for an object that is being fetched: wake-ups, polls, and the question whether the fetch still goes on.

MIN_POLL_INTERVAL, MAX_POLL_INTERVAL, MAX_IDLE_POLL_INTERVAL = 0.005, 0.025, 0.1
"""Seconds; the last where nothing has moved for a while and many may be waiting. Wake-ups come in between."""
STATE_CHECK_INTERVAL = 2.0
"""Seconds between questions to the state store while nothing moves."""


class FetchPoller:
    """Paces one request that waits for bytes. Its polls are short while bytes arrive, longer while they do not."""

    def __init__(self, object_id: ObjectId, state: StateStore, fetch_events: FetchEvents) -> None:
        self._object_id = object_id
        self._state = state
        self._fetch_events = fetch_events
        self._interval = MIN_POLL_INTERVAL
        self._last_size = -1
        self._last_progress = self._last_check = monotonic()
        self._ended = False

    @property
    def idle(self) -> float:
        """Seconds since the file last grew."""
        return monotonic() - self._last_progress

    def observe(self, size: int) -> None:
        """So many bytes are on disk now."""
        if size != self._last_size:
            self._last_size, self._interval, self._last_progress = size, MIN_POLL_INTERVAL, monotonic()
            self._ended = False

    async def wait(self, size: int, max_seconds: float = MAX_IDLE_POLL_INTERVAL) -> None:
        """Wait for a moment, or until something changes about the fetch. `size`: bytes on disk now."""
        self.observe(size)
        delay = max(0.001, min(self._interval, max_seconds))
        max_interval = min(MAX_IDLE_POLL_INTERVAL, max(MAX_POLL_INTERVAL, self.idle / 20))
        self._interval = min(self._interval * 1.5, max_interval)
        if await self._fetch_events.wait(self._object_id, delay):
            self._last_check = -inf

    async def wait_for_event(self, seconds: float) -> None:
        """Wait for word of the fetch, at most so long."""
        await self._fetch_events.wait(self._object_id, seconds)

    async def has_ended(self) -> bool:
        """True once the state store has said, twice in a row, that nobody fetches the object any more.

        Twice: between the rename of a complete file and the commit, or a worker's end and the next one's beginning,
        one look can mislead. A store that does not answer says nothing.
        """
        if self.idle < MAX_POLL_INTERVAL or monotonic() - self._last_check < STATE_CHECK_INTERVAL:
            return False
        self._last_check = monotonic()
        try:
            object_status = await self._state.find(self._object_id)
        except StateStoreUnavailable:
            return False
        if object_status.failure is not None:
            return True
        ended_before, self._ended = self._ended, not may_resume(object_status)
        return ended_before and self._ended
