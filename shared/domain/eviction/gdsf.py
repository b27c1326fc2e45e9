"""GDSF: Greedy-Dual-Size with Frequency, for misses that cost c0 + size.

Priority = L + frequency × (c0 + size) / size. The least priority goes first; of equal ones the one accessed least
lately, then the lesser id. L ("inflation") is the highest priority of any victim so far, which is that of the last one
where nobody was spared: whoever is not asked for any more is overtaken in time, however popular it was.

`c0` is what a miss costs besides its bytes, in bytes: how much traffic one miss less is worth. 0 counts bytes alone
(size then does not matter: least frequently used, with ageing); a very large one counts misses alone (the classic
form).
Source: Ludmila Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy", HP Labs
HPL-98-69R1, 1998; ageing from Pei Cao, Sandy Irani, "Cost-aware WWW proxy caching algorithms", USITS 1997.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import closing

from distributor_node.shared.domain.eviction.lazy_heap import LazyHeap
from distributor_node.shared.domain.eviction.packed import PackedPolicy, PackedRecords
from distributor_node.shared.domain.eviction.policy import PolicyEntry
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint

DEFAULT_MISS_COST = 64 * 1024**2
_NO_IDS: frozenset[ObjectId] = frozenset()


class Gdsf(PackedPolicy):
    """See the module's text; an EvictionPolicy. `miss_cost` is c0, in bytes."""

    def __init__(self, miss_cost: int = DEFAULT_MISS_COST) -> None:
        self._miss_cost = miss_cost
        self._clear(0.0)

    def _clear(self, inflation: float) -> None:
        self.inflation = inflation
        self._records = PackedRecords(with_priorities=True)
        self._heap = LazyHeap(self._records)

    def add(self, entry: PolicyEntry) -> None:
        """A priority that the entry brings with it counts as far as this policy can have given it (see `restore`)."""
        self.remove(entry.object_id)
        self._heap.push(self._insert(entry))

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        """Raises the priority. With no further views (a long send goes on) that is by what L has risen."""
        records = self._records
        slot = records.slots.get(object_id)
        if slot is None:
            return
        frequency = records.count_access(slot, views, now)
        priority = self.inflation + self._worth(records.sizes[slot], frequency)
        records.priorities[slot] = max(records.priorities[slot], priority)

    def remove(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        """Gone. L follows the priorities of victims, and never falls when one is chosen that was spared before."""
        slot = self._records.slots.get(object_id)
        if slot is None:
            return
        if evicted:
            self.inflation = max(self.inflation, self._records.priorities[slot])
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
        """Least priorities first. Costs a few microseconds for each victim, and as much for each one passed over."""
        records, latest = self._records, now - min_idle
        chosen: list[PolicyEntry] = []
        with closing(self._heap.ascending()) as slots:
            while wanted > 0 and len(chosen) < at_most:
                slot = next(slots, None)
                if slot is None:
                    break
                if records.last_accesses[slot] <= latest and records.ids[slot] not in spared:
                    chosen.append(records.entry(slot))
                    wanted -= footprint(records.sizes[slot])
        return chosen

    def restore(self, entries: Iterable[PolicyEntry], inflation: float) -> None:
        """Takes one entry at a time: a generator saves the memory of a list. Of entries with one id the last counts.

        Entries of another policy, or of this one with another `c0`, have a priority of 0 or one out of bounds: it can
        only lie between what it would be with L = 0 and with L as it is now. Such are brought to the nearer bound,
        those without any (0.0) to the upper one, as if they had been accessed just now.
        """
        self._clear(inflation)
        for entry in entries:
            self._insert(entry)
        self._heap.push_all(self._records.slots.values())

    def _insert(self, entry: PolicyEntry) -> int:
        slot = self._records.insert(entry)
        least = self._worth(entry.size, self._records.frequencies[slot])
        most = self.inflation + least
        self._records.priorities[slot] = min(max(entry.priority, least), most) if entry.priority else most
        return slot

    def _worth(self, size: int, frequency: int) -> float:
        size = max(1, size)  # an empty object is worth as much as one of a byte, not infinitely much
        return frequency * (self._miss_cost + size) / size
