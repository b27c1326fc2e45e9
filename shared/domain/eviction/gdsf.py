"""GDSF: Greedy-Dual-Size with Frequency, for misses that cost c0 + size.

Priority = L + frequency × (c0 + size) / size. The lowest priority goes first; of equal ones the object accessed least
recently, then the lesser id. L ("inflation") is the highest priority of all victims so far. An object that is not
requested any more is overtaken by L in time, however popular it was.

`c0` is what a miss costs besides its bytes, in bytes: how much traffic one avoided miss is worth. 0 counts bytes alone
(size then does not matter: least frequently used, with ageing). A very large one counts misses alone (the classic
form).
Source: Ludmila Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy", HP Labs
HPL-98-69R1, 1998; ageing from Pei Cao, Sandy Irani, "Cost-aware WWW proxy caching algorithms", USITS 1997.
"""

from __future__ import annotations

from distributor_node.shared.domain.eviction.packed import PackedPolicy
from distributor_node.shared.domain.objects import ObjectId

DEFAULT_MISS_COST = 64 * 1024**2


def priority_above_inflation(size: int, frequency: int, miss_cost: int) -> float:
    """Frequency × (c0 + size) / size; an empty object counts as one byte, so that its priority is finite."""
    size = max(1, size)
    return frequency * (miss_cost + size) / size


def bounded_priority(known: float, above_inflation: float, inflation: float) -> float:
    """A priority that this policy can have given, as near as possible to the `known` one.

    A known priority is 0.0 (none) or out of bounds after a change of policy or of c0. It can only lie between the
    priority with L = 0 and the one with L as it is now. A missing one becomes the upper bound, as if the object had
    been accessed just now.
    """
    most = inflation + above_inflation
    return min(max(known, above_inflation), most) if known else most


class Gdsf(PackedPolicy):
    """Greedy-Dual-Size with Frequency, as the module describes it."""

    name = "gdsf"
    has_priorities = True

    def __init__(self, miss_cost: int = DEFAULT_MISS_COST) -> None:
        """`miss_cost`: c0, in bytes."""
        self._miss_cost = miss_cost
        super().__init__()

    def _clear(self, inflation: float) -> None:
        self.inflation = inflation
        super()._clear(inflation)

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        """Raise the priority. Without further views (a long send continues) it rises by as much as L has risen."""
        records = self._records
        slot = records.slots.get(object_id)
        if slot is None:
            return
        frequency = records.count_access(slot, views, now)
        priority = self.inflation + priority_above_inflation(records.sizes[slot], frequency, self._miss_cost)
        records.priorities[slot] = max(records.priorities[slot], priority)

    def _key(self, slot: int, known: float) -> float:
        records = self._records
        above = priority_above_inflation(records.sizes[slot], records.frequencies[slot], self._miss_cost)
        return bounded_priority(known, above, self.inflation)

    def _age(self, slot: int) -> None:
        """L never falls, not even when the victim is an object that was spared before."""
        self.inflation = max(self.inflation, self._records.priorities[slot])
