"""Partial files against the store's fetches: each is accounted for, abandoned ones go.

The volume is looked at before the store: a file whose fetch began before it was seen has its row by then, and one whose
fetch ended meanwhile is no longer there when it is looked at again.
"""

from __future__ import annotations

import time

import structlog

from services.evictor.adoption import Adoption
from services.evictor.file_calls import run_blocking
from services.evictor.partial_files import discard_partial_file, scan_partial_files
from shared.adapters.volume import FoundObject, FoundPartial, PartialHeld, Volume
from shared.domain.errors import VolumeError
from shared.domain.objects import ObjectId
from shared.domain.space import footprint
from shared.observability.metrics import RECONCILED
from shared.ports.state_store import Fetch, FetchPhase, Lease, StateStore, Term

_RESUME_FRACTION = 0.8
"""Of the time that a worker waits for space, so that its request is still in force then."""

logger = structlog.get_logger()


class PartialReaper:
    """`keep`: seconds that an abandoned partial file waits for its resumption; `space_wait`: that a worker waits for
    the room that it has asked for."""

    def __init__(
        self, state: StateStore, volume: Volume, adoption: Adoption, keep: float, space_wait: float
    ) -> None:
        self._state, self._volume, self._adoption, self._keep = state, volume, adoption, keep
        self._resume_grace = _RESUME_FRACTION * space_wait

    async def sweep(self, term: Term) -> int:
        """Account for unknown partial files, remove hopeless and old ones, end fetches that left nothing.

        Returns how many things lie there that are none of ours.
        """
        found, foreign = await run_blocking(scan_partial_files, self._volume)
        fetches = {fetch.object_id: fetch for fetch in await self._state.fetches()}
        for partial in found.values():
            await self._reconcile_one(term, partial, fetches.get(partial.object_id))
        for fetch in fetches.values():
            if fetch.phase is FetchPhase.PARKED and fetch.object_id not in found:
                await self._reap(term, fetch.object_id, "left_no_file")
        return len(foreign)

    async def free(self, term: Term, wanted: int) -> int:
        """Give up parked fetches, longest parked first, until `wanted` bytes are free; bytes freed.

        Those parked a moment ago stay: their jobs are on the way to another worker, and clients may be following them.
        """
        if wanted <= 0:
            return 0
        min_age = min(self._resume_grace, self._keep)
        parked = [
            fetch
            for fetch in await self._state.fetches()
            if fetch.phase is FetchPhase.PARKED and fetch.age >= min_age
        ]
        freed = 0
        for fetch in sorted(parked, key=_age, reverse=True):
            if freed >= wanted:
                break
            freed += await self._reap(term, fetch.object_id, "space_wanted")
        return freed

    async def discard(self, term: Term, object_id: ObjectId) -> None:
        """Give up one parked fetch, if it is one."""
        await self._reap(term, object_id, "purged")

    async def _reconcile_one(self, term: Term, partial: FoundPartial, fetch: Fetch | None) -> None:
        if fetch is not None and fetch.phase is FetchPhase.FETCHING:
            return
        object_id = partial.object_id
        if fetch is None or fetch.phase is not FetchPhase.PARKED:
            # A claim may or may not have a reservation: the store knows, and adds none twice
            await self._adoption.adopt_partial(term, object_id, partial.size)
        sidecar = await run_blocking(self._volume.partial_record, object_id)
        idle = time.time() - partial.changed_at
        if sidecar is None or partial.size > sidecar.size:
            await self._reap(term, object_id, "unusable")
        elif max(idle, fetch.age if fetch else 0.0) > self._keep:
            await self._reap(term, object_id, "abandoned")

    async def _reap(self, term: Term, object_id: ObjectId, reason: str) -> int:
        """End a fetch that nobody works on: take its lease, remove what it left, give the reservation back.

        Bytes freed; 0 if a worker has it again, or still writes although its lease is over, or has made it an object.
        """
        stored = await run_blocking(self._volume.find_object, object_id)
        if await self._adoption.adopt(term, object_id) is not None:
            return 0  # the worker got as far as the complete file, and died before it could tell
        lease = await self._state.steal_lease(term, object_id)
        if lease is None:
            return 0
        try:
            removed = await run_blocking(_remove, self._volume, lease, stored)
        except PartialHeld:
            logger.info("partial_in_use", object_id=object_id)
            removed = False
        except VolumeError as error:
            logger.error("partial_removal_failed", object_id=object_id, reason=str(error))
            removed = False
        if not removed:
            await self._state.park(lease)
            return 0
        await self._state.release(lease)
        RECONCILED.labels("removed_partial").inc()
        logger.info("partial_removed", object_id=object_id, reason=reason, bytes=lease.size)
        return footprint(lease.size)


def _remove(volume: Volume, lease: Lease, stored: FoundObject | None) -> bool:
    """Remove the partial file. False if its writer, whose lease was over, has made it a complete object since
    `stored` was looked at: then the reservation is what accounts for it."""
    discard_partial_file(volume, lease.object_id, lease.size)
    return volume.find_object(lease.object_id) == stored


def _age(fetch: Fetch) -> float:
    return fetch.age
