"""Status and headers of asset answers, by the contract's table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate

from sanic import HTTPResponse

from distributor_node.services.api.assets.decision import PreconditionResult, Representation, Span
from distributor_node.services.api.errors import HttpError
from distributor_node.services.api.headers import (
    ASSET,
    ASSET_CONTENT,
    CACHE_STATUS_OWN,
    CacheResult,
    DataSource,
    as_block,
    cache_control,
    cache_status,
    date_now,
)
from distributor_node.shared.domain.ranges import Unsatisfiable

UNKNOWN_MEDIA_TYPE = "application/octet-stream"
CONTENT_LENGTH = "content-length"
"""As Sanic spells it: it would rename the header where it sends a body in one piece, and only there."""


@dataclass(frozen=True, slots=True)
class CacheOutcome:
    """What the cache has for one request. `result`: as X-Cache says it; `stored`: what is not there will be kept, since
    a fetch goes on or is asked for."""

    result: CacheResult
    stored: bool = True

    def cache_status(self, source: DataSource | None) -> str:
        """The value of the Cache-Status header (RFC 9211); what is proxied is neither kept nor shared.

        `source` is None for an answer without content (HEAD, 304): unless it is a hit, nothing was forwarded for it.
        """
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
PENDING = CacheOutcome("pending")
MISS = CacheOutcome("miss")
BYPASS = CacheOutcome("miss", stored=False)


def _validators(
    representation: Representation, outcome: CacheOutcome, source: DataSource | None = None
) -> dict[str, str]:
    headers = {
        "X-Cache": outcome.result,
        "Cache-Control": cache_control(outcome.result),
        "Cache-Status": outcome.cache_status(source),
        "ETag": representation.etag,
    }
    if representation.last_modified is not None:
        headers["Last-Modified"] = formatdate(representation.last_modified, usegmt=True)
    return headers


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Status line and headers of an answer with content, and what the metrics need to know of it."""

    status: int
    headers: dict[str, str]
    result: CacheResult
    source: DataSource | None


def content_head(
    representation: Representation,
    outcome: CacheOutcome,
    span: Span,
    source: DataSource | None,
    media_type: str | None = None,
) -> ResponseHead:
    """Of a 200 or 206. `source` is None for HEAD; `media_type` is the source's word, for want of the catalog's."""
    headers = {
        **ASSET_CONTENT,
        **_validators(representation, outcome, source),
        "Content-Type": representation.media_type or media_type or UNKNOWN_MEDIA_TYPE,
    }
    if source is not None:
        headers["X-Data-Source"] = source
    if span.length is not None:
        headers[CONTENT_LENGTH] = str(span.length)
    if span.partial:
        headers["Content-Range"] = span.content_range
    return ResponseHead(206 if span.partial else 200, headers, outcome.result, source)


def not_modified_headers(representation: Representation, outcome: CacheOutcome) -> dict[str, str]:
    """Of a 304."""
    return {**ASSET, **_validators(representation, outcome)}


def precondition_response(
    result: PreconditionResult | Unsatisfiable, representation: Representation, outcome: CacheOutcome
) -> HTTPResponse:
    """The 304; what is an error is raised as one."""
    if result is PreconditionResult.NOT_MODIFIED:
        return HTTPResponse(status=304, headers=not_modified_headers(representation, outcome))
    extra: dict[str, str] = {"X-Cache": outcome.result}
    if isinstance(result, Unsatisfiable):
        extra["Content-Range"] = result.content_range
        raise HttpError(416, "Range not satisfiable", "range_not_satisfiable", extra)
    raise HttpError(412, "Precondition failed", "precondition_failed", extra)


# The heads of answers from one complete object, ready-made as bytes: what the fast path writes.
#
# They are made from the very headers that Sanic is given (`content_head`, `not_modified_headers`), in Sanic's form,
# so that nobody can tell from an answer which way it came.

_STATUS_LINES = {
    200: b"HTTP/1.1 200 OK\r\n",
    206: b"HTTP/1.1 206 Partial Content\r\n",
    304: b"HTTP/1.1 304 Not Modified\r\n",
}
_REQUEST_ID = b"X-Request-ID: "


@dataclass(frozen=True, slots=True)
class PrebuiltHeaders:
    """Each ends where the request id has to follow, and then `end_of_head`. `whole`: a 200 with all bytes; `head`: the
    same in answer to HEAD; `not_modified`: a 304; `partial`: a 206 up to its length."""

    whole: bytes
    head: bytes
    not_modified: bytes
    partial: bytes

    @classmethod
    def build(cls, representation: Representation) -> PrebuiltHeaders:
        """Of a complete object that is not empty. ValueError if a header is none that can be sent."""
        size = representation.size or 0
        span = Span(0, size - 1, size)
        partial = content_head(representation, HIT, Span(0, size - 1, size, partial=True), "local")
        common = list(partial.headers.items())
        names = [name for name, _ in common]
        return cls(
            _block(200, content_head(representation, HIT, span, "local").headers) + _REQUEST_ID,
            _block(200, content_head(representation, HIT, span, None).headers) + _REQUEST_ID,
            _block(304, not_modified_headers(representation, HIT)) + _REQUEST_ID,
            _block(206, dict(common[: names.index(CONTENT_LENGTH)])),
        )

    def for_range(self, first: int, last: int, size: int) -> bytes:
        """The head of a 206 with bytes `first` to `last`, as far as the request id."""
        return b"%bcontent-length: %d\r\nContent-Range: bytes %d-%d/%d\r\nX-Request-ID: " % (
            self.partial,
            last - first + 1,
            first,
            last,
            size,
        )


def end_of_head() -> bytes:
    """What follows the request id on a connection that is kept; good for this second."""
    return f"\r\nDate: {date_now()}\r\nconnection: keep-alive\r\n\r\n".encode()


def _block(status: int, headers: Mapping[str, str]) -> bytes:
    for value in headers.values():
        if not value.isascii() or not value.isprintable():
            raise ValueError("a header value that is not plain text")
    return _STATUS_LINES[status] + as_block(headers)
