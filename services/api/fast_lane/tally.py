"""What the fast path has answered, counted in plain numbers and handed to the metrics a few times a second."""

from __future__ import annotations

import asyncio
from bisect import bisect_left

from shared.observability.metrics import REQUESTS, SENT_BYTES, TIME_TO_FIRST_BYTE
from shared.observability.observations import add_observations, bounds_of

_FLUSH_SECONDS = 0.1


class BufferedHitMetrics:
    """Of one process. A Prometheus counter takes a lock, and in multiprocess mode a write to a mapped file, each
    time."""

    def __init__(self) -> None:
        self._requests: dict[tuple[bool, int], int] = {}
        self._sent = 0
        self._first_bytes = TIME_TO_FIRST_BYTE.labels(cache="hit")
        self._bounds = bounds_of(self._first_bytes)
        self._counts = [0] * len(self._bounds)
        self._seconds = 0.0
        self._due = False

    def add(self, head: bool, status: int, sent: int, seconds: float) -> None:
        """One more answer, to HEAD or GET; `sent` bytes of a body, the first of them `seconds` after the request
        came."""
        key = (head, status)
        self._requests[key] = self._requests.get(key, 0) + 1
        if sent:
            self._sent += sent
            self._counts[bisect_left(self._bounds, seconds)] += 1
            self._seconds += seconds
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self.flush)

    def flush(self) -> None:
        """Hand everything over now."""
        self._due = False
        requests, self._requests = self._requests, {}
        for (head, status), count in requests.items():
            method = "HEAD" if head else "GET"
            REQUESTS.labels(method=method, status=str(status), cache="hit").inc(count)
        if self._sent:
            SENT_BYTES.labels(source="local").inc(self._sent)
            self._sent = 0
        if any(self._counts):
            add_observations(self._first_bytes, self._counts, self._seconds)
            self._counts, self._seconds = [0] * len(self._bounds), 0.0
