"""The header blocks of the public API, ready-made."""

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

# Objects come from strangers and share the node's origin. `sandbox` gives a document an origin of its own, without
# script, forms or pop-ups; default-src 'none' keeps it from loading anything but images and media.
# What is no document (an <img>, a <video>, a fetch by another page) is ruled by that page's own policy instead.
# The browser's own page around a single image or video needs the inline style and the object itself.
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
"""Any page may read the answer, its headers and its timing."""

ASSET: Mapping[str, str] = {
    **CROSS_ORIGIN,
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
}
"""On every answer of an asset path, errors and preflights included."""

ASSET_CONTENT: Mapping[str, str] = {**ASSET, "Accept-Ranges": "bytes", "Content-Disposition": "inline"}
"""On every answer that carries or describes an object (200, 206; ASSET and the validators on 304)."""

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
"""On the answer to OPTIONS (Fetch standard, CORS preflight)."""

CACHE_HIT = "public, max-age=31536000, immutable"
CACHE_PENDING = "max-age=180, must-revalidate"
CACHE_ERROR = "no-store"

CACHE_STATUS_HIT = "distributor; hit"
CACHE_STATUS_OWN = "distributor"
"""On what was answered without content and without asking a source."""


def cache_control(result: CacheResult) -> str:
    """Cache-Control of an answer with content: an object is immutable, but what is not verified yet may be wrong."""
    return CACHE_HIT if result == "hit" else CACHE_PENDING


def cache_status(
    result: CacheResult, *, stored: bool, collapsed: bool = False, forwarded: str = "uri-miss"
) -> str:
    """Cache-Status (RFC 9211) of this cache: `stored` if the fetch behind the answer will be kept, `collapsed` if the
    fetch was begun for another request, `forwarded` is why it went on (`uri-miss`, `bypass`, …)."""
    if result == "hit":
        return CACHE_STATUS_HIT
    parts = ["distributor", f"fwd={forwarded}"]
    if stored:
        parts.append("stored")
    if collapsed:
        parts.append("collapsed")
    return "; ".join(parts)


def date_now() -> str:
    """The value of Date (RFC 9110 section 6.6.1) of an answer that is made now; made once a second."""
    return _date(int(time.time()))


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)


def as_block(headers: Mapping[str, str]) -> bytes:
    """Header lines as they go over the wire, each with its CRLF."""
    return b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in headers.items())
