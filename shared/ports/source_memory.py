"""The source memory: how the storage nodes do, as all processes of the node have seen it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shared.domain.objects import ObjectId
from shared.domain.source_order import SourceHealth, SourceNews

MOST_SOURCES = 1000
"""Sources that a memory keeps; those beyond are known to the process that met them alone."""
MOST_CORRUPTED = 2000
"""Corrupted copies that a memory keeps; beyond, those that would be forgotten first are."""


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


class SourceMemory(Protocol):
    """One instance per process; `open` before use, `close` at the end. `exchange` may raise StateStoreUnavailable,
    within a bounded time. A source of which nothing was heard for a day is forgotten."""

    async def open(self) -> None:
        """Connect in the background; never fails because the memory is down."""

    async def close(self) -> None: ...

    async def exchange(
        self, news: Mapping[str, SourceNews], corrupted: Sequence[CorruptedCopy], now: float
    ) -> SharedSources:
        """Hand over what was seen since the last time, and learn what all have seen; one step. All times are on the
        caller's clock, which says `now`. News whose answer was lost may be counted twice when handed over again."""
