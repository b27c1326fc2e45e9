"""Pure decisions of the asset path: preconditions, ranges, and which bytes may be sent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto

from distributor_node.shared.domain.conditionals import (
    NO_VALIDATORS,
    ByteRange,
    Conditions,
    Unsatisfiable,
    Validators,
    Verdict,
    Version,
    evaluate,
    parse_range,
    range_applies,
)
from distributor_node.shared.domain.http_caching import Freshness, unknown_freshness
from distributor_node.shared.domain.objects import (
    ContentHash,
    MediaObject,
    ObjectId,
    StoredRecord,
    entity_tag,
)
from distributor_node.shared.ports.state_store import Fetch, FetchPhase, ObjectStatus

UNVERIFIED_TAIL_BYTES = 64 * 1024
"""The last bytes of an object, which no client gets before the hash of the whole object is verified."""

MIN_FETCHED_AHEAD = 4 * 1024 * 1024
"""Bytes of the smallest object of which a part is fetched before those in front of it."""

_LIVE = (FetchPhase.CLAIMED, FetchPhase.QUEUED, FetchPhase.FETCHING)


@dataclass(frozen=True, slots=True)
class AssetRequest:
    """The parts of a request that decide its response. Header values as received, None for absent headers."""

    is_head: bool
    conditions: Conditions
    range_header: str | None = None
    if_range: str | None = None
    sendfile_type: str | None = None  # X-Sendfile-Type, from a web server in front
    only_if_cached: bool = False
    no_cache: bool = False


@dataclass(frozen=True, slots=True)
class Representation:
    """An object as its response headers describe it."""

    object_id: ObjectId
    size: int | None
    etag: str | None
    content_hash: ContentHash | None
    media_type: str | None
    last_modified: int | None = (
        None  # POSIX seconds: the source's, else (of a complete object) when it was stored
    )
    validators: Validators = NO_VALIDATORS
    name: str | None = None  # under which people know it, for saved files
    freshness: Freshness | None = None  # of an object of an HTTP origin, as far as known
    not_stored: bool = False  # its source forbids to store it

    @classmethod
    def of_hit(cls, record: StoredRecord, *, http_caching: bool) -> Representation:
        """`http_caching`: the object is one of an HTTP origin, and may be stale."""
        freshness = freshness_in_use(record) if http_caching else None
        return replace(cls.from_record(record, complete=True), freshness=freshness)

    @classmethod
    def from_record(cls, record: StoredRecord, *, complete: bool) -> Representation:
        last_modified = record.validators.last_modified
        return cls(
            record.object_id,
            None if record.growing else record.size,
            record.etag,
            record.content_hash,
            record.media_type,
            last_modified if last_modified is not None or not complete else record.stored_at,
            record.validators,
            record.name,
            record.freshness,
        )

    @classmethod
    def from_object(cls, media_object: MediaObject) -> Representation:
        return cls(
            media_object.object_id,
            media_object.size,
            media_object.etag,
            media_object.content_hash,
            media_object.media_type,
            media_object.validators.last_modified,
            media_object.validators,
            media_object.name,
            not_stored=media_object.not_stored is not None,
        )

    @property
    def version(self) -> Version:
        return Version(self.content_hash, self.validators, self.size)

    @property
    def is_verified_empty(self) -> bool:
        """Whether the hash says that the object has no bytes."""
        return (
            self.content_hash is not None and self.content_hash.hasher().digest() == self.content_hash.digest
        )

    def with_validators(self, validators: Validators, freshness: Freshness | None = None) -> Representation:
        """The same object as a source describes it in the response that is passed on."""
        return replace(
            self,
            etag=entity_tag(self.content_hash, validators),
            last_modified=validators.last_modified,
            validators=validators,
            freshness=freshness,
        )


def freshness_in_use(record: StoredRecord) -> Freshness | None:
    """Return the freshness of a complete object of an HTTP origin. None: its hash says that it never changes."""
    if record.content_hash is not None:
        return None
    return record.freshness or unknown_freshness(record.stored_at)


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes to send."""

    first: int
    last: int | None  # inclusive; None while the size is unknown; `first - 1` for an empty object
    size: int | None  # of the whole object
    partial: bool = False  # the response is a 206

    @property
    def length(self) -> int | None:
        return None if self.last is None else self.last - self.first + 1

    @property
    def whole(self) -> bool:
        """Whether the span is the whole object, which can be verified by its hash."""
        return self.first == 0 and self.reaches_end

    @property
    def reaches_end(self) -> bool:
        return self.last is None or self.size is None or self.last == self.size - 1

    @property
    def content_range(self) -> str:
        """The Content-Range header of a 206. Raises ValueError while the size is unknown."""
        if self.last is None or self.size is None:
            raise ValueError("Content-Range: the size of the object is unknown")
        return ByteRange(self.first, self.last).content_range(self.size)


class PreconditionResult(Enum):
    """Preconditions that end the request without content."""

    NOT_MODIFIED = auto()
    PRECONDITION_FAILED = auto()


def select_range(
    asset_request: AssetRequest, representation: Representation
) -> Span | Unsatisfiable | PreconditionResult:
    """Evaluate preconditions, then the range (RFC 9110 section 13.2.2).

    A range is ignored for a HEAD (section 14.2) and while the object's size is unknown.
    """
    verdict = evaluate(asset_request.conditions, representation.etag, representation.last_modified)
    if verdict is Verdict.NOT_MODIFIED:
        return PreconditionResult.NOT_MODIFIED
    if verdict is Verdict.PRECONDITION_FAILED:
        return PreconditionResult.PRECONDITION_FAILED
    size = representation.size
    if size is None:
        return Span(0, None, None)
    if not asset_request.is_head and range_applies(
        asset_request.if_range,
        representation.etag,
        representation.last_modified,
        immutable=representation.content_hash is not None,
    ):
        found = parse_range(asset_request.range_header, size)
        if isinstance(found, Unsatisfiable):
            return found
        if found is not None:
            return Span(found.first, found.last, size, partial=True)
    return Span(0, size - 1, size)


def live_fetch(object_status: ObjectStatus) -> Fetch | None:
    """Return the fetch in progress, if there is one. A parked fetch is not in progress."""
    fetch = object_status.fetch
    return fetch if fetch is not None and fetch.phase in _LIVE else None


def may_resume(object_status: ObjectStatus) -> bool:
    """Whether more bytes may arrive: a fetch is in progress, or parked with its reservation."""
    return object_status.fetch is not None and object_status.failure is None


def is_cacheable(media_object: MediaObject, largest_cached_size: int) -> bool:
    """Whether the object is fetched into the cache. Others are proxied.

    One of unknown length is, until it turns out to be too large. With a content hash, its catalog knows the size.
    """
    if media_object.not_stored is not None:
        return False
    if media_object.size is None:
        return media_object.content_hash is None
    return media_object.size <= largest_cached_size


def is_far(first: int, on_disk: int, far_distance: int) -> bool:
    """Whether byte `first` is too far ahead to wait for, at any rate. Players request the end of an MP4 first."""
    return first > on_disk + far_distance


def is_fetched_ahead(span: Span, far_distance: int) -> bool:
    """Whether a fetch may be asked to fetch the span's first bytes before others.

    Not for the last bytes of an object alone, which cannot be sent before all are verified. Nor for the rest of an
    object from a near byte on, which is verified from its first byte, on disk or from a source.
    """
    if span.size is None or span.length is None or span.size < MIN_FETCHED_AHEAD:
        return False
    return not span.reaches_end or (span.first > far_distance and span.length > UNVERIFIED_TAIL_BYTES)


def bytes_missing(span: Span, on_disk: int) -> int:
    """Return how many bytes a partial file must grow by before the first byte of a range ahead of it can be sent.

    0 for a range that begins within what is on disk: it is not ahead. The object's last bytes need all before them.
    """
    if span.first <= on_disk:
        return 0
    if span.size is not None and span.reaches_end and span.first >= span.size - UNVERIFIED_TAIL_BYTES:
        return span.size - on_disk
    return span.first + 1 - on_disk


def sendable_end(span: Span, on_disk: int, *, verified: bool) -> int:
    """Return the end (exclusive) of the bytes of a partial file that may be sent now.

    Before verification a response that reaches the object's end stops UNVERIFIED_TAIL_BYTES short of it.
    """
    size, last = span.size, span.last
    if size is None or last is None:
        return on_disk  # without a hash: there is nothing to verify
    end = min(on_disk, last + 1)
    if verified or not span.reaches_end:
        return end
    return min(end, max(0, size - UNVERIFIED_TAIL_BYTES))
