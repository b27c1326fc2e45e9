"""The interface of eviction policies: an order of the complete objects, the next victim first. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from distributor_node.shared.domain.objects import ObjectId


@dataclass(slots=True)
class PolicyEntry:
    """What every policy knows of an object, so that the policy can be changed at a restart.

    Never change one. It is not frozen only because a frozen one takes four times as long to make, and a new leader
    makes a million.
    """

    object_id: ObjectId
    size: int  # bytes
    frequency: int  # views, at least 1
    last_access: float  # POSIX seconds
    priority: float = 0.0  # the policy's own; 0.0: none


FIRST_COST_FACTOR = 28.0
"""c0 is so many times the mean bytes of a view, before anything is known of the traffic."""


@dataclass(frozen=True, slots=True)
class PriorityBasis:
    """What stored priorities rest on, beside the objects' own fields. It is kept with them."""

    inflation: float = 0.0  # L
    policy: str = ""  # that gave the priorities; "": not known
    miss_cost: float = 0.0  # c0 in bytes, as it was last
    # Running sums, from which c0 follows
    views: float = 0.0
    viewed_bytes: float = 0.0
    # What views weigh: see gdsf.ViewWeights
    exponent: float = 1.0
    first_weight: float = 0.4
    cost_factor: float = FIRST_COST_FACTOR  # see gdsf.CostFactor

    @property
    def mean_view(self) -> float:
        """Bytes; 0.0 if no view was counted."""
        return self.viewed_bytes / self.views if self.views else 0.0

    def counting(self, viewed: Iterable[tuple[int, int]]) -> PriorityBasis:
        """With the views of more objects, each given as its size and number of views."""
        counted = [(max(1, views), size) for size, views in viewed]
        return replace(
            self,
            views=self.views + sum(views for views, _ in counted),
            viewed_bytes=self.viewed_bytes + sum(views * size for views, size in counted),
        )


NO_BASIS = PriorityBasis()


class EvictionPolicy(Protocol):
    """All times are arguments, in POSIX seconds. Calls for objects that the policy does not hold do nothing."""

    @property
    def name(self) -> str:
        """As settings call it."""

    @property
    def inflation(self) -> float:
        """L: the highest priority of all victims, for policies that age by it; 0.0 for the others."""

    @property
    def basis(self) -> PriorityBasis:
        """As of now, for `restore`."""

    def __len__(self) -> int: ...

    def __contains__(self, object_id: object) -> bool: ...

    def get(self, object_id: ObjectId) -> PolicyEntry | None:
        """The entry as of now."""

    def store(self, object_id: ObjectId, size: int, now: float, *, begins_view: bool = True) -> None:
        """An object that was fetched for a view. `begins_view`: False if that view was counted before."""

    def add(self, entry: PolicyEntry) -> None:
        """An object whose views are known, last accessed at `entry.last_access`; replaces an entry of the same id."""

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        """Count `views` more views, the last one at `now`. A late report never makes an entry older."""

    def remove(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        """The object is gone. `evicted`: as a victim of this policy, which may age by it."""

    def victims(
        self,
        wanted: int,
        now: float,
        *,
        min_idle: float = 0.0,
        spared: Collection[ObjectId] = frozenset(),
        at_most: int = 1000,
    ) -> list[PolicyEntry]:
        """The next victims, in order, until `wanted` bytes (footprints) would be free. Changes nothing.

        Passes over objects accessed less than `min_idle` seconds ago, and those in `spared` (in use now, or pinned).
        At most `at_most` victims. They are fewer bytes than wanted when nothing else may go.
        """

    def evictable(
        self,
        wanted: int,
        now: float,
        *,
        min_idle: float = 0.0,
        spared: Collection[ObjectId] = frozenset(),
    ) -> int:
        """Bytes (footprints) of all objects that `victims` may choose. Stops counting at `wanted` bytes."""

    def ids(self) -> Sequence[ObjectId]:
        """All ids as of now, in any order."""

    def dump(self) -> Iterator[PolicyEntry]:
        """All entries, in any order. The policy must not change during the iteration."""

    def restore(self, entries: Iterable[PolicyEntry], basis: PriorityBasis) -> None:
        """Start again with the entries of a `dump` and the `basis` of the same time: the same victims follow. More of
        these entries may be added until `end_restore`."""

    def end_restore(self) -> None:
        """From now on priorities of entries that are added are of this policy and its own basis."""
