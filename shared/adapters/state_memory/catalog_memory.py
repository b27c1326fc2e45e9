"""The shared catalog cache in one process: for several catalogs in it, and for tests."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from shared.domain.objects import MediaObject, ObjectId
from shared.ports.catalog_memory import CachedAnswer, CacheLookup

_MAX_ENTRIES = 100_000


@dataclass(frozen=True, slots=True)
class _Entry:
    answer: MediaObject | None
    fresh_until: float
    ends: float


class MemorySharedCatalogCache:
    """See the port. Verbs never await, so each one is atomic; the least recently used answers are dropped beyond
    100,000."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` in seconds."""
        self._clock = clock
        self._entries: OrderedDict[ObjectId, _Entry] = OrderedDict()
        self._locks: dict[ObjectId, tuple[str, float]] = {}

    async def open(self) -> None:
        """Nothing to get ready."""

    async def close(self) -> None:
        """Nothing to give back."""

    async def get(self, object_id: ObjectId) -> CachedAnswer | None:
        return self._get(object_id)

    async def get_or_lock(self, object_id: ObjectId, owner: str, seconds: float) -> CacheLookup:
        cached = self._get(object_id)
        if cached is not None and cached.fresh_for > 0:
            return CacheLookup(cached, owns_lock=False)
        now = self._clock()
        _, ends = self._locks.get(object_id, ("", now))
        if ends > now:
            return CacheLookup(cached, owns_lock=False)
        self._locks[object_id] = (owner, now + seconds)
        return CacheLookup(cached, owns_lock=True)

    async def put(self, object_id: ObjectId, answer: MediaObject | None, fresh: float, keep: float) -> None:
        now = self._clock()
        self._entries[object_id] = _Entry(answer, now + fresh, now + keep)
        self._entries.move_to_end(object_id)
        self._locks.pop(object_id, None)
        while len(self._entries) > _MAX_ENTRIES:
            self._entries.popitem(last=False)

    async def unlock(self, object_id: ObjectId, owner: str) -> None:
        if self._locks.get(object_id, ("", 0.0))[0] == owner:
            del self._locks[object_id]

    def _get(self, object_id: ObjectId) -> CachedAnswer | None:
        now = self._clock()
        entry = self._entries.get(object_id)
        if entry is None or entry.ends <= now:
            self._entries.pop(object_id, None)
            return None
        self._entries.move_to_end(object_id)
        return CachedAnswer(entry.answer, entry.fresh_until - now)
