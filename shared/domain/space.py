"""How the bytes of objects are counted against the storage limit."""

from __future__ import annotations

from dataclasses import dataclass

RECORD_BYTES = 1024
"""Counted for each object's record on the volume; the volume refuses to write a longer one."""


def footprint(size: int) -> int:
    """Bytes that an object of `size` bytes takes on the volume, its record included."""
    return size + RECORD_BYTES


@dataclass(frozen=True, slots=True)
class Usage:
    """Space in bytes. `used`: complete objects (those being evicted too). `reserved`: promised to fetches, partial
    files included. `used + reserved <= limit`, always. `accounted` is False while the index does not stand for what is
    on the volume (an empty or restarted state store, before the evictor has reconciled): no bytes can be reserved."""

    limit: int
    used: int
    reserved: int
    objects: int
    fetches: int
    accounted: bool

    @property
    def free(self) -> int:
        return self.limit - self.used - self.reserved


@dataclass(frozen=True, slots=True)
class Watermarks:
    """The evictor starts above `high` bytes and evicts down to `low`."""

    low: int
    high: int

    def to_evict(self, usage: Usage, wanted: int) -> int:
        """Bytes to evict now: down to the low mark if above the high one, and in any case room for what is wanted."""
        taken = usage.used + usage.reserved
        for_marks = taken - self.low if taken > self.high else 0
        for_wanted = max(0, wanted - usage.free)
        return max(0, for_marks, for_wanted)
