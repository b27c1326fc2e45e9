"""Checks a source's status and headers before any byte of its body is used. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from distributor_node.shared.domain.errors import SourceRefused, SourceWrong, VersionChanged
from distributor_node.shared.domain.media_types import media_type_or_none
from distributor_node.shared.domain.ranges import ByteRange, parse_content_range
from distributor_node.shared.domain.version import (
    NO_VALIDATORS,
    UNKNOWN_VERSION,
    Comparison,
    Validators,
    Version,
)

MAX_SKIP = 8 * 1024 * 1024
"""If a source ignores ranges, at most so many bytes are read and skipped to reach the range."""


@dataclass(frozen=True, slots=True)
class BodyPlan:
    """Which bytes of the body to use."""

    status: Literal[200, 206]  # 200: the whole object, 206: a range
    first: int  # position of the first byte in the object
    length: int | None  # bytes to use; None: all there are
    total: int | None  # size of the whole object; None: unknown
    media_type: str | None
    validators: Validators = NO_VALIDATORS
    skip: int = 0  # bytes to discard at the beginning
    to_the_end: bool = True  # the body must end after `length` bytes


@dataclass(frozen=True, slots=True)
class Expected:
    """What the response must be, as far as known. Of the version, the content hash is not checked here."""

    version: Version = UNKNOWN_VERSION
    must_match: bool = False
    """The response must prove to be of this version, because its bytes follow other bytes of it."""


def validate_response(
    status: int,
    headers: Mapping[str, str],
    byte_range: ByteRange | None,
    expected: Expected,
) -> BodyPlan:
    """Decide what to do with the body. `headers` has case-insensitive names.

    Raises:
        SourceRefused: the response does not have the object.
        VersionChanged: the response has another version of the object.
        SourceWrong: the response contradicts the request or the catalog.
    """
    if status not in (200, 206):
        raise SourceRefused(f"responded {status}", status)
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise SourceWrong(f"Content-Encoding: expected identity, got {encoding[:20]}")
    validators = Validators.from_headers(headers)
    _check_version(validators, expected)
    expected_size = expected.version.size
    media_type = media_type_or_none(headers.get("Content-Type"))
    body_length = _content_length(headers)
    if status == 206:
        if byte_range is None:
            raise SourceWrong("status: expected 200 for a request without a range, got 206")
        plan = _plan_range(headers, byte_range, expected_size, body_length, media_type)
        return replace(plan, validators=validators)
    if body_length is not None and expected_size is not None and body_length != expected_size:
        raise VersionChanged(f"Content-Length: expected {expected_size}, got {body_length}", of_size=True)
    total = expected_size if expected_size is not None else body_length
    if byte_range is None:
        return BodyPlan(200, 0, total, total, media_type, validators)
    return replace(_plan_skip(byte_range, total, media_type), validators=validators)


def _check_version(validators: Validators, expected: Expected) -> None:
    """Raise VersionChanged for another version, or for one that cannot be proved to be the expected one."""
    version, received = expected.version, Version(None, validators)
    if version.content_hash is not None:
        return
    if version.compare(received) is Comparison.DIFFERENT:
        raise VersionChanged(f"validators: expected {version.validators}, got {validators}")
    if expected.must_match and not version.is_joinable_with(received):
        raise VersionChanged(f"validators: expected a proof of {version.validators}, got {validators}")


def _plan_range(
    headers: Mapping[str, str],
    requested: ByteRange,
    expected_size: int | None,
    body_length: int | None,
    media_type: str | None,
) -> BodyPlan:
    stated = headers.get("Content-Range", "")
    parsed = parse_content_range(stated)
    if parsed is None:
        raise SourceWrong(f"Content-Range: expected a byte range, got {stated[:60]!r}")
    given, total = parsed
    if expected_size is not None and total is not None and total != expected_size:
        raise VersionChanged(f"Content-Range: expected a size of {expected_size}, got {total}", of_size=True)
    # If the size is unknown, the requested range may extend beyond the end of the object.
    clamped = (
        expected_size is None and given.first == requested.first and total == given.last + 1 <= requested.last
    )
    if given != requested and not clamped:
        raise SourceWrong(
            f"Content-Range: expected {requested.first}-{requested.last}, got {given.first}-{given.last}"
        )
    if body_length is not None and body_length != given.length:
        raise SourceWrong(f"Content-Length: expected {given.length} for the range, got {body_length}")
    return BodyPlan(206, given.first, given.length, expected_size if total is None else total, media_type)


def _plan_skip(requested: ByteRange, total: int | None, media_type: str | None) -> BodyPlan:
    if requested.first > MAX_SKIP:
        raise SourceWrong(
            f"range ignored: it begins at {requested.first}, and at most {MAX_SKIP} bytes are skipped"
        )
    if total is not None and requested.first >= total:
        raise SourceWrong(f"range {requested.first}-{requested.last} is beyond the end of {total} bytes")
    last = requested.last if total is None else min(requested.last, total - 1)
    return BodyPlan(
        206,
        requested.first,
        last - requested.first + 1,
        total,
        media_type,
        skip=requested.first,
        to_the_end=last + 1 == total,
    )


def _content_length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("Content-Length")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise SourceWrong(f"Content-Length: expected a number, got {text[:40]!r}")
    return int(text)
