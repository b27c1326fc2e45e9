"""Objects: ids, content hashes, the catalog's description and its JSON form, the record stored on the volume."""

from __future__ import annotations

import hashlib
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Protocol, Self
from urllib.parse import quote, unquote_to_bytes, urlsplit

import base58
from blake3 import blake3

from distributor_node.shared.domain.conditionals import (
    NO_VALIDATORS,
    Validators,
    Version,
    etag_or_none,
    is_http_date,
    parse_http_date,
)
from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.http_caching import Freshness
from distributor_node.shared.domain.media_types import detect_media_type, media_type_or_none

_OBJECT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,127}\Z", re.ASCII)
_BUCKET_ID = re.compile(r"[0-9]{1,20}:[0-9]{1,20}\Z", re.ASCII)
_BLAKE3_MULTIHASH_PREFIX = b"\x1e\x20"
_DIGEST_BYTES = 32

MAX_SIZE = 2**63 - 1
"""Bytes of the largest object that can be described: what a file offset holds."""


# RFC 3986 section 3.3 and 3.4: characters of a path and of a query, with complete percent-encodings.
_PATH = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})+\Z", re.ASCII)
_QUERY = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})+\Z", re.ASCII)
_UNENCODED = "!$&'()*+,;=:@/~"  # in a path, beside letters, digits and `_.-`
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
_MAX_PATH = 1024  # bytes, decoded; of a query as well
DIGEST_PREFIX = "sha256-"
"""Begins each id that is the digest of a path; plain ids may begin so, too."""
_DIGEST_ID = re.compile(rf"{DIGEST_PREFIX}[0-9a-f]{{64}}\Z", re.ASCII)


class ObjectId(str):
    """The id of one object: 1 to 128 unreserved characters of URLs, the first a letter or digit.

    It is safe as a file name and in a URL: no separators, no `..`, no control characters. An object that is named by
    another path has the digest of that path as its id. Such an id knows its `path` where it was made from one, and not
    where it was read back: a job and a record say by themselves where the object comes from.
    """

    __slots__ = ("_path",)
    _path: str

    @property
    def path(self) -> str:
        """The object's path, percent-encoded, with its query. Of a digest that was read back: the digest."""
        path: str = getattr(self, "_path", self)
        return path

    @property
    def is_digest(self) -> bool:
        """Whether this is the digest of a path."""
        return _DIGEST_ID.match(self) is not None

    @classmethod
    def is_plain(cls, text: str) -> bool:
        """Whether this is an id by itself: unreserved characters, or the digest of a path."""
        return _OBJECT_ID.match(text) is not None

    @classmethod
    def parse_path(cls, raw: str, query: str = "") -> Self:
        """Check a percent-encoded path, and a query that belongs to the id. Raises InvalidInput.

        Spellings of one path have one id: `%61` is `a`. A plain id stays as it is.
        """
        if not query and _OBJECT_ID.match(raw) and not _DIGEST_ID.match(raw):
            return cls(raw)
        if not _PATH.match(raw) or (query and not _QUERY.match(query)):
            raise InvalidInput(f"malformed object id: expected a path of RFC 3986, got {raw[:40]!r}")
        if "%2f" in raw.lower():
            raise InvalidInput("malformed object id: expected no encoded slash")
        return cls._from_path(unquote_to_bytes(raw), query)

    @classmethod
    def parse_text(cls, text: str, query: str = "") -> Self:
        """Check an id as people write it, not percent-encoded: a plain one, or a path. Raises InvalidInput."""
        if query and not _QUERY.match(query):
            raise InvalidInput(f"malformed object id: expected a query of RFC 3986, got {query[:40]!r}")
        return cls._from_path(text.encode("utf-8", "surrogatepass"), query)

    @classmethod
    def _from_path(cls, path: bytes, query: str) -> Self:
        try:
            text = path.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidInput("malformed object id: expected UTF-8") from error
        if not 0 < len(path) <= _MAX_PATH or len(query) > _MAX_PATH:
            raise InvalidInput(f"malformed object id: expected 1 to {_MAX_PATH} bytes, got {len(path)}")
        if _CONTROLS.search(text) or not {".", ".."}.isdisjoint(text.split("/")):
            raise InvalidInput("malformed object id: expected no control characters and no dot segments")
        if _DIGEST_ID.match(text):
            raise InvalidInput("malformed object id: expected a path, got the digest of one")
        if not query and _OBJECT_ID.match(text):
            return cls(text)
        encoded = quote(text, safe=_UNENCODED) + (f"?{query}" if query else "")
        made = cls(f"{DIGEST_PREFIX}{hashlib.sha256(encoded.encode()).hexdigest()}")
        made._path = encoded
        return made

    def with_path(self, path: str | None) -> ObjectId:
        """Return this id with the path that it is the digest of, if `path` is that (percent-encoded, with query)."""
        if path is None or not self.is_digest:
            return self
        raw, _, query = path.partition("?")
        try:
            made = ObjectId.parse_path(raw, query)
        except InvalidInput:
            return self
        return made if made == self else self

    @classmethod
    def parse(cls, text: str) -> Self:
        """Check an id. Raises InvalidInput."""
        if not _OBJECT_ID.match(text):
            raise InvalidInput(
                "malformed object id: expected 1 to 128 of A-Z a-z 0-9 . _ ~ -, the first a letter or digit, "
                f"got {text[:40]!r}"
            )
        return cls(text)


def parse_bucket_id(text: str) -> str:
    """Check a bucket id, `family:index` in decimal. Raises InvalidInput."""
    if not _BUCKET_ID.match(text):
        raise InvalidInput(f"malformed bucket id: expected family:index, such as 0:1, got {text[:40]!r}")
    return text


class Hasher(Protocol):
    """The common interface of hashlib and blake3."""

    def update(self, data: bytes | bytearray | memoryview, /) -> object: ...
    def digest(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class ContentHash:
    """A 32-byte digest of an object's bytes."""

    algorithm: Literal["blake3", "sha256"]
    digest: bytes

    def __post_init__(self) -> None:
        if len(self.digest) != _DIGEST_BYTES:
            raise InvalidInput(f"a {self.algorithm} digest has {_DIGEST_BYTES} bytes, got {len(self.digest)}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `sha256:<64 hex digits>` or base58btc of multihash(blake3-256). Raises InvalidInput."""
        if text.startswith("sha256:"):
            try:
                return cls("sha256", bytes.fromhex(text[7:]))
            except ValueError as error:
                raise InvalidInput(
                    f"malformed sha256 hash: expected 64 hex digits, got {text[7:][:80]!r}"
                ) from error
        if len(text) > 128:
            raise InvalidInput(f"malformed content hash: expected at most 128 characters, got {len(text)}")
        try:
            raw = base58.b58decode(text)
        except ValueError as error:
            raise InvalidInput(
                f"malformed content hash: expected sha256:… or base58, got {text!r}"
            ) from error
        if raw[:2] != _BLAKE3_MULTIHASH_PREFIX:
            raise InvalidInput(f"unknown content hash: expected a blake3-256 multihash, got {text!r}")
        return cls("blake3", raw[2:])

    def __str__(self) -> str:
        if self.algorithm == "sha256":
            return f"sha256:{self.digest.hex()}"
        return _multihash(self.digest)

    def hasher(self) -> Hasher:
        """Return a new hasher of this algorithm."""
        factory: Callable[[], Hasher] = blake3 if self.algorithm == "blake3" else hashlib.sha256
        return factory()


@lru_cache(maxsize=1024)
def _multihash(digest: bytes) -> str:
    """base58 takes 37 µs, and the tag of one miss is needed several times: in heads, job, sidecar and record."""
    return base58.b58encode(_BLAKE3_MULTIHASH_PREFIX + digest).decode("ascii")


@dataclass(frozen=True, slots=True)
class DistributionBucket:
    """A bucket that contains an object, and the workers that operate it actively."""

    bucket_id: str
    active_workers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class MediaObject:
    """What the catalog says of one object."""

    object_id: ObjectId
    size: int | None  # bytes; None when the catalog cannot know it: the object is proxied, never fetched
    content_hash: ContentHash | None = None
    media_type: str | None = None
    buckets: tuple[DistributionBucket, ...] = ()
    accepted: bool = True
    sources: tuple[str, ...] = ()  # URLs of the object, best first if the catalog knows an order
    validators: Validators = NO_VALIDATORS  # where there is no hash: what the object's source said of it
    name: str | None = None  # under which people know it, for saved files
    not_stored: str | None = None  # why its source forbids to store it; None: as far as known, it does not

    def __post_init__(self) -> None:
        if self.size is not None and not 0 <= self.size <= MAX_SIZE:
            bound = "0 or more" if self.size < 0 else f"at most {MAX_SIZE}"
            raise InvalidInput(f"size: expected {bound}, got {self.size} (object {self.object_id})")

    @property
    def etag(self) -> str | None:
        """The entity tag that clients see; see `entity_tag`."""
        return entity_tag(self.content_hash, self.validators)

    @property
    def version(self) -> Version:
        return Version(self.content_hash, self.validators, self.size)


def entity_tag(content_hash: ContentHash | None, validators: Validators = NO_VALIDATORS) -> str | None:
    """Return the entity tag with its quotes: strong and the same on every node with a hash, else the source's own."""
    return validators.etag if content_hash is None else f'"{content_hash}"'


_OMITTED_IF_NONE = frozenset({"last_modified", "name"})


@dataclass(frozen=True, slots=True)
class MediaObjectCodec:
    """Converts a MediaObject to JSON fields and back.

    Fetch jobs and the shared catalog cache store the same object under different field names.
    """

    names: Mapping[str, str]
    """JSON field name by attribute of MediaObject, in the order of writing.

    An attribute that is not listed is not written. Reading gives it its default.
    """

    def encode(self, media_object: MediaObject) -> dict[str, Any]:
        """Return the JSON fields."""
        content_hash = media_object.content_hash
        values = {
            "object_id": media_object.object_id,
            "size": media_object.size,
            "content_hash": None if content_hash is None else str(content_hash),
            "media_type": media_object.media_type,
            "buckets": [[bucket.bucket_id, sorted(bucket.active_workers)] for bucket in media_object.buckets],
            "accepted": media_object.accepted,
            "sources": list(media_object.sources),
            "etag": media_object.validators.etag,
            "last_modified": media_object.validators.last_modified,
            "name": media_object.name,
        }
        return {
            name: values[attribute]
            for attribute, name in self.names.items()
            if attribute not in _OMITTED_IF_NONE or values[attribute] is not None
        }

    def decode(self, fields: Mapping[str, Any]) -> MediaObject:
        """Read what `encode` wrote. A missing field counts as null. Raises InvalidInput."""
        values: dict[str, Any] = {attribute: fields.get(name) for attribute, name in self.names.items()}
        size, content_hash = values.get("size"), values.get("content_hash")
        accepted, sources = values.get("accepted", True), values.get("sources", [])
        self._expect("object_id", "a string", values, isinstance(values.get("object_id"), str))
        self._expect("size", "an integer or null", values, size is None or type(size) is int)
        for attribute in ("content_hash", "media_type", "etag", "name"):
            self._expect(attribute, "a string or null", values, isinstance(values.get(attribute), str | None))
        modified = values.get("last_modified")
        is_date = modified is None or is_http_date(modified)
        self._expect("last_modified", "POSIX seconds of the years 1 to 9999 or null", values, is_date)
        media_type = values.get("media_type")
        is_type = media_type is None or media_type_or_none(media_type) is not None
        self._expect("media_type", "type/subtype such as image/png or null", values, is_type)
        self._expect("accepted", "a boolean", values, isinstance(accepted, bool))
        self._expect("sources", "a list of http(s) URLs", values, _are_http_urls(sources))
        return MediaObject(
            object_id=ObjectId.parse(str(values.get("object_id"))),
            size=size,
            content_hash=None if content_hash is None else ContentHash.parse(content_hash),
            media_type=media_type_or_none(media_type),
            buckets=self._decode_buckets(values),
            accepted=accepted,
            sources=tuple(sources),
            validators=_decode_validators(values.get("etag"), modified),
            name=values.get("name"),
        )

    def _decode_buckets(self, values: Mapping[str, Any]) -> tuple[DistributionBucket, ...]:
        try:
            return tuple(
                DistributionBucket(bucket_id, frozenset(workers))
                for bucket_id, workers in values.get("buckets", [])
            )
        except (TypeError, ValueError):
            self._expect("buckets", "a list of [bucket id, [worker, …]]", values, False)
            raise

    def _expect(self, attribute: str, expected: str, values: Mapping[str, Any], holds: bool) -> None:
        if not holds:
            got = repr(values.get(attribute))[:60]
            raise InvalidInput(f"{self.names[attribute]}: expected {expected}, got {got}")


def _decode_validators(validator: str | None, modified: int | None) -> Validators:
    """Read the validators. Nodes of earlier releases write an entity tag, a date or another text in one field."""
    etag = etag_or_none(validator)
    if etag is None and modified is None and validator is not None:
        modified = parse_http_date(validator)
    return Validators(etag, modified)


def _are_http_urls(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(url, str) and url.startswith(("http://", "https://")) for url in value
    )


def source_name(url: str) -> str:
    """Return `host:port` of a source's URL, for logs and metric labels (one label per storage node)."""
    return urlsplit(url).netloc.rpartition("@")[2]


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which objects this node serves: those of some buckets, else those of a worker, else all objects."""

    bucket_ids: frozenset[str] | None = None
    worker_id: int | None = None
    """Ignored while `bucket_ids` is set. It is kept for an operator's command to serve all buckets of the worker."""

    @property
    def effective(self) -> Assignment:
        """The assignment without an ignored worker: equal for assignments that cover the same objects."""
        return self if self.bucket_ids is None else Assignment(self.bucket_ids)

    def covers(self, media_object: MediaObject) -> bool:
        """Return whether this node serves the object."""
        if self.bucket_ids is not None:
            return any(bucket.bucket_id in self.bucket_ids for bucket in media_object.buckets)
        if self.worker_id is not None:
            return any(self.worker_id in bucket.active_workers for bucket in media_object.buckets)
        return True


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """What is stored beside an object's bytes on the volume: enough to serve it without catalog and state store."""

    object_id: ObjectId
    size: int
    etag: str | None  # that clients see, with its quotes
    content_hash: ContentHash | None
    media_type: str | None  # None only beside a partial file, until the catalog or a source states a type
    stored_at: int  # POSIX seconds of the fetch
    validators: Validators = NO_VALIDATORS  # of the source, in the response that its bytes came from
    name: str | None = None  # see MediaObject
    freshness: Freshness | None = (
        None  # of an object of an HTTP origin; None: it does not become stale, or is unknown
    )
    growing: bool = False  # of a partial file whose length is not known yet: `size` bytes are reserved for it

    @property
    def version(self) -> Version:
        return Version(self.content_hash, self.validators, None if self.growing else self.size)

    def with_validators(self, validators: Validators) -> StoredRecord:
        """The record of bytes of which their source says this. With a content hash, the source's tag says no more."""
        kept = validators if self.content_hash is None else Validators(None, validators.last_modified)
        return replace(self, etag=entity_tag(self.content_hash, kept), validators=kept)


def path_of(object_id: ObjectId, record: StoredRecord | None) -> str | None:
    """Return the path that the id is the digest of, if it is known: percent-encoded, with its query."""
    found = object_id.with_path(None if record is None else record.name)
    return found.path if found.is_digest and found.path != found else None


def record_for_file(
    known: MediaObject, size: int, head: bytes, stored_at: float, stated_type: str | None = None
) -> StoredRecord:
    """The record that a fetch would have written.

    `size` in bytes; `head`: the first SNIFF_BYTES bytes of the file; `stored_at`: POSIX seconds; `stated_type`: the
    media type that the former node recorded, in case the catalog has none.
    """
    return StoredRecord(
        object_id=known.object_id,
        size=size,
        etag=entity_tag(known.content_hash),  # nothing says which version bytes without a hash are
        content_hash=known.content_hash,
        media_type=detect_media_type(known.media_type or stated_type, head),
        stored_at=int(stored_at),
        name=known.name,
    )


# Sets of a million ids, for comparisons with the volume and with the catalog.


class CompactIdSet:
    """Object ids as their 64-bit hashes, 8 bytes each.

    Among 10^6 ids two share a hash with a probability of about 10^-7. Then an object that should be looked at is taken
    for a known one, until another process looks: hashes differ from process to process.
    """

    def __init__(self) -> None:
        self._hashes = array("q")
        self._sorted = True

    def __len__(self) -> int:
        """Number of ids added; an id that was added twice counts twice."""
        return len(self._hashes)

    def update(self, object_ids: Iterable[ObjectId]) -> None:
        self._hashes.extend(map(hash, object_ids))
        self._sorted = False

    def __contains__(self, object_id: object) -> bool:
        if not self._sorted:
            self._hashes = array("q", sorted(self._hashes))
            self._sorted = True
        target = hash(object_id)
        index = bisect_left(self._hashes, target)
        return index < len(self._hashes) and self._hashes[index] == target
