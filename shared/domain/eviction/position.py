"""The place of one object in the order of eviction: how many bytes would go before it.

The evictor alone holds a policy with all objects. Any other process can tell an object's place from the entries of the
index: it feeds them all to a `Position`, once per pass. That takes no memory per entry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace

from distributor_node.shared.domain.eviction.gdsf import Gdsf, MissCost, StoredPriorities
from distributor_node.shared.domain.eviction.lru_sp import GROUPS, LruSp, cost_of, group_of
from distributor_node.shared.domain.eviction.policy import PolicyEntry, PriorityBasis
from distributor_node.shared.domain.space import footprint

_Place = tuple[float, float, str]  # (priority, last access, id): the order within one heap of a policy


def position_of(
    policy: str, cost: MissCost, target: PolicyEntry, basis: PriorityBasis, now: float
) -> Position:
    """The place of `target` under the policy of this name, at POSIX time `now`. `cost` and `basis` (of the index)
    concern gdsf alone."""
    if policy == Gdsf.name:
        return GdsfPosition(target, StoredPriorities(basis, cost))
    if policy == LruSp.name:
        return LruSpPosition(target, now)
    return LruPosition(target)


class Position(ABC):
    """Feed every entry that may be evicted `passes` times: `feed` all, then `end_pass`. The target may be among them.

    Recency (`evictor.min_idle`) is not looked at: an object that is accessed too lately to go now is counted.
    """

    passes = 1
    priority: float | None = None
    """Of the target; None where the policy has no priorities."""
    inflation: float | None = None
    """L, for policies with priorities."""

    def __init__(self, target: PolicyEntry) -> None:
        self.target = target
        self.bytes_before = 0
        """Footprints of the objects that would go before the target. Valid after the last pass."""
        self.objects_before = 0
        self._pass = 1

    def feed(self, entries: Iterable[PolicyEntry]) -> None:
        for entry in entries:
            if entry.object_id != self.target.object_id and self._goes_before(entry):
                self.objects_before += 1
                self.bytes_before += footprint(entry.size)

    def end_pass(self) -> None:
        self._pass += 1

    @abstractmethod
    def _goes_before(self, entry: PolicyEntry) -> bool: ...


class LruPosition(Position):
    """By last access."""

    def _goes_before(self, entry: PolicyEntry) -> bool:
        return _access_place(entry) < _access_place(self.target)


class GdsfPosition(Position):
    """By priority. The index may hold none for a new object, or those of another policy: see `StoredPriorities`."""

    def __init__(self, target: PolicyEntry, stored: StoredPriorities) -> None:
        super().__init__(target)
        self._stored, self.inflation = stored, stored.inflation
        self.priority = self._priority_of(target)
        self._target_place = _place(replace(target, priority=self.priority))

    def _goes_before(self, entry: PolicyEntry) -> bool:
        return (self._priority_of(entry), entry.last_access, entry.object_id) < self._target_place

    def _priority_of(self, entry: PolicyEntry) -> float:
        return self._stored.priority(entry.size, max(1, entry.frequency), entry.priority)


class LruSpPosition(Position):
    """By groups, of which the policy always takes the oldest object that costs most to keep.

    An object goes when everything before it in its group is gone, so its turn is decided by the least cost among these
    and itself: its rank. A group is emptied before the target up to its first object of a lower rank. Hence three
    passes: 1. the target's rank; 2. in each group the first object of a lower rank; 3. what is before those.
    """

    passes = 3

    def __init__(self, target: PolicyEntry, now: float) -> None:
        super().__init__(target)
        self._now = now
        self._group = group_of(target.size, max(1, target.frequency))
        self._rank = (cost_of(target, now), self._group)  # of equal costs the later group goes first
        self._ends: list[_Place | None] = [None] * GROUPS
        self._ends[self._group] = _access_place(target)

    def _goes_before(self, entry: PolicyEntry) -> bool:
        group, place = group_of(entry.size, max(1, entry.frequency)), _access_place(entry)
        end = self._ends[group]
        if self._pass == 1:
            if group == self._group and end is not None and place < end:
                self._rank = min(self._rank, (cost_of(entry, self._now), group))
        elif self._pass == 2:
            lower = group != self._group and (cost_of(entry, self._now), group) < self._rank
            if lower and (end is None or place < end):
                self._ends[group] = place
        else:
            return end is None or place < end
        return False


def _place(entry: PolicyEntry) -> _Place:
    return (entry.priority, entry.last_access, entry.object_id)


def _access_place(entry: PolicyEntry) -> _Place:
    return (0.0, entry.last_access, entry.object_id)
