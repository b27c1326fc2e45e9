"""The leader's picture of the index: the policy with every complete object, kept true to the state store.

At take-over it is filled from the store's entries. Then accesses are read each second; objects that were stored
meanwhile are noticed by announcements and by their accesses, and whatever slipped through by counting. Changed figures
are written back every few seconds, together with the position in the access log up to which they hold.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from services.evictor.file_calls import file_call
from services.evictor.known_ids import KnownIds
from shared.adapters.volume import FoundObject, Volume
from shared.domain.eviction import EvictionPolicy, PolicyEntry
from shared.domain.objects import ObjectId
from shared.ports.state_store import Access, IndexEntry, PolicyState, StateStore, Term

_BATCHES_AT_ONCE = 200
_SAVED_AT_ONCE = 2000
_NOTICED_MOST = 10_000


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
        self._former = make_policy()
        self._position = self._saved_position = ""
        self._dirty: set[ObjectId] = set()
        self._noticed: set[ObjectId] = set()
        # What happens to single objects while everything is being loaded, to be done again afterwards.
        self._meanwhile: list[PolicyEntry | ObjectId] | None = None
        self._loading = asyncio.Lock()

    async def take_over(self) -> None:
        """Load figures and position as the last leader saved them, at the start of a term."""
        async with self._loading:
            state = await self._state.load_policy_state()
            former = self.policy
            await self._load(state.inflation, _as_stored)
            if len(former):
                self._former = former
            self._position = self._saved_position = state.position
            self._dirty.clear()
        await self._apply_accesses()

    async def resync(self) -> KnownIds:
        """Compare with the store's entries; our own newer figures stay. The ids that the store knows.

        `evicting` then names the objects whose removal has begun and not finished.
        """
        async with self._loading:
            return await self._load(self.policy.inflation, self._as_known)

    async def _load(self, inflation: float, figures: Callable[[IndexEntry], PolicyEntry]) -> KnownIds:
        meanwhile = self._meanwhile = []
        try:
            known, entries, evicting = KnownIds(), list[PolicyEntry](), dict[ObjectId, None]()
            async for batch in self._state.entries():
                known.update(entry.object_id for entry in batch)
                evicting.update((entry.object_id, None) for entry in batch if entry.evicting)
                entries.extend(figures(entry) for entry in batch if not entry.evicting)
                await asyncio.sleep(0)
            policy = self._make_policy()
            await file_call(policy.restore, entries, inflation)
        finally:
            self._meanwhile = None
        self.policy, self.evicting = policy, evicting
        for change in meanwhile:
            if isinstance(change, PolicyEntry):
                self.policy.add(change)
            else:
                self.policy.remove(change)
                self.evicting.pop(change, None)
        return known

    def _as_known(self, entry: IndexEntry) -> PolicyEntry:
        return self.policy.get(entry.object_id) or _as_stored(entry)

    def remembered(self, object_id: ObjectId) -> PolicyEntry | None:
        """What is known of an object that the store has lost: from before the take-over."""
        return self.policy.get(object_id) or self._former.get(object_id)

    def forget_former(self) -> None:
        """Volume and store agree again: memories of the time before are of no more use."""
        self._former = self._make_policy()

    def notice(self, object_id: str) -> None:
        """Something happened to an object: it may be complete now."""
        if object_id and object_id not in self.policy and len(self._noticed) < _NOTICED_MOST:
            self._noticed.add(ObjectId(object_id))

    def add(self, entry: PolicyEntry) -> None:
        """A complete object that the store knows."""
        self._note_meanwhile(entry)
        self.policy.add(entry)

    def removed(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        """The object is no longer in the store."""
        self._note_meanwhile(object_id)
        self.policy.remove(object_id, evicted=evicted)
        self.evicting.pop(object_id, None)
        self._dirty.discard(object_id)

    def left_behind(self, object_id: ObjectId) -> None:
        """The object's removal has begun and cannot be finished yet: somebody is reading it."""
        self.removed(object_id)
        self.evicting[object_id] = None

    def _note_meanwhile(self, change: PolicyEntry | ObjectId) -> None:
        if self._meanwhile is not None:
            self._meanwhile.append(change)

    async def refresh(self) -> None:
        """Take in objects that have become complete, and apply new accesses."""
        await self._take_in_noticed()
        await self._apply_accesses()

    async def _take_in_noticed(self) -> None:
        noticed = [object_id for object_id in self._noticed if object_id not in self.policy]
        self._noticed.clear()
        if noticed:
            now = self._clock()
            for found in await file_call(self._find, noticed):
                if found.object_id not in self.policy and found.object_id not in self.evicting:
                    self.add(PolicyEntry(found.object_id, found.size, 1, min(found.changed_at, now)))

    async def _apply_accesses(self) -> None:
        async with self._loading:
            while True:
                position, accesses = await self._state.read_accesses(self._position, _BATCHES_AT_ONCE)
                if position == self._position:
                    return
                for access in accesses:
                    self.notice(access.object_id)
                await self._take_in_noticed()
                self._apply(accesses)
                self._position = position
                await asyncio.sleep(0)

    def _apply(self, accesses: Iterable[Access]) -> None:
        # In the order of time, whichever process reported first: the order of equals must survive a restart.
        now = self._clock()
        for access in sorted(accesses, key=_last_at):
            if access.object_id in self.policy:
                # A client's or another host's clock that is ahead must not make an object untouchable.
                self.policy.access(access.object_id, access.views, min(access.last_at, now))
                self._dirty.add(access.object_id)

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
                batch = changed[written : written + _SAVED_AT_ONCE]
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


def _last_at(access: Access) -> float:
    return access.last_at
