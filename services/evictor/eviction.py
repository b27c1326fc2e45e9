"""Keeping the volume below its high watermark, and making room when a worker asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from services.evictor.index import EvictionIndex
from services.evictor.partials import Partials
from services.evictor.removals import Outcome, Removals
from shared.domain.eviction import PolicyEntry
from shared.domain.objects import ObjectId
from shared.domain.space import Usage, Watermarks, footprint, missing_for
from shared.observability.metrics import EVICTION_STUCK, LONGEST_IDLE_EVICTED, VICTIM_IDLE, VICTIM_SIZE
from shared.ports.state_store import StateStore, Term

_BATCH = 128
_SPARED_SECONDS = 2.0
_FAILED_SECONDS = 60.0

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
        removals: Removals,
        partials: Partials,
        rules: EvictionRules,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._state, self._index, self._removals, self._partials = state, index, removals, partials
        self._rules, self._clock = rules, clock
        self._spared_until: dict[ObjectId, float] = {}
        self.pinned: frozenset[ObjectId] = frozenset()
        self.stuck = False

    async def make_room(self, term: Term, usage: Usage, device_free: int) -> None:
        """Evict what has to go now, as `usage` says; usage is looked at again after each batch.

        `device_free`: bytes, measured just before. From there on what goes is added: a device that gives bytes back
        late must not cost more objects than were asked for.
        """
        longest_idle, marks = 0.0, self._rules.watermarks
        if usage.used + usage.reserved > marks.high:
            marks = Watermarks(low=marks.low, high=marks.low)  # once begun, all the way down
        while True:
            wanted = await self._state.space_requested()
            needed = marks.to_evict(usage, wanted, device_free)
            if needed <= 0:
                self._note_stuck(0)
                break
            await self._index.refresh()
            victims = self._choose(needed)
            if not victims:
                short = needed - await self._partials.make_room(term, missing_for(usage, wanted, device_free))
                self._note_stuck(short)
                break
            idle, freed = await self._evict(term, victims)
            longest_idle, device_free = max(longest_idle, idle), device_free + freed
            usage = await self._state.usage()
        if longest_idle:
            LONGEST_IDLE_EVICTED.set(longest_idle)

    def _choose(self, needed: int) -> Sequence[PolicyEntry]:
        now = time.monotonic()
        self._spared_until = {
            object_id: until for object_id, until in self._spared_until.items() if until > now
        }
        return self._index.policy.victims(
            needed,
            self._clock(),
            min_idle=self._rules.min_idle,
            spared=self._spared_until.keys() | self.pinned,
            at_most=_BATCH,
        )

    async def _evict(self, term: Term, victims: Sequence[PolicyEntry]) -> tuple[float, int]:
        """Evict some victims together; of those gone the longest idle age (seconds), and their bytes."""
        object_ids = [entry.object_id for entry in victims]
        outcomes = await self._removals.make_room(term, object_ids, self._rules.min_idle)
        now, longest_idle, freed = self._clock(), 0.0, 0
        for entry, outcome in zip(victims, outcomes, strict=True):
            if outcome is Outcome.GONE:
                idle = now - entry.last_access
                longest_idle = max(longest_idle, idle)
                freed += footprint(entry.size)
                VICTIM_IDLE.observe(idle)
                VICTIM_SIZE.observe(entry.size)
            elif outcome is not Outcome.LEAVING:
                patience = _FAILED_SECONDS if outcome is Outcome.FAILED else _SPARED_SECONDS
                self._spared_until[entry.object_id] = time.monotonic() + patience
        return longest_idle, freed

    def _note_stuck(self, short: int) -> None:
        """Say once, not every second, that nothing can go."""
        stuck = short > 0
        if stuck and not self.stuck:
            logger.warning("nothing_to_evict", missing_bytes=short, objects=len(self._index.policy))
        if stuck:
            EVICTION_STUCK.inc()
        self.stuck = stuck
