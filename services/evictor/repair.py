"""Complete files without a record: the catalog may know what they are.

What the catalog confirms (size, and hash where it has one) gets a record and is a hit from then on. What contradicts it
goes. What it does not know stays: it counts, takes its turn in eviction like any other object, and is never served.
"""

from __future__ import annotations

import os
import time
from enum import StrEnum

import structlog

from services.evictor.file_calls import file_call, next_chunk
from services.evictor.hashing import hash_file
from services.evictor.removals import Removals
from shared.adapters.volume import FoundObject, Volume
from shared.domain.media_sniffing import HEAD_BYTES, settle_media_type
from shared.domain.objects import MediaObject, StoredRecord
from shared.observability.metrics import RECONCILED
from shared.ports.catalog import Catalog
from shared.ports.state_store import Term

_AT_ONCE = 100
_QUESTIONS_MOST = 1000  # of one run: the rest waits for the next

logger = structlog.get_logger()


class Verdict(StrEnum):
    """CONFIRMED: as the catalog says; WRONG: not what it says; UNKNOWN: it does not say enough to tell."""

    CONFIRMED = "repaired"
    WRONG = "wrong"
    UNKNOWN = "unknown"


def judge_size(known: MediaObject | None, size: int) -> Verdict:
    """What the size alone tells; CONFIRMED still wants the hash looked at, where there is one."""
    if known is None or known.size is None:
        return Verdict.UNKNOWN
    return Verdict.CONFIRMED if known.size == size else Verdict.WRONG


class Repair:
    """One run after each reconciliation."""

    def __init__(self, volume: Volume, catalog: Catalog, removals: Removals) -> None:
        self._volume, self._catalog, self._removals = volume, catalog, removals

    async def run(self, term: Term) -> None:
        """CatalogUnavailable in the middle leaves the rest for the next time."""
        scan = self._volume.scan_unrecorded()
        questions, unknown = 0, 0
        while (chunk := await next_chunk(scan, _AT_ONCE)) and questions < _QUESTIONS_MOST:
            for found in chunk:
                verdict = await self._settle(term, found)
                unknown += verdict is Verdict.UNKNOWN
            questions += len(chunk)
        if unknown:
            logger.warning("objects_without_record", count=unknown, reason="the catalog does not know them")

    async def _settle(self, term: Term, found: FoundObject) -> Verdict:
        known = await self._catalog.look_up(found.object_id)
        descriptor = self._volume.open_raw(found.object_id)
        if descriptor is None:
            return Verdict.CONFIRMED  # gone meanwhile
        try:
            verdict = await self._judge(known, descriptor)
            head = os.pread(descriptor, HEAD_BYTES, 0)
        finally:
            os.close(descriptor)
        if verdict is Verdict.CONFIRMED and known is not None:
            await file_call(self._write_record, known, found, head)
            logger.info("object_repaired", object_id=found.object_id)
        elif verdict is Verdict.WRONG:
            logger.warning("object_wrong", object_id=found.object_id, bytes=found.size)
            await self._removals.purge(term, found.object_id, "wrong")
        RECONCILED.labels(str(verdict)).inc()
        return verdict

    async def _judge(self, known: MediaObject | None, descriptor: int) -> Verdict:
        verdict = judge_size(known, os.fstat(descriptor).st_size)
        if verdict is Verdict.CONFIRMED and known is not None and known.content_hash is not None:
            seen = await hash_file(descriptor, known.content_hash, rate=0)
            return Verdict.CONFIRMED if seen == known.content_hash else Verdict.WRONG
        return verdict

    def _write_record(self, known: MediaObject, found: FoundObject, head: bytes) -> None:
        if self._volume.read_record(found.object_id) is None:
            self._volume.write_record(
                StoredRecord(
                    object_id=found.object_id,
                    size=found.size,
                    etag=known.etag,
                    content_hash=known.content_hash,
                    media_type=settle_media_type(known.media_type, head),
                    stored_at=int(min(found.changed_at, time.time())),
                )
            )
