"""Reads access logs and public traces, plain or compressed, into a recording of requests.

The file has two parts: reading files, and parsing one line in any of the known formats.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import yaml

from distributor_node.services.replay.recording import MAX_BYTES, LogLine, Recording
from distributor_node.shared.domain.conditionals import parse_content_range
from distributor_node.shared.domain.errors import ConfigurationError, InvalidInput
from distributor_node.shared.domain.objects import ObjectId

_MAX_LINE = 64 * 1024  # bytes
_REPORT_INTERVAL = 1000  # lines between two reports of the progress
_SAMPLE_STEPS = 2**32


@dataclass(slots=True)
class LinesRead:
    """Numbers of lines."""

    counted: int = 0
    other: int = 0  # readable, but not a response with an object
    unreadable: int = 0
    not_sampled: int = 0
    elsewhere: int = 0  # of the others: responses at paths that name no object
    first_elsewhere: str = ""  # file, line, and what was expected
    first_unreadable: str = ""  # file, line, and what was expected

    @property
    def total(self) -> int:
        return self.counted + self.other + self.unreadable + self.not_sampled


def read_logs(
    paths: Iterable[Path],
    recording: Recording,
    sample: float,
    progress: Callable[[int], None],
    prefix: str | None = None,
) -> LinesRead:
    """Read all files into the recording.

    `sample`: share of the objects to keep. A hash of the id decides, so that all requests for an object are kept or
    none. The cache must be smaller by the same share. `progress`: called with the bytes read since its last call.
    `prefix`: in front of the objects' paths, such as `/media/`; None: all up to `/assets/`.
    Raises ConfigurationError for a file that cannot be read, and for a damaged record of a binary trace.
    """
    counts, asset = LinesRead(), _ASSET if prefix is None else asset_under(prefix)
    for path in paths:
        with _opened(path) as (raw, content):
            before = 0
            records = (
                _oracle_records(path, content)
                if _ORACLE in path.name.lower()
                else _lines(path, content, asset)
            )
            for number, parsed in enumerate(records):
                if number % _REPORT_INTERVAL == 0:
                    progress(raw.tell() - before)
                    before = raw.tell()
                _add(parsed, recording, sample, counts)
            progress(raw.tell() - before)
    return counts


def _lines(
    path: Path, content: IO[bytes], asset: re.Pattern[str]
) -> Iterator[LogLine | Unreadable | Elsewhere | None]:
    """None: a line about something else. Lines that are not counted for their form say where they are."""
    columns: Columns | None = None
    for number, line in enumerate(iter(lambda: content.readline(_MAX_LINE), b""), 1):
        text = line.decode("utf-8", "replace")
        header = columns_of(text)
        if header is not None:
            columns = header
            yield None
            continue
        try:
            yield parse_line(text, columns, asset)
        except (Unreadable, Elsewhere) as error:
            yield type(error)(f"{path}: line {number}: {error}")


def _add(
    parsed: LogLine | Unreadable | Elsewhere | None, recording: Recording, sample: float, counts: LinesRead
) -> None:
    if parsed is None:
        counts.other += 1
    elif isinstance(parsed, Elsewhere):
        counts.other += 1
        counts.elsewhere += 1
        counts.first_elsewhere = counts.first_elsewhere or str(parsed)
    elif isinstance(parsed, Unreadable):
        counts.unreadable += 1
        counts.first_unreadable = counts.first_unreadable or str(parsed)
    elif not _sampled(parsed.object_id, sample):
        counts.not_sampled += 1
    else:
        counts.counted += 1
        recording.add(parsed)


def _sampled(object_id: ObjectId, sample: float) -> bool:
    if sample >= 1:
        return True
    digest = hashlib.blake2b(object_id.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < sample * _SAMPLE_STEPS


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a log: yields the file, for its position, and its content. Compression is recognised by the first bytes."""
    try:
        with path.open("rb") as raw:
            yield raw, _unpacked(path, raw)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from error


def _unpacked(path: Path, raw: io.BufferedReader) -> IO[bytes]:
    first = raw.peek(6)[:6]
    if first[:2] == b"\x1f\x8b":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if first[:3] == b"BZh":
        return bz2.BZ2File(raw)
    if first == b"\xfd7zXZ\x00":
        return lzma.LZMAFile(raw)
    if first[:4] == b"\x28\xb5\x2f\xfd":
        raise ConfigurationError(
            f"{path}: expected a plain, gzip, bzip2 or xz file, got zstd: unpack it first"
        )
    return raw


# libCacheSim's binary traces: time, id, size, and when the object is requested next, which is not needed

_ORACLE = "oraclegeneral"  # in the names of such files
_ORACLE_RECORD = struct.Struct("<IQIq")
_RECORDS_AT_ONCE = 4096
_NO_NEXT = -2  # or -1: it is not requested again


def _oracle_records(path: Path, content: IO[bytes]) -> Iterator[LogLine]:
    number = 0
    while block := content.read(_RECORDS_AT_ONCE * _ORACLE_RECORD.size):
        whole = len(block) // _ORACLE_RECORD.size * _ORACLE_RECORD.size
        for at, key, size, following in _ORACLE_RECORD.iter_unpack(block[:whole]):
            number += 1
            if following < _NO_NEXT:
                raise ConfigurationError(
                    f"{path}: record {number}: next_access_vtime: expected {_NO_NEXT} or more, got {following}:"
                    " not a trace in libCacheSim's oracleGeneral format?"
                )
            yield LogLine(float(at), ObjectId(str(key)), size, size=size)
        if whole < len(block):
            raise ConfigurationError(
                f"{path}: record {number + 1}: expected {_ORACLE_RECORD.size} bytes, got {len(block) - whole}"
            )


def read_sizes(path: Path) -> dict[str, int]:
    """Read sizes in bytes by object id from a manifest (YAML or JSON). Raises ConfigurationError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        sizes = {
            str(item["id"]): int(item["size"]) for item in document["objects"] if item.get("size") is not None
        }
        if any(not is_size(size) for size in sizes.values()):
            raise ValueError(f"size: expected 0 to {MAX_BYTES} bytes")
        return sizes
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from error
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigurationError(
            f"{path}: expected a manifest with a list `objects` of id and size"
        ) from error


# One line of an access log, in any of the known formats:
#
# - our own: JSON with event `request_answered`;
# - Caddy's JSON;
# - the common and combined formats of nginx and others, `… [time] "GET /…/assets/<id> HTTP/1.1" status bytes …`;
# - CSV, `time,id,size[,sent]`, or with other columns that a header line names, as libCacheSim has them;
# - `time id size`, as webcachesim has them, more columns are ignored;
# times in POSIX seconds or ISO 8601.
#
# Only responses to GET requests for objects count (200, 206, 304). Other readable lines are ignored.

_COMMON = re.compile(
    r'\S+ \S+ .*?\[(?P<time>[^\]]{1,40})\] "(?P<method>[A-Z]{1,10}) (?P<path>\S+)[^"]*"'
    r" (?P<status>\d{3}) (?P<bytes>\d+|-)"
)
_ASSET = re.compile(r".*?/assets/(?P<path>[^?#]+)")
_CONTENT_STATUSES = frozenset({200, 206, 304})


def asset_under(prefix: str) -> re.Pattern[str]:
    """Return what the paths of objects match that begin with `prefix`. Raises ConfigurationError."""
    if not prefix.startswith("/"):
        raise ConfigurationError(
            f"path-prefix: expected the beginning of a path, such as /media/, got {prefix!r}"
        )
    return re.compile(rf"(?:https?://[^/]+)?{re.escape(prefix.rstrip('/'))}/(?P<path>[^?#]+)")


class Unreadable(Exception):
    """The line is in none of the known formats."""


class Elsewhere(Exception):
    """A response with content, at a path that names no object."""


class _InvalidField(Exception):
    """Says which field of the line, what was expected and what it has."""


def parse_line(line: str, columns: Columns | None = None, asset: re.Pattern[str] = _ASSET) -> LogLine | None:
    """Parse one line. `columns`: of CSV, from a header line. `asset`: the form of an object's path. None: it is not a
    response with an object. Raises Unreadable, which names the field where one is to blame, and Elsewhere."""
    line = line.strip()
    if not line:
        return None
    try:
        parsed = _from_text(line, columns, asset)
    except InvalidInput:
        return None  # an invalid object id: the response was 400
    except _InvalidField as error:
        if columns_of(line) is not None:
            return None
        raise Unreadable(str(error)) from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise Unreadable(f"expected a known format, got {line[:80]!r}") from error
    if parsed is not None and not (
        is_size(parsed.sent)
        and (parsed.size is None or is_size(parsed.size))
        and (parsed.first is None or (parsed.first >= 0 and is_size(parsed.first + parsed.sent)))
    ):
        raise Unreadable(f"size: expected 0 to {MAX_BYTES} bytes, got {line[:80]!r}")
    return parsed


def is_size(count: int) -> bool:
    """Whether an object or a response can have so many bytes."""
    return 0 <= count <= MAX_BYTES


def _from_text(line: str, columns: Columns | None, asset: re.Pattern[str]) -> LogLine | None:
    if line.startswith("{"):
        return _from_json(json.loads(line), asset)
    common = _COMMON.match(line)
    if common is not None:
        return _from_common(common, asset)
    spaced = columns is None and "," not in line
    fields = line.split() if spaced else [field.strip().strip('"') for field in line.split(",")]
    if spaced:
        return _from_columns(fields, _SPACED)
    return _from_columns(fields, _UNNAMED if columns is None else columns)


def _from_json(fields: Mapping[str, Any], asset: re.Pattern[str]) -> LogLine | None:
    if "request" in fields and "ts" in fields:
        return _from_caddy(fields, asset)
    if fields.get("event") != "request_answered":
        return None
    object_id, status = fields.get("object_id"), int(fields["status"])
    if object_id is None or fields["method"] != "GET" or status not in _CONTENT_STATUSES:
        return None
    sent, size, first = int(fields["bytes"]), fields.get("size"), fields.get("range_start")
    if status == 200:
        first = 0
    return LogLine(
        at=_seconds(fields["timestamp"]) - float(fields.get("duration_ms", 0)) / 1000,
        object_id=ObjectId.parse(object_id),
        sent=sent,
        size=None if size is None else int(size),
        whole=status == 200 and not fields.get("cut"),
        cache=fields.get("x_cache"),
        not_modified=status == 304,
        first=None if first is None else int(first),
    )


def _from_caddy(fields: Mapping[str, Any], asset: re.Pattern[str]) -> LogLine | None:
    request, status = fields["request"], int(fields["status"])
    if request["method"] != "GET" or status not in _CONTENT_STATUSES:
        return None
    object_id = _object_in(request["uri"], asset)
    headers = {name.lower(): str(values[0]) for name, values in (fields.get("resp_headers") or {}).items()}
    duration, sent = fields.get("duration", 0), int(fields["size"])
    size, first = None, 0 if status == 200 else None
    if status == 206:
        given = parse_content_range(headers.get("content-range", ""))
        if given is not None:
            first, size = given[0].first, given[1]
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
        first=first,
    )


def _from_common(fields: re.Match[str], asset: re.Pattern[str]) -> LogLine | None:
    status = int(fields["status"])
    if fields["method"] != "GET" or status not in _CONTENT_STATUSES:
        return None
    object_id = _object_in(fields["path"], asset)
    at = datetime.strptime(fields["time"], "%d/%b/%Y:%H:%M:%S %z").timestamp()
    sent = 0 if fields["bytes"] == "-" else int(fields["bytes"])
    first = 0 if status == 200 else None
    return LogLine(at, object_id, sent, whole=status == 200, not_modified=status == 304, first=first)


@dataclass(frozen=True, slots=True)
class Columns:
    """Places of the columns of CSV, the first is 0."""

    time: int
    object_id: int
    size: int
    sent: int | None = None  # None: the whole object
    first: int | None = None  # None: not known


_UNNAMED, _SPACED = Columns(0, 1, 2, 3), Columns(0, 1, 2)
_COLUMN_NAMES = {
    "time": ("time", "timestamp", "ts", "real_time", "clock_time"),
    "id": ("id", "obj_id", "object_id", "obj", "object", "key"),
    "size": ("size", "obj_size", "object_size", "obj-size"),
    "sent": ("sent", "bytes_sent"),
    "first": ("first", "range_start"),
}


def columns_of(line: str) -> Columns | None:
    """The columns that a header line of CSV names. None: it is no header line, or names no time, id or size."""
    if line[:1].isdigit() or line[:1] == "{":
        return None
    names = [name.strip().strip('"').lower() for name in line.strip().lstrip("#").split(",")]
    found = {
        column: place
        for column, known in _COLUMN_NAMES.items()
        for place, name in enumerate(names)
        if name in known
    }
    if not {"time", "id", "size"} <= found.keys():
        return None
    return Columns(found["time"], found["id"], found["size"], found.get("sent"), found.get("first"))


def _from_columns(fields: Sequence[str], columns: Columns) -> LogLine:
    needed = max(columns.time, columns.object_id, columns.size) + 1
    if len(fields) < needed:
        raise _InvalidField(f"expected {needed} columns, got {len(fields)}")
    try:
        at = _seconds(fields[columns.time])
    except ValueError as error:
        raise _InvalidField(f"time: expected a number or ISO 8601, got {fields[columns.time]!r}") from error
    size = _count("size", fields[columns.size])
    given = columns.sent is not None and columns.sent < len(fields)
    sent = _count("sent", fields[columns.sent or 0]) if given else size
    first = 0 if sent >= size else None
    if columns.first is not None and columns.first < len(fields):
        first = _count("first", fields[columns.first])
    return LogLine(at, ObjectId.parse(fields[columns.object_id]), sent, size=size, first=first)


def _count(name: str, field: str) -> int:
    if not field.isascii() or not field.isdigit():
        raise _InvalidField(f"{name}: expected a number of bytes, got {field[:80]!r}")
    return int(field)


def _object_in(path: str, asset: re.Pattern[str]) -> ObjectId:
    found = asset.match(path)
    if found is None:
        expected = "/assets/ID" if asset is _ASSET else "one below --path-prefix"
        raise Elsewhere(f"path: expected {expected}, got {path[:80]!r}")
    return ObjectId.parse_path(found["path"])


def _seconds(time: object) -> float:
    """Convert POSIX seconds or an ISO 8601 time (UTC without a zone) to POSIX seconds."""
    try:
        seconds = float(time)  # type: ignore[arg-type]
    except ValueError:
        moment = datetime.fromisoformat(str(time))
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(seconds):
        raise ValueError(f"time: expected a finite number, got {time!r}")
    return seconds
