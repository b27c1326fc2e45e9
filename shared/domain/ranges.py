"""Byte ranges: the value, and the Range header's meaning for an object of known size (RFC 9110 section 14)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from distributor_node.shared.domain.errors import InvalidInput

_MAX_HEADER = 4096
_MAX_DIGITS = 40  # larger than any size; a longer number is an attack on the parser, not a position
_RANGE_SPEC = re.compile(rf"([0-9]{{0,{_MAX_DIGITS}}})-([0-9]{{0,{_MAX_DIGITS}}})", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Positions `first` to `last`, both included, counted from 0 (RFC 9110 section 14.1.2)."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise InvalidInput(f"no byte range: {self.first}-{self.last}")

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
    """A well-formed range that holds no byte of an object of `size` bytes."""

    size: int

    @property
    def content_range(self) -> str:
        """The value of the Content-Range header that tells the client the size (RFC 9110 section 14.4)."""
        return f"bytes */{self.size}"


def parse_range(header: str | None, size: int) -> ByteRange | Unsatisfiable | None:
    """What a Range header asks of an object of `size` bytes; None: the whole object.

    None for no header, one that is not well-formed, another unit than bytes, and several ranges at once: RFC 9110
    section 14.2 lets a server ignore them. An end beyond the object is clamped; a suffix longer than the object is all
    of it. An empty object has no range to answer with: a suffix of it is the whole (empty) object.
    """
    if header is None or len(header) > _MAX_HEADER:
        return None
    unit, equals, ranges = header.partition("=")
    if not equals or unit.lower() != "bytes":
        return None
    # Empty list elements are passed over (RFC 9110 section 5.6.1.2).
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
    """A 206 answer's Content-Range: the range and the whole size (None for `*`); None if it is not well-formed."""
    match = _CONTENT_RANGE.fullmatch(header.strip(" \t"))
    if match is None:
        return None
    first, last = int(match.group(1)), int(match.group(2))
    total = None if match.group(3) == "*" else int(match.group(3))
    if last < first or (total is not None and last >= total):
        return None
    return ByteRange(first, last), total
