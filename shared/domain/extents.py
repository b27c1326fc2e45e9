"""Extents: which bytes of an object are there, as ranges that neither overlap nor touch.

The record of a partial file names them in blocks. A block counts only if all of it is there: what the record does not
name is fetched again.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from distributor_node.shared.domain.errors import InvalidInput

BLOCK = 4096
"""Bytes of a block. An extent that begins and ends at multiples of it is named exactly."""

MAX_EXTENTS = 64
"""Extents that a record names at most."""

_TEXT = re.compile(r"[0-9a-f]{1,12}-[0-9a-f]{1,12}(?:,[0-9a-f]{1,12}-[0-9a-f]{1,12})*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes `first` to `end` (exclusive)."""

    first: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, slots=True)
class Extents:
    """In order; between two of them at least one byte is missing."""

    extents: tuple[Extent, ...] = ()

    @classmethod
    def of(cls, *ranges: tuple[int, int]) -> Extents:
        """Return the union of ranges (first, end), `end` exclusive, in any order. Empty ones do not count."""
        merged: list[Extent] = []
        for first, end in sorted(ranges):
            if first >= end:
                continue
            if merged and first <= merged[-1].end:
                merged[-1] = Extent(merged[-1].first, max(end, merged[-1].end))
            else:
                merged.append(Extent(first, end))
        return cls(tuple(merged))

    def __iter__(self) -> Iterator[Extent]:
        return iter(self.extents)

    def __len__(self) -> int:
        return len(self.extents)

    def adding(self, first: int, end: int) -> Extents:
        """Return these extents and the bytes `first` to `end` (exclusive)."""
        return Extents.of(*((known.first, known.end) for known in self.extents), (first, end))

    @property
    def total(self) -> int:
        """Bytes that are there."""
        return sum(extent.length for extent in self.extents)

    @property
    def prefix(self) -> int:
        """Bytes that are there from the first one on, without a gap."""
        return self.end_at(0)

    def end_at(self, position: int) -> int:
        """Return the end (exclusive) of the bytes from `position` on that are there. `position` itself: none are."""
        found = self._at_or_before(position)
        return position if found is None else max(position, found.end)

    def nearest_end(self, position: int) -> int:
        """Return the end (exclusive) of the last extent that begins at or before `position`. 0: there is none."""
        found = self._at_or_before(position)
        return 0 if found is None else found.end

    def contains(self, first: int, end: int) -> bool:
        """Whether all bytes from `first` to `end` (exclusive) are there."""
        return self.end_at(first) >= end

    def gap_at(self, position: int, size: int) -> Extent | None:
        """Return the nearest missing bytes at or after `position` of an object of `size` bytes. None: there are none.

        If `position` itself is missing, the gap begins there.
        """
        first = self.end_at(position)
        if first >= size:
            return None
        index = bisect_right(self.extents, first, key=lambda extent: extent.first)
        end = self.extents[index].first if index < len(self.extents) else size
        return Extent(first, min(end, size))

    def gaps(self, size: int) -> Iterator[Extent]:
        """All that is missing of an object of `size` bytes."""
        position = 0
        while (gap := self.gap_at(position, size)) is not None:
            yield gap
            position = gap.end

    def _at_or_before(self, position: int) -> Extent | None:
        index = bisect_right(self.extents, position, key=lambda extent: extent.first)
        return self.extents[index - 1] if index else None

    # The record

    def in_blocks(self, size: int, at_most: int = MAX_EXTENTS) -> Extents:
        """Return what a record can name of these extents, of an object of `size` bytes.

        Whole blocks; of more than `at_most` extents the first one and the longest.
        """
        rounded = (
            (-(-extent.first // BLOCK) * BLOCK, size if extent.end >= size else extent.end // BLOCK * BLOCK)
            for extent in self.extents
        )
        found = Extents.of(*rounded)
        if len(found) <= at_most:
            return found
        ranked = sorted(found.extents, key=lambda extent: (extent.first > 0, -extent.length))
        return Extents.of(*((extent.first, extent.end) for extent in ranked[:at_most]))

    def encode(self) -> str:
        """Return the blocks as text: `0-1f,2a-30`, hexadecimal, without the last one. Needs `in_blocks`."""
        return ",".join(f"{extent.first // BLOCK:x}-{-(-extent.end // BLOCK):x}" for extent in self.extents)

    @classmethod
    def decode(cls, text: str, size: int) -> Extents:
        """Read what `encode` wrote for an object of `size` bytes. Raises InvalidInput for anything else."""
        if not text:
            return cls()
        if len(text) > MAX_EXTENTS * 26 or not _TEXT.fullmatch(text):
            raise InvalidInput(f"extents: expected first-end,first-end…, got {text[:40]!r}")
        blocks = [tuple(int(number, 16) for number in pair.split("-")) for pair in text.split(",")]
        if len(blocks) > MAX_EXTENTS:
            raise InvalidInput(f"extents: expected at most {MAX_EXTENTS}, got {len(blocks)}")
        last = -(-size // BLOCK)
        before = -1
        for first, end in blocks:
            if not before < first < end <= last:
                raise InvalidInput(
                    f"extents: expected them in order and below block {last}, got {first:x}-{end:x}"
                )
            before = end
        return cls.of(*((first * BLOCK, min(end * BLOCK, size)) for first, end in blocks))
