"""Byte ranges, and the Range and Content-Range headers (RFC 9110 section 14)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from distributor_node.shared.domain.errors import InvalidInput

_MAX_HEADER = 4096
_MAX_DIGITS = 40  # more than any size has; a longer number is an attack on the parser
_RANGE_SPEC = re.compile(rf"([0-9]{{0,{_MAX_DIGITS}}})-([0-9]{{0,{_MAX_DIGITS}}})", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Positions `first` to `last`, inclusive, counted from 0 (RFC 9110 section 14.1.2)."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise InvalidInput(f"byte range: expected 0 <= first <= last, got {self.first}-{self.last}")

    @property
    def length(self) -> int:
        """Bytes in the range, at least 1."""
        return self.last - self.first + 1

    def __str__(self) -> str:
        """The value of a Range header, `bytes=0-499`."""
        return f"bytes={self.first}-{self.last}"

    def content_range(self, size: int) -> str:
        """The value of a Content-Range header for an object of `size` bytes, `bytes 0-499/1234`."""
        return f"bytes {self.first}-{self.last}/{size}"


@dataclass(frozen=True, slots=True)
class Unsatisfiable:
    """A valid range without any byte of an object of `size` bytes."""

    size: int

    @property
    def content_range(self) -> str:
        """The value of the Content-Range header that tells the client the size (RFC 9110 section 14.4)."""
        return f"bytes */{self.size}"


def parse_range(header: str | None, size: int) -> ByteRange | Unsatisfiable | None:
    """Return the range that a Range header requests of an object of `size` bytes. None: the whole object.

    A missing or malformed header, another unit than bytes, and several ranges request the whole object: RFC 9110
    section 14.2 allows a server to ignore them. An end beyond the object is clamped. A suffix longer than the object is
    the whole object, and so is a suffix of an empty object.
    """
    if header is None or len(header) > _MAX_HEADER:
        return None
    unit, equals, ranges = header.partition("=")
    if not equals or unit.lower() != "bytes":
        return None
    # Empty list elements are ignored (RFC 9110 section 5.6.1.2).
    specs = [spec for spec in (part.strip(" \t") for part in ranges.split(",")) if spec]
    match = _RANGE_SPEC.fullmatch(specs[0]) if len(specs) == 1 else None
    if match is None:
        return None
    return _resolve(match.group(1), match.group(2), size)


def _resolve(first_text: str, last_text: str, size: int) -> ByteRange | Unsatisfiable | None:
    if not first_text:
        if not last_text:
            return None
        suffix = int(last_text)
        if suffix == 0:
            return Unsatisfiable(size)
        return ByteRange(max(0, size - suffix), size - 1) if size else None
    first = int(first_text)
    if last_text and int(last_text) < first:
        return None
    if first >= size:
        return Unsatisfiable(size)
    return ByteRange(first, min(int(last_text), size - 1) if last_text else size - 1)


def parse_content_range(header: str) -> tuple[ByteRange, int | None] | None:
    """Parse the Content-Range of a 206: the range and the size (None for `*`). Returns None if it is malformed."""
    match = _CONTENT_RANGE.fullmatch(header.strip(" \t"))
    if match is None:
        return None
    first, last = int(match.group(1)), int(match.group(2))
    total = None if match.group(3) == "*" else int(match.group(3))
    if last < first or (total is not None and last >= total):
        return None
    return ByteRange(first, last), total
