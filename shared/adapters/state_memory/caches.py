"""The shared catalog cache in one process: for several catalogs in it, and for tests."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.domain.source_order import SourceHealth, SourceStatsDelta
from distributor_node.shared.ports.catalog import CachedAnswer, CacheLookup
from distributor_node.shared.ports.source_stats import (
    MAX_CORRUPTED_COPIES,
    MAX_SOURCES,
    CorruptedCopy,
    SharedSources,
)

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


# The shared source stats in one process: for several readers of sources in it, and for tests.

_RETENTION = 24 * 3600.0


class MemorySharedSourceStats:
    """See the port. The verb never awaits, so it is atomic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` in seconds."""
        self._clock = clock
        self._known: dict[str, tuple[float, SourceHealth]] = {}
        self._corrupted: dict[tuple[ObjectId, str], float] = {}

    async def open(self) -> None:
        """Nothing to get ready."""

    async def close(self) -> None:
        """Nothing to give back."""

    async def sync(
        self, deltas: Mapping[str, SourceStatsDelta], corrupted: Sequence[CorruptedCopy], now: float
    ) -> SharedSources:
        here = self._clock()
        for name, latest in deltas.items():
            _, before = self._known.get(name, (here, SourceHealth()))
            if name in self._known or len(self._known) < MAX_SOURCES:
                moved = replace(latest, seen=_moved(latest.seen, here - now))
                self._known[name] = (here, moved.apply_to(before))
        self._known = {name: known for name, known in self._known.items() if known[0] > here - _RETENTION}
        for copy in corrupted:
            self._corrupted[copy.object_id, copy.source] = here + copy.seconds_left
        lasting = sorted(
            (item for item in self._corrupted.items() if item[1] > here), key=lambda item: item[1]
        )
        self._corrupted = dict(lasting[-MAX_CORRUPTED_COPIES:])
        return SharedSources(
            {name: _moved(health, now - here) for name, (_, health) in self._known.items()},
            [CorruptedCopy(*copy, ends - here) for copy, ends in self._corrupted.items()],
        )


def _moved(health: SourceHealth, seconds: float) -> SourceHealth:
    """As seen on a clock that is so far ahead."""
    unreachable_at = health.unreachable_at
    return replace(
        health,
        last_failure_at=health.last_failure_at + seconds,
        unreachable_at=None if unreachable_at is None else unreachable_at + seconds,
    )
