"""Base class of the eviction policies: objects in packed records, their order in lazy heaps.

A subclass says by which key its objects are ordered (`_key`) and what an access changes. The victim loop, adding,
removing and restoring are the same for all of them. LRU is the order of the base class, and is at the end.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import ClassVar, cast

from distributor_node.shared.domain.eviction.lazy_heap import LazyHeap, PackedRecords
from distributor_node.shared.domain.eviction.policy import NO_BASIS, PolicyEntry, PriorityBasis
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint

_NO_IDS: frozenset[ObjectId] = frozenset()


class PackedPolicy:
    """An EvictionPolicy in the order of last access, unless the subclass has priorities."""

    name: ClassVar[str]
    """As settings call it."""
    has_priorities: ClassVar[bool] = False
    """Whether objects have priorities of their own; without them `_key` is the last access."""
    inflation = 0.0

    _records: PackedRecords
    _heap: LazyHeap

    def __init__(self) -> None:
        self._clear(NO_BASIS)

    def __len__(self) -> int:
        return len(self._records.slots)

    def __contains__(self, object_id: object) -> bool:
        return object_id in self._records.slots

    def get(self, object_id: ObjectId) -> PolicyEntry | None:
        slot = self._records.slots.get(object_id)
        return None if slot is None else self._records.entry(slot)

    def ids(self) -> Sequence[ObjectId]:
        """The strings are those of the records: a list of a million takes 8 MB, not 80."""
        return cast("list[ObjectId]", list(self._records.slots))

    def dump(self) -> Iterator[PolicyEntry]:
        """Priorities are 0.0 where the policy has none."""
        return map(self._records.entry, self._records.slots.values())

    @property
    def basis(self) -> PriorityBasis:
        return PriorityBasis(policy=self.name)

    def store(self, object_id: ObjectId, size: int, now: float, *, begins_view: bool = True) -> None:
        """The first view counts, even if it was counted before."""
        self.add(PolicyEntry(object_id, size, 1, now))

    def add(self, entry: PolicyEntry) -> None:
        self.remove(entry.object_id)
        slot = self._insert(entry)
        self._heap_of(slot).push(slot)

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        slot = self._records.slots.get(object_id)
        if slot is not None:
            self._records.count_access(slot, views, now)

    def remove(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        slot = self._records.slots.get(object_id)
        if slot is None:
            return
        if evicted:
            self._age(slot)
        self._heap_of(slot).remove(slot)
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
        """Costs a few microseconds for each victim, and as much for each object passed over."""
        records = self._records
        chosen: list[PolicyEntry] = []
        with closing(self._candidates(now, now - min_idle, spared)) as slots:
            while wanted > 0 and len(chosen) < at_most:
                slot = next(slots, None)
                if slot is None:
                    break
                chosen.append(records.entry(slot))
                wanted -= footprint(records.sizes[slot])
        return chosen

    def restore(self, entries: Iterable[PolicyEntry], basis: PriorityBasis) -> None:
        """Takes one entry at a time: a generator saves the memory of a list. The last of several entries with the same
        id counts."""
        self._clear(basis)
        for entry in entries:
            self._insert(entry)
        self._fill_heaps()

    def end_restore(self) -> None:
        """Without priorities there is nothing to translate."""

    # What subclasses override

    def _key(self, slot: int, known: float) -> float:
        """The key of a new object, whose other fields are set. `known`: the priority that its entry brings, 0.0: none.

        The least (key, last access, id) goes first. While the object is in the heap its key may rise, but never fall.
        Without priorities of its own a policy orders by last access, and this is not asked.
        """
        return self._records.last_accesses[slot]

    def _age(self, slot: int) -> None:
        """Age by an object that is being evicted; for policies with priorities."""

    def _clear(self, basis: PriorityBasis) -> None:
        self._records = PackedRecords(with_priorities=self.has_priorities)
        self._heap = LazyHeap(self._records)

    def _heap_of(self, slot: int) -> LazyHeap:
        return self._heap

    def _fill_heaps(self) -> None:
        """Put all recorded slots into the empty heap."""
        self._heap.push_all(self._records.slots.values())

    def _candidates(
        self, now: float, latest: float, spared: Collection[ObjectId]
    ) -> Generator[int, None, None]:
        """Slots that may go, the first victim first: not in `spared`, last accessed at `latest` or before."""
        return self._idle_slots(self._heap, latest, spared)

    # For subclasses

    def _insert(self, entry: PolicyEntry) -> int:
        """Record the entry, with its key; the slot. It still has to be pushed to a heap."""
        slot = self._records.insert(entry)
        if self.has_priorities:  # else the key is the last access, and in place
            self._records.priorities[slot] = self._key(slot, entry.priority)
        return slot

    def _idle_slots(
        self, heap: LazyHeap, latest: float, spared: Collection[ObjectId]
    ) -> Generator[int, None, None]:
        """One heap from its least key on, without objects in `spared` or accessed after `latest`."""
        ids, times = self._records.ids, self._records.last_accesses
        with closing(heap.ascending()) as slots:
            for slot in slots:
                if times[slot] <= latest:
                    if ids[slot] not in spared:
                        yield slot
                elif not self.has_priorities:
                    return  # the others were accessed even later


class Lru(PackedPolicy):
    """Least recently used, of equally old ones the lesser id. The base class is in this order already.

    For comparison only: media sizes span five orders of magnitude, and LRU gives the room of a thousand images to one
    video that is never watched again (docs/eviction.md).
    """

    name = "lru"
