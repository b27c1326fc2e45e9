"""Follows the growing partial file of a fetch: what can be read of it, and whether it is verified."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from enum import Enum, auto
from math import inf
from time import monotonic

from distributor_node.services.api.accesses import AccessCounter, AccessRenewal
from distributor_node.services.api.assets.decision import (
    Representation,
    Span,
    bytes_missing,
    may_resume,
    sendable_end,
)
from distributor_node.services.api.assets.response import (
    CHUNK_BYTES,
    PAGE_SIZE,
    ResponseWriter,
    is_cached,
    read_chunk,
)
from distributor_node.services.api.fetch_capacity import FetchEvents
from distributor_node.services.api.headers import CacheOutcome, content_head
from distributor_node.shared.adapters.volume import OpenObject, PartialReader, PartialState, Volume
from distributor_node.shared.domain.conditionals import Comparison
from distributor_node.shared.domain.errors import StateStoreUnavailable, VolumeError
from distributor_node.shared.domain.objects import ObjectId, StoredRecord
from distributor_node.shared.ports.state_store import FetchPhase, StateStore
from distributor_node.shared.waiting import background

_CATCH_UP_LEAD = 256 * 1024
"""Bytes that a stalled file must be ahead of a response before the response returns to it."""

MISMATCH_WAIT = 0.25
"""Seconds to wait for a file of another version to be replaced."""

WANT_INTERVAL = 1.0
"""Seconds after which a client that still waits for a byte says so again."""

LOOK_BYTES, LOOK_SECONDS = 1024 * 1024, 0.02
"""Bytes that are sent after one look at the file, and seconds within which. Where content is replaced, its file is
emptied, and the new content has another file: what is sent in between is right, or nothing."""

LOCK_RETRY_INTERVAL = 0.5
"""Seconds between attempts to lock a verified file against removal, if no event comes before. Less than any
evictor.min_idle."""


class StreamEnd(Enum):
    """Why streaming ended."""

    DONE = auto()  # the whole span was sent
    FILE_REPLACED = auto()  # the bytes sent are no longer those of the file
    FETCH_ENDED = auto()  # no worker writes the file any more
    STALLED = auto()  # the file has not grown for `max_stall`


class PartialFileStreamer:
    """Streams the partial file of one object to one client."""

    def __init__(
        self,
        volume: Volume,
        accesses: AccessCounter,
        poller: FetchPoller,
        representation: Representation,
        span: Span,
        *,
        stall_timeout: float,
        far_range_wait: float,
    ) -> None:
        """Two limits in seconds:

        - `stall_timeout`: without a new byte, after which a fetch counts as dead, whatever its state is.
        - `far_range_wait`: expected until the first byte of a range ahead, beyond which it is not waited for.
        """
        self._volume = volume
        self._accesses = accesses
        self._poller = poller
        self._representation = representation
        self._span = span
        self.stall_timeout = stall_timeout
        self._media_type: str | None = None
        self.fetch_ended = False  # `wait_for_first_byte` saw that no more bytes come
        self._far_range_wait = far_range_wait
        self.has_begun = False  # a partial file was seen
        self.want: Callable[[int], None] | None = None
        """Tells the fetch of an offset whose bytes are needed first; None: the fetch reads in order."""
        self.on_near: Callable[[], None] | None = None
        """Called when the file ends less than `near` bytes ahead of the client. None: the fetch does not wait."""
        self.near = 0
        self._wanted_at = -inf  # when it was last told
        self._wanted_since: float | None = None
        self._mismatch_since: float | None = None

    async def wait_for_first_byte(
        self, deadline: float, give_up: Callable[[], bool], *, far: bool = False
    ) -> OpenObject | PartialReader | None:
        """Wait for a file from which the span's first byte can be sent. The caller closes it.

        Returns None at `deadline` (monotonic seconds), when the fetch ends, or when `give_up` says so while there is no
        partial file. `far`: the byte is wanted from the beginning. One that is wanted is waited for as long as
        `far_range_wait`. Raises VolumeError if the disk fails.
        """
        reader: PartialReader | None = None
        returned, first = False, self._span.first
        if far:
            self._want_first()
        try:
            while True:
                reader = self._close_if_gone(reader) or self._volume.open_partial(
                    self._representation.object_id
                )
                progress = prefix = 0
                if reader is None:
                    # Partial first, then complete: a file that was renamed in between is seen here.
                    found = self._volume.open_object(self._representation.object_id)
                    if found is not None:
                        return self._if_matching(found)
                else:
                    state = reader.state()
                    progress, prefix, self.has_begun = state.progress(first), state.size, True
                    ready = sendable_end(self._span, state.end_from(first), verified=state.verified) > first
                    # Looked at last: a file that was replaced has been unlinked before its sidecar was.
                    if (
                        ready
                        and self._matches_representation(verified=state.verified)
                        and not reader.state().unlinked
                    ):
                        returned = True
                        return reader
                    if self._is_far_by_rate(state):
                        if self.want is None:
                            return None
                        self._want_first()
                remaining = self._limit(deadline) - monotonic()
                if remaining <= 0 or (reader is None and give_up()):
                    return None
                if await self._poller.has_ended():
                    self.fetch_ended = True
                    return None
                await self._poller.wait(progress, remaining, prefix=prefix)
        finally:
            if reader is not None and not returned:
                reader.close()

    def _want_first(self) -> None:
        self._want(self._span.first)
        self._wanted_since = self._wanted_since or monotonic()

    def _want(self, position: int) -> None:
        now = monotonic()
        if self.want is not None and now - self._wanted_at >= WANT_INTERVAL:
            self._wanted_at = now
            self.want(position)

    def _limit(self, deadline: float) -> float:
        """A file of another version than expected may be about to be replaced, but that takes a worker no time."""
        if self._mismatch_since is not None:
            deadline = min(deadline, self._mismatch_since + MISMATCH_WAIT)
        if self._wanted_since is not None:
            deadline = min(deadline, self._wanted_since + self._far_range_wait)
        return deadline

    async def stream(
        self,
        response: ResponseWriter,
        reader: PartialReader,
        outcome: CacheOutcome,
        max_stall: float = inf,
    ) -> StreamEnd:
        """Send from the file as it grows, until the span is sent, the file is replaced or its fetch ends.

        Raises VolumeError if the disk fails. `max_stall`: seconds without a new byte after which to return STALLED.
        """
        async with background(self._lock_once_verified(reader), name="lock-once-verified"):
            return await self._stream(response, reader, outcome, max_stall)

    async def watch(
        self, response: ResponseWriter, reader: PartialReader, caught_up: asyncio.Event, began: int
    ) -> None:
        """Set `caught_up` when the file can continue the response, which is being sent from elsewhere since the offset
        `began`.

        Never, if the file was emptied in between: what was sent from it may be wrong.
        """
        span, last_size = self._span, 0
        end = span.first + (span.length or 0)
        while True:
            state, position = reader.state(), span.first + response.sent
            if state.unlinked or (state.extents is None and state.size < last_size):
                return
            last_size = state.size
            sendable = sendable_end(span, state.end_from(began), verified=state.verified)
            if sendable > position and sendable >= min(position + _CATCH_UP_LEAD, end):
                caught_up.set()
                return
            await self._poller.wait(state.progress(began), prefix=state.size)

    @property
    def source(self) -> str | None:
        """The source that the fetch used when it was last looked up."""
        return self._poller.source

    async def _lock_once_verified(self, reader: PartialReader) -> None:
        """Lock the file against removal as soon as the worker has verified it, before the worker's own lock ends.

        A client that reads nothing for a while must not find the object evicted, which may be complete by then.
        """
        while not (reader.state().verified and reader.lock_shared()):
            await self._poller.wait_for_event(LOCK_RETRY_INTERVAL)

    async def _stream(
        self, response: ResponseWriter, reader: PartialReader, outcome: CacheOutcome, max_stall: float
    ) -> StreamEnd:
        span, object_id = self._span, self._representation.object_id
        end = inf if span.last is None else span.first + (span.length or 0)
        renewal = AccessRenewal(self._accesses, object_id)
        while (position := span.first + response.sent) < end:
            state = reader.state()
            # A client that took long to read the last chunk must not make the fetch look dead.
            self._poller.observe(state.progress(position), prefix=state.size)
            if state.unlinked or (state.extents is None and state.size < position):
                return StreamEnd.FILE_REPLACED
            if state.verified:
                reader.lock_shared()
            available = state.end_from(position)
            if self.on_near is not None and available - position <= self.near and not state.verified:
                self.on_near()
            sendable = sendable_end(span, available, verified=state.verified)
            if sendable <= position:
                if span.last is None and state.verified:
                    break  # that is its length
                if self._poller.idle > self.stall_timeout or await self._poller.has_ended():
                    return StreamEnd.FETCH_ENDED
                if response.started and self._poller.idle >= self._stall_limit(state, position, max_stall):
                    return StreamEnd.STALLED
                if state.extents is not None and available == position:
                    self._want(position)
                await self._poller.wait(state.progress(position), prefix=state.size)
                continue
            if response.started:
                until = min(sendable, position - position % PAGE_SIZE + LOOK_BYTES)
                sending = self._send_until(until, response, reader)
            else:
                until = min(sendable, position - position % PAGE_SIZE + CHUNK_BYTES)
                sending = self._start(until, response, reader, outcome)
            try:
                if not await sending:
                    return StreamEnd.FILE_REPLACED
            except OSError as error:
                raise VolumeError(f"read the partial file of {object_id}: {error.strerror}") from error
            renewal.touch_if_due()
        self._accesses.touch(object_id)
        await response.finish()
        return StreamEnd.DONE

    def _stall_limit(self, state: PartialState, position: int, max_stall: float) -> float:
        """Return after how many seconds without a byte to send the response continues from a source.

        Sooner for the last bytes of a range that began far on. They are there and not verified, and others in front of
        the range are missing, so it may take as long as the whole fetch.
        """
        far = self.want is not None and state.extents is not None and state.size < position
        if max_stall == inf or not far or state.end_from(position) != self._span.size:
            return max_stall
        return min(max_stall, self._far_range_wait)

    async def _start(
        self, end: int, response: ResponseWriter, reader: PartialReader, outcome: CacheOutcome
    ) -> bool:
        """Send the head, and bytes up to `end`. Returns False if the file was truncated, and nothing was sent. Raises
        OSError if the disk fails."""
        first = self._span.first
        await response.take_turn(end - first)
        chunk = await read_chunk(reader.descriptor, first, end - first)
        if chunk:
            head = content_head(self._representation, outcome, self._span, "local", self._media_type)
            await response.start(head, chunk)
        return bool(chunk)

    async def _send_until(self, end: int, response: ResponseWriter, reader: PartialReader) -> bool:
        """Send bytes up to `end`, as far as the client takes them soon. Likewise."""
        first, descriptor = self._span.first, reader.descriptor
        position = first + response.sent
        # Bytes are written in order, and leave the page cache in this order. So a few probes tell of all.
        cached = is_cached(descriptor, position, end - position, stride=CHUNK_BYTES)
        look_again_at = monotonic() + LOOK_SECONDS
        while position < end:
            # It ends with a page of the file where it can: sendfile costs more from within one.
            length = min(LOOK_BYTES - position % PAGE_SIZE, end - position)
            if not await response.send_file(descriptor, position, length, cached=cached):
                return False
            if monotonic() >= look_again_at:
                break
            position = first + response.sent
        return True

    def _is_far_by_rate(self, state: PartialState) -> bool:
        """Whether the first byte of a range ahead of the file is expected too late, if it is not wanted."""
        self._poller.observe(state.progress(self._span.first), prefix=state.size)
        if state.extents is not None and self.want is not None:
            return True
        if self.on_near is not None and self._poller.idle < self._far_range_wait:
            return (
                False  # the fetch may have waited for this client, and what it has read before tells nothing
            )
        missing = bytes_missing(self._span, state.size)
        return bool(missing and state.size) and self._poller.expects_later(missing, self._far_range_wait)

    def seconds_until_first_byte(self) -> float | None:
        """Return in how many seconds a file that grows in order has the span's first byte. None: it cannot be told."""
        missing = bytes_missing(self._span, self.on_disk())
        return self._poller.seconds_until(missing)

    def on_disk(self) -> int:
        """Return where the bytes end that the partial file has up to the span's first byte. 0: there is no file."""
        reader = self._volume.open_partial(self._representation.object_id)
        if reader is None:
            return 0
        with closing(reader):
            return reader.state().nearest_end(self._span.first)

    def _close_if_gone(self, reader: PartialReader | None) -> PartialReader | None:
        if reader is not None and reader.state().unlinked:
            reader.close()
            return None
        return reader

    def _matches_representation(self, *, verified: bool) -> bool:
        """Whether the file holds what the headers describe. It may not, if the catalog has changed.

        Takes the source's media type from the sidecar, which is written before the first byte.
        """
        object_id = self._representation.object_id
        expected = self._volume.partial_record(object_id)
        if expected is None:
            # The sidecar goes away once the file is complete.
            expected = self._volume.read_record(object_id) if verified else None
            if expected is None:
                return verified and self._representation.content_hash is not None
        self._media_type = expected.media_type
        if not self._is_expected(expected):
            self._mismatch_since = self._mismatch_since or monotonic()
            return False
        self._representation = self._representation.with_validators(expected.validators, expected.freshness)
        if self._span.last is None and not expected.growing:
            self._span = replace(self._span, last=expected.size - 1, size=expected.size)
        return True

    def _is_expected(self, record: StoredRecord) -> bool:
        """Whether bytes of this record may be sent. A part under a strong tag needs a proof of its version."""
        expected = self._representation.version
        comparison = expected.compare(record.version)
        if self._span.partial and expected.is_strong:
            return comparison is Comparison.SAME
        return comparison is not Comparison.DIFFERENT

    def _if_matching(self, found: OpenObject) -> OpenObject | None:
        if self._is_expected(found.record):
            return found
        self._mismatch_since = self._mismatch_since or monotonic()
        found.close()
        return None


# How fast partial files grow, as all requests of this process see them.

_RATE_WINDOW = 3.0
"""Seconds over which a rate is measured."""
_RATE_SPACING = 0.05
_MIN_OBSERVED = 0.25
"""Seconds of observation that make a rate."""
_MAX_RATES = 1_000


class FetchRates:
    """The growth of partial files, in bytes a second."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """`clock`: in seconds."""
        self._clock = clock
        self._sizes: OrderedDict[ObjectId, deque[tuple[float, int]]] = OrderedDict()

    def observe(self, object_id: ObjectId, size: int) -> None:
        """The partial file has `size` bytes now."""
        now, sizes = self._clock(), self._sizes.get(object_id)
        if sizes and now - sizes[-1][0] < _RATE_SPACING and size >= sizes[-1][1]:
            return
        # Of a fetch that was not observed for a while, or begins again, nothing is known.
        if sizes is None or size < sizes[-1][1] or now - sizes[-1][0] > _RATE_WINDOW:
            sizes = self._sizes[object_id] = deque()
        sizes.append((now, size))
        while now - sizes[0][0] > _RATE_WINDOW:
            sizes.popleft()
        self._sizes.move_to_end(object_id)
        if len(self._sizes) > _MAX_RATES:
            self._sizes.popitem(last=False)

    def seconds_until(self, object_id: ObjectId, more: int) -> float | None:
        """Return in how many seconds, at the rate of the last ones, the file will have grown by `more` bytes.

        None: that cannot be told.
        """
        sizes = self._sizes.get(object_id)
        if not sizes or self._clock() - sizes[-1][0] > _RATE_WINDOW:
            return None
        observed, grown = sizes[-1][0] - sizes[0][0], sizes[-1][1] - sizes[0][1]
        return more * observed / grown if grown and observed >= _MIN_OBSERVED else None

    def expects_later(self, object_id: ObjectId, more: int, seconds: float) -> bool:
        """Whether, at the rate of the last seconds, the file will grow by `more` bytes later than in `seconds`.

        False while the file was not observed for long enough to tell.
        """
        sizes = self._sizes.get(object_id)
        if not sizes or self._clock() - sizes[-1][0] > _RATE_WINDOW:
            return False
        observed, grown = sizes[-1][0] - sizes[0][0], sizes[-1][1] - sizes[0][1]
        # A file that has not grown at all may have been observed between two writes.
        enough = _MIN_OBSERVED if grown else max(_MIN_OBSERVED, seconds)
        return observed >= enough and more * observed > grown * seconds


# Waiting for bytes of a fetch: events, polls, and the check whether the fetch has ended.

MIN_POLL_INTERVAL, MAX_POLL_INTERVAL, MAX_IDLE_POLL_INTERVAL = 0.005, 0.025, 0.1
"""Seconds. The last one applies after a while without progress, when many requests may wait. Events end a wait."""
STATE_CHECK_INTERVAL = 2.0
"""Seconds between look-ups in the state store while there is no progress."""


class FetchPoller:
    """Paces one request that waits for bytes. Its polls are short while bytes arrive, and longer otherwise."""

    def __init__(
        self,
        object_id: ObjectId,
        state: StateStore,
        fetch_events: FetchEvents,
        rates: FetchRates | None = None,
    ) -> None:
        """`rates`: of all fetches that this process sees."""
        self._rates = rates or FetchRates()
        self._object_id = object_id
        self._state = state
        self._fetch_events = fetch_events
        self._interval = MIN_POLL_INTERVAL
        self._last_size = -1
        self._last_progress = self._last_check = monotonic()
        self._ended = False
        self.on_parked: Callable[[], Awaitable[None]] | None = None
        """Called when the fetch was found to be parked: no worker continues it unless a job says so."""
        self.source: str | None = None  # the source of the fetch when it was last looked up

    @property
    def idle(self) -> float:
        """Seconds since the file last grew."""
        return monotonic() - self._last_progress

    def observe(self, size: int, *, prefix: int | None = None) -> None:
        """Note how many bytes there are of those that are waited for. `prefix`: those from the first one on, if that is
        another number."""
        self._rates.observe(self._object_id, size if prefix is None else prefix)
        if size != self._last_size:
            self._last_size, self._interval, self._last_progress = size, MIN_POLL_INTERVAL, monotonic()
            self._ended = False

    def expects_later(self, more: int, seconds: float) -> bool:
        """Whether so many more bytes are expected later than in `seconds`."""
        return self._rates.expects_later(self._object_id, more, seconds)

    def seconds_until(self, more: int) -> float | None:
        """Return in how many seconds so many more bytes are expected. None: that cannot be told."""
        return self._rates.seconds_until(self._object_id, more)

    async def wait(
        self, size: int, max_seconds: float = MAX_IDLE_POLL_INTERVAL, *, prefix: int | None = None
    ) -> None:
        """Wait for the poll interval, or until an event of the fetch. `size`, `prefix`: see `observe`."""
        self.observe(size, prefix=prefix)
        delay = max(0.001, min(self._interval, max_seconds))
        max_interval = min(MAX_IDLE_POLL_INTERVAL, max(MAX_POLL_INTERVAL, self.idle / 20))
        self._interval = min(self._interval * 1.5, max_interval)
        if await self._fetch_events.wait(self._object_id, delay):
            self._last_check = -inf

    async def wait_for_event(self, seconds: float) -> None:
        """Wait for an event of the fetch, at most `seconds`."""
        await self._fetch_events.wait(self._object_id, seconds)

    async def has_ended(self) -> bool:
        """Whether two look-ups in a row have found no fetch of the object in the state store.

        One look-up can mislead: between the rename of a complete file and its commit, or between the end of one worker
        and the start of the next. An unavailable store counts as no look-up.
        """
        if self.idle < MAX_POLL_INTERVAL or monotonic() - self._last_check < STATE_CHECK_INTERVAL:
            return False
        self._last_check = monotonic()
        try:
            object_status = await self._state.find(self._object_id)
        except StateStoreUnavailable:
            return False
        fetch = object_status.fetch
        if fetch is not None:
            self.source = fetch.source or self.source
        if object_status.failure is not None:
            return True
        if fetch is not None and fetch.phase is FetchPhase.PARKED and self.on_parked is not None:
            await self.on_parked()
        ended_before, self._ended = self._ended, not may_resume(object_status)
        return ended_before and self._ended
