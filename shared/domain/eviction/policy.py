"""What an eviction policy is: an order of the complete objects, the one to go first at its head. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from distributor_node.shared.domain.objects import ObjectId


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """What any policy knows of an object, so that the policy can be changed at a restart.

    `size` in bytes; `frequency` in views, at least 1; `last_access` POSIX seconds; `priority` is the policy's own.
    """

    object_id: ObjectId
    size: int
    frequency: int
    last_access: float
    priority: float = 0.0


class EvictionPolicy(Protocol):
    """All times are arguments, in POSIX seconds. Objects that are not there are passed over in silence."""

    @property
    def inflation(self) -> float:
        """Priority of the last victim, for policies that age by it; 0.0 for the others."""

    def __len__(self) -> int: ...

    def __contains__(self, object_id: object) -> bool: ...

    def get(self, object_id: ObjectId) -> PolicyEntry | None:
        """The entry as of now."""

    def add(self, entry: PolicyEntry) -> None:
        """A new object, last accessed at `entry.last_access`; replaces an entry of the same id."""

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        """`views` more views, the last one at `now`. An access reported late never makes an entry older."""

    def remove(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        """The object is gone; `evicted`: as this policy's victim (policies that age by their victims do it here)."""

    def victims(
        self,
        wanted: int,
        now: float,
        *,
        min_idle: float = 0.0,
        spared: Collection[ObjectId] = frozenset(),
        at_most: int = 1000,
    ) -> list[PolicyEntry]:
        """Who would go, first one first, until `wanted` bytes (footprints) are free; nothing is changed.

        Passed over: objects accessed less than `min_idle` seconds ago, and those `spared` (in use at this moment).
        At most `at_most` victims; fewer bytes than wanted when nobody else can go.
        """

    def ids(self) -> Sequence[ObjectId]:
        """All ids as of now, in any order."""

    def dump(self) -> Iterator[PolicyEntry]:
        """All entries, in any order. Nothing may be changed meanwhile."""

    def restore(self, entries: Iterable[PolicyEntry], inflation: float) -> None:
        """Begin anew with these entries, as after `dump`: the same victims follow."""
