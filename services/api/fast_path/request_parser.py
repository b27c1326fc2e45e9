"""Strict parser for the heads of simple GETs and HEADs. Sanic handles all other requests."""

from __future__ import annotations

import re
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

from distributor_node.services.api.request_log import is_request_id
from distributor_node.shared.domain.conditionals import Conditions

_GET, _HEAD, _VERSION = b"GET /api/v1/assets/", b"HEAD /api/v1/assets/", b" HTTP/1.1"
_END = b"\r\n\r\n"
_MAX_HEAD_BYTES = 4096
# RFC 9110 section 5: token, colon, a value of visible ASCII. Sanic handles empty values, other bytes and folded lines.
_FIELDS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[ \t]*[\x21-\x7e][\t\x20-\x7e]*\r\n)+")
_RANGE = re.compile(rb"\r\n[Rr]ange: (bytes=([0-9]{1,15})-([0-9]{0,15}))(?=\r\n)")
_RANGE_MARK = b"ange: bytes="

_CONDITIONS = {
    b"if-match": "if_match",
    b"if-unmodified-since": "if_unmodified_since",
    b"if-none-match": "if_none_match",
    b"if-modified-since": "if_modified_since",
}
_SUPPORTED_FIELDS = {*_CONDITIONS, b"range", b"if-range", b"x-request-id", b"host", b"connection"}
_UNSUPPORTED_FIELDS = {
    b"content-length",
    b"transfer-encoding",
    b"expect",
    b"upgrade",
    b"te",
    b"trailer",
    b"http2-settings",
    b"x-sendfile-type",  # Sanic's path may respond with X-Accel-Redirect
}

PARSE_CACHE_SIZE = 2048
_MAX_CACHED_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Fields:
    """The parsed header fields of a request."""

    conditions: Conditions
    range_header: str | None
    if_range: str | None
    request_id: bytes | None  # None: absent or not valid
    unconditional: bool  # neither conditions nor a range


class ParsedRequest(NamedTuple):
    """A GET or HEAD of one object."""

    is_head: bool
    object_id: bytes  # not validated
    fields: Fields
    range_header: str | None  # may be absent from `fields`, which are cached without it
    bounds: tuple[int, int] | None = None  # both numbers of a simple range, in any order


class RequestParser:
    """Parses heads. Clients repeat their header fields, so parsed ones are cached, a few megabytes at most."""

    def __init__(self, left_to_sanic: Iterable[bytes] = ()) -> None:
        """`left_to_sanic`: names of more header fields that the fast path does not support, in lower case."""
        self._unsupported = _UNSUPPORTED_FIELDS.union(left_to_sanic)
        self._cache: dict[bytes, Fields] = {}

    def parse(self, data: bytes) -> ParsedRequest | None:
        """Return the request if `data` is exactly the head of a simple one, else None."""
        if data.startswith(_GET):
            is_head, start = False, len(_GET)
        elif data.startswith(_HEAD):
            is_head, start = True, len(_HEAD)
        else:
            return None
        line_end = data.find(b"\r\n")
        path_end = line_end - len(_VERSION)
        if path_end <= start or data[path_end:line_end] != _VERSION or not data.endswith(_END):
            return None
        block = data[line_end + 2 : -2]
        range_header = bounds = None
        if _RANGE_MARK in block:
            # Players request another range each time. Without it their fields stay equal and are found in the cache.
            found = _RANGE.search(data, line_end)
            if found is not None:
                block = data[line_end + 2 : found.start() + 2] + data[found.end() + 2 : -2]
                range_header = found[1].decode()
                bounds = (int(found[2]), int(found[3])) if found[3] else None
        fields = self._cache.get(block)
        if fields is None:
            fields = self._parse_fields(block)
            if fields is None:
                return None
        if range_header is not None and fields.range_header is not None:
            return None
        return ParsedRequest(
            is_head, data[start:path_end], fields, range_header or fields.range_header, bounds
        )

    def _parse_fields(self, block: bytes) -> Fields | None:
        fields = parse_fields(block, self._unsupported)
        if fields is not None and fields.request_id is None and len(block) <= _MAX_CACHED_BLOCK:
            if len(self._cache) >= PARSE_CACHE_SIZE:
                self._cache.clear()
            self._cache[block] = fields
        return fields


def parse_fields(
    block: bytes, unsupported: AbstractSet[bytes] = frozenset(_UNSUPPORTED_FIELDS)
) -> Fields | None:
    """Parse the header fields of a head (all lines but the first, each with its CRLF).

    Returns None if there is a field that the fast path does not support.
    """
    if len(block) > _MAX_HEAD_BYTES or _FIELDS.fullmatch(block) is None:
        return None
    found: dict[bytes, str] = {}
    for line in block[:-2].split(b"\r\n"):
        name, _, value = line.partition(b":")
        name = name.lower()
        if name in unsupported or name in found:
            return None
        if name in _SUPPORTED_FIELDS:
            found[name] = value.lstrip(b" \t").decode("ascii")
    if b"host" not in found or found.pop(b"connection", "keep-alive").lower() != "keep-alive":
        return None
    del found[b"host"]
    offered = found.pop(b"x-request-id", None)
    request_id = offered.encode() if offered is not None and is_request_id(offered) else None
    return Fields(
        Conditions(**{field: found.get(name) for name, field in _CONDITIONS.items()}),
        found.get(b"range"),
        found.get(b"if-range"),
        request_id,
        unconditional=not found,
    )
