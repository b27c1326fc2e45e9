"""Objects that were fetched again soon after they had gone: the measure of victims badly chosen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from shared.domain.objects import ObjectId
from shared.observability.metrics import REFETCHED_AFTER_EVICTION

GHOST_TTL = 3600.0
_MAX_GHOSTS = 50_000


class GhostList:
    """The last `max_size` objects evicted for space within GHOST_TTL seconds, as hashes: about 100 bytes each.

    `clock`: POSIX seconds."""

    def __init__(self, clock: Callable[[], float], max_size: int = _MAX_GHOSTS) -> None:
        self._clock, self._max_size = clock, max_size
        self._evicted_at: OrderedDict[int, float] = OrderedDict()

    def add(self, object_id: ObjectId) -> None:
        """Evicted now."""
        key = hash(object_id)
        self._evicted_at[key] = self._clock()
        self._evicted_at.move_to_end(key)
        if len(self._evicted_at) > self._max_size:
            self._evicted_at.popitem(last=False)

    def hit(self, object_id: ObjectId) -> bool:
        """The object has been fetched; True, and counted, if that is soon after it was evicted."""
        evicted_at = self._evicted_at.pop(hash(object_id), None)
        refetched = evicted_at is not None and 0 <= self._clock() - evicted_at <= GHOST_TTL
        if refetched:
            REFETCHED_AFTER_EVICTION.inc()
        return refetched
