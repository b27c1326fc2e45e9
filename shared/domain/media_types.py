"""Media types: their grammar, names of saved files, and which type a fetched object has.

Only a valid media type (RFC 9110 section 8.3.1) may reach a Content-Type header.
"""

from __future__ import annotations

import re

import filetype

from distributor_node.shared.domain.errors import InvalidInput

_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED = r'"(?:[\t !#-\[\]-~]|\\[\t -~])*"'
_MEDIA_TYPE = re.compile(rf"{_NAME}/{_NAME}(?:[ \t]*;[ \t]*(?:{_NAME}=(?:{_NAME}|{_QUOTED}))?)*", re.ASCII)
_MAX_LENGTH = 200


def parse_media_type(text: str) -> str:
    """Check `type/subtype` with any parameters. Raises InvalidInput."""
    trimmed = text.strip(" \t")
    if len(trimmed) > _MAX_LENGTH or not _MEDIA_TYPE.fullmatch(trimmed):
        raise InvalidInput(f"media type: expected type/subtype such as image/png, got {trimmed[:40]!r}")
    return trimmed


def media_type_or_none(text: str | None) -> str | None:
    """Return the media type of a server's header. None: there is none, or it is malformed."""
    if text is None:
        return None
    try:
        return parse_media_type(text)
    except InvalidInput:
        return None


# Names of saved files.

_EXTENSIONS = {
    "image/jpeg": "jpg", "image/png": "png", "image/apng": "png", "image/gif": "gif", "image/webp": "webp",
    "image/avif": "avif", "image/heic": "heic", "image/tiff": "tiff", "image/bmp": "bmp", "image/svg+xml": "svg",
    "image/x-icon": "ico", "image/vnd.microsoft.icon": "ico",
    "video/mp4": "mp4", "video/x-m4v": "m4v", "video/quicktime": "mov", "video/webm": "webm",
    "video/x-matroska": "mkv", "video/x-msvideo": "avi", "video/avi": "avi", "video/3gpp": "3gp", "video/ogg": "ogv",
    "video/mp2t": "ts", "application/vnd.apple.mpegurl": "m3u8", "application/x-mpegurl": "m3u8",
    "application/dash+xml": "mpd",
    "audio/mp4": "m4a", "audio/x-m4a": "m4a", "audio/m4a": "m4a", "audio/mpeg": "mp3", "audio/ogg": "ogg",
    "application/ogg": "ogg", "audio/opus": "opus", "audio/webm": "webm", "audio/aac": "aac", "audio/flac": "flac",
    "audio/x-flac": "flac", "audio/wav": "wav", "audio/x-wav": "wav", "audio/wave": "wav", "audio/vnd.wave": "wav",
    "text/plain": "txt", "text/html": "html", "text/css": "css", "text/csv": "csv", "text/vtt": "vtt",
    "text/srt": "srt", "text/x-srt": "srt", "text/x-subrip": "srt", "application/x-subrip": "srt",
    "text/ttml": "ttml", "text/x-ssa": "ssa", "text/x-ass": "ass", "text/x-sami": "smi", "text/xml": "xml",
    "text/markdown": "md", "application/xml": "xml", "application/json": "json", "application/pdf": "pdf",
    "application/zip": "zip", "application/gzip": "gz", "application/epub+zip": "epub",
}  # fmt: skip
_KNOWN_EXTENSIONS = tuple(f".{extension}" for extension in {*_EXTENSIONS.values(), "jpeg", "htm", "tif"})
_FORBIDDEN_IN_NAMES = re.compile(r'[\\/:*?"<>|]')
_MAX_NAME = 150  # characters
# Opened as a document, these run scripts, or are another program's input. An <img> of an SVG is not affected.
_DOCUMENTS = frozenset({"text/html", "text/xml", "application/xml", "application/pdf"})


def essence_of(media_type: str | None) -> str:
    """Return the media type in lower case without its parameters. Empty: there is none."""
    return (media_type or "").partition(";")[0].strip(" \t").lower()


def is_document(media_type: str | None) -> bool:
    """Whether a browser that opens it makes more of it than a picture or a player: HTML, XML, SVG, PDF."""
    essence = essence_of(media_type)
    return essence in _DOCUMENTS or essence.endswith("+xml")


def file_name(name: str, media_type: str | None) -> str:
    """Return a name that any system can save a file under, with the extension of the media type. Empty: none is left.

    A name that has a known extension keeps it. Control and format characters are dropped, among them those that change
    the direction of text and so disguise an extension.
    """
    cleaned = _FORBIDDEN_IN_NAMES.sub("_", "".join(filter(str.isprintable, name))).strip(" .")[:_MAX_NAME]
    extension = _EXTENSIONS.get(essence_of(media_type))
    if not cleaned or extension is None or cleaned.lower().endswith(_KNOWN_EXTENSIONS):
        return cleaned
    return f"{cleaned}.{extension}"


# Sniffing: the first bytes decide where they are unambiguous, and the catalog decides otherwise.

SNIFF_BYTES = 8192
"""How many bytes at the beginning of an object are inspected."""

DEFAULT_MEDIA_TYPE = "application/octet-stream"

# Types that the first bytes identify beyond doubt, and that a browser does not execute. Omitted are types that two or
# three bytes identify, with which other files begin too (MP3, AAC, BMP, icons), and containers that do not say what
# they contain (ZIP is also EPUB and DOCX). For those, the catalog decides.
_UNAMBIGUOUS = frozenset({
    "image/jpeg", "image/png", "image/apng", "image/gif", "image/webp", "image/avif", "image/heic", "image/tiff",
    "video/mp4", "video/x-m4v", "video/quicktime", "video/webm", "video/x-matroska", "video/x-msvideo", "video/3gpp",
    "audio/mp4", "audio/ogg", "audio/x-flac", "audio/x-wav", "application/pdf",
})  # fmt: skip

# Types with the same first bytes. Within a family, the catalog is more precise.
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
# Bytes that do not occur in text (WHATWG MIME Sniffing, section 3 "binary data byte").
_BINARY = frozenset({*range(0x09), 0x0B, *range(0x0E, 0x1B), *range(0x1C, 0x20)})


def detect_media_type(stated: str | None, head: bytes) -> str:
    """Return the media type of an object.

    `stated`: the catalog's value, if it has one. `head`: the first SNIFF_BYTES bytes, or all there are. Text (SVG,
    subtitles, JSON) is never sniffed, because text may begin with anything.
    """
    cataloged = media_type_or_none(stated)
    sniffed = None if _BINARY.isdisjoint(head) else _sniff(head)
    if sniffed is None or (cataloged is not None and _same_family(cataloged, sniffed)):
        return cataloged or DEFAULT_MEDIA_TYPE
    return sniffed


def _sniff(head: bytes) -> str | None:
    # filetype reads bytes at fixed positions, and some of its matchers expect a minimum length.
    kind = filetype.guess(head) if len(head) >= 64 else None
    return kind.mime if kind is not None and kind.mime in _UNAMBIGUOUS else None


def _same_family(cataloged: str, sniffed: str) -> bool:
    essence = essence_of(cataloged)
    return essence == sniffed or any({essence, sniffed} <= family for family in _FAMILIES)
