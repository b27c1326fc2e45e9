"""Counting who looks at what, without a network call per hit."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from shared.domain.errors import StateStoreUnavailable
from shared.domain.objects import ObjectId
from shared.domain.views import ViewCoalescer
from shared.observability.metrics import LOST_ACCESSES
from shared.ports.state_store import Access, StateStore

HAND_OVER_INTERVAL = 1.0
MAX_WAITING = 10_000
LAST_HAND_OVER = 1.0
"""Seconds; a part of what is left of the shutdown deadline for closing."""

logger = structlog.get_logger()


@dataclass(slots=True)
class _Waiting:
    views: int
    last_at: float


class AccessCounter:
    """Collects accesses in process; `run` hands them over in batches. Counting never waits and never fails.

    While the store is down at most `max_waiting` objects are remembered, those accessed last.
    """

    def __init__(
        self, state: StateStore, clock: Callable[[], float] = time.time, max_waiting: int = MAX_WAITING
    ) -> None:
        """`clock`: POSIX seconds."""
        self._state = state
        self._clock = clock
        self._max_waiting = max_waiting
        self._waiting: OrderedDict[ObjectId, _Waiting] = OrderedDict()
        self._views = ViewCoalescer()
        self._down = False

    def note_request(self, object_id: ObjectId) -> None:
        """A client was (or is being) sent this object, or a part of it."""
        now = self._clock()
        self._note(object_id, int(self._views.begins_view(object_id, now)), now)

    def note_sending(self, object_id: ObjectId) -> None:
        """A long send of this object goes on: its last access is now (no further view)."""
        self._note(object_id, 0, self._clock())

    def _note(self, object_id: ObjectId, views: int, now: float) -> None:
        waiting = self._waiting.get(object_id)
        if waiting is None:
            self._waiting[object_id] = _Waiting(views, now)
            if len(self._waiting) > self._max_waiting:
                self._waiting.popitem(last=False)
                LOST_ACCESSES.inc()
            return
        waiting.views += views
        waiting.last_at = max(waiting.last_at, now)
        self._waiting.move_to_end(object_id)

    async def run(self, interval: float = HAND_OVER_INTERVAL) -> None:
        """Hand over once every `interval` seconds, until cancelled."""
        while True:
            await asyncio.sleep(interval)
            await self.hand_over()

    async def hand_over(self) -> None:
        """Hand over what has been counted; what the store does not take is kept for the next time.

        So it is when cancelled, though the store may have it by then: counted twice is better than not at all.
        """
        if not self._waiting:
            return
        batch, self._waiting = self._waiting, OrderedDict()
        accesses = [Access(object_id, counted.views, counted.last_at) for object_id, counted in batch.items()]
        try:
            await self._state.record_accesses(accesses)
        except StateStoreUnavailable as error:
            if not self._down:
                self._down = True
                logger.warning("accesses_not_handed_over", reason=str(error))
            self._put_back(accesses)
            return
        except asyncio.CancelledError:
            self._put_back(accesses)
            raise
        if self._down:
            self._down = False
            logger.info("accesses_handed_over_again", objects=len(accesses))

    async def close(self, patience: float = LAST_HAND_OVER) -> None:
        """Hand over for the last time, within `patience` seconds; what is left then is lost."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self.hand_over()
        if self._waiting:
            LOST_ACCESSES.inc(len(self._waiting))
            logger.warning("accesses_lost", objects=len(self._waiting))
            self._waiting.clear()

    def _put_back(self, accesses: Sequence[Access]) -> None:
        newer, self._waiting = self._waiting, OrderedDict()
        for access in accesses:
            self._note(access.object_id, access.views, access.last_at)
        for object_id, counted in newer.items():
            self._note(object_id, counted.views, counted.last_at)
