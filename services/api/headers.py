"""Header blocks of the public API: CORS, security, caching, Date; status and headers of asset responses."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from typing import Literal
from urllib.parse import parse_qs, quote, unquote

from distributor_node.services.api.assets.decision import PreconditionResult, Representation, Span
from distributor_node.services.api.errors import HttpError
from distributor_node.shared.domain.conditionals import Unsatisfiable
from distributor_node.shared.domain.media_types import file_name, is_document

CacheResult = Literal["hit", "pending", "miss"]
DataSource = Literal["local", "external"]

EXPOSED = "X-Cache, X-Data-Source, ETag, Content-Length, Content-Range, Accept-Ranges, Age, Cache-Status, X-Request-ID"

# Objects are uploaded by third parties and share the node's origin. `sandbox` gives a document an origin of its own,
# without scripts, forms and pop-ups. `default-src 'none'` lets it load only images and media.
# An <img>, a <video> or a fetch in another page follows that page's policy instead.
# The page that a browser makes around a single image or video needs the inline style and the object itself.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; img-src 'self' data:; media-src 'self' data:; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; sandbox"
)

CROSS_ORIGIN: Mapping[str, str] = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Expose-Headers": EXPOSED,
    "Timing-Allow-Origin": "*",
    "Cross-Origin-Resource-Policy": "cross-origin",
}
"""Any page may read the response, its headers and its timing."""

ASSET: Mapping[str, str] = {
    **CROSS_ORIGIN,
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
}
"""On every response of an asset path, errors and preflights included."""

ASSET_CONTENT: Mapping[str, str] = {**ASSET, "Accept-Ranges": "bytes"}
"""On every 200 and 206 of an object, with a Content-Disposition of its own. A 304 has ASSET and the validators."""

PREFLIGHT: Mapping[str, str] = {
    **ASSET,
    "Access-Control-Allow-Methods": "GET, HEAD, OPTIONS",
    "Access-Control-Allow-Headers": (
        "Range, If-Range, If-Match, If-None-Match, If-Modified-Since, If-Unmodified-Since, "
        "Cache-Control, Accept, X-Request-ID"
    ),
    "Access-Control-Max-Age": "86400",
    "Allow": "GET, HEAD, OPTIONS",
    "Vary": "Access-Control-Request-Headers, Access-Control-Request-Private-Network",
}
"""On responses to OPTIONS (Fetch standard, CORS preflight), unless the preflight asks for other headers."""

_FIELD_NAMES = re.compile(r"[ \t]*(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+[ \t]*(?:,[ \t]*|$))+", re.ASCII)
_MAX_FIELD_NAMES = 2048  # characters


def preflight_headers(asked: Mapping[str, str]) -> dict[str, str]:
    """Return the headers of the response to a preflight, which allows the headers that it asks for.

    Players send CMCD-*, traceparent, Authorization and others, and the node reads none of them. `asked`: the headers of
    the request, names in lower case. A list that is too long or has anything but field names (RFC 9110 section 5.1)
    gets the usual response.
    """
    headers = dict(PREFLIGHT)
    names = asked.get("access-control-request-headers", "")
    if 0 < len(names) <= _MAX_FIELD_NAMES and _FIELD_NAMES.fullmatch(names):
        headers["Access-Control-Allow-Headers"] = names.strip(" \t")
    if asked.get("access-control-request-private-network", "").strip().lower() == "true":
        headers["Access-Control-Allow-Private-Network"] = "true"
    return headers


CACHE_HIT = "public, max-age=31536000, immutable"
CACHE_PENDING = "max-age=180, must-revalidate"
CACHE_ERROR = "no-store"

CACHE_STATUS_HIT = "distributor; hit"
CACHE_STATUS_REVALIDATED = "distributor; fwd=stale; fwd-status=304"
CACHE_STATUS_OWN = "distributor"
"""On responses without content for which no source was contacted."""


def cache_control(result: CacheResult) -> str:
    """Return Cache-Control for content. Objects are immutable, but bytes of a miss may not be verified yet."""
    return CACHE_HIT if result == "hit" else CACHE_PENDING


def cache_status(
    result: CacheResult, *, stored: bool, collapsed: bool = False, forwarded: str = "uri-miss"
) -> str:
    """Return Cache-Status (RFC 9211) of this cache.

    `stored`: the fetched object will be kept. `collapsed`: another request started the fetch. `forwarded`: why the
    request went to a source (`uri-miss`, `bypass`, …).
    """
    if result == "hit":
        return CACHE_STATUS_HIT
    parts = ["distributor", f"fwd={forwarded}"]
    if stored:
        parts.append("stored")
    if collapsed:
        parts.append("collapsed")
    return "; ".join(parts)


def date_now() -> str:
    """Return the current value of Date (RFC 9110 section 6.6.1), cached for a second."""
    return _date(int(time.time()))


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)


def as_block(headers: Mapping[str, str]) -> bytes:
    """Return header lines in wire format, each with its CRLF."""
    return b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in headers.items())


UNKNOWN_MEDIA_TYPE = "application/octet-stream"
CONTENT_LENGTH = "content-length"
"""Sanic's spelling. It would rename the header of a body that it sends in one piece, and only there."""


@dataclass(frozen=True, slots=True)
class CacheOutcome:
    """What the cache held when a request came."""

    result: CacheResult  # the value of X-Cache
    stored: bool = True  # False: the object is proxied without being fetched into the cache
    revalidated: bool = False  # a hit that was stale: the origin has been asked, and it has not changed

    def cache_status(self, source: DataSource | None, ttl: int | None = None) -> str:
        """Return the value of the Cache-Status header (RFC 9211).

        `source` is None for a response without content (HEAD, 304). Nothing was forwarded for it. A proxied response
        (`external`) is neither stored nor collapsed. `ttl`: seconds that a hit is still fresh; negative: it is stale.
        """
        if self.revalidated:
            return CACHE_STATUS_REVALIDATED
        if self.result == "hit" and ttl is not None:
            return f"{CACHE_STATUS_HIT}; ttl={ttl}"
        if source is None and self.result != "hit":
            return CACHE_STATUS_OWN
        shared = source != "external"
        return cache_status(
            self.result,
            stored=self.stored and shared,
            collapsed=self.result == "pending" and shared,
            forwarded="uri-miss" if self.stored else "bypass",
        )


HIT = CacheOutcome("hit")
REVALIDATED = CacheOutcome("hit", revalidated=True)
PENDING = CacheOutcome("pending")
MISS = CacheOutcome("miss")
BYPASS = CacheOutcome("miss", stored=False)


def _validators(
    representation: Representation, outcome: CacheOutcome, source: DataSource | None = None
) -> dict[str, str]:
    """Return the headers that say what the object is, and how long it may be used; but see `_aging_headers`."""
    if representation.freshness is not None:
        control = representation.freshness.response_cache_control
    elif representation.not_stored:
        control = CACHE_ERROR
    else:
        # Only with a content hash it is certain that the object never changes.
        control = cache_control("pending" if representation.content_hash is None else outcome.result)
    headers = {"X-Cache": outcome.result, "Cache-Control": control}
    if representation.freshness is None:
        headers["Cache-Status"] = outcome.cache_status(source)
    if representation.etag is not None:
        headers["ETag"] = representation.etag
    if representation.last_modified is not None:
        headers["Last-Modified"] = formatdate(representation.last_modified, usegmt=True)
    return headers


def _aging_headers(
    representation: Representation, outcome: CacheOutcome, source: DataSource | None = None
) -> dict[str, str]:
    """Return the headers that change with time, of an object that can become stale. They are the last ones."""
    freshness, now = representation.freshness, time.time()
    if freshness is None:
        return {}
    status = outcome.cache_status(source, freshness.ttl(now))
    return {"Cache-Status": status, "Age": str(freshness.age(now))}


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Status and headers of a response, and its labels in the metrics."""

    status: int
    headers: dict[str, str]
    result: CacheResult
    source: DataSource | None  # None: a response without a body


def content_head(
    representation: Representation,
    outcome: CacheOutcome,
    span: Span,
    source: DataSource | None,
    media_type: str | None = None,
) -> ResponseHead:
    """Return the head of a 200 or 206.

    `source`: None for HEAD. `media_type`: what the source stated, used if the catalog states none. A HEAD has no
    Content-Type unless it is known: the GET may find another one.
    """
    known = representation.media_type or media_type
    headers = {
        **ASSET_CONTENT,
        "Content-Disposition": content_disposition(representation, known),
        **_validators(representation, outcome, source),
    }
    if known is not None or source is not None:
        headers["Content-Type"] = known or UNKNOWN_MEDIA_TYPE
    if source is not None:
        headers["X-Data-Source"] = source
    if span.length is not None:
        headers[CONTENT_LENGTH] = str(span.length)
    if span.partial:
        headers["Content-Range"] = span.content_range
    headers |= _aging_headers(representation, outcome, source)
    return ResponseHead(206 if span.partial else 200, headers, outcome.result, source)


# Content-Disposition (RFC 6266): under which name a client saves an object, and whether a browser shows it.

_DOWNLOAD = "download"
_ATTRIBUTE_CHARACTERS = "!#$&+-.^_`|~"
"""Not encoded in `filename*` (RFC 8187 section 3.2.1), nor are letters and digits."""


def content_disposition(representation: Representation, media_type: str | None) -> str:
    """Return the header's value: the id with the extension of the media type, and the catalog's name beside it."""
    kind = "attachment" if is_document(media_type) else "inline"
    name = representation.name
    if representation.object_id.is_digest:
        # The name is the path that the digest stands for, or what the manifest calls the object.
        last = (name or "").partition("?")[0].rpartition("/")[2]
        return _disposition(kind, file_name(unquote(last), media_type))
    own = file_name(representation.object_id, media_type)
    return _disposition(kind, own, "" if name is None else file_name(name, media_type))


def requested_disposition(query: str, usual: str) -> str | None:
    """Return the Content-Disposition for `?download` or `?download=NAME`. None: the query asks for neither.

    `usual`: what the object has without it.
    """
    try:
        wanted = parse_qs(query, keep_blank_values=True, max_num_fields=100).get(_DOWNLOAD)
    except ValueError:  # too many fields
        return None
    if wanted is None:
        return None
    name = file_name(wanted[0], None)
    if not name:
        return "attachment" + "".join(usual.partition(";")[1:])
    return _disposition("attachment", name)


def _disposition(kind: str, name: str, extended: str = "") -> str:
    """`extended`: for `filename*`, which clients prefer. A name with other characters than ASCII gets one anyhow."""
    plain = "".join(character if character.isascii() and character != "%" else "_" for character in name)
    if not extended and plain != name:
        extended = name
    parts = [kind]
    if plain:
        parts.append(f'filename="{plain}"')
    if extended:
        parts.append(f"filename*=UTF-8''{quote(extended, safe=_ATTRIBUTE_CHARACTERS)}")
    return "; ".join(parts)


def not_modified_headers(representation: Representation, outcome: CacheOutcome) -> dict[str, str]:
    """Return the headers of a 304."""
    return {**ASSET, **_validators(representation, outcome), **_aging_headers(representation, outcome)}


def precondition_head(
    result: PreconditionResult | Unsatisfiable, representation: Representation, outcome: CacheOutcome
) -> ResponseHead:
    """Return the head of a 304. Raises HttpError 412 or 416 for the other results."""
    if result is PreconditionResult.NOT_MODIFIED:
        return ResponseHead(304, not_modified_headers(representation, outcome), outcome.result, None)
    extra: dict[str, str] = {"X-Cache": outcome.result}
    if isinstance(result, Unsatisfiable):
        extra["Content-Range"] = result.content_range
        raise HttpError(416, "Range not satisfiable", "range_not_satisfiable", extra)
    raise HttpError(412, "Precondition failed", "precondition_failed", extra)


# Heads of hits, prebuilt as bytes for the fast path.
#
# They are built from the headers that Sanic is given (`content_head`, `not_modified_headers`) and in Sanic's format, so
# that the fast path and Sanic send equal responses.

_STATUS_LINES = {
    200: b"HTTP/1.1 200 OK\r\n",
    206: b"HTTP/1.1 206 Partial Content\r\n",
    304: b"HTTP/1.1 304 Not Modified\r\n",
}


@dataclass(frozen=True, slots=True)
class PrebuiltHeaders:
    """Heads of the hits of one object. Each is followed by a tail (`TAIL` or `aging_tail`), the request id and
    `end_of_head`."""

    whole: bytes  # a 200 with all bytes
    head: bytes  # the response to HEAD
    not_modified: bytes  # a 304
    partial: bytes  # a 206, up to its length: see `for_range`

    @classmethod
    def build(cls, representation: Representation) -> PrebuiltHeaders:
        """Build the heads of a complete object that is not empty. Raises ValueError if a header cannot be sent."""
        size = representation.size or 0
        span = Span(0, size - 1, size)
        partial = content_head(representation, HIT, Span(0, size - 1, size, partial=True), "local").headers
        common = list(partial.items())
        names = [name for name, _ in common]
        last = {} if representation.freshness is None else _aging_headers(representation, HIT)

        def lasting(headers: Mapping[str, str]) -> dict[str, str]:
            return {name: value for name, value in headers.items() if name not in last}

        return cls(
            _block(200, lasting(content_head(representation, HIT, span, "local").headers)),
            _block(200, lasting(content_head(representation, HIT, span, None).headers)),
            _block(304, lasting(not_modified_headers(representation, HIT))),
            _block(206, dict(common[: names.index(CONTENT_LENGTH)])),
        )

    def for_range(self, first: int, last: int, size: int) -> bytes:
        """Return the head of a 206 with bytes `first` to `last`, up to the tail."""
        return b"%bcontent-length: %d\r\nContent-Range: bytes %d-%d/%d\r\n" % (
            self.partial,
            last - first + 1,
            first,
            last,
            size,
        )


TAIL = b"X-Request-ID: "
"""Between a prebuilt head and the request id."""


@lru_cache(maxsize=8192)
def aging_tail(age: int, ttl: int) -> bytes:
    """Return the tail of an object that can become stale, for one second of its life."""
    return as_block({"Cache-Status": f"{CACHE_STATUS_HIT}; ttl={ttl}", "Age": str(age)}) + TAIL


def end_of_head() -> bytes:
    """Return what follows the request id on a keep-alive connection. Valid for the current second."""
    return f"\r\nDate: {date_now()}\r\nconnection: keep-alive\r\n\r\n".encode()


def _block(status: int, headers: Mapping[str, str]) -> bytes:
    for value in headers.values():
        if not value.isascii() or not value.isprintable():
            raise ValueError(f"header value: expected printable ASCII, got {value!r}")
    return _STATUS_LINES[status] + as_block(headers)
