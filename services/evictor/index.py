"""The leader's picture of the index: the policy with every complete object, kept true to the state store.

At take-over it is filled from the store's entries. Then accesses are read each second; objects that were stored
meanwhile are noticed by announcements and by their accesses, and whatever slipped through by counting. Changed figures
are written back every few seconds, together with the position in the access log up to which they hold.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from distributor_node.shared.adapters.volume import FoundObject, Volume
from distributor_node.shared.domain.admission import ViewCoalescer
from distributor_node.shared.domain.eviction import EvictionPolicy, PolicyEntry
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.observability.metrics import REFETCHED_AFTER_EVICTION
from distributor_node.shared.ports.state_store import (
    ACCESS_TIME_RESOLUTION,
    Access,
    IndexEntry,
    PolicyState,
    StateStore,
    Term,
)
from distributor_node.shared.runtime.threads import run_blocking

_READ_BATCHES = 200
_SAVE_BATCH = 1000
_MAX_CHANGED = 10_000
_COMPARE_BATCH = 1000


class EvictionIndex:
    """`make_policy` gives a fresh policy; `clock` POSIX seconds. Outlives terms: what it learned in one is remembered
    in the next, so that even an emptied store costs no recency while this process lives."""

    def __init__(
        self,
        state: StateStore,
        volume: Volume,
        make_policy: Callable[[], EvictionPolicy],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._state, self._volume, self._make_policy, self._clock = state, volume, make_policy, clock
        self.policy = make_policy()
        self.evicting: dict[ObjectId, None] = {}
        self._previous = make_policy()
        self._position = self._saved_position = ""
        self._dirty: set[ObjectId] = set()
        self._changed: set[ObjectId] = set()
        self._views = ViewCoalescer()
        self.ghosts = GhostList(clock)
        # Objects that came or went while all entries are being read: what is read of them may be older than that
        self._touched: set[ObjectId] | None = None
        self._loading = asyncio.Lock()

    async def load(self) -> None:
        """Load figures and position as the last leader saved them, at the start of a term."""
        async with self._loading:
            state = await self._state.load_policy_state()
            if len(self.policy):
                self._previous = self.policy
            self.policy = self._make_policy()
            self.policy.restore((), state.inflation)
            await self._compare()
            self._position = self._saved_position = state.position
            self._dirty.clear()
        await self._apply_accesses()

    async def resync(self) -> CompactIdSet:
        """Compare with the store's entries; our own newer figures stay. The ids that the store knows.

        `evicting` then names the objects whose removal has begun and not finished.
        """
        async with self._loading:
            return await self._compare()

    async def _compare(self) -> CompactIdSet:
        """Make the policy hold what the store does. In place: a second policy would take as much memory again."""
        known, held, evicting = CompactIdSet(), self.policy.ids(), dict[ObjectId, None]()
        touched = self._touched = set()
        try:
            async for batch in self._state.entries():
                known.update(entry.object_id for entry in batch)
                for entry in batch:
                    if entry.object_id in touched:
                        continue
                    if entry.evicting:
                        evicting[entry.object_id] = None
                        self.policy.remove(entry.object_id)
                    elif entry.object_id not in self.policy:
                        self.policy.add(_as_stored(entry))
                await asyncio.sleep(0)
            for start in range(0, len(held), _COMPARE_BATCH):
                for object_id in held[start : start + _COMPARE_BATCH]:
                    if object_id not in known and object_id not in touched:
                        self.policy.remove(object_id)
                await asyncio.sleep(0)
        finally:
            self._touched = None
        left = {object_id: None for object_id in self.evicting if object_id in touched}
        self.evicting = {object_id: None for object_id in evicting if object_id not in touched} | left
        return known

    def known_entry(self, object_id: ObjectId) -> PolicyEntry | None:
        """What is known of an object that the store has lost: from before the take-over."""
        return self.policy.get(object_id) or self._previous.get(object_id)

    def forget_previous(self) -> None:
        """Volume and store agree again: memories of the time before are of no more use."""
        self._previous = self._make_policy()

    def mark_changed(self, object_id: str) -> None:
        """Something happened to an object: it may be complete now."""
        known = ObjectId(object_id)
        if known in self.policy:
            # Seen on the volume before the store knew it, perhaps, and passed over when its figures were written
            self._dirty.add(known)
        elif object_id and len(self._changed) < _MAX_CHANGED:
            self._changed.add(known)

    def add(self, entry: PolicyEntry) -> None:
        """A complete object that the store knows, with these figures."""
        self._touch(entry.object_id)
        self.policy.add(entry)

    def with_priorities(self, entries: Sequence[PolicyEntry]) -> Sequence[PolicyEntry]:
        """As they would stand in the policy, were they added now: the store is to know the same priorities."""
        scale = self._make_policy()
        scale.restore(entries, self.policy.inflation)
        return [scale.get(entry.object_id) or entry for entry in entries]

    def removed(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        """The object is no longer in the store."""
        self._touch(object_id)
        self.policy.remove(object_id, evicted=evicted)
        self.evicting.pop(object_id, None)
        self._dirty.discard(object_id)

    def mark_deferred(self, object_id: ObjectId) -> None:
        """The object's removal has begun and cannot be finished yet: somebody is reading it."""
        self.removed(object_id)
        self.evicting[object_id] = None

    def mark_restored(self, object_id: ObjectId) -> None:
        """The object's removal was called off: it is a complete object as before."""
        self.evicting.pop(object_id, None)
        self.mark_changed(object_id)

    def _touch(self, object_id: ObjectId) -> None:
        if self._touched is not None:
            self._touched.add(object_id)

    async def refresh(self) -> None:
        """Take in objects that have become complete, and apply new accesses."""
        await self._add_changed()
        await self._apply_accesses()

    async def _add_changed(self) -> None:
        changed = [object_id for object_id in self._changed if object_id not in self.policy]
        self._changed.clear()
        if changed:
            now = self._clock()
            for found in await run_blocking(self._find, changed):
                if found.object_id not in self.policy and found.object_id not in self.evicting:
                    self.add(
                        PolicyEntry(found.object_id, found.size, 1, _quantize(min(found.changed_at, now)))
                    )
                    self._dirty.add(found.object_id)  # the store knows no priority yet
                    # It came for a view, which is its first: the player's further ranges are no second one
                    self._views.begins_view(found.object_id, found.changed_at)
                    self.ghosts.hit(found.object_id)

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
        # In the order of time, whichever process reported first: the order of equals must survive a restart.
        now = self._clock()
        for access in sorted(accesses, key=_last_at):
            if access.object_id in self.policy:
                # A client's or another host's clock that is ahead must not make an object untouchable.
                at = _quantize(min(access.last_at, now))
                self.policy.access(access.object_id, self._further_views(access, at), at)
                self._dirty.add(access.object_id)

    def _further_views(self, access: Access, at: float) -> int:
        """Each API process counts one view where it sees several requests; this makes one of theirs too."""
        if access.views == 1 and not self._views.begins_view(access.object_id, at):
            return 0
        return access.views

    def _find(self, object_ids: list[ObjectId]) -> list[FoundObject]:
        seen = (self._volume.find_object(object_id) for object_id in object_ids)
        return [found for found in seen if found is not None]

    async def save(self, term: Term) -> None:
        """Write what has changed. The position goes with the last batch: what was written before it may be counted
        twice after a crash in between, never lost."""
        await self._apply_accesses()
        changed, self._dirty = list(self._dirty), set()
        written = 0
        try:
            while True:
                batch = changed[written : written + _SAVE_BATCH]
                last = written + len(batch) >= len(changed)
                position = self._position if last else self._saved_position
                await self._state.save_policy(
                    term, self._entries_of(batch), PolicyState(self.policy.inflation, position)
                )
                written += len(batch)
                if last:
                    self._saved_position = position
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


def _as_stored(entry: IndexEntry) -> PolicyEntry:
    return PolicyEntry(
        entry.object_id, entry.size, max(1, entry.frequency), entry.last_access, entry.priority
    )


def _quantize(seconds: float) -> float:
    """As precise as the store keeps it: who is restarted sees the same order."""
    return seconds // ACCESS_TIME_RESOLUTION * ACCESS_TIME_RESOLUTION


def _last_at(access: Access) -> float:
    return access.last_at


# Objects that were fetched again soon after they had gone: the measure of victims badly chosen.

GHOST_TTL = 3600.0
_MAX_GHOSTS = 50_000


class GhostList:
    """The last `max_size` objects evicted for space within GHOST_TTL seconds, as hashes: about 100 bytes each.

    `clock`: POSIX seconds."""

    def __init__(self, clock: Callable[[], float], max_size: int = _MAX_GHOSTS) -> None:
        self._clock, self._max_size = clock, max_size
        self._evicted_at: OrderedDict[int, float] = OrderedDict()

    def add(self, object_id: ObjectId) -> None:
        """Evicted now."""
        key = hash(object_id)
        self._evicted_at[key] = self._clock()
        self._evicted_at.move_to_end(key)
        if len(self._evicted_at) > self._max_size:
            self._evicted_at.popitem(last=False)

    def hit(self, object_id: ObjectId) -> bool:
        """The object has been fetched; True, and counted, if that is soon after it was evicted."""
        evicted_at = self._evicted_at.pop(hash(object_id), None)
        refetched = evicted_at is not None and 0 <= self._clock() - evicted_at <= GHOST_TTL
        if refetched:
            REFETCHED_AFTER_EVICTION.inc()
        return refetched


# A set of object ids in eight bytes each: what 10^6 objects are compared with must not cost as much as they do.


class CompactIdSet:
    """Ids as their 64-bit hashes (keyed anew in each process). Two ids in 10^6 share one with a chance of about 10^-7;
    then an object that should be looked at is taken for a known one, until the next process looks."""

    def __init__(self) -> None:
        self._hashes = array("q")
        self._sorted = True

    def __len__(self) -> int:
        """Ids added; those added twice count twice."""
        return len(self._hashes)

    def update(self, object_ids: Iterable[ObjectId]) -> None:
        self._hashes.extend(hash(object_id) for object_id in object_ids)
        self._sorted = False

    def __contains__(self, object_id: object) -> bool:
        if not self._sorted:
            self._hashes = array("q", sorted(self._hashes))
            self._sorted = True
        target = hash(object_id)
        index = bisect_left(self._hashes, target)
        return index < len(self._hashes) and self._hashes[index] == target
