"""Waiting for an object that is being fetched: wake-ups, polls, and the question whether the fetch still goes on."""

from __future__ import annotations

from math import inf
from time import monotonic

from services.api.assets.decision import may_resume
from services.api.wakeups import FetchEvents
from shared.domain.errors import StateStoreUnavailable
from shared.domain.objects import ObjectId
from shared.ports.state_store import StateStore

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
