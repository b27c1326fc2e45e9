"""Media types: the grammar of RFC 9110 section 8.3.1, so that nothing else ever reaches a Content-Type header."""

from __future__ import annotations

import re

from shared.domain.errors import InvalidInput

_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED = r'"(?:[\t !#-\[\]-~]|\\[\t -~])*"'
_MEDIA_TYPE = re.compile(rf"{_NAME}/{_NAME}(?:[ \t]*;[ \t]*(?:{_NAME}=(?:{_NAME}|{_QUOTED}))?)*", re.ASCII)
_MAX_LENGTH = 200


def parse_media_type(text: str) -> str:
    """Check `type/subtype` with any parameters; raise InvalidInput otherwise."""
    trimmed = text.strip(" \t")
    if len(trimmed) > _MAX_LENGTH or not _MEDIA_TYPE.fullmatch(trimmed):
        raise InvalidInput("malformed media type: want type/subtype, such as image/png")
    return trimmed


def media_type_or_none(text: str | None) -> str | None:
    """The media type that a server's header states, None if there is none or it is malformed."""
    if text is None:
        return None
    try:
        return parse_media_type(text)
    except InvalidInput:
        return None
