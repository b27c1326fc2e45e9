"""How the bytes of objects are counted against the storage limit."""

from __future__ import annotations

from dataclasses import dataclass, field

RECORD_BYTES = 1024
"""Counted for each object's record on the volume; the volume refuses to write a longer one."""


def footprint(size: int) -> int:
    """Bytes that an object of `size` bytes takes on the volume, its record included."""
    return size + RECORD_BYTES


@dataclass(frozen=True, slots=True)
class Usage:
    """Space in bytes. `used`: complete objects (those being evicted too). `reserved`: promised to fetches, partial
    files included. `used + reserved <= limit`, always. `reconciled` is False while the index does not stand for what is
    on the volume (an empty or restarted state store, before the evictor has reconciled): no bytes can be reserved.
    `churn`: all that has ever been added to `used` and taken from it, so that two looks tell how much moved."""

    limit: int
    used: int
    reserved: int
    objects: int
    fetches: int
    reconciled: bool
    churn: int = field(default=0, compare=False)

    @property
    def free(self) -> int:
        return self.limit - self.used - self.reserved


@dataclass(frozen=True, slots=True)
class Watermarks:
    """The evictor starts above `high` bytes and evicts down to `low`."""

    low: int
    high: int

    def to_evict(self, usage: Usage, wanted: int, device_free: int) -> int:
        """Bytes to evict now: down to the low mark if above the high one, and in any case room for what is wanted."""
        taken = usage.used + usage.reserved
        for_marks = taken - self.low if taken > self.high else 0
        return max(0, for_marks, missing_for(usage, wanted, device_free))


def missing_for(usage: Usage, wanted: int, device_free: int) -> int:
    """Bytes that have to go before what is wanted fits, below the limit and on the device: its free bytes may be fewer
    than the limit says."""
    return max(0, wanted - min(usage.free, device_free))


_TYPICAL_HEADROOM = 8 * 64 * 1024**2
"""Eight objects of 64 MiB under way at once: what fetchers reserve while the evictor is looking elsewhere."""


def watermarks_for(
    limit: int, largest: int | None = None, high_share: float | None = None, low_share: float | None = None
) -> Watermarks:
    """Watermarks by their shares of the limit; where there is none, derived from the limit and the `largest` object
    that is cached (bytes; None: any that fits).

    Above the high mark there is room for `largest`, so that no worker waits for it, but at least 2 % and at most 10 %
    of the limit; the low mark is half of that room below the high one. A mark that is given moves the other along.
    """
    room = min(max(largest or 0, _TYPICAL_HEADROOM, limit // 50), limit // 10)
    high = limit - room if high_share is None else int(limit * high_share)
    low = max(0, high - room // 2) if low_share is None else int(limit * low_share)
    if high_share is None:
        high = max(high, low)
    return Watermarks(low=low, high=high)
