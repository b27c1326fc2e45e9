"""The manifest's format, version 1: what each field may hold. Anything else is refused with its place and rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from shared.adapters.catalogs.documents import LocatedMapping
from shared.domain.errors import InvalidInput
from shared.domain.media_types import parse_media_type
from shared.domain.objects import ContentHash, DistributionBucket, MediaObject, ObjectId, parse_bucket_id
from shared.domain.source_urls import parse_source_url

_Value = TypeVar("_Value")

MANIFEST_VERSION = 1
_MAX_SIZE = 2**63 - 1
_MAX_URLS = 100
_FIELDS = frozenset({"version", "base_urls", "objects"})
_OBJECT_FIELDS = frozenset({"id", "size", "hash", "media_type", "bucket", "accepted", "name", "urls"})


@dataclass(frozen=True, slots=True)
class Manifest:
    """One version of the file."""

    objects: Mapping[str, MediaObject]
    bucket_ids: tuple[str, ...]


def parse_manifest(document: Any) -> Manifest:
    """Raise InvalidInput, naming line, entry, field and rule."""
    if not isinstance(document, LocatedMapping):
        raise InvalidInput("want a mapping with version, base_urls and objects")
    _refuse_unknown(document, _FIELDS, "the manifest")
    version = document.get("version")
    if version != MANIFEST_VERSION or isinstance(version, bool):
        raise InvalidInput(f"version: want {MANIFEST_VERSION}, found {str(version)[:20]}")
    base_urls = _urls(document, "base_urls", "base_urls")
    entries = document.get("objects")
    if not isinstance(entries, list):
        raise InvalidInput("objects: want a list")
    buckets: dict[str, tuple[DistributionBucket, ...]] = {}
    objects: dict[str, MediaObject] = {}
    for number, entry in enumerate(entries, start=1):
        place = _place(number, entry)
        if not isinstance(entry, LocatedMapping):
            raise InvalidInput(f"{place}: want a mapping")
        media_object = _parse_object(entry, place, base_urls, buckets)
        if media_object.object_id in objects:
            raise InvalidInput(f"{place}: id: {media_object.object_id} is listed twice")
        objects[media_object.object_id] = media_object
    return Manifest(objects, tuple(sorted(buckets)))


def _parse_object(
    entry: LocatedMapping,
    place: str,
    base_urls: tuple[str, ...],
    buckets: dict[str, tuple[DistributionBucket, ...]],
) -> MediaObject:
    _refuse_unknown(entry, _OBJECT_FIELDS, place)
    object_id = _read(ObjectId.parse, _text(entry, "id", place), f"{place}: id")
    bucket_id = _optional(entry, "bucket", place, parse_bucket_id)
    _optional(entry, "name", place, str)
    accepted = entry.get("accepted", True)
    if not isinstance(accepted, bool):
        raise InvalidInput(f"{place}: accepted: want true or false")
    if bucket_id is not None and bucket_id not in buckets:
        buckets[bucket_id] = (DistributionBucket(bucket_id),)
    urls = _urls(entry, "urls", f"{place}: urls") if "urls" in entry else ()
    sources = urls or tuple(base + object_id for base in base_urls)
    if accepted and not sources:
        raise InvalidInput(f"{place}: no source: give it urls, or the manifest base_urls")
    return MediaObject(
        object_id=object_id,
        size=_size(entry, place),
        content_hash=_optional(entry, "hash", place, ContentHash.parse),
        media_type=_optional(entry, "media_type", place, parse_media_type),
        buckets=buckets[bucket_id] if bucket_id is not None else (),
        accepted=accepted,
        sources=sources,
    )


def _size(entry: LocatedMapping, place: str) -> int:
    size = entry.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _MAX_SIZE:
        raise InvalidInput(f"{place}: size: want the number of bytes")
    return size


def _urls(mapping: LocatedMapping, field: str, place: str) -> tuple[str, ...]:
    listed = mapping.get(field, [])
    if not isinstance(listed, list) or len(listed) > _MAX_URLS:
        raise InvalidInput(f"{place}: want a list of at most {_MAX_URLS} URLs")
    for url in listed:
        if not isinstance(url, str):
            raise InvalidInput(f"{place}: want http(s) URLs")
        _read(parse_source_url, url, place)
    return tuple(listed)


def _text(entry: LocatedMapping, field: str, place: str) -> str:
    value = entry.get(field)
    if not isinstance(value, str):
        raise InvalidInput(f"{place}: {field}: want text" + (" (in quotes)" if value is not None else ""))
    return value


def _optional(entry: LocatedMapping, field: str, place: str, parse: Callable[[str], _Value]) -> _Value | None:
    if entry.get(field) is None:
        return None
    return _read(parse, _text(entry, field, place), f"{place}: {field}")


def _read(parse: Callable[[str], _Value], text: str, place: str) -> _Value:
    try:
        return parse(text)
    except InvalidInput as error:
        raise InvalidInput(f"{place}: {error}") from error


def _refuse_unknown(mapping: LocatedMapping, known: frozenset[str], place: str) -> None:
    unknown = mapping.keys() - known
    if unknown:
        raise InvalidInput(f"{place}: unknown field {min(unknown)[:40]!r}")


def _place(number: int, entry: Any) -> str:
    line = entry.line if isinstance(entry, LocatedMapping) else 0
    return f"line {line}, object {number}" if line else f"object {number}"
