"""Keeping the volume below its high watermark, and making room when a worker asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from services.evictor.index import EvictionIndex
from services.evictor.partials import PartialReaper
from services.evictor.removals import ObjectRemover, RemovalOutcome
from shared.domain.eviction import PolicyEntry
from shared.domain.objects import ObjectId
from shared.domain.space import Usage, Watermarks, footprint, missing_for
from shared.observability.metrics import (
    EVICTED_OBJECT_IDLE,
    EVICTED_OBJECT_SIZE,
    EVICTION_BLOCKED,
    LAST_EVICTION_MAX_IDLE,
)
from shared.ports.state_store import StateStore, Term

_EVICTION_BATCH = 128
_IN_USE_COOLDOWN = 2.0
_FAILURE_COOLDOWN = 60.0

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class EvictionRules:
    """`min_idle`: seconds since its last access before an object may go."""

    watermarks: Watermarks
    min_idle: float


class Eviction:
    """One pass after the other, by the leader's loop. `clock`: POSIX seconds."""

    def __init__(
        self,
        state: StateStore,
        index: EvictionIndex,
        remover: ObjectRemover,
        reaper: PartialReaper,
        rules: EvictionRules,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._state, self._index, self._remover, self._reaper = state, index, remover, reaper
        self._rules, self._clock = rules, clock
        self._spared_until: dict[ObjectId, float] = {}
        self.pinned: frozenset[ObjectId] = frozenset()
        self.blocked = False

    async def run(self, term: Term, usage: Usage, device_free: int) -> None:
        """Evict what has to go now, as `usage` says; usage is looked at again after each batch.

        `device_free`: bytes, measured just before. From there on what goes is added: a device that gives bytes back
        late must not cost more objects than were asked for.
        """
        max_idle, watermarks = 0.0, self._rules.watermarks
        if usage.used + usage.reserved > watermarks.high:
            watermarks = Watermarks(low=watermarks.low, high=watermarks.low)  # once begun, all the way down
        while True:
            wanted = await self._state.space_requested()
            needed = watermarks.to_evict(usage, wanted, device_free)
            if needed <= 0:
                self._set_blocked(0)
                break
            await self._index.refresh()
            victims = self._select(needed)
            if not victims:
                shortfall = needed - await self._reaper.free(term, missing_for(usage, wanted, device_free))
                self._set_blocked(shortfall)
                break
            idle, freed = await self._evict(term, victims)
            max_idle, device_free = max(max_idle, idle), device_free + freed
            usage = await self._state.usage()
        if max_idle:
            LAST_EVICTION_MAX_IDLE.set(max_idle)

    def _select(self, needed: int) -> Sequence[PolicyEntry]:
        now = time.monotonic()
        self._spared_until = {
            object_id: until for object_id, until in self._spared_until.items() if until > now
        }
        return self._index.policy.victims(
            needed,
            self._clock(),
            min_idle=self._rules.min_idle,
            spared=self._spared_until.keys() | self.pinned,
            at_most=_EVICTION_BATCH,
        )

    async def _evict(self, term: Term, victims: Sequence[PolicyEntry]) -> tuple[float, int]:
        """Evict some victims together; of those gone the longest idle age (seconds), and their bytes."""
        object_ids = [entry.object_id for entry in victims]
        outcomes = await self._remover.evict_batch(term, object_ids, self._rules.min_idle)
        now, max_idle, freed = self._clock(), 0.0, 0
        for entry, outcome in zip(victims, outcomes, strict=True):
            if outcome is RemovalOutcome.REMOVED:
                idle = now - entry.last_access
                max_idle = max(max_idle, idle)
                freed += footprint(entry.size)
                EVICTED_OBJECT_IDLE.observe(idle)
                EVICTED_OBJECT_SIZE.observe(entry.size)
            elif outcome is not RemovalOutcome.DEFERRED:
                cooldown = _FAILURE_COOLDOWN if outcome is RemovalOutcome.FAILED else _IN_USE_COOLDOWN
                self._spared_until[entry.object_id] = time.monotonic() + cooldown
        return max_idle, freed

    def _set_blocked(self, shortfall: int) -> None:
        """Say once, not every second, that nothing can go."""
        blocked = shortfall > 0
        if blocked and not self.blocked:
            logger.warning("eviction_blocked", missing_bytes=shortfall, objects=len(self._index.policy))
        if blocked:
            EVICTION_BLOCKED.inc()
        self.blocked = blocked
