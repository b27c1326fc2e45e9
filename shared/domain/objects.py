"""Objects and what is known of them: ids, content hashes, the catalog's word, the record kept on the volume."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, Self
from urllib.parse import urlsplit

import base58
from blake3 import blake3

from distributor_node.shared.domain.errors import InvalidInput

_OBJECT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,127}\Z", re.ASCII)
_BUCKET_ID = re.compile(r"[0-9]{1,20}:[0-9]{1,20}\Z", re.ASCII)
_BLAKE3_MULTIHASH_PREFIX = b"\x1e\x20"
_DIGEST_BYTES = 32


class ObjectId(str):
    """The name of one object: 1 to 128 of the URL's unreserved characters, the first a letter or digit.

    That makes it safe as a file name and in a URL: no separators, no `..`, no control characters.
    """

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raise InvalidInput for anything that cannot be an object's id."""
        if not _OBJECT_ID.match(text):
            raise InvalidInput("malformed object id")
        return cls(text)


def parse_bucket_id(text: str) -> str:
    """Check a bucket id, `family:index` in decimal; raise InvalidInput otherwise."""
    if not _BUCKET_ID.match(text):
        raise InvalidInput(f"malformed bucket id {text[:40]!r}: want family:index, such as 0:1")
    return text


class Hasher(Protocol):
    """What both hash libraries offer."""

    def update(self, data: bytes | bytearray | memoryview, /) -> object: ...
    def digest(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class ContentHash:
    """A 32-byte digest of an object's bytes."""

    algorithm: Literal["blake3", "sha256"]
    digest: bytes

    def __post_init__(self) -> None:
        if len(self.digest) != _DIGEST_BYTES:
            raise InvalidInput(f"a {self.algorithm} digest has {_DIGEST_BYTES} bytes, not {len(self.digest)}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `sha256:<64 hex digits>` or the base58btc text of multihash(blake3-256)."""
        if text.startswith("sha256:"):
            try:
                return cls("sha256", bytes.fromhex(text[7:]))
            except ValueError as error:
                raise InvalidInput("malformed sha256 hash: want 64 hex digits") from error
        if len(text) > 128:
            raise InvalidInput("malformed content hash: too long")
        try:
            raw = base58.b58decode(text)
        except ValueError as error:
            raise InvalidInput("malformed content hash: neither sha256:… nor base58") from error
        if raw[:2] != _BLAKE3_MULTIHASH_PREFIX:
            raise InvalidInput("unknown content hash: want a blake3-256 multihash")
        return cls("blake3", raw[2:])

    def __str__(self) -> str:
        if self.algorithm == "sha256":
            return f"sha256:{self.digest.hex()}"
        return base58.b58encode(_BLAKE3_MULTIHASH_PREFIX + self.digest).decode("ascii")

    def hasher(self) -> Hasher:
        """A fresh hasher of this algorithm."""
        factory: Callable[[], Hasher] = blake3 if self.algorithm == "blake3" else hashlib.sha256
        return factory()


@dataclass(frozen=True, slots=True)
class DistributionBucket:
    """A bucket that holds an object, and the workers who operate it actively."""

    bucket_id: str
    active_workers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class MediaObject:
    """What the catalog says of one object.

    `size` is in bytes; None when the catalog cannot know it (then the object is proxied, never fetched).
    `sources` are whole URLs of the object, best first if the catalog has an opinion.
    `validator` is a text that changes with the content where there is no hash (an origin's ETag or date).
    """

    object_id: ObjectId
    size: int | None
    content_hash: ContentHash | None = None
    media_type: str | None = None
    buckets: tuple[DistributionBucket, ...] = ()
    accepted: bool = True
    sources: tuple[str, ...] = ()
    validator: str | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 0:
            raise InvalidInput(f"object {self.object_id}: negative size")

    @property
    def etag(self) -> str:
        """The strong entity tag, quotes included (RFC 9110 §8.8.3): the same on every node and after every fetch."""
        return entity_tag(self.object_id, self.size, self.content_hash, self.validator)


def entity_tag(
    object_id: str, size: int | None, content_hash: ContentHash | None, validator: str | None
) -> str:
    """A strong entity tag from the hash, or without one from all that is known to change with the content."""
    if content_hash is not None:
        return f'"{content_hash}"'
    seen = f"{object_id}\n{size}\n{validator or ''}".encode()
    return f'"{hashlib.sha256(seen).hexdigest()[:32]}"'


def source_name(url: str) -> str:
    """`host:port` of a source's URL, for logs and metric labels (bounded by the number of storage nodes)."""
    return urlsplit(url).netloc.rpartition("@")[2]


@dataclass(frozen=True, slots=True)
class Assignment:
    """What this node has promised to serve: the buckets given, or all of a worker, or (neither) everything. With both,
    the buckets decide; the worker is known then for an order to serve all that is its."""

    bucket_ids: frozenset[str] | None = None
    worker_id: int | None = None

    @property
    def effective(self) -> Assignment:
        """Without what does not count: equal for assignments that cover the same objects."""
        return self if self.bucket_ids is None else Assignment(self.bucket_ids)

    def covers(self, media_object: MediaObject) -> bool:
        """True if the object is ours."""
        if self.bucket_ids is not None:
            return any(bucket.bucket_id in self.bucket_ids for bucket in media_object.buckets)
        if self.worker_id is not None:
            return any(self.worker_id in bucket.active_workers for bucket in media_object.buckets)
        return True


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """What is kept beside an object's bytes on the volume: enough to answer for it with nothing else at hand.

    `stored_at` is the POSIX time (whole seconds) of the fetch; `etag` has its quotes. `media_type` is None only beside
    a partial file, while neither the catalog nor a source has told it.
    """

    object_id: ObjectId
    size: int
    etag: str
    content_hash: ContentHash | None
    media_type: str | None
    stored_at: int
