"""The shared source stats in one process: for several readers of sources in it, and for tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from shared.domain.objects import ObjectId
from shared.domain.source_order import SourceHealth, SourceStatsDelta
from shared.ports.source_memory import MAX_CORRUPTED_COPIES, MAX_SOURCES, CorruptedCopy, SharedSources

_RETENTION = 24 * 3600.0


class MemorySharedSourceStats:
    """See the port. The verb never awaits, so it is atomic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` in seconds."""
        self._clock = clock
        self._known: dict[str, tuple[float, SourceHealth]] = {}
        self._corrupted: dict[tuple[ObjectId, str], float] = {}

    async def open(self) -> None:
        """Nothing to get ready."""

    async def close(self) -> None:
        """Nothing to give back."""

    async def sync(
        self, deltas: Mapping[str, SourceStatsDelta], corrupted: Sequence[CorruptedCopy], now: float
    ) -> SharedSources:
        here = self._clock()
        for name, latest in deltas.items():
            _, before = self._known.get(name, (here, SourceHealth()))
            if name in self._known or len(self._known) < MAX_SOURCES:
                moved = replace(latest, seen=_moved(latest.seen, here - now))
                self._known[name] = (here, moved.apply_to(before))
        self._known = {name: known for name, known in self._known.items() if known[0] > here - _RETENTION}
        for copy in corrupted:
            self._corrupted[copy.object_id, copy.source] = here + copy.seconds_left
        lasting = sorted(
            (item for item in self._corrupted.items() if item[1] > here), key=lambda item: item[1]
        )
        self._corrupted = dict(lasting[-MAX_CORRUPTED_COPIES:])
        return SharedSources(
            {name: _moved(health, now - here) for name, (_, health) in self._known.items()},
            [CorruptedCopy(*copy, ends - here) for copy, ends in self._corrupted.items()],
        )


def _moved(health: SourceHealth, seconds: float) -> SourceHealth:
    """As seen on a clock that is so far ahead."""
    unreachable_at = health.unreachable_at
    return replace(
        health,
        last_failure_at=health.last_failure_at + seconds,
        unreachable_at=None if unreachable_at is None else unreachable_at + seconds,
    )
