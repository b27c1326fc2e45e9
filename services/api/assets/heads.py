"""Status and headers of asset answers, by the contract's table."""

from __future__ import annotations

from dataclasses import dataclass
from email.utils import formatdate

from sanic import HTTPResponse

from services.api.assets.decision import PreconditionResult, Representation, Span
from services.api.errors import HttpError
from services.api.headers import (
    ASSET,
    ASSET_CONTENT,
    CACHE_STATUS_OWN,
    CacheResult,
    DataSource,
    cache_control,
    cache_status,
)
from shared.domain.ranges import Unsatisfiable

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
