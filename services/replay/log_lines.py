"""One line of an access log, in any of the formats that are known.

- ours: JSON with event `request_answered`;
- Caddy's JSON;
- the common and combined formats of nginx and others, `… [time] "GET /…/assets/<id> HTTP/1.1" status bytes …`;
- CSV, `time,id,size[,sent]`, a header line or not; times in POSIX seconds or ISO 8601.

Only answers to GET for objects count (200, 206, 304); other lines are passed over, which is not the same as unreadable.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

from shared.domain.errors import InvalidInput
from shared.domain.objects import ObjectId
from shared.domain.ranges import parse_content_range

_COMMON = re.compile(
    r'\S+ \S+ .*?\[(?P<time>[^\]]{1,40})\] "(?P<method>[A-Z]{1,10}) (?P<path>\S+)[^"]*"'
    r" (?P<status>\d{3}) (?P<bytes>\d+|-)"
)
_ASSET = re.compile(r"/assets/(?P<id>[^/?#]+)(?:[?#]|\Z)")
_CONTENT_STATUSES = frozenset({200, 206, 304})
_MAX_BYTES = 2**63 - 1
"""More than any disk has; a recording's columns hold no more."""


class Unreadable(Exception):
    """A line in no known format."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """An answer with (a part of) an object.

    `at`: POSIX seconds of the request, where the log gives its duration, else of the answer; `sent`: bytes of the body;
    `size`: bytes of the object, if the line says so; `whole`: `sent` is all of it, as far as the log knows;
    `cache`: hit, pending or miss, if it was logged; `not_modified`: the answer was a 304.
    """

    at: float
    object_id: ObjectId
    sent: int
    size: int | None = None
    whole: bool = False
    cache: str | None = None
    not_modified: bool = False


def parse_line(line: str) -> LogLine | None:
    """None for a line that is about something else. Raises Unreadable."""
    line = line.strip()
    if not line:
        return None
    try:
        parsed = _from_text(line)
    except InvalidInput:
        return None  # whoever asked for that was told 400
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise Unreadable(line[:80]) from error
    if parsed is not None and not (is_size(parsed.sent) and (parsed.size is None or is_size(parsed.size))):
        raise Unreadable(line[:80])
    return parsed


def is_size(count: int) -> bool:
    """Bytes that an object or an answer can have."""
    return 0 <= count <= _MAX_BYTES


def _from_text(line: str) -> LogLine | None:
    if line.startswith("{"):
        return _from_json(json.loads(line))
    common = _COMMON.match(line)
    return _from_csv(line) if common is None else _from_common(common)


def _from_json(fields: Mapping[str, Any]) -> LogLine | None:
    if "request" in fields and "ts" in fields:
        return _from_caddy(fields)
    if fields.get("event") != "request_answered":
        return None
    object_id, status = fields.get("object_id"), int(fields["status"])
    if object_id is None or fields["method"] != "GET" or status not in _CONTENT_STATUSES:
        return None
    sent, size = int(fields["bytes"]), fields.get("size")
    return LogLine(
        at=_seconds(fields["timestamp"]) - float(fields.get("duration_ms", 0)) / 1000,
        object_id=ObjectId.parse(object_id),
        sent=sent,
        size=None if size is None else int(size),
        whole=status == 200 and not fields.get("cut"),
        cache=fields.get("x_cache"),
        not_modified=status == 304,
    )


def _from_caddy(fields: Mapping[str, Any]) -> LogLine | None:
    request, status = fields["request"], int(fields["status"])
    object_id = _object_in(request["uri"])
    if object_id is None or request["method"] != "GET" or status not in _CONTENT_STATUSES:
        return None
    headers = {name.lower(): str(values[0]) for name, values in (fields.get("resp_headers") or {}).items()}
    duration, sent = fields.get("duration", 0), int(fields["size"])
    size = None
    if status == 206:
        given = parse_content_range(headers.get("content-range", ""))
        size = None if given is None else given[1]
    elif status == 200 and "content-length" in headers:
        size = int(headers["content-length"])
    return LogLine(
        at=_seconds(fields["ts"]) - (float(duration) if isinstance(duration, int | float) else 0.0),
        object_id=object_id,
        sent=sent,
        size=size,
        whole=status == 200,
        cache=headers.get("x-cache"),
        not_modified=status == 304,
    )


def _from_common(fields: re.Match[str]) -> LogLine | None:
    object_id, status = _object_in(fields["path"]), int(fields["status"])
    if object_id is None or fields["method"] != "GET" or status not in _CONTENT_STATUSES:
        return None
    at = datetime.strptime(fields["time"], "%d/%b/%Y:%H:%M:%S %z").timestamp()
    sent = 0 if fields["bytes"] == "-" else int(fields["bytes"])
    return LogLine(at, object_id, sent, whole=status == 200, not_modified=status == 304)


def _from_csv(line: str) -> LogLine | None:
    time, object_id, size, *more = (field.strip().strip('"') for field in line.split(","))
    if (time, object_id) == ("time", "id"):
        return None
    whole = int(size)
    return LogLine(_seconds(time), ObjectId.parse(object_id), int(more[0]) if more else whole, size=whole)


def _object_in(path: str) -> ObjectId | None:
    found = _ASSET.search(path)
    return None if found is None else ObjectId.parse(unquote(found["id"]))


def _seconds(time: object) -> float:
    """POSIX seconds of a number or an ISO 8601 time (without a zone: UTC)."""
    try:
        seconds = float(time)  # type: ignore[arg-type]
    except ValueError:
        moment = datetime.fromisoformat(str(time))
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(seconds):
        raise ValueError("no time")
    return seconds
