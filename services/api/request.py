"""The request as it came: its raw target, never normalised."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote_to_bytes

from sanic import Request
from sanic.exceptions import BadURL

from services.api.errors import HttpError
from shared.domain.errors import InvalidInput
from shared.domain.objects import ObjectId

ASSETS = "/api/v1/assets/"
MAX_HEAD_BYTES = 16_384
"""Of a request; Sanic allows no more."""

_ABSOLUTE_FORM = re.compile(rb"[a-zA-Z][a-zA-Z0-9+.-]*://[^/?#]*")
# RFC 9112 sections 2.2 and 5: no control characters, no bare CR or LF, no white space in or around a field's name
# (which would hide a Content-Length from one of two servers in a row).
_FORBIDDEN_IN_HEAD = re.compile(
    rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n)|\n[^\r\n:]*[ \t][^\r\n:]*:|\n:"
)


class ApiRequest(Request):
    """A Sanic request that is routed by its raw path: no decoding, no merging of slashes, no error for odd targets."""

    __slots__ = ("raw_path",)

    def __init__(self, url_bytes: bytes, *arguments: Any, **named: Any) -> None:
        try:
            super().__init__(url_bytes, *arguments, **named)
        except BadURL:
            # Let routing answer it, by the raw path; Sanic would fail again while it makes its error answer.
            super().__init__(b"/", *arguments, **named)
            self.raw_url = url_bytes
        self.raw_path = _path_of(url_bytes)

    @property
    def path(self) -> str:
        """The path, still percent-encoded, without query (RFC 9112 section 3.2.2: absolute form is accepted)."""
        return self.raw_path

    @property
    def is_for_asset(self) -> bool:
        """True for every path below the assets, whatever its id is worth."""
        return self.raw_path.startswith(ASSETS)


def _path_of(target: bytes) -> str:
    if not target.startswith(b"/"):
        absolute = _ABSOLUTE_FORM.match(target)
        target = (target[absolute.end() :] or b"/") if absolute else target
    return target.split(b"?", 1)[0].decode("latin-1")


def parse_object_id(raw: str) -> ObjectId:
    """The object id in a path, percent-decoded exactly once. HttpError 400 for all that cannot be one."""
    try:
        text = unquote_to_bytes(raw.encode("latin-1")).decode("utf-8") if "%" in raw else raw
        return ObjectId.parse(text)
    except (InvalidInput, UnicodeDecodeError) as error:
        raise HttpError(400, "Malformed object id", "malformed_id") from error


def validate_head(request: Request[Any, Any]) -> HttpError | None:
    """What HTTP forbids in a request's head and Sanic lets pass, as an answer 400; None if it is in order."""
    if _FORBIDDEN_IN_HEAD.search(request.head):
        return HttpError(400, "Malformed request head", "malformed_request")
    if request.version == "1.1" and len(request.headers.getall("host", ())) != 1:
        return HttpError(400, "Exactly one Host header is needed", "malformed_request")
    return None
