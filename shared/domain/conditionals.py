"""Validators and versions of objects, conditional requests (RFC 9110 section 13), byte ranges (section 14)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from typing import TYPE_CHECKING

from distributor_node.shared.domain.errors import InvalidInput

if TYPE_CHECKING:
    from distributor_node.shared.domain.objects import ContentHash

# RFC 9110 section 8.8.3; obs-text arrives as any character above DEL.
_ENTITY_TAG = re.compile(r'(?P<weak>W/)?(?P<opaque>"[^\x00-\x20"\x7f]*")')
_SEPARATOR = re.compile(r"[ \t]*(?:,[ \t]*)*")
_ANY = "*"


class Verdict(Enum):
    """The result of a request's preconditions."""

    PROCEED = auto()
    NOT_MODIFIED = auto()
    PRECONDITION_FAILED = auto()


@dataclass(frozen=True, slots=True)
class Conditions:
    """A request's precondition headers. Several lines of one name are joined with commas. None: no such header."""

    if_match: str | None = None
    if_unmodified_since: str | None = None
    if_none_match: str | None = None
    if_modified_since: str | None = None


@dataclass(frozen=True, slots=True)
class EntityTag:
    """An entity tag of a request."""

    opaque: str  # with its quotes
    weak: bool


def evaluate(conditions: Conditions, etag: str | None, last_modified: int | None) -> Verdict:
    """Evaluate the preconditions in the order of RFC 9110 section 13.2.2, for an object that exists.

    `etag`: with its quotes, and `W/` before a weak one; None: there is none. `last_modified`: POSIX seconds; None:
    unknown, and dates are ignored. A malformed header has no effect, except that the date it takes precedence over is
    still ignored.
    """
    if conditions.if_match is not None:
        holds = _matches(conditions.if_match, etag, strong=True)
    else:
        holds = _unchanged_since(conditions.if_unmodified_since, last_modified)
    if holds is False:
        return Verdict.PRECONDITION_FAILED
    if conditions.if_none_match is not None:
        known = _matches(conditions.if_none_match, etag, strong=False)
    else:
        known = _unchanged_since(conditions.if_modified_since, last_modified)
    return Verdict.NOT_MODIFIED if known is True else Verdict.PROCEED


def range_applies(
    if_range: str | None, etag: str | None, last_modified: int | None, *, immutable: bool = True
) -> bool:
    """Whether to honour the Range header (RFC 9110 section 13.1.5). If not, the response is the whole object.

    It is honoured without If-Range, and if If-Range has the object's strong entity tag. If the object is `immutable`,
    also if it has the exact date: other objects may change twice within a second.
    """
    if if_range is None:
        return True
    value = if_range.strip(" \t")
    tag = _ENTITY_TAG.fullmatch(value)
    if tag is not None:
        return tag["weak"] is None and value == etag
    return immutable and last_modified is not None and parse_http_date(value) == last_modified


def parse_entity_tags(header: str) -> tuple[EntityTag, ...] | None:
    """Parse a list of entity tags, which may contain commas. None: it is malformed or empty."""
    tags: list[EntityTag] = []
    position = _end_of(_SEPARATOR, header, 0)
    while position < len(header):
        match = _ENTITY_TAG.match(header, position)
        if match is None:
            return None
        tags.append(EntityTag(match["opaque"], weak=match["weak"] is not None))
        position = _end_of(_SEPARATOR, header, match.end())
        if position < len(header) and "," not in header[match.end() : position]:
            return None
    return tuple(tags) or None


def _matches(header: str, etag: str | None, *, strong: bool) -> bool | None:
    """Whether the list has the entity tag. None: it is malformed."""
    if header.strip(" \t") == _ANY:
        return True
    tags = parse_entity_tags(header)
    if tags is None:
        return None
    if etag is None:
        return False
    opaque = etag.removeprefix("W/")
    return any(tag.opaque == opaque and not (strong and (tag.weak or opaque != etag)) for tag in tags)


def _unchanged_since(header: str | None, last_modified: int | None) -> bool | None:
    """Whether the object is as old as the date. None: there is no date, or nothing to compare it with."""
    date = parse_http_date(header) if header is not None else None
    return None if date is None or last_modified is None else last_modified <= date


def _end_of(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


# HTTP dates: the three formats a recipient must read (RFC 9110 section 5.6.7).

_MONTHS = {
    name: number
    for number, name in enumerate(
        ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"), start=1
    )
}
_MONTH = "|".join(_MONTHS)
_SHORT_DAY = "(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_LONG_DAY = "(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"
_TIME = r"(?P<hour>\d\d):(?P<minute>\d\d):(?P<second>\d\d)"
_FORMATS = tuple(
    re.compile(pattern, re.ASCII)
    for pattern in (
        rf"{_SHORT_DAY}, (?P<day>\d\d) (?P<month>{_MONTH}) (?P<year>\d{{4}}) {_TIME} GMT",
        rf"{_LONG_DAY}, (?P<day>\d\d)-(?P<month>{_MONTH})-(?P<year>\d\d) {_TIME} GMT",
        rf"{_SHORT_DAY} (?P<month>{_MONTH}) (?P<day>[ \d]\d) {_TIME} (?P<year>\d{{4}})",
    )
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_DATE, _LAST_DATE = -62_135_596_800, 253_402_300_799  # the years 1 to 9999


def is_http_date(seconds: object) -> bool:
    """Whether the POSIX seconds can be written as an HTTP date, whose year has four digits."""
    return type(seconds) is int and _FIRST_DATE <= seconds <= _LAST_DATE


def parse_http_date(text: str) -> int | None:
    """Return the POSIX seconds of an HTTP date. None: it is malformed. The name of the day is not checked."""
    for date_format in _FORMATS:
        match = date_format.fullmatch(text.strip(" \t"))
        if match is not None:
            return _to_posix(match)
    return None


def _to_posix(match: re.Match[str]) -> int | None:
    year, second = int(match["year"]), int(match["second"])
    if len(match["year"]) == 2:
        # At most 50 years in the future, as the RFC requires, in every year from 2019 on. This needs no clock.
        year += 2000 if year < 70 else 1900
    if second > 60:
        return None
    try:
        moment = datetime(
            year,
            _MONTHS[match["month"]],
            int(match["day"]),
            int(match["hour"]),
            int(match["minute"]),
            tzinfo=UTC,
        )
    except ValueError:
        return None
    # Second 60 is a leap second, which POSIX time counts as the next one.
    seconds = (moment - _EPOCH) // timedelta(seconds=1) + second
    return seconds if is_http_date(seconds) else None


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


_MAX_ETAG = 256  # characters; it is part of a record of limited size
_ETAG = re.compile(r'(?:W/)?"[!#-~]*"', re.ASCII)
_WEAK = "W/"


@dataclass(frozen=True, slots=True)
class Validators:
    """What a source says to tell one content of an object from another."""

    etag: str | None = None  # with its quotes, and `W/` before a weak one
    last_modified: int | None = None  # POSIX seconds

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> Validators:
        """Read ETag and Last-Modified. A malformed one counts as missing. Names are case-insensitive."""
        return cls(etag_or_none(headers.get("ETag")), _date_or_none(headers.get("Last-Modified")))

    @property
    def strong_etag(self) -> str | None:
        """The entity tag, if equal tags mean equal bytes."""
        return None if self.etag is None or self.etag.startswith(_WEAK) else self.etag


NO_VALIDATORS = Validators()


def etag_or_none(text: str | None) -> str | None:
    """Return an entity tag (RFC 9110 section 8.8.3). None: there is none, or it cannot be passed on."""
    trimmed = (text or "").strip(" \t")
    return trimmed if len(trimmed) <= _MAX_ETAG and _ETAG.fullmatch(trimmed) else None


def _date_or_none(text: str | None) -> int | None:
    return None if text is None else parse_http_date(text)


class Comparison(Enum):
    """Whether two descriptions are of the same bytes."""

    SAME = auto()
    DIFFERENT = auto()
    UNKNOWN = auto()  # nothing contradicts it, and nothing proves it


@dataclass(frozen=True, slots=True)
class Version:
    """All that is known of one content of an object: its hash, or else what its source says, and its size."""

    content_hash: ContentHash | None = None
    validators: Validators = NO_VALIDATORS
    size: int | None = None

    @property
    def is_strong(self) -> bool:
        """Whether bytes of another response can be proved to be of this version."""
        return self.content_hash is not None or self.validators.strong_etag is not None

    @property
    def if_range(self) -> str | None:
        """The value of If-Range in a request for a range of this version. None: the source knows no strong validator.

        With a content hash there is none either: each source may have a tag of its own, and the hash is checked.
        """
        return None if self.content_hash is not None else self.validators.strong_etag

    def compare(self, other: Version) -> Comparison:
        """Compare two versions of one object. Unknown parts prove nothing."""
        if None not in (self.size, other.size) and self.size != other.size:
            return Comparison.DIFFERENT
        if self.content_hash is not None and other.content_hash is not None:
            return Comparison.SAME if self.content_hash == other.content_hash else Comparison.DIFFERENT
        mine, theirs = self.validators, other.validators
        if mine.etag is not None and theirs.etag is not None:
            if mine.etag.removeprefix(_WEAK) != theirs.etag.removeprefix(_WEAK):
                return Comparison.DIFFERENT
            if mine.strong_etag is not None and theirs.strong_etag is not None:
                return Comparison.SAME
        dates = (mine.last_modified, theirs.last_modified)
        return Comparison.DIFFERENT if None not in dates and dates[0] != dates[1] else Comparison.UNKNOWN

    def is_joinable_with(self, other: Version) -> bool:
        """Whether bytes of the other response may follow bytes of this version."""
        return self.content_hash is not None or self.compare(other) is Comparison.SAME


UNKNOWN_VERSION = Version()
