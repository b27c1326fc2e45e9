"""Eviction: keeps the volume below its high watermark, and frees space that a worker requests.

`Eviction.run` is one pass: it asks the policy for victims, has them removed in batches (`removal.py`), and logs what
went and why. Partial objects that no worker fetches are in the same order, and are removed by `adoption.py`.
"""

from __future__ import annotations

import heapq
import sys
import time
from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass

import structlog

from distributor_node.services.evictor.adoption import PartialReaper
from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.services.evictor.removal import ObjectRemover, RemovalOutcome, Victim
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import (
    FILES_PER_OBJECT,
    DeviceSpace,
    EvictionReason,
    Usage,
    Watermarks,
    fitting_requests,
    footprint,
    missing_for,
)
from distributor_node.shared.observability.metrics import (
    EVICTED_OBJECT_IDLE,
    EVICTED_OBJECT_SIZE,
    EVICTION_BLOCKED,
    LAST_EVICTION_MAX_IDLE,
)
from distributor_node.shared.ports.state_store import StateStore, Term

_EVICTION_BATCH = 128
_IN_USE_COOLDOWN = 2.0  # seconds until a victim that was in use is tried again
_FAILURE_COOLDOWN = 60.0  # the same, after the disk failed to remove it
_MAX_LOGGED_VICTIMS = 5

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class EvictionRules:
    """When eviction begins and ends, and which objects it spares."""

    watermarks: Watermarks
    min_idle: float  # seconds since its last access before an object may be evicted


class Eviction:
    """Runs passes for the leader, one after the other."""

    def __init__(
        self,
        state: StateStore,
        index: EvictionIndex,
        remover: ObjectRemover,
        reaper: PartialReaper,
        rules: EvictionRules,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: POSIX seconds."""
        self._state, self._index, self._remover, self._reaper = state, index, remover, reaper
        self._rules, self._clock = rules, clock
        self._spared_until: dict[ObjectId, float] = {}  # monotonic seconds
        self.pinned: frozenset[ObjectId] = frozenset()
        self.blocked = False
        """Whether the last pass could not free enough."""
        self.blocked_by_inodes = False

    async def run(self, term: Term, usage: Usage, device: DeviceSpace) -> None:
        """One pass: evict what `usage` requires, and what the device has too few inodes for. Usage is read again after
        each batch.

        `device`: measured just before. The bytes of victims are added to it instead of measuring again: a device that
        frees them late must not cost more objects than were requested.
        """
        report = PassReport(self._index.policy.name)
        try:
            freed = await self._evict_for_inodes(term, device.objects_to_evict(), report)
            if freed:
                usage = await self._state.usage()
            await self._evict_until_enough(term, usage, device.free_bytes + freed, report)
        finally:
            report.publish()

    async def _evict_for_inodes(self, term: Term, objects: int, report: PassReport) -> int:
        """Evict so many objects, whatever their sizes. Returns the bytes freed."""
        freed, until = 0, report.evicted + objects
        while (missing := until - report.evicted) > 0:
            await self._index.refresh()
            victims = self._select(sys.maxsize, EvictionReason.DEVICE_INODES, min(missing, _EVICTION_BATCH))
            if not victims:
                EVICTION_BLOCKED.inc()
                if not self.blocked_by_inodes:
                    logger.warning("eviction_blocked", missing_inodes=missing * FILES_PER_OBJECT)
                self.blocked_by_inodes = True
                return freed
            freed += await self._evict(term, victims, report)
        self.blocked_by_inodes = False
        return freed

    async def _evict_until_enough(
        self, term: Term, usage: Usage, device_free: int, report: PassReport
    ) -> None:
        """Evict for the watermarks, and for those requests for space that can be met in this pass."""
        watermarks, prepared, discarded = self._rules.watermarks, False, False
        # Bytes of objects that may be evicted. Counted up to what is missing, or all: then it is less than that.
        evictable, counted_all = 0, False
        if usage.used + usage.reserved > watermarks.high:
            # Once begun, down to the low mark
            watermarks = Watermarks(low=watermarks.low, high=watermarks.low)
        while True:
            requests = await self._state.space_requests()
            wanted = sum(requests)
            all_needed = watermarks.to_evict(usage, wanted, device_free)
            if all_needed <= 0:
                self._set_blocked(0)
                return
            await self._index.refresh()
            if not prepared and (usage.parked or self._index.has_partials):
                prepared = True
                await self._reaper.prepare(term)
                usage = await self._state.usage()
                continue
            missing = missing_for(usage, wanted, device_free)
            if evictable < missing and not counted_all:
                evictable = self._count_evictable(missing)
                counted_all = evictable < missing
            if evictable < missing:
                partials = self._reaper.discardable if prepared and not discarded else 0
                objects = self._count_evictable(missing, self._index.partials) if partials else evictable
                free = min(usage.free, device_free)
                available = free + objects + partials + await self._given_by_workers()
                wanted = fitting_requests(requests, available)
                missing = missing_for(usage, wanted, device_free)
                if evictable < missing and partials:
                    # Before the objects: less may be freed than expected, and these would go for nothing
                    device_free += await self._reaper.free(term, missing - objects)
                    usage = await self._state.usage()
                    discarded, evictable, counted_all = True, 0, False
                    continue
            needed = watermarks.to_evict(usage, wanted, device_free)
            victims = self._select(needed, watermarks.reason_to_evict(usage, wanted, device_free))
            if not victims:
                self._set_blocked(all_needed if needed else all_needed - evictable)
                return
            evictable -= sum(footprint(victim.entry.size) for victim in victims)
            device_free += await self._evict(term, victims, report)
            usage = await self._state.usage()

    async def _given_by_workers(self) -> int:
        """Bytes that the paused downloads of one worker give to others once the evictor has done its part. A worker
        gives none if its own are not enough, so those of several do not add up."""
        return max((worker.spare for worker in await self._state.workers()), default=0)

    def _spared(self) -> Set[ObjectId]:
        now = time.monotonic()
        self._spared_until = {
            object_id: until for object_id, until in self._spared_until.items() if until > now
        }
        return self._spared_until.keys() | self.pinned

    def _count_evictable(self, wanted: int, besides: Collection[ObjectId] = ()) -> int:
        """Bytes of the objects that may be evicted, `besides` not among them; counted up to `wanted`."""
        return self._index.policy.evictable(
            wanted,
            self._clock(),
            min_idle=self._rules.min_idle,
            spared=self._spared() | set(besides),
        )

    def _select(
        self, needed: int, reason: EvictionReason, at_most: int = _EVICTION_BATCH
    ) -> Sequence[Victim]:
        policy, now = self._index.policy, self._clock()
        chosen = policy.victims(
            needed, now, min_idle=self._rules.min_idle, spared=self._spared(), at_most=at_most
        )
        return [
            Victim(
                entry,
                now - entry.last_access,
                policy.inflation,
                reason,
                self._index.is_partial(entry.object_id),
            )
            for entry in chosen
        ]

    async def _evict(self, term: Term, victims: Sequence[Victim], report: PassReport) -> int:
        """Evict one batch; the bytes freed."""
        partials = [victim for victim in victims if victim.partial]
        objects = [victim for victim in victims if not victim.partial]
        outcomes = list(await self._remover.evict_batch(term, objects, self._rules.min_idle))
        paths = await self._remover.paths_of([victim.object_id for victim in partials])
        for victim in partials:
            outcomes.append(await self._reaper.evict(term, victim.object_id))
            if outcomes[-1] is RemovalOutcome.REMOVED:
                path = paths.get(victim.object_id)
                self._remover.record_removed(victim.object_id, victim, footprint(victim.entry.size), path)
        freed = 0
        for victim, outcome in zip([*objects, *partials], outcomes, strict=True):
            report.add(victim, outcome)
            if outcome is RemovalOutcome.REMOVED:
                freed += footprint(victim.entry.size)
            elif outcome is not RemovalOutcome.DEFERRED:
                cooldown = _FAILURE_COOLDOWN if outcome is RemovalOutcome.FAILED else _IN_USE_COOLDOWN
                self._spared_until[victim.object_id] = time.monotonic() + cooldown
        return freed

    def _set_blocked(self, shortfall: int) -> None:
        """Log once, not every second, that nothing can be evicted."""
        blocked = shortfall > 0
        if blocked and not self.blocked:
            logger.warning("eviction_blocked", missing_bytes=shortfall, objects=len(self._index.policy))
        if blocked:
            EVICTION_BLOCKED.inc()
        self.blocked = blocked


class PassReport:
    """Counts what one pass evicts, for the metrics and for one log event at its end."""

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self.evicted = self._deferred = self._skipped = self._bytes = 0
        self._max_idle = 0.0
        self._largest: list[
            tuple[int, int, Victim]
        ] = []  # heap by size; the serial number keeps victims uncompared

    def add(self, victim: Victim, outcome: RemovalOutcome) -> None:
        if outcome is RemovalOutcome.DEFERRED:
            self._deferred += 1
        elif outcome is not RemovalOutcome.REMOVED:
            self._skipped += 1
        else:
            self.evicted += 1
            self._bytes += footprint(victim.entry.size)
            self._max_idle = max(self._max_idle, victim.idle)
            EVICTED_OBJECT_IDLE.observe(victim.idle)
            EVICTED_OBJECT_SIZE.observe(victim.entry.size)
            heapq.heappush(self._largest, (victim.entry.size, self.evicted, victim))
            if len(self._largest) > _MAX_LOGGED_VICTIMS:
                heapq.heappop(self._largest)

    def publish(self) -> None:
        """Set the gauge and log the pass, if it has evicted anything."""
        if not self.evicted:
            return
        if self._max_idle:
            LAST_EVICTION_MAX_IDLE.set(self._max_idle)
        logger.info(
            "object_evicted",
            policy=self._policy,
            evicted=self.evicted,
            bytes=self._bytes,
            deferred=self._deferred,
            skipped=self._skipped,
            largest=[
                {"object_id": victim.object_id, **victim.log_fields()}
                for _, _, victim in sorted(self._largest, reverse=True)
            ],
        )
