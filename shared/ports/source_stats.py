"""Shared source stats: failures and response times of the storage nodes, as seen by all processes of the node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.source_order import SourceHealth, SourceStatsDelta

MAX_SOURCES = 1000
"""Number of sources that are shared. Further sources are known only to the process that used them."""
MAX_CORRUPTED_COPIES = 2000
"""Number of corrupted copies that are kept. Beyond it, those that expire first are dropped."""


@dataclass(frozen=True, slots=True)
class CorruptedCopy:
    """A source that sent wrong bytes for an object, and is not asked for that object for a while."""

    object_id: ObjectId
    source: str  # host:port
    seconds_left: float


@dataclass(frozen=True, slots=True)
class SourceRate:
    """How fast a source has sent of late."""

    rate: float  # bytes a second, of one download
    seconds_left: float  # until it is forgotten


@dataclass(frozen=True, slots=True)
class SharedSources:
    """What all processes have seen."""

    health: Mapping[str, SourceHealth] = field(default_factory=dict)  # by source, host:port
    corrupted: Sequence[CorruptedCopy] = ()
    rates: Mapping[str, SourceRate] = field(default_factory=dict)  # by source, host:port


class SharedSourceStats(Protocol):
    """One instance per process. `open` it before use, `close` it at the end.

    A source without reports for a day is dropped.
    """

    async def open(self) -> None:
        """Connect in the background. Never fails because the store is down."""

    async def close(self) -> None: ...

    async def sync(
        self, deltas: Mapping[str, SourceStatsDelta], corrupted: Sequence[CorruptedCopy], now: float
    ) -> SharedSources:
        """Add what this process has seen since the last call, and return what all processes have seen, in one step.

        All times are on the caller's clock, which reads `now`. Raises StateStoreUnavailable within a bounded time. The
        deltas of a call whose reply was lost may be counted twice if they are passed again.
        """
