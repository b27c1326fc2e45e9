"""The heads of answers from one complete object, ready-made as bytes: what the fast path writes.

They are made from the very headers that Sanic is given (`content_head`, `not_modified_headers`), in Sanic's form,
so that nobody can tell from an answer which way it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.api.assets.decision import Representation, Span
from services.api.assets.heads import CONTENT_LENGTH, HIT, content_head, not_modified_headers
from services.api.headers import as_block, date_now

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
