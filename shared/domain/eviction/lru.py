"""LRU: whoever was accessed least lately goes first; of those accessed at the same time, the lesser id.

For comparison: media sizes span five orders of magnitude, and LRU gives the room of a thousand images to one video that
nobody watches again (docs/eviction.md).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import closing

from distributor_node.shared.domain.eviction.lazy_heap import LazyHeap
from distributor_node.shared.domain.eviction.packed import PackedPolicy, PackedRecords
from distributor_node.shared.domain.eviction.policy import PolicyEntry
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint

_NO_IDS: frozenset[ObjectId] = frozenset()


class Lru(PackedPolicy):
    """See the module's text; an EvictionPolicy."""

    inflation = 0.0

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._records = PackedRecords(with_priorities=False)
        self._heap = LazyHeap(self._records)

    def add(self, entry: PolicyEntry) -> None:
        self.remove(entry.object_id)
        self._heap.push(self._records.insert(entry))

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        slot = self._records.slots.get(object_id)
        if slot is not None:
            self._records.count_access(slot, views, now)

    def remove(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        """Gone; this policy does not age by its victims."""
        slot = self._records.slots.get(object_id)
        if slot is not None:
            self._heap.remove(slot)
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
        """The least lately accessed first."""
        chosen: list[PolicyEntry] = []
        with closing(self._heap.ascending()) as slots:
            while wanted > 0 and len(chosen) < at_most:
                slot = next(slots, None)
                if slot is None or self._records.last_accesses[slot] > now - min_idle:
                    break  # those behind it are as fresh
                if self._records.ids[slot] not in spared:
                    chosen.append(self._records.entry(slot))
                    wanted -= footprint(self._records.sizes[slot])
        return chosen

    def restore(self, entries: Iterable[PolicyEntry], inflation: float) -> None:
        """Takes one entry at a time: a generator saves the memory of a list. Of entries with one id the last counts."""
        self._clear()
        for entry in entries:
            self._records.insert(entry)
        self._heap.push_all(self._records.slots.values())
