"""Removes objects, for eviction and for every other reason.

First the state store, so that no other process counts on the object, then the file, then its bytes. The lock on the
file is taken before the store is told and released after everything is done. A leader that is stopped in between keeps
the name from being used again, and its successor finds the file in use.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import structlog

from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.shared.adapters.volume import Removal, RemovalState, TrashedFile, Volume
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.eviction import PolicyEntry
from distributor_node.shared.domain.objects import DIGEST_PREFIX, ObjectId
from distributor_node.shared.domain.space import EvictionReason, footprint
from distributor_node.shared.observability.metrics import EVICTED_BYTES, EVICTIONS
from distributor_node.shared.ports.state_store import StateStore, Term
from distributor_node.shared.runtime.threads import run_blocking

MAX_RECENT = 100  # removed objects that the node's page is told of
# Labels of the metrics for everything that is evicted to make room
_SPACE, _PARTIAL = "space", "partial"

ANY_IDLE = -1e12
"""Minimum idle time of an object that has to be removed however recently it was read."""

logger = structlog.get_logger()


class RemovalOutcome(StrEnum):
    """How the attempt to remove one object has ended."""

    REMOVED = "gone"
    """File and entry are gone, the bytes are free."""
    IN_USE = "in_use"
    """It is being sent."""
    REFUSED = "refused"
    """The store does not allow it now."""
    FAILED = "failed"
    """The volume could not remove it."""
    DEFERRED = "leaving"
    """Requests miss it, and its bytes count until its readers have finished."""


@dataclass(frozen=True, slots=True)
class Victim:
    """An object that the policy has chosen, and why. The size of a partial one is what it has reserved."""

    entry: PolicyEntry
    idle: float  # seconds since its last access
    inflation: float  # the policy's L at that moment
    reason: EvictionReason
    partial: bool = False

    @property
    def object_id(self) -> ObjectId:
        return self.entry.object_id

    def log_fields(self) -> dict[str, Any]:
        """Fields of a log event. Policies without priorities have no L either."""
        has_priority = self.entry.priority > 0
        return {
            "size": self.entry.size,
            "views": self.entry.frequency,
            "idle_seconds": round(self.idle, 1),
            "priority": self.entry.priority if has_priority else None,
            "inflation": self.inflation if has_priority else None,
            "reason": self.reason.value,
            **({"partial": True} if self.partial else {}),
        }


class ObjectRemover:
    """Removes objects for the leader."""

    def __init__(self, state: StateStore, volume: Volume, index: EvictionIndex) -> None:
        self._state, self._volume, self._index = state, volume, index
        self._settling = asyncio.Lock()
        self._begun: dict[ObjectId, tuple[str | Victim, str | None]] = {}
        """Why objects are removed whose removal has not finished, and the paths that their ids are the digests of."""
        self.recent: deque[dict[str, Any]] = deque(maxlen=MAX_RECENT)
        """What was removed last, and why; the newest last."""

    async def evict(
        self,
        term: Term,
        object_id: ObjectId,
        min_idle: float,
        reason: str | Victim,
        *,
        even_pinned: bool = False,
    ) -> RemovalOutcome:
        """Remove a complete object unless it is in use, pinned, or was read less than `min_idle` seconds ago.

        `reason`: the victim that is evicted to make room, or a label of the metrics.
        """
        removal = self._volume.removal(object_id)
        try:
            found = await self._begin(object_id, removal)
            if found is None:
                return RemovalOutcome.FAILED
            if found is RemovalState.IN_USE:
                return RemovalOutcome.IN_USE
            paths = await self.paths_of([object_id])
            # Without a file only the entry is left, which may go at once
            required_idle = min_idle if found is RemovalState.READY else ANY_IDLE
            even_pinned = even_pinned or found is not RemovalState.READY
            if not await self._state.begin_eviction(term, object_id, required_idle, even_pinned=even_pinned):
                return RemovalOutcome.REFUSED
            self._begun[object_id] = reason, paths.get(object_id)
            return await self._finish(term, object_id, removal, found)
        finally:
            removal.close()

    async def evict_batch(
        self, term: Term, victims: Sequence[Victim], min_idle: float
    ) -> Sequence[RemovalOutcome]:
        """`evict` about a hundred victims in few steps.

        The order of steps for each victim is that of `evict`. After an error of the store `complete` can finish every
        removal that has begun.
        """
        removals = [self._volume.removal(victim.object_id) for victim in victims]
        try:
            found = await run_blocking(_begin_all, removals)
            outcomes = {
                victim.object_id: RemovalOutcome.IN_USE
                if state is RemovalState.IN_USE
                else RemovalOutcome.FAILED
                for victim, state in zip(victims, found, strict=True)
                if state is not RemovalState.READY and state is not RemovalState.ABSENT
            }
            ready = {
                victim.object_id: (victim, removal)
                for victim, removal, state in zip(victims, removals, found, strict=True)
                if state is RemovalState.READY
            }
            outcomes |= await self._evict_locked(term, ready, min_idle)
        finally:
            for removal in removals:
                removal.close()
        for victim in victims:
            if victim.object_id not in outcomes:  # there is no file
                outcomes[victim.object_id] = await self.evict(term, victim.object_id, min_idle, victim)
        return [outcomes[victim.object_id] for victim in victims]

    async def _evict_locked(
        self, term: Term, ready: Mapping[ObjectId, tuple[Victim, Removal]], min_idle: float
    ) -> dict[ObjectId, RemovalOutcome]:
        object_ids = list(ready)
        paths = await self.paths_of(object_ids)
        begun = await self._state.begin_evictions(term, object_ids, min_idle)
        outcomes = dict.fromkeys(object_ids, RemovalOutcome.REFUSED)
        evicting = [object_id for object_id, granted in zip(object_ids, begun, strict=True) if granted]
        self._begun.update({object_id: (ready[object_id][0], paths.get(object_id)) for object_id in evicting})
        locked = {object_id: ready[object_id][1] for object_id in evicting}
        results = await run_blocking(_unlink_each, self._volume, locked)
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
            self._begun.pop(object_id, None)
            self.record_removed(object_id, ready[object_id][0], freed, paths.get(object_id))
        return outcomes

    async def _cancel(self, term: Term, object_id: ObjectId, error: VolumeError) -> None:
        await self._state.cancel_eviction(term, object_id)
        self._index.mark_restored(object_id)
        logger.error("object_removal_failed", object_id=object_id, reason=str(error))

    async def purge(self, term: Term, object_id: ObjectId, reason: str) -> RemovalOutcome:
        """Remove an object even if it is in use or pinned.

        Requests miss it from now on. Its readers finish undisturbed, and its bytes count until they have finished
        (see `complete`).
        """
        # Before the store is asked: see `Removal.rename_to_trash`
        expected = await run_blocking(self._volume.identity_of, object_id)
        outcome = await self.evict(term, object_id, ANY_IDLE, reason, even_pinned=True)
        if outcome is RemovalOutcome.IN_USE:
            paths = await self.paths_of([object_id])
            if not await self._state.begin_eviction(term, object_id, ANY_IDLE, even_pinned=True):
                return RemovalOutcome.REFUSED
            self._begun[object_id] = reason, paths.get(object_id)
            self._index.mark_deferred(object_id)
        elif outcome is not RemovalOutcome.DEFERRED:
            return outcome
        # DEFERRED: only the file of an earlier purge was unlinked; the one in `objects/` is in use
        # Not while the files in `leaving/` are counted: this one is counted by its entry, and then with them.
        async with self._settling:
            try:
                await run_blocking(self._volume.removal(object_id).rename_to_trash, expected)
            except VolumeError as error:
                # Its readers may have finished, and another attempt may have removed it. `complete` will see
                logger.warning("object_rename_failed", object_id=object_id, reason=str(error))
            else:
                if await self._state.detach_eviction(term, object_id):
                    size = 0 if expected is None else expected[2]
                    why, path = self._begun.pop(object_id, (reason, None))
                    self.record_removed(object_id, why, size, path)
        logger.info("eviction_deferred", object_id=object_id, reason=reason)
        return RemovalOutcome.DEFERRED

    async def complete(self, term: Term, object_id: ObjectId) -> RemovalOutcome:
        """Finish a removal that has begun (the entry is evicting). DEFERRED while the file is being read."""
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
        """Lock the file; None if it cannot be locked: it is a link, or the disk fails."""
        try:
            return await run_blocking(removal.begin)
        except VolumeError as error:
            logger.error("object_removal_failed", object_id=object_id, reason=str(error))
            return None

    async def _finish(
        self, term: Term, object_id: ObjectId, removal: Removal, found: RemovalState
    ) -> RemovalOutcome:
        """The entry is evicting and `removal` has begun: unlink the files of this name, then free the bytes."""
        try:
            still_there = await run_blocking(_unlink_all, self._volume, object_id, removal, found)
        except VolumeError as error:
            await self._cancel(term, object_id, error)
            return RemovalOutcome.FAILED
        if still_there:
            self._index.mark_deferred(object_id)
            return RemovalOutcome.DEFERRED
        reason, path = self._begun.pop(object_id, ("unfinished", None))
        freed = await self._state.finish_eviction(term, object_id)
        self.record_removed(object_id, reason, freed, path)
        return RemovalOutcome.REMOVED

    async def paths_of(self, object_ids: Sequence[ObjectId]) -> Mapping[ObjectId, str]:
        """Read the paths that ids are the digests of, for who asks what was removed: their records go as well."""
        digests = [object_id for object_id in object_ids if object_id.startswith(DIGEST_PREFIX)]
        return await run_blocking(self._volume.paths_of, digests) if digests else {}

    def record_removed(
        self, object_id: ObjectId, reason: str | Victim, freed: int, path: str | None = None
    ) -> None:
        """Forget an object whose file and entry, or whose partial file and fetch, are gone.

        `path`: that the id is the digest of, if it is known.
        """
        victim = reason if isinstance(reason, Victim) else None
        self._index.removed(object_id, evicted=victim is not None)
        if not freed:
            return
        if victim is not None and not victim.partial:
            self._index.ghosts.add(object_id)
        label = (_PARTIAL if reason.partial else _SPACE) if isinstance(reason, Victim) else reason
        EVICTIONS.labels(label).inc()
        EVICTED_BYTES.labels(label).inc(freed)
        fields = {"reason": label} if victim is None else victim.log_fields()
        if path is not None:
            fields["path"] = path
        self.recent.append({"id": object_id, "at": round(time.time(), 3), "bytes": freed, **fields})
        logger.debug("object_removed", object_id=object_id, bytes=freed, **fields)

    async def complete_all(self, term: Term, at_most: int) -> int:
        """Try to finish removals that have begun; returns how many are left."""
        for object_id in list(self._index.evicting)[:at_most]:
            outcome = await self.complete(term, object_id)
            # A removal that failed and was cancelled is not in progress any more
            begun = object_id in self._index.evicting
            self._index.evicting.pop(object_id, None)
            if outcome is RemovalOutcome.DEFERRED or (outcome is RemovalOutcome.FAILED and begun):
                self._index.evicting[object_id] = None  # to the end: the next call begins with others
        return len(self._index.evicting)

    async def settle_trash(self, term: Term) -> None:
        """Unlink the files in `leaving/` that no process sends, whatever the index says of their objects, and count
        the others.

        The entry of a file may be missing: a purge has dropped it, so that the object can be fetched again. Or it is
        not evicting: the store lost its last second with the removal. `complete` takes care of those that are evicting.
        """
        async with self._settling:
            uncounted = 0
            for file in await run_blocking(lambda: list(self._volume.scan_trash())):
                try:
                    counted = await self._settle_trashed(term, file)
                except VolumeError as error:
                    logger.error("object_removal_failed", object_id=file.object_id, reason=str(error))
                    counted = False
                if not counted:
                    uncounted += footprint(file.size)
            if uncounted != (await self._state.usage()).leaving:
                await self._state.set_leaving(term, uncounted)

    async def _settle_trashed(self, term: Term, file: TrashedFile) -> bool:
        """Whether the file is gone, or an entry counts it."""
        object_id = file.object_id
        # An entry stands for one file: for that in `objects/` if there is one. An entry of another size stands for a
        # later file, which is gone
        entry = None
        if file.name == object_id and await run_blocking(self._volume.find_object, object_id) is None:
            entry = await self._state.entry(object_id)
        has_entry = entry is not None and entry.size == file.size
        if has_entry and object_id in self._index.evicting:
            return True
        if await run_blocking(self._volume.unlink_trashed, file):
            return True
        if not has_entry:
            return False
        if not await self._state.begin_eviction(term, object_id, ANY_IDLE, even_pinned=True):
            return False
        self._index.mark_deferred(object_id)
        return True


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
    """`_unlink_all` for each; its error in place of a result."""
    results: dict[ObjectId, bool | VolumeError] = {}
    for object_id, removal in ready.items():
        try:
            results[object_id] = _unlink_all(volume, object_id, removal, RemovalState.READY)
        except VolumeError as error:
            results[object_id] = error
    return results


def _unlink_all(volume: Volume, object_id: ObjectId, removal: Removal, found: RemovalState) -> bool:
    """Unlink by a removal that has begun. True if another file of the name is left and in use: an earlier removal had
    moved one to the trash.

    A file can also have appeared since `removal` found none, because the store was not told until then.
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
