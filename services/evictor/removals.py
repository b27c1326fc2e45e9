"""Taking one object away: state store first, so that nobody counts on it, then the file, then its bytes.

The lock on the file is taken before the store is told and given back after everything is done: a leader that was
stopped in between keeps the name from being used again, and its successor finds the file in use.
"""

from __future__ import annotations

from enum import StrEnum

import structlog

from services.evictor.file_calls import file_call
from services.evictor.index import EvictionIndex
from shared.adapters.volume import Removal, RemovalState, Volume
from shared.domain.errors import VolumeError
from shared.domain.objects import ObjectId
from shared.observability.metrics import EVICTED_BYTES, EVICTIONS
from shared.ports.state_store import StateStore, Term

ANY_IDLE = 0.0
"""Least idle time of an object that must go however recently it was read."""

logger = structlog.get_logger()


class Outcome(StrEnum):
    """GONE: file, entry and bytes. IN_USE: somebody is sending it. REFUSED: the store does not let it go now.
    FAILED: the volume could not remove it. LEAVING: out of sight, its bytes count until its readers have finished."""

    GONE = "gone"
    IN_USE = "in_use"
    REFUSED = "refused"
    FAILED = "failed"
    LEAVING = "leaving"


class Removals:
    """Removes objects in the name of the leader. `reasons` keeps why an object that is still leaving has to go."""

    def __init__(self, state: StateStore, volume: Volume, index: EvictionIndex) -> None:
        self._state, self._volume, self._index = state, volume, index
        self._reasons: dict[ObjectId, str] = {}

    async def evict(
        self, term: Term, object_id: ObjectId, min_idle: float, reason: str, *, even_pinned: bool = False
    ) -> Outcome:
        """Remove a complete object unless it is in use, pinned, or was read less than `min_idle` seconds ago."""
        removal = self._volume.removal(object_id)
        try:
            found = await self._begin(object_id, removal)
            if found is None:
                return Outcome.FAILED
            if found is RemovalState.IN_USE:
                return Outcome.IN_USE
            # Without a file there is nothing to be careful with
            least_idle = min_idle if found is RemovalState.READY else ANY_IDLE
            even_pinned = even_pinned or found is not RemovalState.READY
            if not await self._state.begin_eviction(term, object_id, least_idle, even_pinned=even_pinned):
                return Outcome.REFUSED
            self._reasons[object_id] = reason
            return await self._finish(term, object_id, removal, found)
        finally:
            removal.close()

    async def purge(self, term: Term, object_id: ObjectId, reason: str) -> Outcome:
        """The object must go although it may be in use or pinned: from now on requests miss it, readers finish
        undisturbed, and its bytes count until they have (see `complete`)."""
        outcome = await self.evict(term, object_id, ANY_IDLE, reason, even_pinned=True)
        if outcome is not Outcome.IN_USE:
            return outcome
        if not await self._state.begin_eviction(term, object_id, ANY_IDLE, even_pinned=True):
            return Outcome.REFUSED
        self._reasons[object_id] = reason
        self._index.left_behind(object_id)
        try:
            await file_call(self._volume.removal(object_id).set_aside)
        except VolumeError as error:
            # Its readers may have finished and another attempt may have removed it: `complete` finds out
            logger.warning("object_not_set_aside", object_id=object_id, reason=str(error))
        logger.info("object_leaving", object_id=object_id, reason=reason)
        return Outcome.LEAVING

    async def complete(self, term: Term, object_id: ObjectId) -> Outcome:
        """Finish a removal that has begun (the entry is evicting): now, or LEAVING while somebody reads the file."""
        removal = self._volume.removal(object_id)
        try:
            found = await self._begin(object_id, removal)
            if found is None:
                return Outcome.FAILED
            if found is RemovalState.IN_USE:
                return Outcome.LEAVING
            return await self._finish(term, object_id, removal, found)
        finally:
            removal.close()

    async def _begin(self, object_id: ObjectId, removal: Removal) -> RemovalState | None:
        """None if what stands under the name cannot be locked: a link that somebody put there, a failing disk."""
        try:
            return await file_call(removal.begin)
        except VolumeError as error:
            logger.error("object_not_removed", object_id=object_id, reason=str(error))
            return None

    async def _finish(
        self, term: Term, object_id: ObjectId, removal: Removal, found: RemovalState
    ) -> Outcome:
        """The entry is evicting and `removal` has begun: unlink what is there under the name, then free the bytes."""
        try:
            still_there = await file_call(_unlink_all, self._volume, object_id, removal, found)
        except VolumeError as error:
            await self._state.cancel_eviction(term, object_id)
            logger.error("object_not_removed", object_id=object_id, reason=str(error))
            return Outcome.FAILED
        if still_there:
            self._index.left_behind(object_id)
            return Outcome.LEAVING
        reason = self._reasons.pop(object_id, "unfinished")
        freed = await self._state.finish_eviction(term, object_id)
        self._index.removed(object_id, evicted=reason == "space")
        if freed:
            EVICTIONS.labels(reason).inc()
            EVICTED_BYTES.labels(reason).inc(freed)
            logger.debug("object_removed", object_id=object_id, reason=reason, bytes=freed)
        return Outcome.GONE

    async def complete_all(self, term: Term, at_most: int) -> int:
        """Try to finish removals that have begun; how many are left."""
        for object_id in list(self._index.evicting)[:at_most]:
            outcome = await self.complete(term, object_id)
            self._index.evicting.pop(object_id, None)
            if outcome is Outcome.LEAVING:
                self._index.evicting[object_id] = None  # to the end: the next look begins with others
        return len(self._index.evicting)


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
