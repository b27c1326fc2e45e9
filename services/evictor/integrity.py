"""Integrity of stored objects: `Repair` gives records to files that lack one, `Scrub` re-hashes all files slowly.

Repair asks the catalog about each file without a record. If size and hash (where the catalog has one) match, the file
gets a record and is a hit from then on. If they do not, it is removed. A file that the catalog does not know stays: it
counts, it is evicted like any other object, and it is never served.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from enum import StrEnum

import structlog

from distributor_node.services.evictor.node_import import NodeImport
from distributor_node.services.evictor.removal import ObjectRemover
from distributor_node.shared.adapters.volume import FileState, FoundObject, UnknownFile, Volume
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.media_types import SNIFF_BYTES
from distributor_node.shared.domain.objects import (
    Assignment,
    CompactIdSet,
    MediaObject,
    ObjectId,
    StoredRecord,
    record_for_file,
)
from distributor_node.shared.observability.metrics import RECONCILED, SCRUBBED_BYTES, SCRUBBED_OBJECTS
from distributor_node.shared.ports.catalog import Catalog
from distributor_node.shared.ports.state_store import Term
from distributor_node.shared.runtime.threads import hash_file, next_chunk, run_blocking

_REPAIR_BATCH = 100
_MAX_CONCURRENT_REPAIRS = 16

logger = structlog.get_logger()


class Verdict(StrEnum):
    """What a file is, compared with what the catalog says of its object."""

    CONFIRMED = "repaired"
    MISMATCH = "mismatch"
    UNKNOWN = "unknown"
    """The catalog does not say enough."""
    UNREADABLE = "unreadable"
    """The disk cannot read it."""


_UNREPAIRED_REASONS = {
    Verdict.UNKNOWN: "the catalog does not know them",
    Verdict.UNREADABLE: "the disk cannot read them",
}


def judge_size(known: MediaObject | None, size: int) -> Verdict:
    """The verdict by size alone. After CONFIRMED the hash still has to be compared, where there is one."""
    if known is None or known.size is None:
        return Verdict.UNKNOWN
    return Verdict.CONFIRMED if known.size == size else Verdict.MISMATCH


class Repair:
    """Runs once after each reconciliation."""

    max_lookups = 1000
    """About so many look-ups in one run; the remaining files wait for the next run."""

    def __init__(
        self,
        volume: Volume,
        catalog: Catalog,
        remover: ObjectRemover,
        assignment: Callable[[], Assignment] | None,
        node_import: NodeImport | None = None,
    ) -> None:
        """`assignment`: returns the current one; None if the catalog cannot list objects.

        `node_import`: many objects without a record come from another node. So the catalog's whole list of the
        assignment is read first, and the size alone decides; the scrub verifies their hashes later.
        """
        self._volume, self._catalog, self._remover = volume, catalog, remover
        self._assignment, self._node_import = assignment, node_import
        self._unresolved = CompactIdSet()  # asked about without success since the last round over all files

    async def run(self, term: Term) -> None:
        """CatalogUnavailable in the middle leaves the rest for the next time."""
        if self._node_import is not None:
            await self._repair_listed(term)
        await self._repair_one_by_one(term)

    async def _repair_listed(self, term: Term) -> None:
        unrecorded = await run_blocking(self._all_unrecorded)
        if not unrecorded or self._assignment is None:
            return
        async for batch in self._catalog.list_objects(self._assignment()):
            listed = [
                (unrecorded.pop(known.object_id), known) for known in batch if known.object_id in unrecorded
            ]
            for start in range(0, len(listed), _MAX_CONCURRENT_REPAIRS):
                chunk = listed[start : start + _MAX_CONCURRENT_REPAIRS]
                repairs = (self._repair_one(term, found, known) for found, known in chunk)
                # All of them end before an error of one is raised
                for verdict in await asyncio.gather(*repairs, return_exceptions=True):
                    if isinstance(verdict, BaseException):
                        raise verdict
            if not unrecorded:
                return

    def _all_unrecorded(self) -> dict[ObjectId, FoundObject]:
        return {found.object_id: found for found in self._volume.scan_unrecorded()}

    async def _repair_one_by_one(self, term: Term) -> None:
        """Look up some files in each run. Those without success give way to the others, until all had their turn."""
        scan = self._volume.scan_unrecorded()
        lookups, left = 0, {verdict: list[ObjectId]() for verdict in _UNREPAIRED_REASONS}
        while (chunk := await next_chunk(scan, _REPAIR_BATCH)) and lookups < self.max_lookups:
            for found in chunk:
                if found.object_id in self._unresolved:
                    continue
                lookups += 1
                known = await self._catalog.look_up(found.object_id)
                verdict = await self._repair_one(term, found, known)
                if verdict in left:
                    left[verdict].append(found.object_id)
        for verdict, object_ids in left.items():
            if object_ids:
                logger.warning(
                    "objects_not_repaired", count=len(object_ids), reason=_UNREPAIRED_REASONS[verdict]
                )
            self._unresolved.update(object_ids)
        if not chunk:
            self._unresolved = CompactIdSet()

    async def _repair_one(self, term: Term, found: FoundObject, known: MediaObject | None) -> Verdict:
        """Repair one file. One that the disk cannot read does not stop the others; the next run tries it again."""
        try:
            verdict = await self._repair_readable(term, found, known)
        except VolumeError as error:
            logger.error("object_unreadable", object_id=found.object_id, reason=str(error))
            verdict = Verdict.UNREADABLE
        RECONCILED.labels(str(verdict)).inc()
        return verdict

    async def _repair_readable(self, term: Term, found: FoundObject, known: MediaObject | None) -> Verdict:
        descriptor = self._volume.open_raw(found.object_id)
        if descriptor is None:
            return Verdict.CONFIRMED  # it is gone
        try:
            verdict = await self._judge(known, descriptor)
            head = await run_blocking(_head_of, descriptor)
        finally:
            os.close(descriptor)
        if verdict is Verdict.CONFIRMED and known is not None:
            await run_blocking(self._write_record, known, found, head)
            logger.info("object_repaired", object_id=found.object_id)
        elif verdict is Verdict.MISMATCH:
            logger.warning("object_mismatch", object_id=found.object_id, bytes=found.size)
            await self._remover.purge(term, found.object_id, "mismatch")
        return verdict

    async def _judge(self, known: MediaObject | None, descriptor: int) -> Verdict:
        verdict = judge_size(known, os.fstat(descriptor).st_size)
        if self._node_import is not None or known is None or known.content_hash is None:
            return verdict
        if verdict is Verdict.CONFIRMED:
            seen = await hash_file(run_blocking, descriptor, known.content_hash)
            return Verdict.CONFIRMED if seen == known.content_hash else Verdict.MISMATCH
        return verdict

    def _write_record(self, known: MediaObject, found: FoundObject, head: bytes) -> None:
        if self._volume.read_record(found.object_id) is None:
            media_type = (
                None if self._node_import is None else self._node_import.media_type_of(found.object_id)
            )
            stored_at = min(found.changed_at, time.time())
            self._volume.write_record(record_for_file(known, found.size, head, stored_at, media_type))


def _head_of(descriptor: int) -> bytes:
    try:
        return os.pread(descriptor, SNIFF_BYTES, 0)
    except OSError as error:
        raise VolumeError(f"read the first bytes: {error.strerror}") from error


# The scrub re-hashes stored objects at a limited rate, and purges corrupt ones.

_SCRUB_BATCH = 100
_MIN_SECONDS_PER_OBJECT = 0.002
_ROUND_PAUSE = 60.0  # seconds


class Scrub:
    """Verifies all objects, one after the other. Its position is kept in memory: a new process starts at the first."""

    def __init__(
        self, volume: Volume, remover: ObjectRemover, rate: int, round_pause: float = _ROUND_PAUSE
    ) -> None:
        """`rate`: bytes a second; `round_pause`: seconds between two rounds over all objects."""
        self._volume, self._remover = volume, remover
        self._rate, self._round_pause = rate, round_pause
        self._scan: Iterator[FoundObject | UnknownFile] | None = None

    async def step(self, term: Term) -> float:
        """Verify the next few objects; returns the seconds until the next step."""
        if self._scan is None:
            self._scan = self._volume.scan_objects()
        try:
            chunk = await next_chunk(self._scan, _SCRUB_BATCH)
        except BaseException:
            self._scan = None  # a scan cannot continue after an error
            raise
        if not chunk:
            self._scan = None
            return self._round_pause
        for found in chunk:
            if isinstance(found, FoundObject) and not found.in_trash:
                try:
                    await self._verify(term, found)
                except VolumeError as error:
                    logger.error("object_unreadable", object_id=found.object_id, reason=str(error))
                await asyncio.sleep(_MIN_SECONDS_PER_OBJECT)
        return 0.0

    async def _verify(self, term: Term, found: FoundObject) -> None:
        descriptor = self._volume.open_raw(found.object_id)
        if descriptor is None:
            return
        try:
            stored = await run_blocking(self._volume.read_stored, found.object_id)
            if stored is None:
                return  # it is no hit; `Repair` handles it
            record, known = stored
            seen = FileState.of(os.fstat(descriptor))
            fault = await self._fault_of(descriptor, record)
            # The fault says nothing of the current file if this one was evicted or replaced while it was read
            current = os.fstat(descriptor).st_nlink > 0
        finally:
            os.close(descriptor)
        if fault is None:
            SCRUBBED_OBJECTS.labels("ok").inc()
            if record.content_hash is not None and not (known and known.is_kept_by(seen, can_verify=True)):
                # Written by the version before, or its file has changed since, and is right
                await run_blocking(self._volume.write_record, record, seen)
        elif current and await run_blocking(self._volume.read_record, found.object_id) == record:
            SCRUBBED_OBJECTS.labels("corrupt").inc()
            logger.error("object_corrupt", object_id=found.object_id, reason=fault, bytes=found.size)
            await self._remover.purge(term, found.object_id, "corrupt")

    async def _fault_of(self, descriptor: int, record: StoredRecord) -> str | None:
        size = os.fstat(descriptor).st_size
        if size != record.size:
            return f"size: expected {record.size} bytes, got {size}"
        if record.content_hash is None:
            return None
        try:
            seen = await hash_file(run_blocking, descriptor, record.content_hash, self._rate)
        except VolumeError as error:
            return f"cannot be read: {error}"
        SCRUBBED_BYTES.inc(size)
        return None if seen == record.content_hash else f"hash: expected {record.content_hash}, got {seen}"
