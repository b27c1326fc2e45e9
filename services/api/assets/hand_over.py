"""Hits whose bytes a web server in front sends by itself, from the shared volume (nginx's X-Accel-Redirect).

The answer says where the file lies, and carries the headers as always; nginx adds the body. It judges ranges by itself,
and would judge preconditions by its own idea of the file's validators: only requests without preconditions are handed
over, and a range only if it is one that both read alike.
"""

from __future__ import annotations

from collections.abc import Mapping

from services.api.assets.decision import Asked, Span
from shared.adapters.volume.layout import object_path
from shared.domain.conditionals import Conditions
from shared.domain.objects import ObjectId

OFFER, KIND = "x-sendfile-type", "X-Accel-Redirect"
"""What the web server in front adds to a request that it can take over; no other is handed over, since its client would
be left without a body."""

_NO_CONDITIONS = Conditions()
# nginx states these of what it sends; Accept-Ranges of whole objects alone, and of those twice if we say it too.
_OF_THE_BODY = frozenset({"content-length", "content-range"})
_OF_THE_WHOLE = _OF_THE_BODY | {"accept-ranges"}


class HandOver:
    """`prefix`: of the internal location through which the web server in front sees the volume; "": nothing is
    handed over."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.rstrip("/")

    def suits(self, asked: Asked, span: Span, offer: str | None) -> bool:
        """Whether the bytes of this answer may be sent by whoever made this `offer` (the header's value)."""
        return (
            bool(self._prefix)
            and offer == KIND
            and not asked.head
            and asked.conditions == _NO_CONDITIONS
            and asked.if_range is None
            and (asked.range_header is None or span.partial)
        )

    def headers(self, object_id: ObjectId, span: Span, headers: Mapping[str, str]) -> dict[str, str]:
        """The headers of an answer without its body, with the place of the body."""
        left_to_nginx = _OF_THE_BODY if span.partial else _OF_THE_WHOLE
        kept = {name: value for name, value in headers.items() if name.lower() not in left_to_nginx}
        return {**kept, KIND: f"{self._prefix}/{object_path(object_id)}"}
