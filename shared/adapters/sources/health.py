"""What this process has seen of the sources lately; forgotten when it ends."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

from shared.domain.objects import source_name
from shared.domain.source_order import SourceHealth, order

_SOURCES_KEPT = 1_000
_WEIGHT = 0.1  # of the newest answer: the mean is of about the last ten


class HealthBook:
    """Health by source name (`host:port`). `clock`: seconds, never backwards."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: OrderedDict[str, SourceHealth] = OrderedDict()

    def best_first(self, sources: Sequence[str]) -> tuple[str, ...]:
        """The URLs in the order to ask them in."""
        return order(sources, self._known, self._clock())

    def record_first_byte(self, url: str, seconds: float) -> None:
        """The source answered, its first byte so long after the request."""
        seen = self._known.get(source_name(url), SourceHealth())
        before = seen.mean_first_byte
        mean = seconds if before is None else before + _WEIGHT * (seconds - before)
        self._keep(url, replace(seen, mean_first_byte=mean))

    def record_success(self, url: str) -> None:
        """The source gave all that was asked of it."""
        seen = self._known.get(source_name(url))
        if seen is not None and seen.failures:
            self._keep(url, replace(seen, failures=0))

    def record_failure(self, url: str) -> None:
        """The source failed in a way that says something of its other objects too."""
        seen = self._known.get(source_name(url), SourceHealth())
        self._keep(url, replace(seen, failures=seen.failures + 1, last_failure_at=self._clock()))

    def _keep(self, url: str, health: SourceHealth) -> None:
        name = source_name(url)
        self._known[name] = health
        self._known.move_to_end(name)
        if len(self._known) > _SOURCES_KEPT:
            self._known.popitem(last=False)
