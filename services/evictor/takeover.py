"""Taking over the objects of an existing node: its flat directory becomes ours, without a download.

Files on the volume's own file system are moved before the first reconciliation, which counts them like any other file
it does not know; what the old node knew of their use goes with them. `repair` then asks the catalog what they must be:
the size decides at once, the hash when the scrub comes by. Files on another file system are copied one after the
other, see `copying`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import structlog

from services.evictor.file_calls import next_chunk, run_blocking
from shared.adapters.existing_node import CacheState, read_cache_state
from shared.adapters.volume import FoundObject
from shared.adapters.volume.intake import ImportResult, ImportSource, PendingFile
from shared.domain.errors import InvalidInput, VolumeError
from shared.domain.eviction import PolicyEntry
from shared.domain.objects import ObjectId
from shared.observability.metrics import RECONCILED

_IMPORT_BATCH = 500

logger = structlog.get_logger()


class NodeImport:
    """`cache_state`: the old node's file, or the directory it lies in; None: recency is not to be had."""

    def __init__(self, import_source: ImportSource, cache_state: Path | None) -> None:
        self._import_source = import_source
        self._cache_state = cache_state
        self._state = CacheState()
        self._state_read = False
        self.needs_copy = False

    async def link_files(self) -> None:
        """Move what can be moved. Safe to repeat, and to be killed in. A directory that cannot be read is no reason for
        the node not to work without it."""
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
            results.update(await run_blocking(self._import_batch, chunk))
            if results[ImportResult.OTHER_DEVICE]:
                break
        self.needs_copy = results[ImportResult.OTHER_DEVICE] > 0
        RECONCILED.labels("imported").inc(results[ImportResult.MOVED])
        logger.info(
            "import_files_moved",
            assets=str(self._import_source.assets),
            moved=results[ImportResult.MOVED],
            there=results[ImportResult.EXISTS],
            failed=results[ImportResult.FAILED],
            to_copy=self.needs_copy,
        )

    def usage_of(self, found: FoundObject) -> PolicyEntry | None:
        """How the old node saw the use of an object that nobody here has seen used; None: it does not say."""
        usage = self._state.views.get(found.object_id)
        return None if usage is None else PolicyEntry(found.object_id, found.size, *usage)

    def media_type_of(self, object_id: ObjectId) -> str | None:
        """What the old node found it to be."""
        return self._state.media_types.get(object_id)

    def views_of(self, pending: PendingFile) -> tuple[int, float]:
        """Views, and POSIX seconds of the last."""
        return self._state.views.get(pending.object_id, (1, pending.changed_at))

    async def finish(self) -> None:
        """All that was moved has been counted, and compared with the catalog."""
        if not self.needs_copy:
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
        self._import_source.close()  # directories may have been replaced since the last time
        return bool(list(islice(self._import_source.pending(), 1)))

    def _import_batch(self, pending: Sequence[PendingFile]) -> list[ImportResult]:
        return [self._import_one(one.object_id) for one in pending]

    def _import_one(self, object_id: ObjectId) -> ImportResult:
        try:
            return self._import_source.import_file(object_id)
        except VolumeError as error:
            logger.error("import_move_failed", object_id=object_id, reason=str(error))
            return ImportResult.FAILED
