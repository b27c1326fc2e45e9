"""Objects that were fetched again soon after they had gone: the measure of victims badly chosen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from shared.domain.objects import ObjectId
from shared.observability.metrics import REFETCHED

SOON = 3600.0
_MOST = 50_000


class RecentVictims:
    """The last `most` objects evicted for space within SOON seconds, as hashes: about 100 bytes each.

    `clock`: POSIX seconds."""

    def __init__(self, clock: Callable[[], float], most: int = _MOST) -> None:
        self._clock, self._most = clock, most
        self._gone_at: OrderedDict[int, float] = OrderedDict()

    def gone(self, object_id: ObjectId) -> None:
        """Evicted now."""
        number = hash(object_id)
        self._gone_at[number] = self._clock()
        self._gone_at.move_to_end(number)
        if len(self._gone_at) > self._most:
            self._gone_at.popitem(last=False)

    def came_back(self, object_id: ObjectId) -> bool:
        """The object has been fetched; True, and counted, if that is soon after it was evicted."""
        gone_at = self._gone_at.pop(hash(object_id), None)
        again = gone_at is not None and 0 <= self._clock() - gone_at <= SOON
        if again:
            REFETCHED.inc()
        return again
