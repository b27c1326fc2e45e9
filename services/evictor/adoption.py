"""Taking files of the volume that the store does not know into the index. The disk is the truth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.services.evictor.node_import import NodeImport
from distributor_node.services.evictor.partial_files import (
    discard_partial_file,
    expected_bytes,
    partial_file_exists,
    scan_partial_files,
)
from distributor_node.shared.adapters.volume import FoundObject, FoundPartial, PartialHeld, Volume
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.eviction import PolicyEntry
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.observability.metrics import RECONCILED
from distributor_node.shared.ports.state_store import Fetch, FetchPhase, IndexEntry, Lease, StateStore, Term
from distributor_node.shared.runtime.threads import run_blocking

NEVER = 0.0  # POSIX time of the last access of an object that nobody can ask for any more

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class SeenFile:
    """The complete file; `valid`: it has a record that fits, or none at all (the catalog may know more)."""

    found: FoundObject
    valid: bool
    has_partial: bool


class Adoption:
    """A file without a record is adopted too: its bytes count, it may be evicted, yet it is no hit until repaired."""

    def __init__(
        self, state: StateStore, volume: Volume, index: EvictionIndex, node_import: NodeImport | None = None
    ) -> None:
        """`node_import`: it may know how an object was used before it came here."""
        self._state, self._volume, self._index = state, volume, index
        self._node_import = node_import

    async def adopt(self, term: Term, object_id: ObjectId) -> bool | None:
        """True: adopted. False: adopted, but what its record says is not what is there. None: not adopted, since the
        store knows it, a live fetch will tell the store, or it is gone."""
        seen = await run_blocking(_inspect, self._volume, object_id)
        if seen is None:
            return None
        [outcome] = await self.adopt_files(term, [seen])
        if isinstance(outcome, VolumeError):
            raise outcome
        return outcome

    async def inspect(self, object_ids: Sequence[ObjectId]) -> Sequence[SeenFile | VolumeError | None]:
        """Many files in one go, for `adopt_files`; None: gone."""
        return await run_blocking(_inspect_all, self._volume, object_ids)

    async def adopt_files(self, term: Term, seen: Sequence[SeenFile]) -> Sequence[bool | VolumeError | None]:
        """As `adopt`, of some hundred files at most that were looked at a moment ago."""
        faults = {}
        for one in seen:
            if one.has_partial:
                try:
                    await self._remove_partial(term, one.found.object_id)
                except VolumeError as error:
                    faults[one.found.object_id] = error
        ready = [one for one in seen if one.found.object_id not in faults]
        entries = self._index.with_priorities([self._entry_of(one.found) for one in ready])
        adopted = await self._state.adopt_many(term, [_as_index_entry(entry) for entry in entries])
        outcomes: dict[ObjectId, bool | VolumeError | None] = {**faults}
        for one, entry, taken in zip(ready, entries, adopted, strict=True):
            outcomes[entry.object_id] = one.valid if taken else None
            if taken:
                await self._register(term, one, entry)
        RECONCILED.labels("adopted").inc(sum(adopted))
        return [outcomes[one.found.object_id] for one in seen]

    async def _register(self, term: Term, seen: SeenFile, entry: PolicyEntry) -> None:
        self._index.add(entry)
        logger.debug("object_adopted", object_id=entry.object_id, bytes=entry.size)
        if seen.has_partial:
            await self.adopt_partial(term, entry.object_id, 0)

    def _entry_of(self, found: FoundObject) -> PolicyEntry:
        known = self._index.known_entry(found.object_id) or self._imported_usage(found)
        return PolicyEntry(
            found.object_id,
            found.size,
            known.frequency if known else 1,
            min(known.last_access if known else found.changed_at, time.time()),
            known.priority if known else 0.0,
        )

    def _imported_usage(self, found: FoundObject) -> PolicyEntry | None:
        return None if self._node_import is None else self._node_import.usage_of(found)

    async def adopt_trashed(self, term: Term, object_id: ObjectId, size: int) -> bool:
        """Count a file that is out of sight, and mark it as being evicted. False: the store knows the object."""
        if not await self._state.adopt(term, IndexEntry(object_id, size, 1, NEVER)):
            return False
        await self._state.begin_eviction(term, object_id, 0.0)
        self._index.mark_deferred(object_id)
        RECONCILED.labels("adopted_evicting").inc()
        return True

    async def adopt_partial(self, term: Term, object_id: ObjectId, at_least: int) -> None:
        """Reserve what a partial file may take, if no fetch has done so; nothing if it is gone meanwhile."""
        size = await run_blocking(_size_to_reserve, self._volume, object_id, at_least)
        if size is not None and await self._state.adopt_partial(term, object_id, size):
            RECONCILED.labels("adopted_partial").inc()
            logger.info("partial_adopted", object_id=object_id, bytes=size)

    async def _remove_partial(self, term: Term, object_id: ObjectId) -> None:
        """The object is complete: a partial file beside it, whose fetch is over, must not be counted as one with it."""
        lease = await self._state.steal_lease(term, object_id)
        if lease is None:
            return
        try:
            await run_blocking(discard_partial_file, self._volume, object_id, lease.size)
        except PartialHeld:
            logger.info("partial_in_use", object_id=object_id)
        finally:
            await self._state.park(lease)


def _inspect(volume: Volume, object_id: ObjectId) -> SeenFile | None:
    found = volume.find_object(object_id)
    if found is None:
        return None
    record = volume.read_record(object_id)
    valid = record is None or record.size == found.size
    return SeenFile(found, valid, partial_file_exists(volume, object_id))


def _inspect_all(volume: Volume, object_ids: Sequence[ObjectId]) -> Sequence[SeenFile | VolumeError | None]:
    seen: list[SeenFile | VolumeError | None] = []
    for object_id in object_ids:
        try:
            seen.append(_inspect(volume, object_id))
        except VolumeError as error:
            seen.append(error)
    return seen


def _size_to_reserve(volume: Volume, object_id: ObjectId, at_least: int) -> int | None:
    if not partial_file_exists(volume, object_id):
        return None
    return expected_bytes(volume, object_id, at_least)


def _as_index_entry(entry: PolicyEntry) -> IndexEntry:
    return IndexEntry(entry.object_id, entry.size, entry.frequency, entry.last_access, entry.priority)


# Partial files against the store's fetches: each is accounted for, abandoned ones go.
#
# The volume is looked at before the store: a file whose fetch began before it was seen has its row by then, and one
# whose
# fetch ended meanwhile is no longer there when it is looked at again.

_RESUME_FRACTION = 0.8
"""Of the time that a worker waits for space, so that its request is still in force then."""


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
