"""Fields of objects in packed columns, so that a million objects do not take a gigabyte.

An object takes about 180 bytes. That includes an id of up to 24 characters, its hash table entry and its place in a
heap.
"""

from __future__ import annotations

from array import array

from distributor_node.shared.domain.eviction.policy import PolicyEntry
from distributor_node.shared.domain.objects import ObjectId

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
        if with_priorities:
            self.priorities, self.pushed_priorities = array("d"), array("d")
            self._columns += [self.priorities, self.pushed_priorities]

    def insert(self, entry: PolicyEntry) -> int:
        """The slot of this object, a new one if it has none yet. The caller sets its priority."""
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
        """Count views up to `now`; returns the new number. A late report never makes the object older."""
        frequency = min(self.frequencies[slot] + views, MAX_VIEWS)
        self.frequencies[slot] = frequency
        self.last_accesses[slot] = max(self.last_accesses[slot], now)
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
