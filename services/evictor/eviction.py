"""Keeping the volume below its high watermark, and making room when a worker asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import structlog

from distributor_node.services.evictor.adoption import PartialReaper
from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.shared.adapters.volume import Removal, RemovalState, Volume
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.eviction import PolicyEntry
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import Usage, Watermarks, footprint, missing_for
from distributor_node.shared.observability.metrics import (
    EVICTED_BYTES,
    EVICTED_OBJECT_IDLE,
    EVICTED_OBJECT_SIZE,
    EVICTION_BLOCKED,
    EVICTIONS,
    LAST_EVICTION_MAX_IDLE,
)
from distributor_node.shared.ports.state_store import StateStore, Term
from distributor_node.shared.runtime.threads import run_blocking

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


# Taking one object away: state store first, so that nobody counts on it, then the file, then its bytes.
#
# The lock on the file is taken before the store is told and given back after everything is done: a leader that was
# stopped in between keeps the name from being used again, and its successor finds the file in use.

ANY_IDLE = 0.0
"""Least idle time of an object that must go however recently it was read."""


class RemovalOutcome(StrEnum):
    """REMOVED: file, entry and bytes. IN_USE: somebody is sending it. REFUSED: the store does not let it go now.
    FAILED: the volume could not remove it. DEFERRED: out of sight, its bytes count until its readers have finished."""

    REMOVED = "gone"
    IN_USE = "in_use"
    REFUSED = "refused"
    FAILED = "failed"
    DEFERRED = "leaving"


class ObjectRemover:
    """Removes objects in the name of the leader. `reasons` keeps why an object that is still leaving has to go."""

    def __init__(self, state: StateStore, volume: Volume, index: EvictionIndex) -> None:
        self._state, self._volume, self._index = state, volume, index
        self._reasons: dict[ObjectId, str] = {}

    async def evict(
        self, term: Term, object_id: ObjectId, min_idle: float, reason: str, *, even_pinned: bool = False
    ) -> RemovalOutcome:
        """Remove a complete object unless it is in use, pinned, or was read less than `min_idle` seconds ago."""
        removal = self._volume.removal(object_id)
        try:
            found = await self._begin(object_id, removal)
            if found is None:
                return RemovalOutcome.FAILED
            if found is RemovalState.IN_USE:
                return RemovalOutcome.IN_USE
            # Without a file there is nothing to be careful with
            required_idle = min_idle if found is RemovalState.READY else ANY_IDLE
            even_pinned = even_pinned or found is not RemovalState.READY
            if not await self._state.begin_eviction(term, object_id, required_idle, even_pinned=even_pinned):
                return RemovalOutcome.REFUSED
            self._reasons[object_id] = reason
            return await self._finish(term, object_id, removal, found)
        finally:
            removal.close()

    async def evict_batch(
        self, term: Term, object_ids: Sequence[ObjectId], min_idle: float
    ) -> Sequence[RemovalOutcome]:
        """`evict` each for space: a hundred or so, in few steps. For each of them their order is that of `evict`, and
        an error of the store leaves none half done that `complete` would not bring to its end."""
        removals = [self._volume.removal(object_id) for object_id in object_ids]
        try:
            found = await run_blocking(_begin_all, removals)
            outcomes = {
                object_id: RemovalOutcome.IN_USE if state is RemovalState.IN_USE else RemovalOutcome.FAILED
                for object_id, state in zip(object_ids, found, strict=True)
                if state is not RemovalState.READY and state is not RemovalState.ABSENT
            }
            ready = {
                object_id: removal
                for object_id, removal, state in zip(object_ids, removals, found, strict=True)
                if state is RemovalState.READY
            }
            outcomes |= await self._evict_locked(term, ready, min_idle)
        finally:
            for removal in removals:
                removal.close()
        for object_id in object_ids:
            if object_id not in outcomes:  # no file there: nothing to be careful with
                outcomes[object_id] = await self.evict(term, object_id, min_idle, "space")
        return [outcomes[object_id] for object_id in object_ids]

    async def _evict_locked(
        self, term: Term, ready: Mapping[ObjectId, Removal], min_idle: float
    ) -> dict[ObjectId, RemovalOutcome]:
        object_ids = list(ready)
        begun = await self._state.begin_evictions(term, object_ids, min_idle)
        outcomes = dict.fromkeys(object_ids, RemovalOutcome.REFUSED)
        evicting = [object_id for object_id, granted in zip(object_ids, begun, strict=True) if granted]
        self._reasons.update(dict.fromkeys(evicting, "space"))
        results = await run_blocking(_unlink_each, self._volume, {one: ready[one] for one in evicting})
        removed = []
        for object_id in evicting:
            result = results[object_id]
            if isinstance(result, VolumeError):
                await self._cancel(term, object_id, result)
                outcomes[object_id] = RemovalOutcome.FAILED
            elif result:
                self._index.mark_deferred(object_id)
                outcomes[object_id] = RemovalOutcome.DEFERRED
            else:
                removed.append(object_id)
                outcomes[object_id] = RemovalOutcome.REMOVED
        for object_id, freed in zip(removed, await self._state.finish_evictions(term, removed), strict=True):
            self._reasons.pop(object_id, None)
            self._record_evicted(object_id, "space", freed)
        return outcomes

    async def _cancel(self, term: Term, object_id: ObjectId, error: VolumeError) -> None:
        await self._state.cancel_eviction(term, object_id)
        self._index.mark_restored(object_id)
        logger.error("object_removal_failed", object_id=object_id, reason=str(error))

    async def purge(self, term: Term, object_id: ObjectId, reason: str) -> RemovalOutcome:
        """The object must go although it may be in use or pinned: from now on requests miss it, readers finish
        undisturbed, and its bytes count until they have (see `complete`)."""
        outcome = await self.evict(term, object_id, ANY_IDLE, reason, even_pinned=True)
        if outcome is not RemovalOutcome.IN_USE:
            return outcome
        if not await self._state.begin_eviction(term, object_id, ANY_IDLE, even_pinned=True):
            return RemovalOutcome.REFUSED
        self._reasons[object_id] = reason
        self._index.mark_deferred(object_id)
        try:
            await run_blocking(self._volume.removal(object_id).rename_to_trash)
        except VolumeError as error:
            # Its readers may have finished and another attempt may have removed it: `complete` finds out
            logger.warning("object_rename_failed", object_id=object_id, reason=str(error))
        logger.info("eviction_deferred", object_id=object_id, reason=reason)
        return RemovalOutcome.DEFERRED

    async def complete(self, term: Term, object_id: ObjectId) -> RemovalOutcome:
        """Finish a removal that has begun (the entry is evicting): now, or DEFERRED while somebody reads the file."""
        removal = self._volume.removal(object_id)
        try:
            found = await self._begin(object_id, removal)
            if found is None:
                return RemovalOutcome.FAILED
            if found is RemovalState.IN_USE:
                return RemovalOutcome.DEFERRED
            return await self._finish(term, object_id, removal, found)
        finally:
            removal.close()

    async def _begin(self, object_id: ObjectId, removal: Removal) -> RemovalState | None:
        """None if what stands under the name cannot be locked: a link that somebody put there, a failing disk."""
        try:
            return await run_blocking(removal.begin)
        except VolumeError as error:
            logger.error("object_removal_failed", object_id=object_id, reason=str(error))
            return None

    async def _finish(
        self, term: Term, object_id: ObjectId, removal: Removal, found: RemovalState
    ) -> RemovalOutcome:
        """The entry is evicting and `removal` has begun: unlink what is there under the name, then free the bytes."""
        try:
            still_there = await run_blocking(_unlink_all, self._volume, object_id, removal, found)
        except VolumeError as error:
            await self._cancel(term, object_id, error)
            return RemovalOutcome.FAILED
        if still_there:
            self._index.mark_deferred(object_id)
            return RemovalOutcome.DEFERRED
        reason = self._reasons.pop(object_id, "unfinished")
        freed = await self._state.finish_eviction(term, object_id)
        self._record_evicted(object_id, reason, freed)
        return RemovalOutcome.REMOVED

    def _record_evicted(self, object_id: ObjectId, reason: str, freed: int) -> None:
        for_space = reason == "space"
        self._index.removed(object_id, evicted=for_space)
        if for_space and freed:
            self._index.ghosts.add(object_id)
        if freed:
            EVICTIONS.labels(reason).inc()
            EVICTED_BYTES.labels(reason).inc(freed)
            logger.debug("object_removed", object_id=object_id, reason=reason, bytes=freed)

    async def complete_all(self, term: Term, at_most: int) -> int:
        """Try to finish removals that have begun; how many are left."""
        for object_id in list(self._index.evicting)[:at_most]:
            outcome = await self.complete(term, object_id)
            # One whose removal failed and was called off is not evicting any more
            begun = object_id in self._index.evicting
            self._index.evicting.pop(object_id, None)
            if outcome is RemovalOutcome.DEFERRED or (outcome is RemovalOutcome.FAILED and begun):
                self._index.evicting[object_id] = None  # to the end: the next look begins with others
        return len(self._index.evicting)


def _begin_all(removals: Sequence[Removal]) -> Sequence[RemovalState | VolumeError]:
    found: list[RemovalState | VolumeError] = []
    for removal in removals:
        try:
            found.append(removal.begin())
        except VolumeError as error:
            logger.error("object_removal_failed", reason=str(error))
            found.append(error)
    return found


def _unlink_each(volume: Volume, ready: Mapping[ObjectId, Removal]) -> Mapping[ObjectId, bool | VolumeError]:
    """`_unlink_all` of each, or what went wrong."""
    results: dict[ObjectId, bool | VolumeError] = {}
    for object_id, removal in ready.items():
        try:
            results[object_id] = _unlink_all(volume, object_id, removal, RemovalState.READY)
        except VolumeError as error:
            results[object_id] = error
    return results


def _unlink_all(volume: Volume, object_id: ObjectId, removal: Removal, found: RemovalState) -> bool:
    """Unlink by a removal that has begun; True if another file of the name, in use, is left (one was set aside before).

    A file can also have appeared since `removal` found none: the store was not told until then.
    """
    if found is RemovalState.READY:
        removal.unlink()
    while True:
        another = volume.removal(object_id)
        try:
            state = another.begin()
            if state is RemovalState.READY:
                another.unlink()
                continue
            return state is RemovalState.IN_USE
        finally:
            another.close()
