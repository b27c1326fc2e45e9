"""Tells the fetchers which objects have viewers, so that these are fetched first."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.observability.logging import OutageLog
from distributor_node.shared.ports.state_store import MAX_VIEWED, StateStore

REPORT_INTERVAL = 2.0
"""Seconds between two reports: less than the time for which one counts as current."""

logger = structlog.get_logger()


class Viewers:
    """Objects that are requested while they are not cached. `run` is its task. No request waits for the state store."""

    def __init__(self, state: StateStore) -> None:
        self._state = state
        self._viewing: Counter[ObjectId] = Counter()
        self._left: dict[ObjectId, None] = {}  # since the last report
        self._outage = OutageLog(logger, down="viewers_not_reported", up="viewers_reported")

    @contextmanager
    def viewing(self, object_id: ObjectId) -> Iterator[None]:
        """A client reads the object, or waits for it, during the block."""
        self._viewing[object_id] += 1
        try:
            yield
        finally:
            self._viewing[object_id] -= 1
            if not self._viewing[object_id]:
                del self._viewing[object_id]
            if len(self._left) < MAX_VIEWED:
                self._left[object_id] = None

    async def run(self) -> None:
        """Report at intervals, until cancelled."""
        while True:
            await asyncio.sleep(REPORT_INTERVAL)
            await self.report()

    async def report(self) -> None:
        """Report once. What could not be reported is dropped: the next report is as good."""
        left, self._left = self._left, {}
        objects = list(dict.fromkeys([*left, *self._viewing]))[-MAX_VIEWED:]
        try:
            await self._state.record_viewers(objects)
        except StateStoreUnavailable as error:
            self._outage.failed(str(error))
        else:
            self._outage.succeeded()
