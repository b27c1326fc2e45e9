"""Header blocks of the public API: CORS, security, caching, Date."""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache
from typing import Literal

CacheResult = Literal["hit", "pending", "miss"]
DataSource = Literal["local", "external"]

EXPOSED = (
    "X-Cache, X-Data-Source, ETag, Content-Length, Content-Range, Accept-Ranges, Cache-Status, X-Request-ID"
)

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

ASSET_CONTENT: Mapping[str, str] = {**ASSET, "Accept-Ranges": "bytes", "Content-Disposition": "inline"}
"""On every 200 and 206 of an object. A 304 has ASSET and the validators."""

PREFLIGHT: Mapping[str, str] = {
    **ASSET,
    "Access-Control-Allow-Methods": "GET, HEAD, OPTIONS",
    "Access-Control-Allow-Headers": (
        "Range, If-Range, If-Match, If-None-Match, If-Modified-Since, If-Unmodified-Since, "
        "Cache-Control, Accept, X-Request-ID"
    ),
    "Access-Control-Max-Age": "86400",
    "Allow": "GET, HEAD, OPTIONS",
}
"""On responses to OPTIONS (Fetch standard, CORS preflight)."""

CACHE_HIT = "public, max-age=31536000, immutable"
CACHE_PENDING = "max-age=180, must-revalidate"
CACHE_ERROR = "no-store"

CACHE_STATUS_HIT = "distributor; hit"
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
