"""The squid's answers into our values: everything may be null, nothing is believed unchecked."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
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
from distributor_node.shared.ports.catalog import CatalogStatus

logger = structlog.get_logger()
_SIZE = re.compile(r"[0-9]{1,19}", re.ASCII)
_MAX_SIZE = 2**63 - 1
_MAX_SOURCES = 100
_MAX_VALIDATOR = 256
_ACTIVE_STORAGE = "StorageBucketOperatorStatusActive"
# A subtitle's type is what its uploader wrote; as text/html it would be a page of the node's own origin.
_SUBTITLE_TYPES = frozenset(
    {
        "text/plain", "text/vtt", "text/srt", "text/x-srt", "text/x-subrip", "text/ttml", "text/x-ssa", "text/x-ass",
        "text/x-sami", "text/x-microdvd",
    }
)  # fmt: skip


def read_object(object_id: ObjectId, found: Any, *, refuse_private: bool) -> MediaObject:
    """What the squid says of one object; `found` is not null. CatalogUnavailable if it is another object's word."""
    if not isinstance(found, dict) or found.get("id") != object_id:
        raise CatalogUnavailable("the squid answered for another object")
    bag = _mapping(found.get("storageBag"))
    return _described(
        object_id,
        found,
        buckets=tuple(_distribution_buckets(bag)),
        accepted=found.get("isAccepted") is True,
        sources=_sources(object_id, bag, refuse_private=refuse_private),
    )


def read_listed(found: Any, buckets: tuple[DistributionBucket, ...]) -> MediaObject:
    """An object of a list: no sources, and accepted for all the list says. CatalogUnavailable if it has no id."""
    stated = _mapping(found).get("id")
    try:
        object_id = ObjectId.parse(stated if isinstance(stated, str) else "")
    except InvalidInput as error:
        raise CatalogUnavailable("the squid lists an object without a usable id") from error
    return _described(object_id, found, buckets=buckets, accepted=True, sources=())


def _described(
    object_id: ObjectId,
    found: dict[str, Any],
    *,
    buckets: tuple[DistributionBucket, ...],
    accepted: bool,
    sources: tuple[str, ...],
) -> MediaObject:
    content_hash, validator = _hash(object_id, found.get("ipfsHash"))
    return MediaObject(
        object_id=object_id,
        size=_size(object_id, found.get("size")),
        content_hash=content_hash,
        media_type=_media_type(found.get("type")),
        buckets=buckets,
        accepted=accepted,
        sources=sources,
        validator=validator,
    )


def _size(object_id: ObjectId, stated: Any) -> int | None:
    """None if the squid does not say: such an object is proxied, never fetched."""
    text = str(stated) if isinstance(stated, int) and not isinstance(stated, bool) else stated
    if isinstance(text, str) and _SIZE.fullmatch(text) and int(text) <= _MAX_SIZE:
        return int(text)
    logger.warning("catalog_size_unusable", object_id=object_id, size=str(stated)[:40])
    return None


def _hash(object_id: ObjectId, stated: Any) -> tuple[ContentHash | None, str | None]:
    """The hash, or else its text as the validator: an object under a hash we cannot compute is served with its size as
    the only check, and its ETag still changes with the text."""
    try:
        if isinstance(stated, str):
            return ContentHash.parse(stated), None
    except InvalidInput:
        pass
    logger.warning("catalog_hash_unusable", object_id=object_id, hash=str(stated)[:100])
    return None, stated[:_MAX_VALIDATOR] if isinstance(stated, str) and stated else None


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
        worker_id = operator.get("workerId")
        if operator.get("status") == "ACTIVE" and isinstance(worker_id, int):
            yield worker_id


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
    """The API's base of a storage bucket's node; None without an endpoint, or with one that must not be asked."""
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


# What the squid says of the network and of itself.


@dataclass(frozen=True, slots=True)
class StorageEndpoint:
    """An active storage node: its bucket's id, and the base of its API with `/` at the end."""

    bucket_id: str
    api_url: str


def read_endpoints(data: dict[str, Any], *, refuse_private: bool) -> tuple[StorageEndpoint, ...]:
    """Nodes without a usable endpoint are left out. CatalogUnavailable if there is no list."""
    endpoints = []
    for bucket in _list(data, "storageBuckets"):
        base = base_or_none(bucket, refuse_private=refuse_private)
        if base is not None:
            endpoints.append(StorageEndpoint(str(bucket.get("id"))[:40], base))
    return tuple(endpoints)


def read_bucket_ids(data: dict[str, Any]) -> tuple[str, ...]:
    """CatalogUnavailable if there is no list."""
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
        raise CatalogUnavailable(f"the squid's {field} are missing")
    return [entry for entry in listed if isinstance(entry, dict)]


# Endpoints of storage nodes, as their operators publish them: anybody's text until it is checked here.

_MAX_LENGTH = 1024
_PRIVATE_NAMES = (".localhost", ".local", ".internal", ".lan", ".home.arpa", ".intranet", ".corp")


def api_base(endpoint: str, *, refuse_private: bool) -> str:
    """The base of a storage node's API, with `/` at its end; InvalidInput for an endpoint that must not be asked.

    Only http and https, no credentials, query or fragment. With `refuse_private`, neither addresses that are not
    public (however they are written) nor names that only a local network knows. What a public name resolves to is
    looked at when a source is connected to.
    """
    if len(endpoint) > _MAX_LENGTH:
        raise InvalidInput("endpoint too long")
    parse_source_url(endpoint)
    parts = urlsplit(endpoint)
    if parts.query or "?" in endpoint:
        raise InvalidInput("endpoint with a query")
    if refuse_private and is_private(parts.hostname or ""):
        raise InvalidInput("endpoint at a private address")
    return f"{endpoint.rstrip('/')}/api/v1/"


def is_private(host: str) -> bool:
    """True for an address that is not public, and for names that are resolved by the local network alone."""
    name = host.rstrip(".").lower()
    try:
        return not is_public(name)
    except ValueError:
        return _is_private_name(name)


def _is_private_name(name: str) -> bool:
    try:
        # `127.1`, `0x7f000001`, `2130706433`: resolvers take them for addresses. No name is looked up here.
        packed = socket.inet_aton(name)
    except OSError:
        return "." not in name or name.endswith(_PRIVATE_NAMES)
    return not is_public(socket.inet_ntoa(packed))
