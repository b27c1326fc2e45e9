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
from shared.adapters.volume.intake import Intake, Taken, WaitingFile
from shared.domain.errors import InvalidInput, VolumeError
from shared.domain.eviction import PolicyEntry
from shared.domain.objects import ObjectId
from shared.observability.metrics import RECONCILED

_AT_ONCE = 500

logger = structlog.get_logger()


class Takeover:
    """`cache_state`: the old node's file, or the directory it lies in; None: recency is not to be had."""

    def __init__(self, intake: Intake, cache_state: Path | None) -> None:
        self._intake = intake
        self._cache_state = cache_state
        self._state = CacheState()
        self._read = False
        self.elsewhere = False

    async def move_in(self) -> None:
        """Move what can be moved. Safe to repeat, and to be killed in. A directory that cannot be read is no reason for
        the node not to work without it."""
        try:
            waiting = await run_blocking(self._anything_waiting)
        except VolumeError as error:
            logger.error("assets_unreadable", assets=str(self._intake.assets), reason=str(error))
            return
        await self._read_state_once()
        if waiting:
            await self._move_all()

    async def _move_all(self) -> None:
        await run_blocking(self._intake.mark, done=False)
        taken = Counter[Taken]()
        scan = self._intake.waiting()
        while chunk := await next_chunk(scan, _AT_ONCE):
            taken.update(await run_blocking(self._take_in, chunk))
            if taken[Taken.ELSEWHERE]:
                break
        self.elsewhere = taken[Taken.ELSEWHERE] > 0
        RECONCILED.labels("taken_over").inc(taken[Taken.MOVED])
        logger.info(
            "assets_taken_over",
            assets=str(self._intake.assets),
            moved=taken[Taken.MOVED],
            there=taken[Taken.THERE],
            failed=taken[Taken.FAILED],
            to_copy=self.elsewhere,
        )

    def figures_of(self, found: FoundObject) -> PolicyEntry | None:
        """How the old node saw the use of an object that nobody here has seen used; None: it does not say."""
        told = self._state.views.get(found.object_id)
        return None if told is None else PolicyEntry(found.object_id, found.size, *told)

    def media_type_of(self, object_id: ObjectId) -> str | None:
        """What the old node found it to be."""
        return self._state.media_types.get(object_id)

    def views_of(self, waiting: WaitingFile) -> tuple[int, float]:
        """Views, and POSIX seconds of the last."""
        return self._state.views.get(waiting.object_id, (1, waiting.changed_at))

    async def finish(self) -> None:
        """All that was moved has been counted, and compared with the catalog."""
        if not self.elsewhere:
            self._state = CacheState()
        if not await run_blocking(self._intake.is_done):
            await run_blocking(self._intake.mark, done=True)
            logger.info("takeover_done", assets=str(self._intake.assets))

    async def _read_state_once(self) -> None:
        if self._cache_state is None or self._read:
            return
        self._read = True
        try:
            self._state = await run_blocking(read_cache_state, self._cache_state)
        except (OSError, InvalidInput) as error:
            reason = f"{error.strerror}" if isinstance(error, OSError) else str(error)
            logger.warning("cache_state_unusable", path=str(self._cache_state), reason=reason)

    def _anything_waiting(self) -> bool:
        self._intake.close()  # directories may have been replaced since the last time
        return bool(list(islice(self._intake.waiting(), 1)))

    def _take_in(self, waiting: Sequence[WaitingFile]) -> list[Taken]:
        return [self._take_in_one(one.object_id) for one in waiting]

    def _take_in_one(self, object_id: ObjectId) -> Taken:
        try:
            return self._intake.take_in(object_id)
        except VolumeError as error:
            logger.error("asset_not_taken_over", object_id=object_id, reason=str(error))
            return Taken.FAILED
