"""The correct responses of a storage node (Colossus, API v1). Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from distributor_node.services.demo.objects import MODIFIED_AT, BytesContent, Content, DemoObject
from distributor_node.services.demo.wire import Request

API_BASE = "/api/v1"
VERSION = {"version": "3.10.2", "userAgent": "demo-storage-node"}
_RANGE = re.compile(r"bytes=\s*([0-9]*)-([0-9]*)\s*")
_NOTHING = BytesContent(b"")


@dataclass(frozen=True, slots=True)
class Response:
    """A status, headers without Content-Length, and as body `length` bytes of `content` from `offset`."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    content: Content = _NOTHING
    offset: int = 0
    length: int = 0


def json_response(status: int, document: object) -> Response:
    """Return a response with a JSON document."""
    body = json.dumps(document).encode()
    return Response(status, (("Content-Type", "application/json"),), BytesContent(body), 0, len(body))


def error_response(status: int, kind: str, message: str) -> Response:
    """Return an error as storage nodes send it: JSON with `type` and `message`."""
    return json_response(status, {"type": kind, "message": message})


def endpoint_of(request: Request) -> tuple[str | None, str | None]:
    """Return the endpoint ("files", "version" or None) and, for files, the id as it is in the path."""
    if request.path == f"{API_BASE}/version":
        return "version", None
    prefix = f"{API_BASE}/files/"
    if request.path.startswith(prefix):
        return "files", request.path[len(prefix) :]
    return None, None


def handle_request(request: Request, objects: Mapping[str, DemoObject]) -> Response:
    """Return the correct response to a request."""
    endpoint, object_id = endpoint_of(request)
    if endpoint is None:
        return error_response(404, "not_found", "no such path")
    if request.method not in ("GET", "HEAD"):
        return error_response(405, "method_not_allowed", "only GET and HEAD are served")
    if endpoint == "version":
        return json_response(200, VERSION)
    if object_id is None or re.fullmatch(r"[0-9]+", object_id, re.ASCII) is None:
        return error_response(400, "bad_request", "the object id must be made of digits")
    item = objects.get(object_id)
    if item is None:
        return Response(404)
    return _file_response(request, item)


def _file_response(request: Request, item: DemoObject) -> Response:
    control = () if item.cache_control is None else (("Cache-Control", item.cache_control),)
    if request.method == "HEAD":
        told = () if item.own_etag is None else (*control, *item.validators)
        return Response(200, (*told, ("Content-Type", item.media_type)), item.content, 0, item.size)
    validators = (("Accept-Ranges", "bytes"), *control, *item.validators)
    if _precondition_failed(request, item):
        return error_response(500, "unknown_error", "PreconditionFailedError: Precondition Failed")
    if _not_modified(request, item):
        return Response(304, validators)
    headers = (*validators, ("Content-Type", item.media_type))
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    if match is None or not any(match.groups()) or not _range_is_fresh(request, item):
        return Response(200, headers, item.content, 0, item.size)
    window = _window(match[1], match[2], item.size)
    if window is None:
        return error_response(500, "unknown_error", "RangeNotSatisfiableError: Range Not Satisfiable")
    start, end = window
    content_range = ("Content-Range", f"bytes {start}-{end - 1}/{item.size}")
    return Response(206, (*headers, content_range), item.content, start, end - start)


def _window(first: str, last: str, size: int) -> tuple[int, int] | None:
    """Return a byte range as half-open [start, end). None: it cannot be satisfied (RFC 9110 section 14.1.2)."""
    if first == "":
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
    return (start, end) if start < end else None


def _weak(etag: str) -> str:
    return etag.strip().removeprefix("W/")


def _lists(field: str, etag: str) -> bool:
    return field.strip() == "*" or any(_weak(item) == _weak(etag) for item in field.split(","))


def _older(date: str, limit: int) -> bool:
    """Whether an HTTP date is before a time. A malformed date is not."""
    try:
        return parsedate_to_datetime(date).timestamp() < limit
    except ValueError:
        return False


def _precondition_failed(request: Request, item: DemoObject) -> bool:
    if (wanted := request.headers.get("if-match")) is not None:
        return not _lists(wanted, item.etag)
    return _older(request.headers.get("if-unmodified-since", ""), MODIFIED_AT)


def _not_modified(request: Request, item: DemoObject) -> bool:
    if (known := request.headers.get("if-none-match")) is not None:
        return _lists(known, item.etag)
    since = request.headers.get("if-modified-since")
    modified_at = item.modified_at if item.own_etag is not None else MODIFIED_AT
    return since is not None and modified_at is not None and not _older(since, modified_at)


def _range_is_fresh(request: Request, item: DemoObject) -> bool:
    """Compare If-Range weakly, as storage nodes do, although RFC 9110 section 13.1.5 requires a strong comparison.

    Origins compare strongly.
    """
    condition = request.headers.get("if-range")
    if condition is None:
        return True
    if '"' in condition and item.own_etag is not None:
        return condition.strip() == item.etag and not condition.startswith("W/")
    if '"' in condition:
        return _weak(condition) == _weak(item.etag)
    return not _older(condition, MODIFIED_AT)
