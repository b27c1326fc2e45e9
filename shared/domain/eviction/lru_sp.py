"""LRU-SP: size-adjusted, popularity-aware LRU, with the parameters that the network's existing node uses.

Objects are in 24 groups by `ceil(log2(sizeKB / popularity))`, and within a group in the order of their last access
(then of their ids). The next victim is the oldest object of one group: the one that costs most to keep, where
cost = idle minutes (rounded up) × sizeKB / popularity. Of equal costs the later group's object goes first.
Source: Kai Cheng, Yahiko Kambayashi, "LRU-SP: a size-adjusted and popularity-aware LRU replacement algorithm for web
caching", COMPSAC 2000.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Collection, Generator, Iterator
from contextlib import ExitStack, closing

from distributor_node.shared.domain.eviction.packed import LazyHeap, PackedPolicy
from distributor_node.shared.domain.eviction.policy import PolicyEntry, PriorityBasis
from distributor_node.shared.domain.objects import ObjectId

GROUPS = 24


def size_in_kilobytes(size: int) -> int:
    """Started kilobytes of 1024 bytes."""
    return -(-size // 1024)


def group_of(size: int, frequency: int) -> int:
    """`ceil(log2(sizeKB / popularity))`, clamped to 0–23; in integers, so that powers of two fall where they belong."""
    at_least = -(-size // 1024 // frequency)  # a ceiling of a ceiling is one ceiling
    return min((at_least - 1).bit_length(), GROUPS - 1) if at_least else 0


def cost_of(entry: PolicyEntry, now: float) -> float:
    """What it costs to keep the object: idle minutes, rounded up, × sizeKB / popularity."""
    return _cost(entry.size, entry.frequency, entry.last_access, now)


def _cost(size: int, frequency: int, last_access: float, now: float) -> float:
    minutes = math.ceil(max(0.0, now - last_access) / 60)
    return minutes * size_in_kilobytes(size) / frequency


class LruSp(PackedPolicy):
    """LRU-SP, as the module describes it. One heap for each group."""

    name = "lru-sp"

    def _clear(self, basis: PriorityBasis) -> None:
        super()._clear(basis)
        self._groups = [LazyHeap(self._records) for _ in range(GROUPS)]
        self._group_of = array("B")

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        """Move the object towards the end of its group, which may be another one now."""
        records = self._records
        slot = records.slots.get(object_id)
        if slot is None:
            return
        frequency = records.count_access(slot, views, now)
        group, previous = group_of(records.sizes[slot], frequency), self._group_of[slot]
        if group != previous:
            self._groups[previous].remove(slot)
            self._group_of[slot] = group
            self._groups[group].push(slot)

    def _insert(self, entry: PolicyEntry) -> int:
        slot = super()._insert(entry)
        if slot == len(self._group_of):
            self._group_of.append(0)
        self._group_of[slot] = group_of(entry.size, self._records.frequencies[slot])
        return slot

    def _heap_of(self, slot: int) -> LazyHeap:
        return self._groups[self._group_of[slot]]

    def _fill_heaps(self) -> None:
        members: list[list[int]] = [[] for _ in range(GROUPS)]
        for slot in self._records.slots.values():
            members[self._group_of[slot]].append(slot)
        for group, slots in zip(self._groups, members, strict=True):
            group.push_all(slots)

    def _candidates(
        self, now: float, latest: float, spared: Collection[ObjectId]
    ) -> Generator[int, None, None]:
        """The most expensive of the oldest objects of each group, again and again."""
        oldest: list[tuple[float, int, int]] = []
        with ExitStack() as stack:
            queues: list[Iterator[int]] = []
            for number, group in enumerate(self._groups):
                slots = stack.enter_context(closing(self._idle_slots(group, latest, spared)))
                queues.append(slots)
                self._push_next(oldest, number, slots, now)
            while oldest:
                _, negative_number, slot = heapq.heappop(oldest)
                yield slot
                self._push_next(oldest, -negative_number, queues[-negative_number], now)

    def _push_next(
        self, oldest: list[tuple[float, int, int]], number: int, queue: Iterator[int], now: float
    ) -> None:
        """Put the next object of a group into the heap."""
        slot, records = next(queue, None), self._records
        if slot is not None:
            cost = _cost(records.sizes[slot], records.frequencies[slot], records.last_accesses[slot], now)
            heapq.heappush(oldest, (-cost, -number, slot))
