"""The last hour and the last day of the node in bounded memory, from the counters that all processes report.

Every API process keeps it, so that another one can serve the page with the same history. Prometheus is the long memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from distributor_node.shared.observability.metrics import FIRST_BYTE_BOUNDS
from distributor_node.shared.runtime.process_reports import ReportedProcess

STEP = 10.0
"""Seconds between two samples of the last hour."""
SAMPLES = 360
MINUTES = 24 * 60
_STEPS_OF_MINUTE = 6

_COUNTERS = ("hit", "pending", "miss", "error", "local", "external", "fetched", "evicted", "evictedBytes")
_BUCKETS = len(FIRST_BYTE_BOUNDS) + 1
WIDTH = len(_COUNTERS) + _BUCKETS
_MAX_PROCESSES = 1000


def counted_by(process: ReportedProcess) -> list[float]:
    """The process's counters in the order of a sample. What another version does not count is 0."""
    counted = process.content.counted
    buckets = counted.first_byte if len(counted.first_byte) == _BUCKETS else [0.0] * _BUCKETS
    return [
        *(counted.requests.get(name, 0.0) for name in ("hit", "pending", "miss", "error")),
        *(counted.sent.get(name, 0.0) for name in ("local", "external")),
        counted.fetched,
        sum(counted.evictions.values()),
        counted.evicted_bytes,
        *buckets,
    ]


class CounterSum:
    """What all processes together have counted between two readings of their reports."""

    def __init__(self) -> None:
        self._last: dict[str, list[float]] = {}
        self._read_at: float | None = None

    def advance(self, processes: Sequence[ReportedProcess], now: float) -> list[float]:
        """Return the growth of each counter since the last call. `now`: POSIX seconds.

        A process that is seen for the first time counts from 0 if it has started since the last reading, or within STEP
        before it, since its first report may have come too late for that. Of others it is not known when they counted.
        """
        started_lately = (now if self._read_at is None else self._read_at) - STEP
        growth = [0.0] * WIDTH
        current: dict[str, list[float]] = {}
        for process in processes[:_MAX_PROCESSES]:
            values = current[process.name] = counted_by(process)
            before = self._last.get(process.name)
            if before is None and process.content.started >= started_lately:
                before = [0.0] * WIDTH
            if before is not None:
                for place, (value, earlier) in enumerate(zip(values, before, strict=True)):
                    growth[place] += max(0.0, value - earlier)
        # A report that is missing for once, because the store did not reply, would count from 0 when it is back.
        kept = {name: values for name, values in self._last.items() if name not in current}
        self._last = dict([*current.items(), *kept.items()][:_MAX_PROCESSES])
        self._read_at = now
        return growth


class History:
    """Samples of the last hour, each of STEP seconds, and of the last day, each of a minute."""

    def __init__(self) -> None:
        self._samples = array("d", bytes(8 * WIDTH * SAMPLES))
        self._minutes = array("d", bytes(8 * len(_COUNTERS) * MINUTES))
        self._minute = [0.0] * len(_COUNTERS)  # the one that is not full yet
        self._taken = 0
        self.ends = 0.0
        """POSIX seconds of the last sample."""

    def add(self, growth: Sequence[float], now: float) -> None:
        """Add the sample that ends now."""
        place = self._taken % SAMPLES * WIDTH
        self._samples[place : place + WIDTH] = array("d", growth)
        self._minute = [known + more for known, more in zip(self._minute, growth, strict=False)]
        self._taken += 1
        self.ends = now
        if self._taken % _STEPS_OF_MINUTE == 0:
            place = (self._taken // _STEPS_OF_MINUTE - 1) % MINUTES * len(_COUNTERS)
            self._minutes[place : place + len(_COUNTERS)] = array("d", self._minute)
            self._minute = [0.0] * len(_COUNTERS)

    def totals(self) -> dict[str, dict[str, float]]:
        """The sums of the last minute, hour and day, and how many seconds of them were seen."""
        day = list(self._minute)
        for place in range(0, len(self._minutes), len(_COUNTERS)):
            for column in range(len(_COUNTERS)):
                day[column] += self._minutes[place + column]
        minute = [sum(column) for column in zip(*self._rows(_STEPS_OF_MINUTE), strict=True)]
        hour = [sum(column) for column in zip(*self._rows(SAMPLES), strict=True)]
        return {
            "minute": self._total(minute, _STEPS_OF_MINUTE),
            "hour": self._total(hour, SAMPLES),
            "day": self._total(day, MINUTES * _STEPS_OF_MINUTE),
        }

    def _total(self, sums: Sequence[float], steps: int) -> dict[str, float]:
        named = dict(zip(_COUNTERS, sums, strict=False)) or dict.fromkeys(_COUNTERS, 0.0)
        return {"seconds": min(self._taken, steps) * STEP, **named}

    def _rows(self, at_most: int) -> list[array[float]]:
        """The last samples, the oldest first."""
        first = max(0, self._taken - min(at_most, SAMPLES))
        places = (number % SAMPLES * WIDTH for number in range(first, self._taken))
        return [self._samples[place : place + WIDTH] for place in places]

    def as_json(self) -> dict[str, Any]:
        """The last hour in columns, the oldest sample first. `p50`, `p95`: seconds to the first byte, or None."""
        rows = self._rows(SAMPLES)
        columns: dict[str, list[float | None]] = {
            name: [round(row[column]) for row in rows] for column, name in enumerate(_COUNTERS)
        }
        buckets = [row[len(_COUNTERS) :] for row in rows]
        for name, share in (("p50", 0.5), ("p95", 0.95)):
            columns[name] = [quantile(counts, share) for counts in buckets]
        return {"step": STEP, "samples": SAMPLES, "ends": round(self.ends, 3), **columns}


def quantile(counts: Sequence[float], share: float) -> float | None:
    """The quantile of observations in buckets, interpolated within its bucket, in seconds. None without observations.

    In the last bucket, which has no upper bound: its lower one.
    """
    total = sum(counts)
    if total <= 0:
        return None
    wanted, seen = share * total, 0.0
    for place, count in enumerate(counts[:-1]):
        if count and seen + count >= wanted:
            lower = FIRST_BYTE_BOUNDS[place - 1] if place else 0.0
            return round(lower + (FIRST_BYTE_BOUNDS[place] - lower) * (wanted - seen) / count, 5)
        seen += count
    return FIRST_BYTE_BOUNDS[-1]
