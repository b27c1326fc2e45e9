"""Counting who looks at what, without a network call per hit."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from distributor_node.shared.domain.admission import ViewCoalescer
from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.observability.metrics import DROPPED_ACCESSES
from distributor_node.shared.ports.state_store import Access, StateStore

FLUSH_INTERVAL = 1.0
MAX_PENDING = 10_000
FINAL_FLUSH_TIMEOUT = 1.0
"""Seconds; a part of what is left of the shutdown deadline for closing."""

logger = structlog.get_logger()


@dataclass(slots=True)
class _PendingAccess:
    views: int
    last_at: float


class AccessCounter:
    """Collects accesses in process; `run` hands them over in batches. Counting never waits and never fails.

    While the store is down at most `max_pending` objects are remembered, those accessed last.
    """

    def __init__(
        self, state: StateStore, clock: Callable[[], float] = time.time, max_pending: int = MAX_PENDING
    ) -> None:
        """`clock`: POSIX seconds."""
        self._state = state
        self._clock = clock
        self._max_pending = max_pending
        self._pending: OrderedDict[ObjectId, _PendingAccess] = OrderedDict()
        self._views = ViewCoalescer()
        self._down = False

    def record_request(self, object_id: ObjectId) -> None:
        """A client was (or is being) sent this object, or a part of it."""
        now = self._clock()
        self._add(object_id, int(self._views.begins_view(object_id, now)), now)

    def touch(self, object_id: ObjectId) -> None:
        """A long send of this object goes on: its last access is now (no further view)."""
        self._add(object_id, 0, self._clock())

    def _add(self, object_id: ObjectId, views: int, now: float) -> None:
        pending = self._pending.get(object_id)
        if pending is None:
            self._pending[object_id] = _PendingAccess(views, now)
            if len(self._pending) > self._max_pending:
                self._pending.popitem(last=False)
                DROPPED_ACCESSES.inc()
            return
        pending.views += views
        pending.last_at = max(pending.last_at, now)
        self._pending.move_to_end(object_id)

    async def run(self, interval: float = FLUSH_INTERVAL) -> None:
        """Hand over once every `interval` seconds, until cancelled."""
        while True:
            await asyncio.sleep(interval)
            await self.flush()

    async def flush(self) -> None:
        """Hand over what has been counted; what the store does not take is kept for the next time.

        So it is when cancelled, though the store may have it by then: counted twice is better than not at all.
        """
        if not self._pending:
            return
        batch, self._pending = self._pending, OrderedDict()
        accesses = [Access(object_id, counted.views, counted.last_at) for object_id, counted in batch.items()]
        try:
            await self._state.record_accesses(accesses)
        except StateStoreUnavailable as error:
            if not self._down:
                self._down = True
                logger.warning("access_flush_failed", reason=str(error))
            self._requeue(accesses)
            return
        except asyncio.CancelledError:
            self._requeue(accesses)
            raise
        if self._down:
            self._down = False
            logger.info("access_flush_recovered", objects=len(accesses))

    async def close(self, timeout: float = FINAL_FLUSH_TIMEOUT) -> None:
        """Hand over for the last time, within `timeout` seconds; what is left then is lost."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self.flush()
        if self._pending:
            DROPPED_ACCESSES.inc(len(self._pending))
            logger.warning("accesses_dropped", objects=len(self._pending))
            self._pending.clear()

    def _requeue(self, accesses: Sequence[Access]) -> None:
        newer, self._pending = self._pending, OrderedDict()
        for access in accesses:
            self._add(access.object_id, access.views, access.last_at)
        for object_id, counted in newer.items():
            self._add(object_id, counted.views, counted.last_at)
