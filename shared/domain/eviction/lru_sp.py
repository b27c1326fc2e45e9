"""LRU-SP: size-adjusted, popularity-aware LRU, with the figures that the existing node uses.

Objects stand in 24 groups by `ceil(log2(sizeKB / popularity))`, within a group in the order of their last access (then
of their ids). The victim is the oldest of one group: the one that costs most to keep, cost = idle minutes (rounded up)
× sizeKB / popularity; of equal ones that of the later group.
Source: Kai Cheng, Yahiko Kambayashi, "LRU-SP: a size-adjusted and popularity-aware LRU replacement algorithm for web
caching", COMPSAC 2000.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, closing

from distributor_node.shared.domain.eviction.lazy_heap import LazyHeap
from distributor_node.shared.domain.eviction.packed import PackedPolicy, PackedRecords
from distributor_node.shared.domain.eviction.policy import PolicyEntry
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint

GROUPS = 24
_NO_IDS: frozenset[ObjectId] = frozenset()


def size_in_kilobytes(size: int) -> int:
    """Started kilobytes of 1024 bytes."""
    return -(-size // 1024)


def group_of(size: int, frequency: int) -> int:
    """`ceil(log2(sizeKB / popularity))`, clamped to 0–23; in integers, so that powers of two fall where they belong."""
    at_least = -(-size // 1024 // frequency)  # a ceiling of a ceiling is one ceiling
    return min((at_least - 1).bit_length(), GROUPS - 1) if at_least else 0


def cost_of(entry: PolicyEntry, now: float) -> float:
    """What it costs to keep the object: idle minutes, rounded up, × sizeKB / popularity."""
    minutes = math.ceil(max(0.0, now - entry.last_access) / 60)
    return minutes * size_in_kilobytes(entry.size) / entry.frequency


class LruSp(PackedPolicy):
    """See the module's text; an EvictionPolicy."""

    inflation = 0.0

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._records = PackedRecords(with_priorities=False)
        self._groups = [LazyHeap(self._records) for _ in range(GROUPS)]
        self._group_of = array("B")

    def add(self, entry: PolicyEntry) -> None:
        self.remove(entry.object_id)
        slot = self._insert(entry)
        self._groups[self._group_of[slot]].push(slot)

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        """Among the last of its group, which may be another one now."""
        records = self._records
        slot = records.slots.get(object_id)
        if slot is None:
            return
        frequency = records.count_access(slot, views, now)
        group, former = group_of(records.sizes[slot], frequency), self._group_of[slot]
        if group != former:
            self._groups[former].remove(slot)
            self._group_of[slot] = group
            self._groups[group].push(slot)

    def remove(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        """Gone; this policy does not age by its victims."""
        slot = self._records.slots.get(object_id)
        if slot is not None:
            self._groups[self._group_of[slot]].remove(slot)
            self._records.discard(slot)

    def victims(
        self,
        wanted: int,
        now: float,
        *,
        min_idle: float = 0.0,
        spared: Collection[ObjectId] = _NO_IDS,
        at_most: int = 1000,
    ) -> list[PolicyEntry]:
        """Always the dearest among the oldest of each group; of equal ones that of the later group."""
        oldest: list[tuple[float, int, PolicyEntry]] = []
        chosen: list[PolicyEntry] = []
        with ExitStack() as stack:
            queues: list[Iterator[PolicyEntry]] = []
            for number, group in enumerate(self._groups):
                slots = stack.enter_context(closing(group.ascending()))
                queues.append(self._idle(slots, now - min_idle, spared))
                _push_next(oldest, number, queues[number], now)
            while oldest and wanted > 0 and len(chosen) < at_most:
                _, negative_number, entry = heapq.heappop(oldest)
                chosen.append(entry)
                wanted -= footprint(entry.size)
                _push_next(oldest, -negative_number, queues[-negative_number], now)
        return chosen

    def restore(self, entries: Iterable[PolicyEntry], inflation: float) -> None:
        """Takes one entry at a time: a generator saves the memory of a list. Of entries with one id the last counts."""
        self._clear()
        for entry in entries:
            self._insert(entry)
        slots: list[list[int]] = [[] for _ in range(GROUPS)]
        for slot in self._records.slots.values():
            slots[self._group_of[slot]].append(slot)
        for group, its_slots in zip(self._groups, slots, strict=True):
            group.push_all(its_slots)

    def _insert(self, entry: PolicyEntry) -> int:
        slot = self._records.insert(entry)
        if slot == len(self._group_of):
            self._group_of.append(0)
        self._group_of[slot] = group_of(entry.size, self._records.frequencies[slot])
        return slot

    def _idle(
        self, slots: Iterator[int], latest: float, spared: Collection[ObjectId]
    ) -> Iterator[PolicyEntry]:
        """A group from its oldest on, up to the first accessed after `latest`: those behind it are as fresh."""
        records = self._records
        for slot in slots:
            if records.last_accesses[slot] > latest:
                return
            if records.ids[slot] not in spared:
                yield records.entry(slot)


def _push_next(
    oldest: list[tuple[float, int, PolicyEntry]], number: int, queue: Iterator[PolicyEntry], now: float
) -> None:
    """Put the next of a group into the heap; group numbers are unique there, so entries are never compared."""
    entry = next(queue, None)
    if entry is not None:
        heapq.heappush(oldest, (-cost_of(entry, now), -number, entry))
