"""Figures of objects in packed columns, a slot each: a million objects must not cost a gigabyte.

An object takes about 180 bytes, an id of up to 24 characters, its hash table entry and its place in a heap included.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import cast

from distributor_node.shared.domain.eviction.policy import PolicyEntry
from distributor_node.shared.domain.objects import ObjectId

MAX_VIEWS = 2**32 - 1
"""Views are counted up to here."""


class PackedRecords:
    """Columns by slot. Slots of objects that are gone are used again.

    `pushed_priorities` and `pushed_times` hold the key under which a heap knows the slot, `places` where it
    stands there.
    Without priorities of their own, objects are ordered by last access: the columns are the same ones then.
    """

    def __init__(self, *, with_priorities: bool) -> None:
        self.slots: dict[str, int] = {}
        self.ids: list[str] = []
        self.sizes = array("Q")
        self.frequencies = array("I")
        self.last_accesses = array("d")
        self.pushed_times = array("d")
        self.places = array("I")
        self.priorities, self.pushed_priorities = self.last_accesses, self.pushed_times
        self._free = array("I")
        self._columns: list[array[int] | array[float]] = [
            self.sizes,
            self.frequencies,
            self.last_accesses,
            self.pushed_times,
            self.places,
        ]
        if with_priorities:
            self.priorities, self.pushed_priorities = array("d"), array("d")
            self._columns += [self.priorities, self.pushed_priorities]

    def insert(self, entry: PolicyEntry) -> int:
        """The slot of this object, taken for it if it has none yet. Its priority is the caller's to set."""
        # A subclass of str takes more room, as an object and in the hash table.
        plain_id = str(entry.object_id)
        slot = self.slots.get(plain_id, -1)
        if slot < 0:
            slot = self.slots[plain_id] = self._free_slot()
            self.ids[slot] = plain_id
        self.sizes[slot] = entry.size
        self.frequencies[slot] = min(max(1, entry.frequency), MAX_VIEWS)
        self.last_accesses[slot] = entry.last_access
        return slot

    def _free_slot(self) -> int:
        if self._free:
            return self._free.pop()
        self.ids.append("")
        for column in self._columns:
            column.append(0)
        return len(self.ids) - 1

    def count_access(self, slot: int, views: int, now: float) -> int:
        """The views of the object now. A late report never makes it older."""
        frequency = min(self.frequencies[slot] + views, MAX_VIEWS)
        self.frequencies[slot] = frequency
        self.last_accesses[slot] = max(self.last_accesses[slot], now)
        return frequency

    def discard(self, slot: int) -> None:
        """The slot is free again."""
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


# What the policies have in common whose objects stand in packed records.


class PackedPolicy:
    """The part of an EvictionPolicy that only looks."""

    _records: PackedRecords

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
