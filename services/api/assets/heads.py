"""Status and headers of asset answers, by the contract's table."""

from __future__ import annotations

from dataclasses import dataclass
from email.utils import formatdate

from sanic import HTTPResponse

from services.api.assets.decision import Description, Refusal, Span
from services.api.errors import ErrorAnswer
from services.api.headers import (
    ASSET,
    ASSET_CONTENT,
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
class Standing:
    """How the cache stands to one request: its result, whether the object will be kept, and whether somebody else's
    request began its fetch."""

    result: CacheResult
    stored: bool = True

    def cache_status(self, source: DataSource | None) -> str:
        """The value of the Cache-Status header; what is proxied is neither kept nor shared."""
        shared = source != "external"
        return cache_status(
            self.result,
            stored=self.stored and shared,
            collapsed=self.result == "pending" and shared,
            forwarded="uri-miss" if self.stored else "bypass",
        )


HIT = Standing("hit")
PENDING = Standing("pending")
MISS = Standing("miss")
BYPASS = Standing("miss", stored=False)


def _validators(
    described: Description, standing: Standing, source: DataSource | None = None
) -> dict[str, str]:
    headers = {
        "X-Cache": standing.result,
        "Cache-Control": cache_control(standing.result),
        "Cache-Status": standing.cache_status(source),
        "ETag": described.etag,
    }
    if described.last_modified is not None:
        headers["Last-Modified"] = formatdate(described.last_modified, usegmt=True)
    return headers


@dataclass(frozen=True, slots=True)
class Head:
    """Status line and headers of an answer with content, and what the metrics need to know of it."""

    status: int
    headers: dict[str, str]
    result: CacheResult
    source: DataSource | None


def content_head(
    described: Description,
    standing: Standing,
    span: Span,
    source: DataSource | None,
    media_type: str | None = None,
) -> Head:
    """Of a 200 or 206. `source` is None for HEAD; `media_type` is the source's word, for want of the catalog's."""
    headers = {
        **ASSET_CONTENT,
        **_validators(described, standing, source),
        "Content-Type": described.media_type or media_type or UNKNOWN_MEDIA_TYPE,
    }
    if source is not None:
        headers["X-Data-Source"] = source
    if span.length is not None:
        headers[CONTENT_LENGTH] = str(span.length)
    if span.partial:
        headers["Content-Range"] = span.content_range
    return Head(206 if span.partial else 200, headers, standing.result, source)


def not_modified_headers(described: Description, standing: Standing) -> dict[str, str]:
    """Of a 304."""
    return {**ASSET, **_validators(described, standing)}


def refuse(refusal: Refusal | Unsatisfiable, described: Description, standing: Standing) -> HTTPResponse:
    """The 304; what is an error is raised as one."""
    if refusal is Refusal.NOT_MODIFIED:
        return HTTPResponse(status=304, headers=not_modified_headers(described, standing))
    extra: dict[str, str] = {"X-Cache": standing.result}
    if isinstance(refusal, Unsatisfiable):
        extra["Content-Range"] = refusal.content_range
        raise ErrorAnswer(416, "Range not satisfiable", "range_not_satisfiable", extra)
    raise ErrorAnswer(412, "Precondition failed", "precondition_failed", extra)
