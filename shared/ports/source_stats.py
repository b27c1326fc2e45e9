"""The shared source stats: how the storage nodes do, as all processes of the node have seen it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.source_order import SourceHealth, SourceStatsDelta

MAX_SOURCES = 1000
"""Sources that are kept; those beyond are known to the process that met them alone."""
MAX_CORRUPTED_COPIES = 2000
"""Corrupted copies that are kept; beyond, those that would be forgotten first are."""


@dataclass(frozen=True, slots=True)
class CorruptedCopy:
    """A source (`host:port`) gave wrong bytes for an object; it is not asked for that one for `seconds_left`."""

    object_id: ObjectId
    source: str
    seconds_left: float


@dataclass(frozen=True, slots=True)
class SharedSources:
    """What all processes have seen, by source name."""

    health: Mapping[str, SourceHealth] = field(default_factory=dict)
    corrupted: Sequence[CorruptedCopy] = ()


class SharedSourceStats(Protocol):
    """One instance per process; `open` before use, `close` at the end. `sync` may raise StateStoreUnavailable,
    within a bounded time. A source of which nothing was heard for a day is forgotten."""

    async def open(self) -> None:
        """Connect in the background; never fails because the store is down."""

    async def close(self) -> None: ...

    async def sync(
        self, deltas: Mapping[str, SourceStatsDelta], corrupted: Sequence[CorruptedCopy], now: float
    ) -> SharedSources:
        """Hand over what was seen since the last time, and learn what all have seen; one step. All times are on the
        caller's clock, which says `now`. Deltas whose reply was lost may be counted twice when handed over again."""
