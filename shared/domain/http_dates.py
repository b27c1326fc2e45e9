"""HTTP dates: the three formats a recipient must read (RFC 9110 section 5.6.7)."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

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
