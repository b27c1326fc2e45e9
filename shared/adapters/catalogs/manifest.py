"""The catalog that is a file: YAML or JSON, read again when it changes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import islice
from pathlib import Path

import structlog

from shared.adapters.catalogs.documents import read_json, read_yaml
from shared.adapters.catalogs.manifest_format import Manifest, parse_manifest
from shared.domain.errors import CatalogUnavailable, ConfigurationError, InvalidInput
from shared.domain.objects import Assignment, MediaObject, ObjectId
from shared.domain.source_urls import api_base_of, distinct_hosts

logger = structlog.get_logger()
_BATCH = 1000
_RELOAD_TIMEOUT = 0.2  # seconds a look-up waits for a changed file: enough for small ones to be seen at once

_Signature = tuple[int, int, int]


class ManifestCatalog:
    """Lists what the file lists. A new version that cannot be used is refused, and the last good one stays."""

    def __init__(
        self, path: Path, check_interval: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`check_interval`: seconds between looks at the file, taken when something is asked; `clock` in seconds."""
        self._path = path
        self._check_interval = check_interval
        self._clock = clock
        self._manifest: Manifest | None = None
        # Modification time, size and inode of the version last read, good or bad; None: the file was missing.
        self._seen: _Signature | None = None
        self._checked_at = 0.0
        self._reload: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """ConfigurationError, with line, entry and rule, if the file is missing or no manifest."""
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

    async def look_up(self, object_id: ObjectId) -> MediaObject | None:
        return (await self._current()).objects.get(object_id)

    async def list_objects(self, assignment: Assignment) -> AsyncIterator[Sequence[MediaObject]]:
        manifest = await self._current()
        ours = (wanted for wanted in manifest.objects.values() if assignment.covers(wanted))
        while batch := tuple(islice(ours, _BATCH)):
            yield batch
            await asyncio.sleep(0)  # a list of 10^5 objects must not hold up the loop

    async def bucket_ids(self) -> Sequence[str]:
        return (await self._current()).bucket_ids

    async def source_bases(self) -> Sequence[str]:
        manifest = await self._current()
        return await asyncio.to_thread(_bases, manifest)

    async def _current(self) -> Manifest:
        await self._refresh()
        if self._manifest is None:
            raise CatalogUnavailable("the manifest catalog is not open")
        return self._manifest

    async def _refresh(self) -> None:
        now = self._clock()
        if self._reload is None and now - self._checked_at >= self._check_interval:
            self._checked_at = now
            if _signature(self._path) != self._seen:
                self._reload = asyncio.create_task(self._read_again(), name="manifest reload")
        if self._reload is not None:
            await asyncio.wait({self._reload}, timeout=_RELOAD_TIMEOUT)

    async def _read_again(self) -> None:
        """Never raises: a broken file is logged once and costs nothing more until it changes again."""
        noticed = _signature(self._path)
        try:
            self._seen, manifest = await asyncio.to_thread(_read, self._path)
            self._manifest = manifest
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
        # Taken before reading: a file that is written meanwhile differs at the next look.
        signature = _of(os.fstat(file.fileno()))
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InvalidInput(f"line {line}: not UTF-8") from error
    document = read_json(text) if path.suffix.lower() == ".json" else read_yaml(text)
    return signature, parse_manifest(document)


def _signature(path: Path) -> _Signature | None:
    try:
        return _of(path.stat())
    except OSError:
        return None


def _of(status: os.stat_result) -> _Signature:
    return status.st_mtime_ns, status.st_size, status.st_ino


def _reason(error: OSError | InvalidInput) -> str:
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)
