"""Eviction policies over objects in packed records, with their order in lazy heaps.

1. `PackedRecords`: a million objects must not take a gigabyte, so their fields are in columns. An object takes about
   180 bytes, which includes an id of up to 24 characters, its hash table entry and its place in a heap.
2. `LazyHeap`: the key of a slot is (priority, last access, id). While a slot is in the heap its key may rise but never
   fall, so the key under which it was pushed is a lower bound. A search for the least key re-keys the stale slots that
   it meets. So a hit costs the heap nothing, and the order is exact all the same.
3. `PackedPolicy`: a subclass says by which key its objects are ordered (`_key`) and what an access changes. The victim
   loop, adding, removing and restoring are the same for all of them. LRU is the order of the base class, and is at the
   end.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import ClassVar, cast

from distributor_node.shared.domain.eviction.policy import NO_BASIS, PolicyEntry, PriorityBasis
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint

MAX_VIEWS = 2**32 - 1
"""Views are counted up to here."""


class PackedRecords:
    """Columns indexed by slot. Slots of removed objects are reused."""

    def __init__(self, *, with_priorities: bool) -> None:
        self.slots: dict[str, int] = {}  # object id -> slot
        self.ids: list[str] = []
        self.sizes = array("Q")  # bytes
        self.frequencies = array("I")  # views
        self.last_accesses = array("d")  # POSIX seconds
        self.pushed_times = array("d")  # last access at the time the slot was pushed or re-keyed
        self.places = array("I")  # index of the slot in its heap
        # Objects without priorities are ordered by last access: both columns are the same array then
        self.priorities, self.pushed_priorities = self.last_accesses, self.pushed_times
        self._free = array("I")
        self._columns: list[array[int] | array[float]] = [
            self.sizes,
            self.frequencies,
            self.last_accesses,
            self.pushed_times,
            self.places,
        ]
        self.sampled = array("B")  # 1: the policy watches this object as one of a sample
        if with_priorities:
            self.priorities, self.pushed_priorities = array("d"), array("d")
            self._columns += [self.priorities, self.pushed_priorities, self.sampled]

    def insert(self, object_id: ObjectId, size: int, views: int, last_access: float) -> int:
        """The slot of this object, a new one if it has none yet. The caller sets its priority."""
        # A subclass of str takes more room, as an object and in the hash table.
        plain_id = str(object_id)
        slot = self.slots.get(plain_id, -1)
        if slot < 0:
            if not self._free:
                self._grow()
            slot = self.slots[plain_id] = self._free.pop()
            self.ids[slot] = plain_id
        self.sizes[slot] = size
        self.frequencies[slot] = min(max(1, views), MAX_VIEWS)
        self.last_accesses[slot] = last_access
        return slot

    def _grow(self) -> None:
        """Make many slots at once: one at a time takes a tenth of the time that a new leader needs."""
        first, more = len(self.ids), min(max(16, len(self.ids) // 32), 4096)
        self.ids.extend([""] * more)
        for column in self._columns:
            column.frombytes(bytes(more * column.itemsize))
        self._free.extend(range(first + more - 1, first - 1, -1))

    def count_access(self, slot: int, views: int, now: float) -> int:
        """Count views up to `now`; returns the new number. A late report never makes the object older."""
        self.frequencies[slot] = frequency = min(self.frequencies[slot] + views, MAX_VIEWS)
        last = self.last_accesses[slot]
        if now > last:
            self.last_accesses[slot] = now
        return frequency

    def discard(self, slot: int) -> None:
        """Free the slot."""
        del self.slots[self.ids[slot]]
        self.ids[slot] = ""
        self._free.append(slot)

    def entry(self, slot: int) -> PolicyEntry:
        priority = 0.0 if self.priorities is self.last_accesses else self.priorities[slot]
        return PolicyEntry(
            ObjectId(self.ids[slot]),
            self.sizes[slot],
            self.frequencies[slot],
            self.last_accesses[slot],
            priority,
        )


class LazyHeap:
    """Several heaps can share one set of records, as long as each slot is in one of them only."""

    def __init__(self, records: PackedRecords) -> None:
        self._records = records
        self._heap = array("I")
        # Columns of the records, which stay the same arrays
        self._places, self._ids = records.places, records.ids
        self._keys, self._times = records.pushed_priorities, records.pushed_times

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, slot: int) -> None:
        self._heap.append(slot)
        self._note_key(slot)
        self._rise(len(self._heap) - 1, 0)

    def push_all(self, slots: Iterable[int]) -> None:
        """Fill an empty heap, in linear time."""
        self._heap.extend(slots)
        for place, slot in enumerate(self._heap):
            self._records.places[slot] = place
            self._note_key(slot)
        for place in range(len(self._heap) // 2 - 1, -1, -1):
            self._sink(place, place)

    def remove(self, slot: int) -> None:
        """Remove a slot that is in this heap."""
        place, heap = self._records.places[slot], self._heap
        last = heap.pop()
        if last == slot:
            return
        heap[place] = last
        # Nothing sinks from a leaf, and half of all places are leaves: this saves a fifth of a hit's cost with lru-sp
        if 2 * place + 1 < len(heap):
            self._sink(place, 0)
        else:
            self._rise(place, 0)

    def ascending(self) -> Generator[int, None, None]:
        """Slots in the order of their keys. Close the iterator before any change: closing re-keys the stale slots."""
        heap, keys, times, ids = self._heap, self._keys, self._times, self._ids
        present_keys, present_times = self._records.priorities, self._records.last_accesses
        length = len(heap)
        stale: list[int] = []
        # (key, last access, id, slot, place); place is -1 where key and last access are those of now
        frontier = [(keys[slot], times[slot], ids[slot], slot, 0) for slot in heap[:1]]
        try:
            while frontier:
                key, time, object_id, slot, place = heapq.heappop(frontier)
                if place >= 0:
                    for child in range(2 * place + 1, min(2 * place + 3, length)):
                        below = heap[child]
                        heapq.heappush(frontier, (keys[below], times[below], ids[below], below, child))
                    present_key, present_time = present_keys[slot], present_times[slot]
                    if present_key != key or present_time != time:
                        stale.append(place)
                        heapq.heappush(frontier, (present_key, present_time, object_id, slot, -1))
                        continue
                yield slot
        finally:
            self._rekey(stale)

    def _rekey(self, places: list[int]) -> None:
        # From the bottom up, because a sinking slot moves only those below it
        for place in sorted(places, reverse=True):
            self._note_key(self._heap[place])
            self._sink(place, place)

    def _note_key(self, slot: int) -> None:
        self._keys[slot] = self._records.priorities[slot]
        self._times[slot] = self._records.last_accesses[slot]

    def _sink(self, place: int, top: int) -> None:
        """Move the slot at `place` down to a leaf, then up to where it belongs, no higher than `top`.

        Most slots come from the bottom, so this takes fewer comparisons than stopping on the way (as in Python's
        heapq)."""
        heap, places, ids = self._heap, self._places, self._ids
        keys, times = self._keys, self._times
        slot, last = heap[place], len(heap) - 1
        child = 2 * place + 1
        while child < last:
            least, other = heap[child], heap[child + 1]
            left, right = keys[least], keys[other]
            if right < left or (right == left and (times[other], ids[other]) < (times[least], ids[least])):
                least = other
                child += 1
            heap[place] = least
            places[least] = place
            place = child
            child = 2 * place + 1
        if child == last:  # the only one
            heap[place] = least = heap[child]
            places[least] = place
            place = child
        heap[place] = slot
        self._rise(place, top)

    def _rise(self, place: int, top: int) -> None:
        heap, places, ids = self._heap, self._places, self._ids
        keys, times = self._keys, self._times
        slot = heap[place]
        key = keys[slot]
        while place > top:
            parent = (place - 1) >> 1
            other = heap[parent]
            above = keys[other]
            if above < key or (above == key and (times[other], ids[other]) < (times[slot], ids[slot])):
                break
            heap[place] = other
            places[other] = place
            place = parent
        heap[place] = slot
        places[slot] = place


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
        if entry.object_id in self._records.slots:
            self.remove(entry.object_id)
        slot = self._insert(entry)
        self._heap_of(slot).push(slot)

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        slot = self._records.slots.get(object_id)
        if slot is not None:
            self._records.count_access(slot, views, now)

    def remove(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        slot = self._records.slots.get(object_id)
        if slot is not None:
            self._remove(slot, evicted=evicted)

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
                entry = records.entry(slot)
                chosen.append(entry)
                wanted -= footprint(entry.size)
        return chosen

    def evictable(
        self,
        wanted: int,
        now: float,
        *,
        min_idle: float = 0.0,
        spared: Collection[ObjectId] = _NO_IDS,
    ) -> int:
        """Reads the records, whose order does not matter, not the heap: a quarter of a second for a million."""
        sizes, last_accesses, latest = self._records.sizes, self._records.last_accesses, now - min_idle
        total = 0
        for object_id, slot in self._records.slots.items():
            if last_accesses[slot] <= latest and object_id not in spared:
                total += footprint(sizes[slot])
                if total >= wanted:
                    break
        return total

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

    def _insert(self, entry: PolicyEntry) -> int:
        """Record the entry, with its key; the slot. It still has to be pushed to a heap."""
        slot = self._records.insert(entry.object_id, entry.size, entry.frequency, entry.last_access)
        if self.has_priorities:  # else the key is the last access, and in place
            self._records.priorities[slot] = self._key(slot, entry.priority)
        return slot

    def _remove(self, slot: int, *, evicted: bool) -> None:
        if evicted:
            self._age(slot)
        self._heap_of(slot).remove(slot)
        self._records.discard(slot)

    # For subclasses

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
