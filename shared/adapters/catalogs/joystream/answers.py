"""Converts the squid's responses to our values. Every field may be null, and every value is checked."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import structlog

from distributor_node.shared.domain.errors import CatalogUnavailable, InvalidInput
from distributor_node.shared.domain.objects import (
    ContentHash,
    DistributionBucket,
    MediaObject,
    ObjectId,
    parse_bucket_id,
)
from distributor_node.shared.domain.urls import is_public, parse_source_url
from distributor_node.shared.ports.catalog import CatalogStatus, LookupAnswers

logger = structlog.get_logger()
_SIZE = re.compile(r"[0-9]{1,19}", re.ASCII)
_MAX_SIZE = 2**63 - 1
_MAX_SOURCES = 100
_MAX_VALIDATOR = 256
_ACTIVE_STORAGE = "StorageBucketOperatorStatusActive"
# The uploader writes a subtitle's type. As text/html, it would be a page of the node's own web origin.
_SUBTITLE_TYPES = frozenset(
    {
        "text/plain", "text/vtt", "text/srt", "text/x-srt", "text/x-subrip", "text/ttml", "text/x-ssa", "text/x-ass",
        "text/x-sami", "text/x-microdvd",
    }
)  # fmt: skip


def read_object(object_id: ObjectId, found: Any, *, refuse_private: bool) -> MediaObject:
    """Convert the description of one object, which is not null. Raises CatalogUnavailable if the id differs."""
    if not isinstance(found, dict) or found.get("id") != object_id:
        raise CatalogUnavailable("the squid returned another object")
    bag = _mapping(found.get("storageBag"))
    return _describe(
        object_id,
        found,
        buckets=tuple(_distribution_buckets(bag)),
        accepted=found.get("isAccepted") is True,
        sources=_sources(object_id, bag, refuse_private=refuse_private),
    )


def read_objects(object_ids: Sequence[ObjectId], listed: Any, *, refuse_private: bool) -> LookupAnswers:
    """Convert the descriptions of the objects asked for. An object that is not listed does not exist.

    Raises CatalogUnavailable if it is not a list, or lists an object that was not asked for.
    """
    if not isinstance(listed, list):
        raise CatalogUnavailable("the squid's response has no list of objects")
    answers: dict[ObjectId, MediaObject | None] = dict.fromkeys(object_ids)
    for found in listed:
        object_id = ObjectId(_mapping(found).get("id"))
        if object_id not in answers:
            raise CatalogUnavailable("the squid returned another object")
        answers[object_id] = read_object(object_id, found, refuse_private=refuse_private)
    return answers


def read_listed(found: Any, buckets: tuple[DistributionBucket, ...]) -> MediaObject:
    """Convert an object of a list, without sources and as accepted. Raises CatalogUnavailable if it has no id."""
    stated = _mapping(found).get("id")
    try:
        object_id = ObjectId.parse(stated if isinstance(stated, str) else "")
    except InvalidInput as error:
        raise CatalogUnavailable("the squid lists an object without a valid id") from error
    return _describe(object_id, found, buckets=buckets, accepted=True, sources=())


def _describe(
    object_id: ObjectId,
    found: dict[str, Any],
    *,
    buckets: tuple[DistributionBucket, ...],
    accepted: bool,
    sources: tuple[str, ...],
) -> MediaObject:
    return MediaObject(
        object_id=object_id,
        size=_size(object_id, found.get("size")),
        content_hash=_hash(object_id, found.get("ipfsHash")),
        media_type=_media_type(found.get("type")),
        buckets=buckets,
        accepted=accepted,
        sources=sources,
    )


def _size(object_id: ObjectId, stated: Any) -> int | None:
    """Return the size; None if the squid does not state it. Such an object is proxied, never fetched."""
    text = str(stated) if isinstance(stated, int) and not isinstance(stated, bool) else stated
    if isinstance(text, str) and _SIZE.fullmatch(text) and int(text) <= _MAX_SIZE:
        return int(text)
    logger.warning("catalog_size_unusable", object_id=object_id, size=str(stated)[:40])
    return None


def _hash(object_id: ObjectId, stated: Any) -> ContentHash | None:
    """Return the hash. None: we cannot compute it, so the object is handled like one without."""
    try:
        if isinstance(stated, str):
            return ContentHash.parse(stated)
    except InvalidInput:
        pass
    logger.warning("catalog_hash_unusable", object_id=object_id, hash=str(stated)[:100])
    return None


def _media_type(kind: Any) -> str | None:
    stated = _mapping(_mapping(kind).get("subtitle")).get("mimeType")
    if not isinstance(stated, str):
        return None
    essence = stated.partition(";")[0].strip().lower()
    return essence if essence in _SUBTITLE_TYPES else None


def _distribution_buckets(bag: dict[str, Any]) -> Iterator[DistributionBucket]:
    for entry in _sequence(bag.get("distributionBuckets")):
        bucket = _mapping(_mapping(entry).get("distributionBucket"))
        bucket_id = bucket_id_or_none(bucket.get("id"))
        if bucket_id is not None:
            yield DistributionBucket(bucket_id, frozenset(_active_workers(bucket)))


def bucket_id_or_none(stated: Any) -> str | None:
    try:
        return parse_bucket_id(str(stated))
    except InvalidInput:
        return None


def _active_workers(bucket: dict[str, Any]) -> Iterator[int]:
    for operator in map(_mapping, _sequence(bucket.get("operators"))):
        worker_id = _worker_id(operator.get("workerId"))
        if operator.get("status") == "ACTIVE" and worker_id is not None:
            yield worker_id


def _worker_id(stated: Any) -> int | None:
    """Return a worker's id, which is a number or, as a BigInt, a decimal string."""
    if isinstance(stated, str) and _SIZE.fullmatch(stated):
        return int(stated)
    return stated if isinstance(stated, int) and not isinstance(stated, bool) else None


def _sources(object_id: ObjectId, bag: dict[str, Any], *, refuse_private: bool) -> tuple[str, ...]:
    urls: dict[str, None] = {}
    for entry in _sequence(bag.get("storageBuckets")):
        bucket = _mapping(_mapping(entry).get("storageBucket"))
        if _mapping(bucket.get("operatorStatus")).get("__typename") == _ACTIVE_STORAGE:
            base = base_or_none(bucket, refuse_private=refuse_private)
            if base is not None:
                urls[f"{base}files/{object_id}"] = None
    return tuple(urls)[:_MAX_SOURCES]


def base_or_none(bucket: dict[str, Any], *, refuse_private: bool) -> str | None:
    """Return the base URL of a storage node's API. None: its bucket has no endpoint, or one that is not allowed."""
    endpoint = _mapping(bucket.get("operatorMetadata")).get("nodeEndpoint")
    if not isinstance(endpoint, str) or not endpoint:
        return None
    try:
        return api_base(endpoint, refuse_private=refuse_private)
    except InvalidInput as error:
        logger.info("storage_endpoint_rejected", bucket=str(bucket.get("id"))[:40], reason=str(error))
        return None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _sequence(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# Lists of storage nodes and buckets, and the squid's own status.


@dataclass(frozen=True, slots=True)
class StorageEndpoint:
    """An active storage node."""

    bucket_id: str
    api_url: str  # base of its API, ending in `/`


def read_endpoints(data: dict[str, Any], *, refuse_private: bool) -> tuple[StorageEndpoint, ...]:
    """Convert the list of storage nodes, without those that have no usable endpoint. Raises CatalogUnavailable."""
    endpoints = []
    for bucket in _list(data, "storageBuckets"):
        base = base_or_none(bucket, refuse_private=refuse_private)
        if base is not None:
            endpoints.append(StorageEndpoint(str(bucket.get("id"))[:40], base))
    return tuple(endpoints)


def read_bucket_ids(data: dict[str, Any]) -> tuple[str, ...]:
    """Convert the list of buckets. Raises CatalogUnavailable if there is none."""
    found = (bucket_id_or_none(bucket.get("id")) for bucket in _list(data, "distributionBuckets"))
    return tuple(sorted(bucket_id for bucket_id in found if bucket_id is not None))


def read_status(data: dict[str, Any]) -> CatalogStatus:
    status, version = data.get("squidStatus"), data.get("squidVersion")
    height = status.get("height") if isinstance(status, dict) else None
    stated = version.get("version") if isinstance(version, dict) else None
    return CatalogStatus(
        blocks_processed=height if isinstance(height, int) and not isinstance(height, bool) else None,
        version=stated[:64] if isinstance(stated, str) else None,
    )


def _list(data: dict[str, Any], field: str) -> list[dict[str, Any]]:
    listed = data.get(field)
    if not isinstance(listed, list):
        raise CatalogUnavailable(f"the squid's response has no list {field}")
    return [entry for entry in listed if isinstance(entry, dict)]


# Endpoints of storage nodes, as their operators publish them: untrusted text.

_MAX_LENGTH = 1024
_PRIVATE_NAMES = (".localhost", ".local", ".internal", ".lan", ".home.arpa", ".intranet", ".corp")


def api_base(endpoint: str, *, refuse_private: bool) -> str:
    """Return the base URL of a storage node's API, ending in `/`. Raises InvalidInput for one that is not allowed.

    Allowed are http and https URLs without credentials, query and fragment. With `refuse_private`, addresses that are
    not public (in any notation) and names that only a local network resolves are excluded. The addresses of a public
    name are checked when a source is connected to.
    """
    if len(endpoint) > _MAX_LENGTH:
        raise InvalidInput(f"endpoint: expected at most {_MAX_LENGTH} characters, got {len(endpoint)}")
    parse_source_url(endpoint)
    parts = urlsplit(endpoint)
    if parts.query or "?" in endpoint:
        raise InvalidInput("endpoint has a query")
    if refuse_private and is_private(parts.hostname or ""):
        raise InvalidInput(
            "endpoint is at a private address; catalog.refuse_private_sources: false allows it"
        )
    return f"{endpoint.rstrip('/')}/api/v1/"


def is_private(host: str) -> bool:
    """Whether the host is an address that is not public, or a name that only a local network resolves."""
    name = host.rstrip(".").lower()
    try:
        return not is_public(name)
    except ValueError:
        return _is_private_name(name)


def _is_private_name(name: str) -> bool:
    try:
        # Resolvers read `127.1`, `0x7f000001` and `2130706433` as addresses. No name is resolved here.
        packed = socket.inet_aton(name)
    except OSError:
        return "." not in name or name.endswith(_PRIVATE_NAMES)
    return not is_public(socket.inet_ntoa(packed))
