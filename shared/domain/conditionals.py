"""Conditional requests on GET and HEAD (RFC 9110 section 13), for an object with one strong entity tag."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum, auto

# RFC 9110 section 8.8.3; obs-text arrives as any character above DEL.
_ENTITY_TAG = re.compile(r'(?P<weak>W/)?(?P<opaque>"[^\x00-\x20"\x7f]*")')
_SEPARATOR = re.compile(r"[ \t]*(?:,[ \t]*)*")
_ANY = "*"


class Verdict(Enum):
    """What the preconditions say of a request."""

    PROCEED = auto()
    NOT_MODIFIED = auto()
    PRECONDITION_FAILED = auto()


@dataclass(frozen=True, slots=True)
class Conditions:
    """A request's header values; several lines of one name joined with commas, None where there is none."""

    if_match: str | None = None
    if_unmodified_since: str | None = None
    if_none_match: str | None = None
    if_modified_since: str | None = None


@dataclass(frozen=True, slots=True)
class EntityTag:
    """An entity tag of a request; `opaque` has its quotes."""

    opaque: str
    weak: bool


def evaluate(conditions: Conditions, etag: str, last_modified: int | None) -> Verdict:
    """Decide in the order of RFC 9110 section 13.2.2, for an object that exists.

    `etag` is strong and has its quotes; `last_modified` is in POSIX seconds, None if unknown (dates are then ignored).
    A malformed value decides nothing, yet still hides the date that it takes precedence over.
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


def range_applies(if_range: str | None, etag: str, last_modified: int | None) -> bool:
    """True if a Range header is to be honoured (RFC 9110 section 13.1.5): there is no If-Range, or it names this very
    content by a strong entity tag or by its exact date. Otherwise the whole object is the answer."""
    if if_range is None:
        return True
    value = if_range.strip(" \t")
    tag = _ENTITY_TAG.fullmatch(value)
    if tag is not None:
        return tag["weak"] is None and tag["opaque"] == etag
    return last_modified is not None and parse_http_date(value) == last_modified


def parse_entity_tags(header: str) -> tuple[EntityTag, ...] | None:
    """A list of entity tags (they may contain commas); None if it is malformed or empty."""
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


def _matches(header: str, etag: str, *, strong: bool) -> bool | None:
    """None: malformed."""
    if header.strip(" \t") == _ANY:
        return True
    tags = parse_entity_tags(header)
    if tags is None:
        return None
    return any(tag.opaque == etag and not (strong and tag.weak) for tag in tags)


def _unchanged_since(header: str | None, last_modified: int | None) -> bool | None:
    """None: no date, or nothing to compare it with."""
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


def parse_http_date(text: str) -> int | None:
    """POSIX seconds of an HTTP date, None if it is none. The name of the day is not compared with the date."""
    for date_format in _FORMATS:
        match = date_format.fullmatch(text.strip(" \t"))
        if match is not None:
            return _to_posix(match)
    return None


def _to_posix(match: re.Match[str]) -> int | None:
    year, second = int(match["year"]), int(match["second"])
    if len(match["year"]) == 2:
        # Never more than 50 years ahead, as the RFC demands, in any year from 2019 on; needs no clock.
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
    return (moment - _EPOCH) // timedelta(seconds=1) + second
