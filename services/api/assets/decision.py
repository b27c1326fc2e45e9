"""What to answer, and from where: the pure part of the asset path."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from distributor_node.shared.domain.conditionals import Conditions, Verdict, evaluate, range_applies
from distributor_node.shared.domain.objects import ContentHash, MediaObject, ObjectId, StoredRecord
from distributor_node.shared.domain.ranges import ByteRange, Unsatisfiable, parse_range
from distributor_node.shared.ports.state_store import Fetch, FetchPhase, ObjectStatus

UNVERIFIED_TAIL_BYTES = 64 * 1024
"""Bytes at an object's end that nobody gets before all of it is verified."""

_LIVE = (FetchPhase.CLAIMED, FetchPhase.QUEUED, FetchPhase.FETCHING)


@dataclass(frozen=True, slots=True)
class AssetRequest:
    """What a request asks of an object. Header values as they came, None where there was none."""

    is_head: bool
    conditions: Conditions
    range_header: str | None = None
    if_range: str | None = None


@dataclass(frozen=True, slots=True)
class Representation:
    """An object as its headers describe it. `last_modified` is known of complete objects only (POSIX seconds)."""

    object_id: ObjectId
    size: int | None
    etag: str
    content_hash: ContentHash | None
    media_type: str | None
    last_modified: int | None = None

    @classmethod
    def from_record(cls, record: StoredRecord, *, complete: bool) -> Representation:
        return cls(
            record.object_id,
            record.size,
            record.etag,
            record.content_hash,
            record.media_type,
            record.stored_at if complete else None,
        )

    @classmethod
    def from_object(cls, media_object: MediaObject) -> Representation:
        return cls(
            media_object.object_id,
            media_object.size,
            media_object.etag,
            media_object.content_hash,
            media_object.media_type,
        )


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes to send, `first` to `last`, both included; `last` is None while nobody knows the size, and
    `first - 1` for an empty object. `partial`: the answer is a 206. `size` is that of the whole object."""

    first: int
    last: int | None
    size: int | None
    partial: bool = False

    @property
    def length(self) -> int | None:
        return None if self.last is None else self.last - self.first + 1

    @property
    def whole(self) -> bool:
        """True if these are all bytes of the object, so that they can be verified by themselves."""
        return self.first == 0 and self.reaches_end

    @property
    def reaches_end(self) -> bool:
        return self.last is None or self.size is None or self.last == self.size - 1

    @property
    def content_range(self) -> str:
        """The value of the Content-Range header of a 206. ValueError while nobody knows the size."""
        if self.last is None or self.size is None:
            raise ValueError("a part of an object of unknown size")
        return ByteRange(self.first, self.last).content_range(self.size)


class PreconditionResult(Enum):
    """Preconditions that end the request without content."""

    NOT_MODIFIED = auto()
    PRECONDITION_FAILED = auto()


def select_range(
    asset_request: AssetRequest, representation: Representation
) -> Span | Unsatisfiable | PreconditionResult:
    """Preconditions first, then the range (RFC 9110 section 13.2.2). A range of a HEAD is ignored (section 14.2), and
    so is one of an object whose size nobody knows."""
    verdict = evaluate(asset_request.conditions, representation.etag, representation.last_modified)
    if verdict is Verdict.NOT_MODIFIED:
        return PreconditionResult.NOT_MODIFIED
    if verdict is Verdict.PRECONDITION_FAILED:
        return PreconditionResult.PRECONDITION_FAILED
    size = representation.size
    if size is None:
        return Span(0, None, None)
    if not asset_request.is_head and range_applies(
        asset_request.if_range, representation.etag, representation.last_modified
    ):
        found = parse_range(asset_request.range_header, size)
        if isinstance(found, Unsatisfiable):
            return found
        if found is not None:
            return Span(found.first, found.last, size, partial=True)
    return Span(0, size - 1, size)


def live_fetch(object_status: ObjectStatus) -> Fetch | None:
    """The fetch that is under way, if there is one; a parked one is not."""
    fetch = object_status.fetch
    return fetch if fetch is not None and fetch.phase in _LIVE else None


def may_resume(object_status: ObjectStatus) -> bool:
    """True while a follower can hope for more bytes: a fetch is live, or parked with its reservation."""
    return object_status.fetch is not None and object_status.failure is None


def is_cacheable(size: int | None, largest_cached_size: int) -> bool:
    """True for an object that is fetched; others are proxied."""
    return size is not None and size <= largest_cached_size


def is_far(first: int, on_disk: int, far_distance: int) -> bool:
    """True if waiting for byte `first` would take too long: a player asks for the end of an MP4 first."""
    return first > on_disk + far_distance


def sendable_end(span: Span, on_disk: int, *, verified: bool) -> int:
    """Where the bytes end (exclusive) that may be sent now from a growing file. Before verification an answer that
    reaches the object's end stops UNVERIFIED_TAIL_BYTES bytes short of it."""
    size, last = span.size, span.last
    if size is None or last is None:
        return on_disk if verified else 0
    end = min(on_disk, last + 1)
    if verified or not span.reaches_end:
        return end
    return min(end, max(0, size - UNVERIFIED_TAIL_BYTES))
