"""Whether a missed object is fetched at all: a large one only on its second view, while the cache is under pressure."""

from __future__ import annotations

import time
from collections.abc import Callable

from shared.domain.errors import StateStoreUnavailable
from shared.domain.eviction.admission import SecondHitAdmission
from shared.domain.objects import ObjectId
from shared.observability.metrics import ADMISSION_REJECTED
from shared.ports.state_store import StateStore
from shared.settings.model import Settings

_USAGE_TTL = 2.0


class AdmissionControl:
    """Off unless `admission.above_size` is set. Each process remembers the first views that it has seen itself: with
    several of them a second view may take a third. `clock`: POSIX seconds."""

    def __init__(self, settings: Settings, state: StateStore, clock: Callable[[], float] = time.time) -> None:
        admission = settings.admission
        self._above = admission.above_size
        self._policy = (
            None
            if admission.above_size is None
            else SecondHitAdmission(admission.above_size, admission.window)
        )
        self._state, self._clock = state, clock
        self._low_watermark = settings.storage.watermarks.low
        self._pressure, self._checked_at = False, float("-inf")

    async def admits(self, object_id: ObjectId, size: int | None) -> bool:
        """Fetch it, or only proxy it? Objects of unknown size are none of ours to judge."""
        if self._policy is None or self._above is None or size is None or size <= self._above:
            return True
        now = self._clock()
        admitted = self._policy.admits(object_id, size, now, pressure=await self._under_pressure(now))
        if not admitted:
            ADMISSION_REJECTED.inc()
        return admitted

    async def _under_pressure(self, now: float) -> bool:
        """More than the low watermark is taken: something else will have to go. When nobody can tell, nothing is
        kept out."""
        if not 0 <= now - self._checked_at < _USAGE_TTL:
            try:
                usage = await self._state.usage()
            except StateStoreUnavailable:
                return False
            self._pressure = usage.used + usage.reserved > self._low_watermark
            self._checked_at = now
        return self._pressure
