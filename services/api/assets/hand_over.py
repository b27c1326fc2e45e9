"""Hits whose bytes a web server in front sends by itself, from the shared volume (nginx's X-Accel-Redirect).

The answer says where the file lies, and carries the headers as always; nginx adds the body. It judges ranges by itself,
and would judge preconditions by its own idea of the file's validators: only requests without preconditions are handed
over, and a range only if it is one that both read alike.
"""

from __future__ import annotations

from collections.abc import Mapping

from services.api.assets.decision import AssetRequest, Span
from shared.adapters.volume.layout import object_path
from shared.domain.conditionals import Conditions
from shared.domain.objects import ObjectId

ACCEL_REQUEST_HEADER, ACCEL_RESPONSE_HEADER = "x-sendfile-type", "X-Accel-Redirect"
"""What the web server in front adds to a request that it can take over; no other is handed over, since its client would
be left without a body."""

_NO_CONDITIONS = Conditions()
# nginx states these of what it sends; Accept-Ranges of whole objects alone, and of those twice if we say it too.
_BODY_HEADERS = frozenset({"content-length", "content-range"})
_FULL_BODY_HEADERS = _BODY_HEADERS | {"accept-ranges"}


class AccelRedirect:
    """`prefix`: of the internal location through which the web server in front sees the volume; "": nothing is
    handed over."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.rstrip("/")

    def applies(self, asset_request: AssetRequest, span: Span, offer: str | None) -> bool:
        """Whether the bytes of this answer may be sent by whoever made this `offer` (the header's value)."""
        return (
            bool(self._prefix)
            and offer == ACCEL_RESPONSE_HEADER
            and not asset_request.is_head
            and asset_request.conditions == _NO_CONDITIONS
            and asset_request.if_range is None
            and (asset_request.range_header is None or span.partial)
        )

    def headers(self, object_id: ObjectId, span: Span, headers: Mapping[str, str]) -> dict[str, str]:
        """The headers of an answer without its body, with the place of the body."""
        left_to_nginx = _BODY_HEADERS if span.partial else _FULL_BODY_HEADERS
        remaining = {name: value for name, value in headers.items() if name.lower() not in left_to_nginx}
        return {**remaining, ACCEL_RESPONSE_HEADER: f"{self._prefix}/{object_path(object_id)}"}
