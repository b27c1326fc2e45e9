"""The interface of eviction policies: an order of the complete objects, the next victim first. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from distributor_node.shared.domain.objects import ObjectId


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """What every policy knows of an object, so that the policy can be changed at a restart."""

    object_id: ObjectId
    size: int  # bytes
    frequency: int  # views, at least 1
    last_access: float  # POSIX seconds
    priority: float = 0.0  # the policy's own; 0.0: none


class EvictionPolicy(Protocol):
    """All times are arguments, in POSIX seconds. Calls for objects that the policy does not hold do nothing."""

    @property
    def name(self) -> str:
        """As settings call it."""

    @property
    def inflation(self) -> float:
        """L: the highest priority of all victims, for policies that age by it; 0.0 for the others."""

    def __len__(self) -> int: ...

    def __contains__(self, object_id: object) -> bool: ...

    def get(self, object_id: ObjectId) -> PolicyEntry | None:
        """The entry as of now."""

    def add(self, entry: PolicyEntry) -> None:
        """A new object, last accessed at `entry.last_access`; replaces an entry of the same id."""

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

    def ids(self) -> Sequence[ObjectId]:
        """All ids as of now, in any order."""

    def dump(self) -> Iterator[PolicyEntry]:
        """All entries, in any order. The policy must not change during the iteration."""

    def restore(self, entries: Iterable[PolicyEntry], inflation: float) -> None:
        """Start again with the entries of a `dump`: the same victims follow."""
