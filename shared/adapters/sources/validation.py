"""What a source's headers must say before any of its bytes is believed. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from distributor_node.shared.domain.errors import SourceRefused, SourceWrong
from distributor_node.shared.domain.media_types import media_type_or_none
from distributor_node.shared.domain.ranges import ByteRange, parse_content_range

MAX_SKIP = 8 * 1024 * 1024
"""Bytes that are read and thrown away to reach a range, where a source ignores ranges. Beyond, another is asked."""


@dataclass(frozen=True, slots=True)
class BodyPlan:
    """What to do with the body: pass over `skip` bytes, hand out `length` (None: all there is), and, if `to_the_end`,
    see that nothing follows."""

    status: Literal[200, 206]
    first: int
    length: int | None
    total: int | None
    media_type: str | None
    skip: int = 0
    to_the_end: bool = True


def validate_response(
    status: int, headers: Mapping[str, str], byte_range: ByteRange | None, expected_size: int | None
) -> BodyPlan:
    """Raise SourceRefused for an answer without the object, SourceWrong for one that contradicts the request or the
    catalog. `headers` has case-insensitive names."""
    if status not in (200, 206):
        raise SourceRefused(f"answered {status}", status)
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise SourceWrong(f"content encoded as {encoding[:20]}")
    media_type = media_type_or_none(headers.get("Content-Type"))
    body_length = _content_length(headers)
    if status == 206:
        if byte_range is None:
            raise SourceWrong("a range where the whole object was asked for")
        return _plan_range(headers, byte_range, expected_size, body_length, media_type)
    if body_length is not None and expected_size is not None and body_length != expected_size:
        raise SourceWrong(f"{body_length} bytes instead of {expected_size}")
    total = expected_size if expected_size is not None else body_length
    if byte_range is None:
        return BodyPlan(200, 0, total, total, media_type)
    return _plan_skip(byte_range, total, media_type)


def _plan_range(
    headers: Mapping[str, str],
    asked: ByteRange,
    expected_size: int | None,
    body_length: int | None,
    media_type: str | None,
) -> BodyPlan:
    stated = headers.get("Content-Range", "")
    parsed = parse_content_range(stated)
    if parsed is None:
        raise SourceWrong(f"no usable Content-Range: {stated[:60]!r}")
    given, total = parsed
    if expected_size is not None and total != expected_size:
        raise SourceWrong(f"a range of {total} bytes instead of {expected_size}")
    # Only where nobody knows the size may the asked range reach beyond the object.
    clamped = expected_size is None and given.first == asked.first and total == given.last + 1 <= asked.last
    if given != asked and not clamped:
        raise SourceWrong(f"the range {given.first}-{given.last} instead of {asked.first}-{asked.last}")
    if body_length is not None and body_length != given.length:
        raise SourceWrong(f"{body_length} bytes for a range of {given.length}")
    return BodyPlan(206, given.first, given.length, total, media_type)


def _plan_skip(asked: ByteRange, total: int | None, media_type: str | None) -> BodyPlan:
    if asked.first > MAX_SKIP:
        raise SourceWrong("the range was ignored, and it begins too far on to pass over the rest")
    if total is not None and asked.first >= total:
        raise SourceWrong(f"{total} bytes do not hold the range {asked.first}-{asked.last}")
    last = asked.last if total is None else min(asked.last, total - 1)
    return BodyPlan(
        206,
        asked.first,
        last - asked.first + 1,
        total,
        media_type,
        skip=asked.first,
        to_the_end=last + 1 == total,
    )


def _content_length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("Content-Length")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise SourceWrong("malformed Content-Length")
    return int(text)
