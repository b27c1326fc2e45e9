"""The catalog memory in one process: for several catalogs in it, and for tests."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from shared.domain.objects import MediaObject, ObjectId
from shared.ports.catalog_memory import Consultation, Remembered

_MOST_ENTRIES = 100_000


@dataclass(frozen=True, slots=True)
class _Kept:
    answer: MediaObject | None
    fresh_until: float
    ends: float


class MemoryCatalogMemory:
    """See the port. Verbs never await, so each one is atomic; the least recently used answers are dropped beyond
    100,000."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` in seconds."""
        self._clock = clock
        self._kept: OrderedDict[ObjectId, _Kept] = OrderedDict()
        self._asking: dict[ObjectId, tuple[str, float]] = {}

    async def open(self) -> None:
        """Nothing to get ready."""

    async def close(self) -> None:
        """Nothing to give back."""

    async def recall(self, object_id: ObjectId) -> Remembered | None:
        return self._recall(object_id)

    async def consult(self, object_id: ObjectId, asker: str, seconds: float) -> Consultation:
        remembered = self._recall(object_id)
        if remembered is not None and remembered.fresh_left > 0:
            return Consultation(remembered, must_ask=False)
        now = self._clock()
        _, ends = self._asking.get(object_id, ("", now))
        if ends > now:
            return Consultation(remembered, must_ask=False)
        self._asking[object_id] = (asker, now + seconds)
        return Consultation(remembered, must_ask=True)

    async def remember(
        self, object_id: ObjectId, answer: MediaObject | None, fresh: float, keep: float
    ) -> None:
        now = self._clock()
        self._kept[object_id] = _Kept(answer, now + fresh, now + keep)
        self._kept.move_to_end(object_id)
        self._asking.pop(object_id, None)
        while len(self._kept) > _MOST_ENTRIES:
            self._kept.popitem(last=False)

    async def give_up(self, object_id: ObjectId, asker: str) -> None:
        if self._asking.get(object_id, ("", 0.0))[0] == asker:
            del self._asking[object_id]

    def _recall(self, object_id: ObjectId) -> Remembered | None:
        now = self._clock()
        kept = self._kept.get(object_id)
        if kept is None or kept.ends <= now:
            self._kept.pop(object_id, None)
            return None
        self._kept.move_to_end(object_id)
        return Remembered(kept.answer, kept.fresh_until - now)
