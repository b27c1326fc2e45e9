"""Copying the objects of an existing node from another file system, one after the other, within the storage limit.

Each is fetched as from a source: under a lease, with its bytes reserved, verified, published by one rename. The most
used come first, and nothing is evicted for them: what finds no room is left where it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from services.evictor.file_calls import run_blocking
from services.evictor.partial_files import discard_partial_file
from services.evictor.takeover import NodeImport
from shared.adapters.volume import PartialFile, Volume
from shared.adapters.volume.intake import ImportSource, PendingFile
from shared.domain.errors import VolumeError
from shared.domain.found_objects import record_for_file
from shared.domain.media_sniffing import SNIFF_BYTES
from shared.domain.objects import MediaObject, StoredRecord
from shared.observability.metrics import RECONCILED
from shared.ports.catalog import Catalog
from shared.ports.state_store import Access, AlreadyStored, Granted, Lease, NeverFits, NoSpace, StateStore

_COPY_CHUNK = 4 * 1024**2
_LEASE_RENEW_INTERVAL = 2.0
_NO_SPACE_RETRY_INTERVAL = 600.0
_WORKER = "takeover"

logger = structlog.get_logger()


class ImportCopier:
    """`run` when the import found files elsewhere; may be repeated, and killed."""

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
        """Seconds until it is worth trying again; None: nothing is left. CatalogUnavailable, StateStoreUnavailable and
        VolumeError end it in the middle."""
        if not self._node_import.needs_copy:
            return None
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
                return _NO_SPACE_RETRY_INTERVAL
            if isinstance(begun, Granted):
                copied += await self._copy(known, one, begun.lease)
            elif isinstance(begun, AlreadyStored):
                await run_blocking(self._import_source.remove, one.object_id)
            elif not isinstance(begun, NeverFits):
                return (
                    _LEASE_RENEW_INTERVAL  # not reconciled yet, or a fetch of this very object is under way
                )
        logger.info("import_copy_finished", copied=copied, left=len(pending) - copied)
        return None

    def _most_used_first(self) -> Sequence[PendingFile]:
        return sorted(self._import_source.pending(), key=self._node_import.views_of, reverse=True)

    async def _copy(self, known: MediaObject, one: PendingFile, lease: Lease) -> bool:
        """Whether it is ours now. Its source goes only after that."""
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
        """StateStoreUnavailable leaves it to the next attempt, which finds the complete file."""
        if await self._state.commit(lease, last_at):
            return
        begun = await self._state.begin(lease.object_id, lease.size, _WORKER)
        known = isinstance(begun, Granted) and await self._state.commit(begun.lease, last_at)
        if not known and not isinstance(begun, AlreadyStored):
            logger.warning("import_reindex_deferred", object_id=lease.object_id)

    async def _store(self, known: MediaObject, one: PendingFile, lease: Lease) -> bool:
        """Whether it is a complete object now. If not, the lease is given back."""
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
        """Whether all of it came, and is what the catalog says. OSError if the source cannot be read."""
        if partial.size:
            await run_blocking(partial.restart)
        hasher = record.content_hash.hasher() if record.content_hash is not None else None
        offset, renewed_at = 0, time.monotonic()
        descriptor = await run_blocking(os.open, source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
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
        """What is wrong is fetched anew when somebody asks for it; the source stays where it is."""
        logger.warning("import_object_mismatch", object_id=record.object_id, bytes=record.size)
        RECONCILED.labels("import_rejected").inc()
        if await self._state.renew(lease):
            try:
                await run_blocking(discard_partial_file, self._volume, record.object_id, record.size)
            except VolumeError as error:
                logger.warning("partial_removal_failed", object_id=record.object_id, reason=str(error))
                await self._state.park(lease)
                return
            await self._state.release(lease)


def _read_head(source: Path) -> bytes:
    with source.open("rb") as file:
        return file.read(SNIFF_BYTES)


def _open_partial(volume: Volume, record: StoredRecord, opened: list[PartialFile]) -> None:
    """Left in `opened`, where whoever is cancelled meanwhile finds it and closes it."""
    opened.append(volume.open_partial_for_writing(record))


def _is_complete(volume: Volume, known: MediaObject) -> bool:
    """It was published already, and nobody could be told: the store was out of reach at that moment."""
    found = volume.open_object(known.object_id)
    if found is None:
        return False
    found.close()
    return found.record.size == known.size and found.record.content_hash == known.content_hash
