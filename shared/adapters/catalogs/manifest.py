"""The manifest catalog: a YAML or JSON file that lists the objects. It is read again when it changes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import structlog

from distributor_node.shared.adapters.catalogs.documents import LocatedMapping, describe, read_json, read_yaml
from distributor_node.shared.domain.errors import CatalogUnavailable, ConfigurationError, InvalidInput
from distributor_node.shared.domain.media_types import parse_media_type
from distributor_node.shared.domain.objects import (
    Assignment,
    ContentHash,
    DistributionBucket,
    MediaObject,
    ObjectId,
    parse_bucket_id,
)
from distributor_node.shared.domain.urls import api_base_of, distinct_hosts, parse_source_url
from distributor_node.shared.ports.catalog import CatalogStatus

logger = structlog.get_logger()
_BATCH = 1000
_RELOAD_TIMEOUT = 0.2  # seconds a look-up waits for a changed file to be read: enough for a small one

_Signature = tuple[int, int, int]  # modification time, size and inode


class ManifestCatalog:
    """Serves the objects of the file. If a new version of the file is invalid, the last valid one stays in use."""

    def __init__(
        self, path: Path, check_interval: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`check_interval`: seconds between two checks for a changed file, made at look-ups. `clock`: in seconds."""
        self._path = path
        self._check_interval = check_interval
        self._clock = clock
        self._manifest: Manifest | None = None
        # Of the version that was read last, valid or not. None: the file was missing.
        self._seen: _Signature | None = None
        self._checked_at = 0.0
        self._reload: asyncio.Task[None] | None = None
        self._revision = 0

    @property
    def can_list(self) -> bool:
        return True

    @property
    def public_url(self) -> str:
        return ""

    @property
    def lookups_fail(self) -> bool:
        return False

    def sources_of(self, object_id: ObjectId) -> Sequence[str]:
        return ()

    async def open(self) -> None:
        """Read the file. Raises ConfigurationError, with line, entry and rule, if it is missing or invalid."""
        try:
            self._seen, manifest = await asyncio.to_thread(_read, self._path)
        except (OSError, InvalidInput) as error:
            raise ConfigurationError(f"catalog.manifest {self._path}: {_reason(error)}") from error
        self._manifest = manifest
        self._checked_at = self._clock()
        logger.info("manifest_loaded", path=str(self._path), objects=len(manifest.objects))

    async def close(self) -> None:
        if self._reload is not None:
            await self._reload

    def can_have(self, object_id: ObjectId) -> bool:
        return True

    async def read_again(self) -> None:
        """Read the file now, and log the result. An invalid one leaves the last valid one in use."""
        if self._reload is None:
            self._reload = asyncio.create_task(self._read_again(), name="manifest-reload")
        await asyncio.wait({self._reload})

    async def revision(self) -> int:
        """Return the number of times that a new version of the file was read."""
        await self._current()
        return self._revision

    async def look_up(self, object_id: ObjectId, client: str | None = None) -> MediaObject | None:
        return (await self._current()).objects.get(object_id)

    async def forget(self, outdated: MediaObject) -> None:
        """Check for a changed file at the next look-up."""
        self._checked_at = float("-inf")

    async def forget_object(self, object_id: ObjectId) -> None:
        """Nothing is remembered here."""

    async def list_objects(self, assignment: Assignment) -> AsyncIterator[Sequence[MediaObject]]:
        manifest = await self._current()
        ours = (wanted for wanted in manifest.objects.values() if assignment.covers(wanted))
        while batch := tuple(islice(ours, _BATCH)):
            yield batch
            await asyncio.sleep(0)  # a list of 100,000 objects must not block the loop

    async def bucket_ids(self, worker_id: int | None = None) -> Sequence[str]:
        manifest = await self._current()  # it knows no workers
        return manifest.bucket_ids if worker_id is None else ()

    async def source_bases(self) -> Sequence[str]:
        manifest = await self._current()
        return await asyncio.to_thread(_bases, manifest)

    async def status(self) -> CatalogStatus:
        return CatalogStatus()

    async def chain_head(self) -> int | None:
        return None

    async def _current(self) -> Manifest:
        await self._refresh()
        if self._manifest is None:
            raise CatalogUnavailable("the manifest catalog is not open")
        return self._manifest

    async def _refresh(self) -> None:
        now = self._clock()
        if self._reload is None and now - self._checked_at >= self._check_interval:
            self._checked_at = now
            if _signature_of(self._path) != self._seen:
                self._reload = asyncio.create_task(self._read_again(), name="manifest-reload")
        if self._reload is not None:
            await asyncio.wait({self._reload}, timeout=_RELOAD_TIMEOUT)

    async def _read_again(self) -> None:
        """Never raises. An invalid file is logged once, and not read again until it changes."""
        noticed = _signature_of(self._path)
        try:
            self._seen, manifest = await asyncio.to_thread(_read, self._path)
            self._manifest = manifest
            self._revision += 1
            logger.info("manifest_reloaded", path=str(self._path), objects=len(manifest.objects))
        except (OSError, InvalidInput) as error:
            self._seen = noticed
            logger.error("manifest_rejected", path=str(self._path), reason=_reason(error))
        finally:
            self._reload = None


def _bases(manifest: Manifest) -> Sequence[str]:
    return distinct_hosts(
        api_base_of(url, wanted.object_id) for wanted in manifest.objects.values() for url in wanted.sources
    )


def _read(path: Path) -> tuple[_Signature, Manifest]:
    with path.open("rb") as file:
        # Taken before the file is read: if it is written while we read, the next check finds a difference.
        signature = _make_signature(os.fstat(file.fileno()))
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InvalidInput(f"line {line}: not UTF-8") from error
    document = read_json(text) if path.suffix.lower() == ".json" else read_yaml(text)
    return signature, parse_manifest(document)


def _signature_of(path: Path) -> _Signature | None:
    try:
        return _make_signature(path.stat())
    except OSError:
        return None


def _make_signature(status: os.stat_result) -> _Signature:
    return status.st_mtime_ns, status.st_size, status.st_ino


def _reason(error: OSError | InvalidInput) -> str:
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)


# The manifest's format, version 1. Anything else is rejected, with its place in the file and the rule.

_Value = TypeVar("_Value")

MANIFEST_VERSION = 1
_MAX_SIZE = 2**63 - 1
_MAX_URLS = 100
_FIELDS = frozenset({"version", "base_urls", "objects"})
_OBJECT_FIELDS = frozenset({"id", "size", "hash", "media_type", "bucket", "accepted", "name", "urls"})


@dataclass(frozen=True, slots=True)
class Manifest:
    """One version of the file: its objects by id, and the buckets they are in."""

    objects: Mapping[str, MediaObject]
    bucket_ids: tuple[str, ...]


def parse_manifest(document: Any) -> Manifest:
    """Check and convert the document. Raises InvalidInput, naming line, entry, field and rule."""
    if not isinstance(document, LocatedMapping):
        raise InvalidInput("expected a mapping with version, base_urls and objects")
    _reject_unknown(document, _FIELDS, "the manifest")
    version = document.get("version")
    if version != MANIFEST_VERSION or isinstance(version, bool):
        raise InvalidInput(f"version: expected {MANIFEST_VERSION}, got {describe(version)}")
    base_urls = _urls(document, "base_urls", "base_urls")
    entries = document.get("objects")
    if not isinstance(entries, list):
        raise InvalidInput(f"objects: expected a list, got {describe(entries)}")
    buckets: dict[str, tuple[DistributionBucket, ...]] = {}
    objects: dict[str, MediaObject] = {}
    for number, entry in enumerate(entries, start=1):
        place = _place(number, entry)
        if not isinstance(entry, LocatedMapping):
            raise InvalidInput(f"{place}: expected a mapping, got {describe(entry)}")
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
    _reject_unknown(entry, _OBJECT_FIELDS, place)
    object_id = _read_field(ObjectId.parse_text, _text(entry, "id", place), f"{place}: id")
    bucket_id = _optional(entry, "bucket", place, parse_bucket_id)
    accepted = entry.get("accepted", True)
    if not isinstance(accepted, bool):
        raise InvalidInput(f"{place}: accepted: expected true or false, got {describe(accepted)}")
    if bucket_id is not None and bucket_id not in buckets:
        buckets[bucket_id] = (DistributionBucket(bucket_id),)
    urls = _urls(entry, "urls", f"{place}: urls") if "urls" in entry else ()
    sources = urls or tuple(base + object_id.path for base in base_urls)
    if accepted and not sources:
        raise InvalidInput(f"{place}: no source: expected urls here, or base_urls in the manifest")
    return MediaObject(
        object_id=object_id,
        size=_size(entry, place),
        content_hash=_optional(entry, "hash", place, ContentHash.parse),
        media_type=_optional(entry, "media_type", place, parse_media_type),
        buckets=buckets[bucket_id] if bucket_id is not None else (),
        accepted=accepted,
        sources=sources,
        name=_optional(entry, "name", place, str) or (object_id.path if object_id.is_digest else None),
    )


def _size(entry: LocatedMapping, place: str) -> int:
    size = entry.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _MAX_SIZE:
        raise InvalidInput(f"{place}: size: expected a number of bytes, got {describe(size)}")
    return size


def _urls(mapping: LocatedMapping, field: str, place: str) -> tuple[str, ...]:
    listed = mapping.get(field, [])
    if not isinstance(listed, list) or len(listed) > _MAX_URLS:
        raise InvalidInput(f"{place}: expected a list of at most {_MAX_URLS} URLs, got {describe(listed)}")
    for url in listed:
        if not isinstance(url, str):
            raise InvalidInput(f"{place}: expected http(s) URLs, got {describe(url)}")
        _read_field(parse_source_url, url, place)
    return tuple(listed)


def _text(entry: LocatedMapping, field: str, place: str) -> str:
    value = entry.get(field)
    if not isinstance(value, str):
        quotes = " (in quotes)" if isinstance(value, int) else ""
        raise InvalidInput(f"{place}: {field}: expected text{quotes}, got {describe(value)}")
    return value


def _optional(entry: LocatedMapping, field: str, place: str, parse: Callable[[str], _Value]) -> _Value | None:
    if entry.get(field) is None:
        return None
    return _read_field(parse, _text(entry, field, place), f"{place}: {field}")


def _read_field(parse: Callable[[str], _Value], text: str, place: str) -> _Value:
    try:
        return parse(text)
    except InvalidInput as error:
        raise InvalidInput(f"{place}: {error}") from error


def _reject_unknown(mapping: LocatedMapping, known: frozenset[str], place: str) -> None:
    unknown = mapping.keys() - known
    if unknown:
        raise InvalidInput(f"{place}: unknown field {min(unknown)[:40]!r}")


def _place(number: int, entry: Any) -> str:
    line = entry.line if isinstance(entry, LocatedMapping) else 0
    return f"line {line}, object {number}" if line else f"object {number}"
