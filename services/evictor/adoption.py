"""Adoption: files on the volume that the state store does not know enter the index. The disk is the truth.

`Adoption` takes in complete files; `PartialReaper` accounts for partial files, and removes those that are abandoned or
worth least.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

import structlog

from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.services.evictor.node_import import NodeImport
from distributor_node.services.evictor.removal import RemovalOutcome
from distributor_node.shared.adapters.volume import (
    FoundObject,
    FoundPartial,
    PartialHeld,
    UnknownFile,
    UnreadableFile,
    Volume,
)
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.eviction import PolicyEntry
from distributor_node.shared.domain.objects import ObjectId, StoredRecord
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.observability.metrics import PARTIAL_HELD, RECONCILED
from distributor_node.shared.ports.state_store import Fetch, FetchPhase, IndexEntry, Lease, StateStore, Term
from distributor_node.shared.runtime.threads import run_blocking

logger = structlog.get_logger()


class AdoptionResult(Enum):
    """What came of one file."""

    ADOPTED = auto()
    DAMAGED = auto()
    """Adopted, although its size is not that of its record."""
    NOT_ADOPTED = auto()
    """The store knows the object, a live fetch will tell the store, or the file is gone."""


@dataclass(frozen=True, slots=True)
class SeenFile:
    """A complete file, as it was a moment ago."""

    found: FoundObject
    valid: bool  # it has a matching record, or none at all (the catalog may know more)
    has_partial: bool  # a partial file of the same object lies beside it


class Adoption:
    """Adopts files, those without a record too: their bytes count, they may be evicted, and they are no hits until they
    are repaired."""

    def __init__(
        self, state: StateStore, volume: Volume, index: EvictionIndex, node_import: NodeImport | None = None
    ) -> None:
        """`node_import`: may know how an object was used on the node that it comes from."""
        self._state, self._volume, self._index = state, volume, index
        self._node_import = node_import

    async def adopt(self, term: Term, object_id: ObjectId) -> AdoptionResult:
        """Adopt the complete file of this object, if there is one that the store does not know."""
        seen = await run_blocking(_inspect, self._volume, object_id)
        if seen is None:
            return AdoptionResult.NOT_ADOPTED
        [outcome] = await self.adopt_files(term, [seen])
        if isinstance(outcome, VolumeError):
            raise outcome
        return outcome

    async def inspect(self, object_ids: Sequence[ObjectId]) -> Sequence[SeenFile | VolumeError | None]:
        """Look at many files at once, for `adopt_files`. None: the file is gone."""
        return await run_blocking(_inspect_all, self._volume, object_ids)

    async def adopt_files(
        self, term: Term, seen: Sequence[SeenFile]
    ) -> Sequence[AdoptionResult | VolumeError]:
        """`adopt` a few hundred files at most, just after `inspect`. An error of one file stands in its place."""
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
        outcomes: dict[ObjectId, AdoptionResult | VolumeError] = {**faults}
        for one, entry, taken in zip(ready, entries, adopted, strict=True):
            outcomes[entry.object_id] = AdoptionResult.NOT_ADOPTED
            if taken:
                outcomes[entry.object_id] = AdoptionResult.ADOPTED if one.valid else AdoptionResult.DAMAGED
                await self._register(term, one, entry)
        RECONCILED.labels("adopted").inc(sum(adopted))
        return [outcomes[one.found.object_id] for one in seen]

    async def _register(self, term: Term, seen: SeenFile, entry: PolicyEntry) -> None:
        self._index.add(entry)
        logger.debug("object_adopted", object_id=entry.object_id, bytes=entry.size)
        if seen.has_partial:
            try:
                await self.adopt_partial(term, entry.object_id, 0)
            except VolumeError as error:
                logger.error("partial_unreadable", object_id=entry.object_id, reason=str(error))

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

    async def adopt_partial(self, term: Term, object_id: ObjectId, at_least: int) -> None:
        """Reserve what a partial file may take, unless a fetch has done so, or the file is gone."""
        size = await run_blocking(_size_to_reserve, self._volume, object_id, at_least)
        if size is not None and await self._state.adopt_partial(term, object_id, size):
            RECONCILED.labels("adopted_partial").inc()
            logger.info("partial_adopted", object_id=object_id, reserved=size)

    async def _remove_partial(self, term: Term, object_id: ObjectId) -> None:
        """Remove a partial file beside a complete object. Its fetch is over, and its bytes must not be counted as part
        of the object."""
        lease = await self._state.steal_lease(term, object_id)
        if lease is None:
            return
        try:
            await run_blocking(self._volume.discard_partial, object_id, lease.size)
        except PartialHeld:
            logger.info("partial_in_use", object_id=object_id)
        finally:
            await self._state.park(lease)


def _inspect(volume: Volume, object_id: ObjectId) -> SeenFile | None:
    found = volume.find_object(object_id)
    if found is None:
        return None
    try:
        record = volume.read_record(object_id)
    except VolumeError as error:  # its bytes count all the same
        logger.error("record_unreadable", object_id=object_id, reason=str(error))
        record = None
    valid = record is None or record.size == found.size
    return SeenFile(found, valid, _partial_exists(volume, object_id))


def _inspect_all(volume: Volume, object_ids: Sequence[ObjectId]) -> Sequence[SeenFile | VolumeError | None]:
    seen: list[SeenFile | VolumeError | None] = []
    for object_id in object_ids:
        try:
            seen.append(_inspect(volume, object_id))
        except VolumeError as error:
            seen.append(error)
    return seen


def _size_to_reserve(volume: Volume, object_id: ObjectId, at_least: int) -> int | None:
    if not _partial_exists(volume, object_id):
        return None
    return _expected_bytes(volume, object_id, at_least)


def _as_index_entry(entry: PolicyEntry) -> IndexEntry:
    return IndexEntry(entry.object_id, entry.size, entry.frequency, entry.last_access, entry.priority)


# Partial files are compared with the store's fetches. Each is accounted for, and abandoned ones are removed.
#
# Race: 1. we scan the volume; 2. a fetch begins or ends; 3. we read the store's fetches.
# The volume comes first: a fetch that had begun when its file was seen is in the store by then. A file whose fetch has
# ended since is gone when it is looked at again.

_RESUME_FRACTION = 0.8
"""Share of the time that a worker waits for space: its request is still in force then."""

_KEEP_UNPROVED = 600.0
"""Seconds that a partial file is kept which no response can be proved to continue: the next fetch begins again."""

_VIEWER_GRACE = 6.0
"""Seconds after which a client that was reported is gone. API processes report every two seconds."""


@dataclass(slots=True)
class SweepResult:
    """Files in `incoming/` that a sweep did not account for."""

    foreign: int
    unreadable: int  # their bytes may be missing in the sum of reservations


class PartialReaper:
    """Accounts for partial files, shrinks their reservations to what they hold, and ends fetches.

    A parked fetch keeps the bytes reserved that its file takes:

    1. The lease is stolen: no worker can begin.
    2. The file is locked: no writer is left, not even one whose lease has expired. It is synced and measured.
    3. `park` shrinks the reservation and ends the lease, in one step of the store.
    4. `begin` claims the rest in one step before a byte is written. Without room the fetch stays as it is, and the
       object is proxied.

    Killed before 3, the lease expires with the reservation as it was. A worker that gives up its fetch does 2 and 3
    under its own lease. A removal does 1, locks the file, removes it and releases the reservation: killed before its
    last step, it leaves a parked fetch without a file, whose reservation the next sweep releases.
    """

    def __init__(
        self,
        state: StateStore,
        volume: Volume,
        adoption: Adoption,
        index: EvictionIndex,
        keep: float,
        space_wait: float,
    ) -> None:
        """`keep`: seconds that a partial file is kept without a view; `space_wait`: seconds that a worker waits for the
        space that it has requested."""
        self._state, self._volume, self._adoption, self._keep = state, volume, adoption, keep
        self._index = index
        self._resume_grace = _RESUME_FRACTION * space_wait
        self._found: Mapping[ObjectId, FoundPartial] = {}  # as of the last sweep
        # When they were last put into the order
        self._fetches: Sequence[Fetch] = ()
        self._parked: Sequence[Fetch] = ()

    async def sweep(self, term: Term, *, measure: bool = False) -> SweepResult:
        """Account for unknown partial files, remove unusable and old ones, and end parked fetches without a file.

        `measure`: also compare the files of all parked fetches with what these have reserved. The store may have lost
        its last second.
        """
        lost = measure and not (await self._state.usage()).reconciled
        found, others = await run_blocking(_scan_partials, self._volume)
        self._found = found
        unreadable = [file for file in others if isinstance(file, UnreadableFile)]
        for file in unreadable:
            logger.error("partial_unreadable", file=file.path, reason=file.reason)
        result = SweepResult(len(others) - len(unreadable), len(unreadable))
        fetches = {fetch.object_id: fetch for fetch in await self._state.fetches()}
        for partial in found.values():
            try:
                fetch = fetches.get(partial.object_id)
                await self._reconcile_one(term, partial, fetch, measure=measure, lost=lost)
            except VolumeError as error:
                logger.error("partial_unreadable", object_id=partial.object_id, reason=str(error))
                result.unreadable += 1
        for fetch in fetches.values():
            if fetch.phase is FetchPhase.PARKED and fetch.object_id not in found:
                try:
                    await self._reap(term, fetch.object_id, "left_no_file")
                except VolumeError as error:
                    logger.error("partial_unreadable", object_id=fetch.object_id, reason=str(error))
        self._refresh_order(await self._state.fetches())
        PARTIAL_HELD.set(sum(found[one.object_id].held for one in self._parked if one.object_id in found))
        return result

    async def prepare(self, term: Term) -> None:
        """Before objects are evicted: release what parked fetches do not need, and put them into the order.

        All fetches are read once, and once more if anything was released.
        """
        fetches = await self._state.fetches()
        to_shrink = [fetch.object_id for fetch in fetches if self._may_shrink(fetch)]
        for object_id in to_shrink:
            try:
                await self._shrink(term, object_id)
            except VolumeError as error:
                logger.error("partial_unreadable", object_id=object_id, reason=str(error))
        self._refresh_order(await self._state.fetches() if to_shrink else fetches)

    def _refresh_order(self, fetches: Sequence[Fetch]) -> None:
        """Let the policy order the partial objects that no worker fetches.

        Fetches that were parked a short time ago with the whole reservation are left out: their jobs are on the way to
        another worker.
        """
        self._fetches = fetches
        self._parked = [fetch for fetch in fetches if fetch.phase is FetchPhase.PARKED]
        resumed = {fetch.object_id for fetch in fetches if fetch.phase is FetchPhase.FETCHING}
        left = [self._with_access(fetch) for fetch in self._parked if self._is_left(fetch)]
        self._index.set_partials(left, resumed)

    def _with_access(self, fetch: Fetch) -> Fetch:
        """The fetch; with the time when its file last grew as its last access, if none was saved."""
        found = self._found.get(fetch.object_id)
        if fetch.last_access or found is None:
            return fetch
        return replace(fetch, last_access=min(found.changed_at, time.time()))

    def _is_left(self, fetch: Fetch) -> bool:
        """Whether no worker is expected to resume a parked fetch soon."""
        return fetch.is_shrunk or fetch.age >= min(self._resume_grace, self._keep)

    async def evict(self, term: Term, object_id: ObjectId) -> RemovalOutcome:
        """End the fetch of a partial object that the policy has chosen, unless a worker or a client has it in use."""
        try:
            freed = await self._reap(term, object_id, "evicted", unless_read=True)
        except VolumeError as error:
            logger.error("partial_unreadable", object_id=object_id, reason=str(error))
            return RemovalOutcome.FAILED
        return RemovalOutcome.REMOVED if freed else RemovalOutcome.IN_USE

    @property
    def discardable(self) -> int:
        """Bytes that `free` frees at most."""
        return sum(fetch.reserved for fetch in self._parked if self._is_left(fetch))

    async def free(self, term: Term, wanted: int) -> int:
        """Discard parked fetches, longest parked first, until `wanted` bytes are free. Returns the bytes freed.

        For passes whose other victims are not enough: those that were viewed a short time ago go, too. Fetches that
        were parked a short time ago stay: their jobs are on the way to another worker. Call `prepare` in the same pass
        before: the fetches are those that it has read. Of one that has a worker since the lease cannot be taken.
        """
        if wanted <= 0:
            return 0
        freed, ended = 0, set[ObjectId]()
        for fetch in sorted(filter(self._is_left, self._parked), key=_age, reverse=True):
            if freed >= wanted:
                break
            try:
                released = await self._reap(term, fetch.object_id, "space_wanted", unless_read=True)
            except VolumeError as error:
                logger.error("partial_unreadable", object_id=fetch.object_id, reason=str(error))
                continue
            if released:
                freed += released
                ended.add(fetch.object_id)
        self._refresh_order([fetch for fetch in self._fetches if fetch.object_id not in ended])
        return freed

    async def discard(self, term: Term, object_id: ObjectId) -> None:
        """Discard the fetch of this object, if it is parked."""
        await self._reap(term, object_id, "purged")

    async def _reconcile_one(
        self, term: Term, partial: FoundPartial, fetch: Fetch | None, *, measure: bool, lost: bool
    ) -> None:
        """`measure`: see `sweep`; `lost`: the store does not match the volume yet."""
        if fetch is not None and fetch.phase is FetchPhase.FETCHING:
            return
        object_id = partial.object_id
        parked = fetch is not None and fetch.phase is FetchPhase.PARKED
        too_large = fetch is not None and parked and partial.size > fetch.size
        if fetch is None or too_large or (not parked and (lost or not fetch.is_shrunk)):
            # A claim may have a reservation already; the store adds none twice. Of one with less than the whole the
            # worker claims the rest, unless the store has lost that
            await self._adoption.adopt_partial(term, object_id, partial.size)
        sidecar = await run_blocking(self._volume.partial_record, object_id)
        if sidecar is None or partial.size > sidecar.size or too_large:
            await self._reap(term, object_id, "unusable")
        elif self._unused_for(partial, fetch) > (self._keep if _is_resumable(sidecar) else _KEEP_UNPROVED):
            await self._reap(term, object_id, "abandoned", unless_read=True)
        elif fetch is None or self._may_shrink(fetch) or (measure and fetch.is_shrunk):
            await self._shrink(term, object_id)

    def _unused_for(self, partial: FoundPartial, fetch: Fetch | None) -> float:
        """Seconds since the file last grew, its fetch was parked, or it was viewed."""
        now = time.time()
        unused = max(now - partial.changed_at, fetch.age if fetch else 0.0)
        last_access = fetch.last_access if fetch else 0.0
        return min(unused, now - last_access) if last_access else unused

    def _may_shrink(self, fetch: Fetch) -> bool:
        """Whether a fetch has more reserved than its file takes, for longer than the next worker needs to resume it."""
        if fetch.phase is not FetchPhase.PARKED or fetch.is_shrunk or fetch.age < self._resume_grace:
            return False
        found = self._found.get(fetch.object_id)
        return found is None or footprint(found.held) < fetch.reserved

    async def _shrink(self, term: Term, object_id: ObjectId) -> None:
        """Reserve what the file of a parked fetch holds, as the class describes it."""
        lease = await self._state.steal_lease(term, object_id)
        if lease is None:
            return
        try:
            held = await run_blocking(self._volume.measure_partial, object_id)
        except PartialHeld:
            # A writer that the store has forgotten: it may write the whole
            await self._state.park(lease)
            await self._adoption.adopt_partial(term, object_id, 0)
            return
        except VolumeError:
            await self._state.park(lease)
            raise
        await self._state.park(lease, held)
        if held is not None and held > lease.size:
            await self._state.adopt_partial(term, object_id, held)

    async def _reap(self, term: Term, object_id: ObjectId, reason: str, *, unless_read: bool = False) -> int:
        """End a fetch without a live worker: take its lease, remove its file, release its reservation.

        Returns the bytes freed. They are 0 if a worker has the fetch again, still writes although its lease has
        expired, or has completed the object. `unless_read`: or if clients read the file, or wait for more of it.
        """
        if unless_read:
            [viewed] = await self._state.last_viewed([object_id])
            if viewed is not None and viewed < _VIEWER_GRACE:
                return 0
        stored = await run_blocking(self._volume.find_object, object_id)
        if await self._adoption.adopt(term, object_id) is not AdoptionResult.NOT_ADOPTED:
            return 0  # its worker completed the file, and died before it could tell the store
        lease = await self._state.steal_lease(term, object_id)
        if lease is None:
            return 0
        try:
            removed = await run_blocking(_remove, self._volume, lease, stored, unless_read)
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


def _remove(volume: Volume, lease: Lease, stored: FoundObject | None, unless_read: bool) -> bool:
    """Remove the partial file. False if its writer, although its lease had expired, has completed the object since
    `stored` was looked at: then the reservation accounts for the new file."""
    volume.discard_partial(lease.object_id, lease.size, unless_read=unless_read)
    return volume.find_object(lease.object_id) == stored


def _is_resumable(sidecar: StoredRecord) -> bool:
    return sidecar.version.is_strong and not sidecar.growing


def _age(fetch: Fetch) -> float:
    return fetch.age


# Partial files. All functions are blocking: call them from a worker thread.


def _scan_partials(volume: Volume) -> tuple[Mapping[ObjectId, FoundPartial], Sequence[UnknownFile]]:
    """All partial files by object, and the foreign and unreadable files among them."""
    found: dict[ObjectId, FoundPartial] = {}
    others: list[UnknownFile] = []
    for seen in volume.scan_partials():
        if isinstance(seen, FoundPartial):
            found[seen.object_id] = seen
        else:
            others.append(seen)
    return found, others


def _partial_exists(volume: Volume, object_id: ObjectId) -> bool:
    reader = volume.open_partial(object_id)
    if reader is None:
        return False
    reader.close()
    return True


def _expected_bytes(volume: Volume, object_id: ObjectId, at_least: int) -> int:
    """How large a partial file may grow: the size in its sidecar, but not less than `at_least`."""
    sidecar = volume.partial_record(object_id)
    return at_least if sidecar is None else max(at_least, sidecar.size)
