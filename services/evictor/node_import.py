"""Import of the objects of an existing node, without downloads.

`NodeImport` moves files on the volume's own file system before the first reconciliation, which counts them like any
other unknown file. Their views and last accesses come from the old node's cache state. `Repair` then asks the catalog
about each: the size decides at once, and the scrub verifies the hash later. `ImportCopier` copies files from another
file system.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import structlog

from distributor_node.shared.adapters.volume import FoundObject, PartialFile, Volume
from distributor_node.shared.adapters.volume.intake import ImportResult, ImportSource, PendingFile
from distributor_node.shared.adapters.volume.layout import open_plain
from distributor_node.shared.domain.errors import InvalidInput, VolumeError
from distributor_node.shared.domain.eviction import PolicyEntry
from distributor_node.shared.domain.media_types import SNIFF_BYTES, media_type_or_none
from distributor_node.shared.domain.objects import MediaObject, ObjectId, StoredRecord, record_for_file
from distributor_node.shared.observability.metrics import RECONCILED
from distributor_node.shared.ports.catalog import Catalog
from distributor_node.shared.ports.state_store import (
    Access,
    AlreadyStored,
    FetchPhase,
    Granted,
    Lease,
    NeverFits,
    NoSpace,
    StateStore,
)
from distributor_node.shared.runtime.threads import next_chunk, run_blocking

_IMPORT_BATCH = 500

logger = structlog.get_logger()


class NodeImport:
    """Moves files into the volume, and tells how the old node used them."""

    def __init__(self, state: StateStore, import_source: ImportSource, cache_state: Path | None) -> None:
        """`cache_state`: the old node's state file, or its directory; None: without it."""
        self._store = state
        self._import_source = import_source
        self._cache_state = cache_state
        self._state = CacheState()
        self._state_read = False
        self.needs_copy = False
        """Whether `link_files` found files on another file system."""
        self.deferred = set[ObjectId]()
        """Objects that were under a lease when `link_files` came to them."""

    async def link_files(self) -> None:
        """Move the files that can be moved; those of objects that are being fetched wait for another call. Safe to
        repeat, and to be killed in. If the directory cannot be read, the node works without it.

        StateStoreUnavailable ends it early.
        """
        self.deferred.clear()
        try:
            pending = await run_blocking(self._has_pending)
        except VolumeError as error:
            logger.error(
                "import_directory_unreadable", assets=str(self._import_source.assets), reason=str(error)
            )
            return
        await self._read_state_once()
        if pending:
            await self._link_all()

    async def _link_all(self) -> None:
        await run_blocking(self._import_source.mark, done=False)
        results = Counter[ImportResult]()
        scan = self._import_source.pending()
        while chunk := await next_chunk(scan, _IMPORT_BATCH):
            # A file beside the partial file of a live lease would count only once that lease has ended
            leased = await self._leased()
            self.deferred.update(leased.intersection(one.object_id for one in chunk))
            free = [one for one in chunk if one.object_id not in leased]
            results.update(await run_blocking(self._import_batch, free))
            if results[ImportResult.OTHER_DEVICE]:
                break
        if results:  # otherwise all of them wait
            self.needs_copy = results[ImportResult.OTHER_DEVICE] > 0
        RECONCILED.labels("imported").inc(results[ImportResult.MOVED])
        logger.info(
            "import_files_moved",
            assets=str(self._import_source.assets),
            moved=results[ImportResult.MOVED],
            there=results[ImportResult.EXISTS],
            excluded=results[ImportResult.EXCLUDED],
            deferred=len(self.deferred),
            failed=results[ImportResult.FAILED],
            to_copy=self.needs_copy,
        )

    async def has_importable(self) -> bool:
        """Whether `link_files` has left files for fetches that have all ended since: it is worth a call."""
        if self.needs_copy or not self.deferred:  # the copier has leases itself, and takes all that is left
            return False
        return self.deferred.isdisjoint(await self._leased())

    async def _leased(self) -> set[ObjectId]:
        """Objects under a live lease, also that of a worker that has died."""
        fetches = await self._store.fetches()
        return {fetch.object_id for fetch in fetches if fetch.phase is FetchPhase.FETCHING}

    def usage_of(self, found: FoundObject) -> PolicyEntry | None:
        """Views and last access on the old node; None: it does not know the object."""
        usage = self._state.views.get(found.object_id)
        return None if usage is None else PolicyEntry(found.object_id, found.size, *usage)

    def media_type_of(self, object_id: ObjectId) -> str | None:
        """The media type that the old node recorded."""
        return self._state.media_types.get(object_id)

    def views_of(self, pending: PendingFile) -> tuple[int, float]:
        """Views, and the POSIX seconds of the last one."""
        return self._state.views.get(pending.object_id, (1, pending.changed_at))

    async def exclude(self, object_id: ObjectId) -> None:
        """Never import this object: the operator has purged it. Call it before the object is removed. VolumeError if
        that could not be recorded."""
        await run_blocking(self._import_source.exclude, object_id)

    async def finish(self) -> None:
        """Call it when all moved files have been adopted and compared with the catalog."""
        if not self.needs_copy and not self.deferred:
            self._state = CacheState()
        if not await run_blocking(self._import_source.is_done):
            await run_blocking(self._import_source.mark, done=True)
            logger.info("import_finished", assets=str(self._import_source.assets))

    async def _read_state_once(self) -> None:
        if self._cache_state is None or self._state_read:
            return
        self._state_read = True
        try:
            self._state = await run_blocking(read_cache_state, self._cache_state)
        except (OSError, InvalidInput) as error:
            reason = f"{error.strerror}" if isinstance(error, OSError) else str(error)
            logger.warning("cache_state_unusable", path=str(self._cache_state), reason=reason)

    def _has_pending(self) -> bool:
        self._import_source.close()  # directories may have been replaced since the last call
        return bool(list(islice(self._import_source.pending(), 1)))

    def _import_batch(self, pending: Sequence[PendingFile]) -> list[ImportResult]:
        return [self._import_one(one.object_id) for one in pending]

    def _import_one(self, object_id: ObjectId) -> ImportResult:
        try:
            return self._import_source.import_file(object_id)
        except VolumeError as error:
            logger.error("import_move_failed", object_id=object_id, reason=str(error))
            return ImportResult.FAILED


# Objects on another file system are copied one after the other, within the storage limit.
#
# Each copy is made like a fetch from a source: under a lease, with reserved bytes, verified, published by one rename.
# The most used objects come first. Nothing is evicted for them: an object without room stays where it is.

_COPY_CHUNK = 4 * 1024**2  # bytes
_LEASE_RENEW_INTERVAL = 2.0  # seconds
_RETRY_INTERVAL = 600.0  # seconds
_WORKER = "takeover"


class ImportCopier:
    """Copies files that `NodeImport` could not move. `run` may be repeated, and killed."""

    def __init__(
        self,
        state: StateStore,
        volume: Volume,
        catalog: Catalog,
        import_source: ImportSource,
        node_import: NodeImport,
    ) -> None:
        self._state, self._volume, self._catalog = state, volume, catalog
        self._import_source, self._node_import = import_source, node_import

    async def run(self) -> float | None:
        """Copy what has room. Returns the seconds until the next attempt; None: nothing is left.

        CatalogUnavailable and StateStoreUnavailable end it early.
        """
        if not self._node_import.needs_copy:
            return _RETRY_INTERVAL if self._node_import.deferred else None
        pending = await run_blocking(self._most_used_first)
        copied = 0
        for one in pending:
            known = await self._catalog.look_up(one.object_id)
            if known is None or known.size != one.size:
                RECONCILED.labels("import_rejected").inc()
                logger.warning(
                    "import_object_skipped", object_id=one.object_id, bytes=one.size, known=known is not None
                )
                continue
            begun = await self._state.begin(one.object_id, one.size, _WORKER)
            if isinstance(begun, NoSpace):
                logger.info("import_paused_no_space", copied=copied, left=len(pending) - copied)
                return _RETRY_INTERVAL
            if isinstance(begun, Granted | AlreadyStored):
                try:
                    copied += await self._import_admitted(known, one, begun)
                except VolumeError as error:
                    logger.error("import_copy_failed", object_id=one.object_id, reason=str(error))
            elif not isinstance(begun, NeverFits):
                # Not reconciled yet, or a worker is fetching this object
                return _LEASE_RENEW_INTERVAL
        logger.info("import_copy_finished", copied=copied, left=len(pending) - copied)
        return None

    async def _import_admitted(
        self, known: MediaObject, one: PendingFile, begun: Granted | AlreadyStored
    ) -> bool:
        if isinstance(begun, Granted):
            # Race: 1. we read what is pending; 2. the operator purges the object; 3. we begin. A purge that comes after
            # this look finds our fetch, and waits for its end
            if not await self._may_copy(one.object_id, begun.lease):
                return False
            return await self._copy(known, one, begun.lease)
        await run_blocking(self._import_source.remove, one.object_id)
        return False

    async def _may_copy(self, object_id: ObjectId, lease: Lease) -> bool:
        excluded = True
        try:
            excluded = await run_blocking(self._import_source.is_excluded, object_id)
        finally:
            if excluded:
                await self._state.park(lease)
        return not excluded

    def _most_used_first(self) -> Sequence[PendingFile]:
        return sorted(self._import_source.pending(), key=self._node_import.views_of, reverse=True)

    async def _copy(self, known: MediaObject, one: PendingFile, lease: Lease) -> bool:
        """Copy one object; whether it is stored now. Its source file is removed only after that."""
        views, last_at = self._node_import.views_of(one)
        if not await run_blocking(_is_complete, self._volume, known) and not await self._store(
            known, one, lease
        ):
            return False
        await self._commit(lease, last_at)
        if views > 1:
            await self._state.record_accesses([Access(one.object_id, views - 1, last_at)])
        await run_blocking(self._import_source.remove, one.object_id)
        RECONCILED.labels("import_copied").inc()
        return True

    async def _commit(self, lease: Lease, last_at: float) -> None:
        """Enter the object into the index. After StateStoreUnavailable the next attempt finds the complete file."""
        if await self._state.commit(lease, last_at):
            return
        begun = await self._state.begin(lease.object_id, lease.size, _WORKER)
        known = isinstance(begun, Granted) and await self._state.commit(begun.lease, last_at)
        if not known and not isinstance(begun, AlreadyStored):
            logger.warning("import_reindex_deferred", object_id=lease.object_id)

    async def _store(self, known: MediaObject, one: PendingFile, lease: Lease) -> bool:
        """Copy the bytes and publish the object. If that fails the lease is released, and the result is False."""
        source, opened = self._import_source.assets / one.object_id, list[PartialFile]()
        record, matches = None, False
        try:
            head = await run_blocking(_read_head, source)
            media_type = self._node_import.media_type_of(one.object_id)
            record = record_for_file(known, one.size, head, time.time(), media_type)
            await run_blocking(_open_partial, self._volume, record, opened)
            matches = await self._copy_bytes(opened[0], source, record, lease)
            if matches:
                await run_blocking(opened[0].publish, record)
        except (VolumeError, OSError) as error:
            matches = False
            logger.warning("import_copy_failed", object_id=one.object_id, reason=str(error))
        finally:
            for partial in opened:
                partial.close()
        if not matches and record is not None and opened:
            await self._discard_mismatch(record, lease)
        elif not matches:
            await self._state.park(lease)
        return matches

    async def _copy_bytes(
        self, partial: PartialFile, source: Path, record: StoredRecord, lease: Lease
    ) -> bool:
        """Whether all bytes were copied and match the catalog. OSError if the source cannot be read."""
        if partial.size:
            await run_blocking(partial.restart)
        hasher = record.content_hash.hasher() if record.content_hash is not None else None
        offset, renewed_at = 0, time.monotonic()
        descriptor = await run_blocking(open_plain, source, os.O_RDONLY)
        try:
            while data := await run_blocking(os.pread, descriptor, _COPY_CHUNK, offset):
                if offset + len(data) > record.size:
                    return False
                await run_blocking(partial.write, offset, data)
                if hasher is not None:
                    await run_blocking(hasher.update, data)
                offset += len(data)
                if time.monotonic() - renewed_at > _LEASE_RENEW_INTERVAL:
                    if not await self._state.renew(lease):
                        return False
                    renewed_at = time.monotonic()
        finally:
            os.close(descriptor)
        if offset != record.size:
            return False
        if hasher is not None and record.content_hash is not None:
            return hasher.digest() == record.content_hash.digest
        return True

    async def _discard_mismatch(self, record: StoredRecord, lease: Lease) -> None:
        """Discard a copy that does not match the catalog. Its source file stays. The object is fetched when a client
        requests it."""
        logger.warning("import_object_mismatch", object_id=record.object_id, bytes=record.size)
        RECONCILED.labels("import_rejected").inc()
        if await self._state.renew(lease):
            try:
                await run_blocking(self._volume.discard_partial, record.object_id, record.size)
            except VolumeError as error:
                logger.warning("partial_removal_failed", object_id=record.object_id, reason=str(error))
                await self._state.park(lease)
                return
            await self._state.release(lease)


def _read_head(source: Path) -> bytes:
    descriptor = open_plain(source, os.O_RDONLY)
    try:
        return os.pread(descriptor, SNIFF_BYTES, 0)
    finally:
        os.close(descriptor)


def _open_partial(volume: Volume, record: StoredRecord, opened: list[PartialFile]) -> None:
    """Append to `opened`, so that a caller that is cancelled during the call can close it."""
    opened.append(volume.open_partial_for_writing(record))


def _is_complete(volume: Volume, known: MediaObject) -> bool:
    """Whether the object was published by an earlier attempt that could not reach the store afterwards."""
    record = volume.complete_record(known.object_id)
    return record is not None and (record.size, record.content_hash) == (known.size, known.content_hash)


# The state of the old node's cache, from its `cache.json`.
#
#     lruCacheGroups      24 lists of [object id, {sizeKB, popularity, lastAccessTime}], times in POSIX milliseconds
#     mimeTypeByObjectId  a list of [object id, media type]
#
# The old node writes the file from time to time, not atomically. It may be missing, torn or old; then only views and
# last accesses are lost.

FILE_NAME = "cache.json"
_MAX_VIEWS = 2**31


@dataclass(frozen=True, slots=True)
class CacheState:
    """What the old node knew, by object id."""

    views: Mapping[ObjectId, tuple[int, float]] = field(
        default_factory=dict
    )  # and POSIX seconds of the last one
    media_types: Mapping[ObjectId, str] = field(default_factory=dict)


def read_cache_state(path: Path) -> CacheState:
    """Read the file, or the file in this directory. OSError if it cannot be read; InvalidInput if it is torn. Invalid
    entries are skipped."""
    file = path / FILE_NAME if path.is_dir() else path
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{FILE_NAME}: expected JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidInput(f"{FILE_NAME}: expected a JSON object, got {type(document).__name__}")
    return CacheState(dict(_views(document)), dict(_media_types(document)))


def _views(document: Mapping[str, Any]) -> Iterator[tuple[ObjectId, tuple[int, float]]]:
    for group in _as_list(document.get("lruCacheGroups")):
        for object_id, stated in _pairs(group):
            if not isinstance(stated, dict):
                continue
            popularity = _number(stated.get("popularity"))
            accessed = _number(stated.get("lastAccessTime"))
            if popularity is not None and accessed is not None:
                yield object_id, (int(min(max(popularity, 1), _MAX_VIEWS)), accessed / 1000)


def _media_types(document: Mapping[str, Any]) -> Iterator[tuple[ObjectId, str]]:
    for object_id, stated in _pairs(document.get("mimeTypeByObjectId")):
        media_type = media_type_or_none(stated) if isinstance(stated, str) else None
        if media_type is not None:
            yield object_id, media_type


def _pairs(value: object) -> Iterator[tuple[ObjectId, Any]]:
    for pair in _as_list(value):
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            continue
        try:
            yield ObjectId.parse(pair[0]), pair[1]
        except InvalidInput:
            continue


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: object) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**63
    return value if usable and isinstance(value, int | float) else None
