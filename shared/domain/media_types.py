"""Media types: the grammar of RFC 9110 section 8.3.1, so that nothing else ever reaches a Content-Type header."""

from __future__ import annotations

import re

import filetype

from distributor_node.shared.domain.errors import InvalidInput

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


# The media type of a fetched object: from its first bytes where they say it for sure, else the catalog's.

SNIFF_BYTES = 8192
"""How much of an object's beginning is looked at."""

DEFAULT_MEDIA_TYPE = "application/octet-stream"

# What the first bytes say beyond doubt, and nothing that a browser runs. What is left out is either told from two or
# three bytes that other files begin with too (MP3, AAC, BMP, icons), or is a container that says little of what is
# within (ZIP is also EPUB and DOCX): there the catalog knows better.
_CERTAIN = frozenset({
    "image/jpeg", "image/png", "image/apng", "image/gif", "image/webp", "image/avif", "image/heic", "image/tiff",
    "video/mp4", "video/x-m4v", "video/quicktime", "video/webm", "video/x-matroska", "video/x-msvideo", "video/3gpp",
    "audio/mp4", "audio/ogg", "audio/x-flac", "audio/x-wav", "application/pdf",
})  # fmt: skip

# Types that share their first bytes: the catalog's word is finer than what can be seen.
_FAMILIES = (
    frozenset(
        {"video/mp4", "audio/mp4", "video/x-m4v", "audio/x-m4a", "audio/m4a", "video/quicktime", "video/3gpp"}
    ),
    frozenset({"video/webm", "audio/webm", "video/x-matroska", "audio/x-matroska"}),
    frozenset({"audio/ogg", "video/ogg", "application/ogg", "audio/opus"}),
    frozenset({"image/png", "image/apng", "image/vnd.mozilla.apng"}),
    frozenset({"audio/x-flac", "audio/flac"}),
    frozenset({"audio/x-wav", "audio/wav", "audio/wave", "audio/vnd.wave"}),
    frozenset({"video/x-msvideo", "video/avi", "video/vnd.avi"}),
    frozenset({"image/heic", "image/heif", "image/avif"}),
)
# Bytes that no text has (WHATWG MIME Sniffing, section 3 "binary data byte").
_BINARY = frozenset({*range(0x09), 0x0B, *range(0x0E, 0x1B), *range(0x1C, 0x20)})


def detect_media_type(stated: str | None, head: bytes) -> str:
    """`stated`: the catalog's word, if it has one; `head`: the object's first SNIFF_BYTES bytes, or all there are.

    Text (SVG, subtitles, JSON) is never sniffed: any word may stand at its beginning.
    """
    catalogs = media_type_or_none(stated)
    seen = None if _BINARY.isdisjoint(head) else _sniffed(head)
    if seen is None or (catalogs is not None and _same_family(catalogs, seen)):
        return catalogs or DEFAULT_MEDIA_TYPE
    return seen


def _sniffed(head: bytes) -> str | None:
    # The library looks at single bytes at fixed places, and some of its matchers expect a few to be there.
    kind = filetype.guess(head) if len(head) >= 64 else None
    return kind.mime if kind is not None and kind.mime in _CERTAIN else None


def _same_family(catalogs: str, seen: str) -> bool:
    essence = catalogs.partition(";")[0].rstrip(" \t").lower()
    return essence == seen or any({essence, seen} <= family for family in _FAMILIES)
