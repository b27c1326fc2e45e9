"""Versions: which content of an object some bytes belong to. Bytes of two versions are never joined.

A content hash decides by itself. Without one, a version is known by what its source says of it (RFC 9110 section 8.8):
a strong entity tag changes with every byte; a weak one and a date may stay the same although bytes have changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from distributor_node.shared.domain.conditionals import parse_http_date

if TYPE_CHECKING:
    from distributor_node.shared.domain.objects import ContentHash

_MAX_ETAG = 256  # characters; it is part of a record of limited size
_ETAG = re.compile(r'(?:W/)?"[!#-~]*"', re.ASCII)
_WEAK = "W/"


@dataclass(frozen=True, slots=True)
class Validators:
    """What a source says to tell one content of an object from another."""

    etag: str | None = None  # with its quotes, and `W/` before a weak one
    last_modified: int | None = None  # POSIX seconds

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> Validators:
        """Read ETag and Last-Modified. A malformed one counts as missing. Names are case-insensitive."""
        return cls(etag_or_none(headers.get("ETag")), _date_or_none(headers.get("Last-Modified")))

    @property
    def strong_etag(self) -> str | None:
        """The entity tag, if equal tags mean equal bytes."""
        return None if self.etag is None or self.etag.startswith(_WEAK) else self.etag


NO_VALIDATORS = Validators()


def etag_or_none(text: str | None) -> str | None:
    """Return an entity tag (RFC 9110 section 8.8.3). None: there is none, or it cannot be passed on."""
    trimmed = (text or "").strip(" \t")
    return trimmed if len(trimmed) <= _MAX_ETAG and _ETAG.fullmatch(trimmed) else None


def _date_or_none(text: str | None) -> int | None:
    return None if text is None else parse_http_date(text)


class Comparison(Enum):
    """Whether two descriptions are of the same bytes."""

    SAME = auto()
    DIFFERENT = auto()
    UNKNOWN = auto()  # nothing contradicts it, and nothing proves it


@dataclass(frozen=True, slots=True)
class Version:
    """All that is known of one content of an object: its hash, or else what its source says, and its size."""

    content_hash: ContentHash | None = None
    validators: Validators = NO_VALIDATORS
    size: int | None = None

    @property
    def is_strong(self) -> bool:
        """Whether bytes of another response can be proved to be of this version."""
        return self.content_hash is not None or self.validators.strong_etag is not None

    @property
    def if_range(self) -> str | None:
        """The value of If-Range in a request for a range of this version. None: the source knows no strong validator.

        With a content hash there is none either: each source may have a tag of its own, and the hash is checked.
        """
        return None if self.content_hash is not None else self.validators.strong_etag

    def compare(self, other: Version) -> Comparison:
        """Compare two versions of one object. Unknown parts prove nothing."""
        if None not in (self.size, other.size) and self.size != other.size:
            return Comparison.DIFFERENT
        if self.content_hash is not None and other.content_hash is not None:
            return Comparison.SAME if self.content_hash == other.content_hash else Comparison.DIFFERENT
        mine, theirs = self.validators, other.validators
        if mine.etag is not None and theirs.etag is not None:
            if mine.etag.removeprefix(_WEAK) != theirs.etag.removeprefix(_WEAK):
                return Comparison.DIFFERENT
            if mine.strong_etag is not None and theirs.strong_etag is not None:
                return Comparison.SAME
        dates = (mine.last_modified, theirs.last_modified)
        return Comparison.DIFFERENT if None not in dates and dates[0] != dates[1] else Comparison.UNKNOWN

    def is_joinable_with(self, other: Version) -> bool:
        """Whether bytes of the other response may follow bytes of this version."""
        return self.content_hash is not None or self.compare(other) is Comparison.SAME


UNKNOWN_VERSION = Version()
