"""The slow re-hash of what lies on disk: corrupt objects leave the cache before anybody is given them again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import structlog

from services.evictor.file_calls import next_chunk, run_blocking
from services.evictor.removals import ObjectRemover
from shared.adapters.volume import FoundObject, UnknownFile, Volume
from shared.domain.errors import VolumeError
from shared.domain.objects import StoredRecord
from shared.observability.metrics import SCRUBBED_BYTES, SCRUBBED_OBJECTS
from shared.ports.state_store import Term
from shared.runtime.hashing import hash_file

_SCRUB_BATCH = 100
_MIN_SECONDS_PER_OBJECT = 0.002
_ROUND_PAUSE = 60.0

logger = structlog.get_logger()


class Scrub:
    """`rate`: bytes a second; 0 turns it off. Where it stands is kept in memory: a new process begins anew."""

    def __init__(
        self, volume: Volume, remover: ObjectRemover, rate: int, round_pause: float = _ROUND_PAUSE
    ) -> None:
        self._volume, self._remover = volume, remover
        self._rate, self._round_pause = rate, round_pause
        self._scan: Iterator[FoundObject | UnknownFile] | None = None

    async def step(self, term: Term) -> float:
        """Look at the next few objects; seconds until the next step."""
        if self._scan is None:
            self._scan = self._volume.scan_objects()
        try:
            chunk = await next_chunk(self._scan, _SCRUB_BATCH)
        except BaseException:
            self._scan = None  # a scan that failed does not go on
            raise
        if not chunk:
            self._scan = None
            return self._round_pause
        for found in chunk:
            if isinstance(found, FoundObject) and not found.in_trash:
                await self._verify(term, found)
                await asyncio.sleep(_MIN_SECONDS_PER_OBJECT)
        return 0.0

    async def _verify(self, term: Term, found: FoundObject) -> None:
        descriptor = self._volume.open_raw(found.object_id)
        if descriptor is None:
            return
        try:
            record = await run_blocking(self._volume.read_record, found.object_id)
            if record is None:
                return  # never a hit; repair deals with it
            fault = await self._fault_of(descriptor, record)
            # Evicted or replaced while it was read: what was seen says nothing of what is there now
            current = os.fstat(descriptor).st_nlink > 0
        finally:
            os.close(descriptor)
        if fault is None:
            SCRUBBED_OBJECTS.labels("ok").inc()
        elif current and await run_blocking(self._volume.read_record, found.object_id) == record:
            SCRUBBED_OBJECTS.labels("corrupt").inc()
            logger.error("object_corrupt", object_id=found.object_id, reason=fault, bytes=found.size)
            await self._remover.purge(term, found.object_id, "corrupt")

    async def _fault_of(self, descriptor: int, record: StoredRecord) -> str | None:
        size = os.fstat(descriptor).st_size
        if size != record.size:
            return f"{size} bytes instead of {record.size}"
        if record.content_hash is None:
            return None
        try:
            seen = await hash_file(run_blocking, descriptor, record.content_hash, self._rate)
        except VolumeError as error:
            return f"cannot be read: {error}"
        SCRUBBED_BYTES.inc(size)
        return None if seen == record.content_hash else f"its hash is {seen}"
