"""The leader's copy of the index: the policy with every complete object, kept equal to the state store.

A new leader fills it from the store's entries. Then it reads accesses each second. It learns of new objects by
announcements and by their accesses; objects that both miss are found by counting. Changed views, accesses and
priorities are written back every few seconds, with the position in the access log up to which they hold.

Partial objects that no worker fetches are in the same order, with the bytes that they keep reserved as their size.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import structlog

from distributor_node.shared.adapters.volume import FoundObject, Volume
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.eviction import EvictionPolicy, Gdsf, PolicyEntry, PriorityBasis
from distributor_node.shared.domain.eviction.policy import NO_BASIS
from distributor_node.shared.domain.objects import CompactIdSet, ObjectId
from distributor_node.shared.domain.space import RECORD_BYTES, VIEW_WINDOW, ViewCoalescer
from distributor_node.shared.observability.metrics import REFETCHED_AFTER_EVICTION
from distributor_node.shared.ports.state_store import (
    ACCESS_TIME_RESOLUTION,
    Access,
    Fetch,
    IndexEntry,
    PolicyState,
    StateStore,
    Term,
    with_views,
)
from distributor_node.shared.runtime.threads import run_blocking

logger = structlog.get_logger()

_READ_BATCHES = 200  # of the access log, at a time
_SAVE_BATCH = 1000
_MAX_CHANGED = 10_000
_MAX_UNSTORED = 10_000
_COMPARE_BATCH = 1000
SIZE_BOUNDS = tuple(2**exponent for exponent in (16, 20, 22, 24, 26, 28, 30))  # bytes: 64 KiB to 1 GiB
IDLE_BOUNDS = (10.0, 60.0, 600.0, 3600.0, 6 * 3600.0, 86400.0, 7 * 86400.0)  # seconds
_MAP_BATCH = 500  # less than a millisecond
_MAP_PAUSE = 20  # times as long as the count has taken


class EvictionIndex:
    """Outlives terms: what it learned in one term is known in the next. So an emptied store loses no recency while this
    process lives."""

    def __init__(
        self,
        state: StateStore,
        volume: Volume,
        make_policy: Callable[[], EvictionPolicy],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`make_policy`: returns a fresh policy; `clock`: POSIX seconds."""
        self._state, self._volume, self._make_policy, self._clock = state, volume, make_policy, clock
        self.policy = make_policy()
        self.evicting: dict[
            ObjectId, None
        ] = {}  # removal begun and not finished, in the order of the next attempts
        self.ghosts = GhostList(clock)
        self._previous = make_policy()  # from before the store was lost
        self._position = self._saved_position = ""  # in the access log
        # Of the store, until all priorities are translated there
        self._former_basis: PriorityBasis | None = None
        self._dirty: set[ObjectId] = set()  # changed since the last save
        self._changed: set[ObjectId] = set()  # announced, perhaps complete now
        self._views = ViewCoalescer()
        self._inherits_views_until = 0.0  # POSIX seconds; see `_begins_view`
        self._partials: set[ObjectId] = set()  # of the objects in the policy
        self._translated = False  # the priorities in the store were given by another version, policy or c0
        # Views and last access of objects that are neither complete nor parked, those viewed last
        self._unstored: OrderedDict[ObjectId, tuple[int, float]] = OrderedDict()
        # Objects that come or go while all entries are read; what is read of them may be older. None: no reading
        self._touched: set[ObjectId] | None = None
        self._map: dict[str, Any] = {}
        self._map_due = 0.0  # monotonic seconds
        self._loading = asyncio.Lock()

    async def load(self) -> None:
        """Load the entries and the position that the last leader saved, at the start of a term."""
        async with self._loading:
            state = await self._state.load_policy_state()
            if len(self.policy):
                self._previous = self.policy
            basis = state.basis
            if basis == NO_BASIS and len(self.policy):
                basis = self.policy.basis  # the store was emptied
            if self.policy.name == Gdsf.name:
                basis = await with_views(self._state, basis)
            for object_id in self._partials:
                self._remember_views(object_id)
            self._partials.clear()
            self.policy = self._make_policy()
            self.policy.restore((), basis)
            await self._compare()
            self.policy.end_restore()
            self._position = self._saved_position = state.position
            self._inherits_views_until = self._clock() + VIEW_WINDOW
            self._dirty.clear()
            self._former_basis, self._translated = None, False
            current = self.policy.basis
            if (
                current.policy == Gdsf.mark
                and len(self.policy)
                and ((basis.policy, basis.miss_cost) != (current.policy, current.miss_cost))
            ):
                # Priorities were given by another version, policy or c0: write the translated ones
                self._former_basis, self._translated = state.basis, True
                self._dirty.update(self.policy.ids())
                logger.info(
                    "order_recomputed", policy=current.policy, former_policy=basis.policy or None,
                    objects=len(self.policy), miss_cost=current.miss_cost, inflation=current.inflation,
                )  # fmt: skip
        await self._apply_accesses()

    async def size_and_idle_map(self) -> dict[str, Any]:
        """Count objects and bytes by size class and idle time, for the node's page.

        `cells`: by size class, then by idle class, objects and bytes. A class holds what is below its bound, the last
        one the rest. Many objects are counted again only after a while, so that counting takes a small part of the
        time.
        """
        if time.monotonic() < self._map_due:
            return self._map
        started, now, policy = time.monotonic(), self._clock(), self.policy
        columns = len(IDLE_BOUNDS) + 1
        cells = [[0, 0] for _ in range((len(SIZE_BOUNDS) + 1) * columns)]
        for number, object_id in enumerate(policy.ids(), start=1):
            entry = policy.get(object_id)
            if entry is not None and object_id not in self._partials:
                idle = now - entry.last_access
                cell = cells[
                    bisect_right(SIZE_BOUNDS, entry.size) * columns + bisect_right(IDLE_BOUNDS, idle)
                ]
                cell[0] += 1
                cell[1] += entry.size
            if number % _MAP_BATCH == 0:
                await asyncio.sleep(0)
        self._map = {"sizes": SIZE_BOUNDS, "idle": IDLE_BOUNDS, "cells": cells}
        self._map_due = time.monotonic() + _MAP_PAUSE * (time.monotonic() - started)
        return self._map

    async def resync(self) -> CompactIdSet:
        """Compare with the store's entries; our own newer fields stay. Returns the ids that the store knows.

        Afterwards `evicting` holds the objects whose removal has begun and not finished.
        """
        async with self._loading:
            return await self._compare()

    async def _compare(self) -> CompactIdSet:
        """Make the policy hold the store's objects. In place, because a second policy would double the memory."""
        policy, partials = self.policy, self._partials
        known, held, evicting = CompactIdSet(), policy.ids(), dict[ObjectId, None]()
        touched = self._touched = set()
        try:
            async for batch in self._state.entries():
                known.update([entry.object_id for entry in batch])
                for entry in batch:
                    object_id = entry.object_id
                    if object_id in touched:
                        continue
                    if entry.evicting:
                        evicting[object_id] = None
                        self._forget(object_id)
                    elif object_id not in policy or object_id in partials:
                        partials.discard(object_id)
                        policy.add(entry)
                await asyncio.sleep(0)
            for start in range(0, len(held), _COMPARE_BATCH):
                for object_id in held[start : start + _COMPARE_BATCH]:
                    if object_id not in known and object_id not in touched and object_id in self:
                        self.policy.remove(object_id)
                await asyncio.sleep(0)
        finally:
            self._touched = None
        left = {object_id: None for object_id in self.evicting if object_id in touched}
        self.evicting = {object_id: None for object_id in evicting if object_id not in touched} | left
        return known

    def __contains__(self, object_id: ObjectId) -> bool:
        """Whether this is a complete object."""
        return object_id in self.policy and object_id not in self._partials

    @property
    def objects(self) -> int:
        """Complete ones."""
        return len(self.policy) - len(self._partials)

    @property
    def has_partials(self) -> bool:
        return bool(self._partials)

    @property
    def partials(self) -> Collection[ObjectId]:
        """The partial objects in the order."""
        return self._partials

    def known_entry(self, object_id: ObjectId) -> PolicyEntry | None:
        """The entry of an object that the store has lost, as it was before."""
        known = self.policy.get(object_id) if object_id in self else None
        return known or self._previous.get(object_id)

    def is_partial(self, object_id: ObjectId) -> bool:
        """Whether what is in the order is a partial object."""
        return object_id in self._partials

    def set_partials(self, parked: Sequence[Fetch], resumed: Collection[ObjectId] = ()) -> None:
        """These partial objects, and no others, compete with the complete ones.

        Views are those that were saved, or were seen since. Of neither there is one, and the last access is when the
        fetch was parked. `resumed`: objects that have a live fetch. The request that resumes one is a view, unless it
        belongs to one that was counted.
        """
        present, now = {fetch.object_id for fetch in parked}, self._clock()
        for object_id in self._partials - present:
            begins_view = object_id in resumed and self._begins_view(object_id, now)
            self._remember_views(object_id)
            self._forget(object_id)
            if begins_view:
                self._count_unstored(object_id, 1, now)
        for fetch in parked:
            object_id, size = fetch.object_id, max(0, fetch.reserved - RECORD_BYTES)
            known = self.policy.get(object_id)
            if object_id in self or (known is not None and known.size == size):
                continue
            if known is not None:
                self._remember_views(object_id)
            # What was saved of the priority holds as long as nothing has changed since
            priority = 0.0 if self._translated or object_id in self._unstored else fetch.priority
            views, last_access = self._unstored.pop(object_id, (0, 0.0))
            last_access = max(last_access, fetch.last_access) or self._clock() - fetch.age
            views = max(1, views, fetch.views)
            entry = PolicyEntry(object_id, size, views, _quantize(last_access), priority)
            self._partials.add(object_id)
            self.policy.add(entry)
            self._dirty.add(object_id)

    def _remember_views(self, object_id: ObjectId) -> None:
        entry = self.policy.get(object_id)
        if entry is not None:
            self._count_unstored(object_id, entry.frequency, entry.last_access)

    def _count_unstored(self, object_id: ObjectId, views: int, at: float) -> None:
        before, last = self._unstored.pop(object_id, (0, 0.0))
        self._unstored[object_id] = (before + views, max(last, at))
        if len(self._unstored) > _MAX_UNSTORED:
            self._unstored.popitem(last=False)

    def _forget(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        self._partials.discard(object_id)
        self.policy.remove(object_id, evicted=evicted)

    def forget_previous(self) -> None:
        """Drop the entries from before the store was lost: volume and store agree again."""
        self._previous = self._make_policy()

    def mark_changed(self, object_id: str) -> None:
        """An object was announced: it may be complete now."""
        known = ObjectId(object_id)
        if known in self:
            # It may have been seen on the volume before the store knew it, so that the last save skipped it
            self._dirty.add(known)
        elif object_id and len(self._changed) < _MAX_CHANGED:
            self._changed.add(known)

    def add(self, entry: PolicyEntry) -> None:
        """Add a complete object that the store knows."""
        self._touch(entry.object_id)
        self._partials.discard(entry.object_id)
        self.policy.add(entry)

    def with_priorities(self, entries: Sequence[PolicyEntry]) -> Sequence[PolicyEntry]:
        """The entries with the priorities that the policy would give them now, for the store."""
        self._learn_mean(entries)
        scale = self._make_policy()
        scale.restore(entries, self.policy.basis)
        return [scale.get(entry.object_id) or entry for entry in entries]

    def _learn_mean(self, entries: Sequence[PolicyEntry]) -> None:
        """Let c0 follow the first objects that are adopted, if no view is known: the store is new, or was emptied."""
        basis = self.policy.basis
        if self.policy.name == Gdsf.name and entries and not basis.views:
            basis = basis.counting((entry.size, entry.frequency) for entry in entries)
            self.policy.restore(list(self.policy.dump()), basis)  # partial objects too
            self.policy.end_restore()

    def removed(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        """Forget an object that is no longer in the store."""
        self._touch(object_id)
        self._forget(object_id, evicted=evicted)
        self.evicting.pop(object_id, None)
        self._dirty.discard(object_id)

    def mark_deferred(self, object_id: ObjectId) -> None:
        """The object's removal has begun and cannot be finished while the object is being read."""
        self.removed(object_id)
        self.evicting[object_id] = None

    def mark_restored(self, object_id: ObjectId) -> None:
        """The object's removal was cancelled: it is a complete object as before."""
        self.evicting.pop(object_id, None)
        self.mark_changed(object_id)

    def _touch(self, object_id: ObjectId) -> None:
        if self._touched is not None:
            self._touched.add(object_id)

    async def refresh(self) -> None:
        """Add objects that have become complete, and apply new accesses."""
        await self._add_changed()
        await self._apply_accesses()

    async def _add_changed(self) -> None:
        changed = [object_id for object_id in self._changed if object_id not in self]
        self._changed.clear()
        if changed:
            now = self._clock()
            # In the order of time, because c0 moves with each view
            for found in sorted(await run_blocking(self._find, changed), key=_changed_at):
                if found.object_id not in self and found.object_id not in self.evicting:
                    self._remember_views(found.object_id)
                    self._forget(found.object_id)
                    self._touch(found.object_id)
                    self._store(found, _quantize(min(found.changed_at, now)))
                    self._dirty.add(found.object_id)  # the store knows no priority yet
                    self.ghosts.hit(found.object_id)

    def _store(self, found: FoundObject, stored_at: float) -> None:
        """Add an object that is complete now, with the views of its partial file."""
        object_id = found.object_id
        views, _ = self._unstored.pop(object_id, (0, 0.0))
        # It was fetched for a view: further ranges of that player are no second one
        views += self._views.begins_view(object_id, found.changed_at)
        self.policy.store(object_id, found.size, stored_at, begins_view=views > 0)
        if views > 1:
            self.policy.access(object_id, views - 1, stored_at)

    async def _apply_accesses(self) -> None:
        async with self._loading:
            while True:
                position, accesses = await self._state.read_accesses(self._position, _READ_BATCHES)
                if position == self._position:
                    return
                for access in accesses:
                    self.mark_changed(access.object_id)
                await self._add_changed()
                self._apply(accesses)
                self._position = position
                await asyncio.sleep(0)

    def _apply(self, accesses: Iterable[Access]) -> None:
        # In the order of time, not of reports, so that the order of equal priorities survives a restart
        now = self._clock()
        for access in sorted(accesses, key=_last_at):
            # The clock of another host may be ahead, which must not protect the object from eviction
            at = _quantize(min(access.last_at, now))
            if access.object_id in self.policy:
                self.policy.access(access.object_id, self._further_views(access, at), at)
                self._dirty.add(access.object_id)
            elif access.object_id not in self.evicting:
                self._count_unstored(access.object_id, self._further_views(access, at), at)

    def _further_views(self, access: Access, at: float) -> int:
        """Views that this access adds. Several API processes may report requests of one and the same view."""
        if access.views == 1 and not self._begins_view(access.object_id, at):
            return 0
        return access.views

    def _begins_view(self, object_id: ObjectId, at: float) -> bool:
        """As ViewCoalescer. The former leader has counted the views that go on when a term begins: an access soon after
        the last one that is known of an object belongs to such a view. When it began is not known: half a window before
        that one is taken for it, so that leaders which come and go do not prolong it for ever."""
        entry = self.policy.get(object_id) if at < self._inherits_views_until else None
        if entry is not None:
            self._views.continue_view(object_id, entry.last_access - VIEW_WINDOW / 2)
        return self._views.begins_view(object_id, at)

    def _find(self, object_ids: list[ObjectId]) -> list[FoundObject]:
        """The files that can be read: one that cannot must not keep the others waiting."""
        files = []
        for object_id in object_ids:
            try:
                found = self._volume.find_object(object_id)
            except VolumeError as error:
                logger.warning("object_unreadable", object_id=object_id, reason=str(error))
                continue
            if found is not None:
                files.append(found)
        return files

    async def save(self, term: Term) -> None:
        """Write what has changed. The position is written with the last batch: after a crash between two batches some
        accesses may be counted twice, but none are lost. So is the basis of translated priorities: after such a crash
        some are translated twice, and lose what they had of L."""
        await self._apply_accesses()
        changed, self._dirty = list(self._dirty), set()
        written = 0
        try:
            while True:
                batch = changed[written : written + _SAVE_BATCH]
                last = written + len(batch) >= len(changed)
                position = self._position if last else self._saved_position
                basis = self.policy.basis if last or self._former_basis is None else self._former_basis
                await self._state.save_policy(term, self._entries_of(batch), PolicyState(basis, position))
                written += len(batch)
                if last:
                    self._saved_position, self._former_basis = position, None
                    return
        finally:
            self._dirty.update(changed[written:])

    def _entries_of(self, object_ids: list[ObjectId]) -> list[IndexEntry]:
        found = (self.policy.get(object_id) for object_id in object_ids)
        return [
            IndexEntry(entry.object_id, entry.size, entry.frequency, entry.last_access, entry.priority)
            for entry in found
            if entry is not None
        ]


def _quantize(seconds: float) -> float:
    """Round down to the store's resolution, so that the order is the same after a restart."""
    return seconds // ACCESS_TIME_RESOLUTION * ACCESS_TIME_RESOLUTION


def _changed_at(found: FoundObject) -> tuple[float, str]:
    return found.changed_at, found.object_id


def _last_at(access: Access) -> float:
    return access.last_at


# Objects that are fetched again soon after their eviction: they measure how well victims are chosen.

GHOST_TTL = 3600.0  # seconds
_MAX_GHOSTS = 50_000


class GhostList:
    """Hashes of the objects that were evicted for space within GHOST_TTL: about 100 bytes each."""

    def __init__(self, clock: Callable[[], float], max_size: int = _MAX_GHOSTS) -> None:
        """`clock`: POSIX seconds; `max_size`: only so many of the last ones are kept."""
        self._clock, self._max_size = clock, max_size
        self._evicted_at: OrderedDict[int, float] = OrderedDict()

    def add(self, object_id: ObjectId) -> None:
        """Record an eviction."""
        key = hash(object_id)
        self._evicted_at[key] = self._clock()
        self._evicted_at.move_to_end(key)
        if len(self._evicted_at) > self._max_size:
            self._evicted_at.popitem(last=False)

    def hit(self, object_id: ObjectId) -> bool:
        """Record a fetch. True, and counted, if the object was evicted a short time ago."""
        evicted_at = self._evicted_at.pop(hash(object_id), None)
        refetched = evicted_at is not None and 0 <= self._clock() - evicted_at <= GHOST_TTL
        if refetched:
            REFETCHED_AFTER_EVICTION.inc()
        return refetched
