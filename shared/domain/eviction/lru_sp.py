"""LRU-SP: size-adjusted, popularity-aware LRU, with the figures that the existing node uses.

Objects stand in 24 groups by `ceil(log2(sizeKB / popularity))`, within a group in the order of their last access. The
victim is the oldest of one group: the one that costs most, by idle minutes (rounded up) × sizeKB / popularity.
Source: Kai Cheng, Yahiko Kambayashi, "LRU-SP: a size-adjusted and popularity-aware LRU replacement algorithm for web
caching", COMPSAC 2000.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from shared.domain.eviction.policy import PolicyEntry
from shared.domain.objects import ObjectId
from shared.domain.space import footprint

GROUPS = 24
_NOBODY: frozenset[ObjectId] = frozenset()


def size_in_kilobytes(size: int) -> int:
    """Started kilobytes of 1024 bytes."""
    return -(-size // 1024)


def group_of(size: int, frequency: int) -> int:
    """`ceil(log2(sizeKB / popularity))`, clamped to 0–23; in integers, so that powers of two fall where they belong."""
    at_least = -(-size_in_kilobytes(size) // frequency)
    return min(max(at_least - 1, 0).bit_length(), GROUPS - 1)


def cost_of(entry: PolicyEntry, now: float) -> float:
    """What it costs to keep the object: idle minutes, rounded up, × sizeKB / popularity."""
    minutes = math.ceil(max(0.0, now - entry.last_access) / 60)
    return minutes * size_in_kilobytes(entry.size) / entry.frequency


class LruSp:
    """See the module's text; an EvictionPolicy."""

    inflation = 0.0

    def __init__(self) -> None:
        self._groups: list[OrderedDict[ObjectId, PolicyEntry]] = [OrderedDict() for _ in range(GROUPS)]
        self._group_of: dict[ObjectId, int] = {}

    def __len__(self) -> int:
        return len(self._group_of)

    def __contains__(self, object_id: object) -> bool:
        return object_id in self._group_of

    def get(self, object_id: ObjectId) -> PolicyEntry | None:
        group = self._group_of.get(object_id)
        return None if group is None else self._groups[group][object_id]

    def add(self, entry: PolicyEntry) -> None:
        """To the end of its group."""
        self.remove(entry.object_id)
        entry = replace(entry, frequency=max(1, entry.frequency))
        group = self._group_of[entry.object_id] = group_of(entry.size, entry.frequency)
        self._groups[group][entry.object_id] = entry

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        """To the end of its group, which may be another one now."""
        known = self.get(object_id)
        if known is not None:
            latest = max(known.last_access, now)
            self.add(replace(known, frequency=known.frequency + views, last_access=latest))

    def remove(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        """Gone; this policy does not age by its victims."""
        group = self._group_of.pop(object_id, None)
        if group is not None:
            del self._groups[group][object_id]

    def victims(
        self,
        wanted: int,
        now: float,
        *,
        min_idle: float = 0.0,
        spared: Collection[ObjectId] = _NOBODY,
        at_most: int = 1000,
    ) -> list[PolicyEntry]:
        """Always the dearest among the oldest of each group; of equal ones that of the later group."""
        latest = now - min_idle
        queues = [_idle(group, latest, spared) for group in self._groups]
        oldest: list[tuple[float, int, PolicyEntry]] = []
        for number in range(GROUPS):
            _push_next(oldest, number, queues[number], now)
        chosen: list[PolicyEntry] = []
        while oldest and wanted > 0 and len(chosen) < at_most:
            _, negative_number, entry = heapq.heappop(oldest)
            chosen.append(entry)
            wanted -= footprint(entry.size)
            _push_next(oldest, -negative_number, queues[-negative_number], now)
        return chosen

    def dump(self) -> Iterator[PolicyEntry]:
        for group in self._groups:
            yield from group.values()

    def restore(self, entries: Iterable[PolicyEntry], inflation: float) -> None:
        """Entries of the same last access keep the order in which they come."""
        self._groups = [OrderedDict() for _ in range(GROUPS)]
        self._group_of = {}
        for entry in sorted(entries, key=_last_access):
            self.add(entry)


def _idle(
    group: OrderedDict[ObjectId, PolicyEntry], latest: float, spared: Collection[ObjectId]
) -> Iterator[PolicyEntry]:
    """A group from its oldest on, up to the first that was accessed after `latest`: those behind it are as fresh."""
    for entry in group.values():
        if entry.last_access > latest:
            return
        if entry.object_id not in spared:
            yield entry


def _push_next(
    oldest: list[tuple[float, int, PolicyEntry]], number: int, queue: Iterator[PolicyEntry], now: float
) -> None:
    """Put the next of a group into the heap; group numbers are unique there, so entries are never compared."""
    entry = next(queue, None)
    if entry is not None:
        heapq.heappush(oldest, (-cost_of(entry, now), -number, entry))


def _last_access(entry: PolicyEntry) -> float:
    return entry.last_access
