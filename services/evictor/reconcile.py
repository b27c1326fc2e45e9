"""Reconciliation: makes the index in the state store match the volume, after which the store may grant space again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from distributor_node.services.evictor.adoption import Adoption, AdoptionResult, PartialReaper, SeenFile
from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.services.evictor.removal import ObjectRemover
from distributor_node.shared.adapters.volume import UnknownFile, UnreadableFile, Volume
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.objects import CompactIdSet, ObjectId
from distributor_node.shared.domain.space import Usage, footprint
from distributor_node.shared.observability.metrics import (
    RECONCILE_TIME,
    RECONCILED,
    STATE_STORE_EVICTS,
    UNKNOWN_FILES,
)
from distributor_node.shared.ports.state_store import REBUILD_DELAY, IndexEntry, StateStore, Term
from distributor_node.shared.runtime.threads import next_chunk, run_blocking

_SCAN_BATCH = 500
_ORPHAN_RECORD_AGE = 600.0

logger = structlog.get_logger()


@dataclass(slots=True)
class Findings:
    """What one reconciliation found."""

    objects: int = 0
    adopted: int = 0
    dropped: int = 0  # entries without a file
    unreadable: int = (
        0  # files that could not be looked at; with one of them the index does not match the volume
    )
    foreign: list[str] = field(default_factory=list)  # some paths, as examples
    foreign_count: int = 0

    def add_foreign(self, path: str) -> None:
        self.foreign_count += 1
        if len(self.foreign) < 5:
            self.foreign.append(path)

    def add_unreadable(self, name: str, error: VolumeError | str) -> None:
        """`name`: of the object, or the path of a file or directory."""
        self.unreadable += 1
        logger.error("object_unreadable", object_id=name, reason=str(error))


class Reconciliation:
    """Compares the volume with the index. `run` may be repeated at any time, beside live workers and evictions."""

    def __init__(
        self,
        state: StateStore,
        volume: Volume,
        index: EvictionIndex,
        remover: ObjectRemover,
        adoption: Adoption,
        reaper: PartialReaper,
    ) -> None:
        self._state, self._volume, self._index = state, volume, index
        self._remover, self._adoption, self._reaper = remover, adoption, reaper
        self.usage_check = UsageCheck(state)

    async def run(self, term: Term) -> bool:
        """True if the index matches the volume now. VolumeError if the volume cannot be read."""
        started_at, findings = time.monotonic(), Findings()
        await self.usage_check.check_maxmemory_policy()
        await run_blocking(self._volume.check)
        known = await self._index.resync()
        await self._remover.complete_all(term, len(self._index.evicting))
        # Partial files before objects: a file that is published between the two scans is seen by one of them
        await self._reaper.sweep(term, measure=True)
        await self._remover.settle_trash(term)
        await self._adopt_unknown(term, known, findings)
        await self._check_entries(term, known, findings)
        # Partial files of workers that began just before the store was lost
        await asyncio.sleep(started_at + REBUILD_DELAY - time.monotonic())
        swept = await self._reaper.sweep(term)
        findings.foreign_count += swept.foreign
        findings.unreadable += swept.unreadable
        await self.usage_check.run(term)
        if not findings.unreadable:
            await self._state.set_reconciled(term)
            self._index.forget_previous()
        orphans = await run_blocking(self._volume.remove_orphan_records, _ORPHAN_RECORD_AGE)
        RECONCILED.labels("orphan_record").inc(orphans)
        self._report(findings, time.monotonic() - started_at)
        return not findings.unreadable

    async def recheck(self, term: Term, object_ids: Sequence[ObjectId]) -> Sequence[ObjectId]:
        """Look again at objects whose bytes were released. A file that is still there must count again: its entry was
        dropped because the file was damaged, and the fetch that was to replace it has failed.

        Returns the objects that were not entered into the index.
        """
        findings, refused = Findings(), list[ObjectId]()
        for start in range(0, len(object_ids), _SCAN_BATCH):
            batch = object_ids[start : start + _SCAN_BATCH]
            inspections = await self._adoption.inspect(batch)
            for object_id, seen in zip(batch, inspections, strict=True):
                if seen is None and not self._index.is_partial(object_id):
                    self._index.removed(object_id)
            refused += await self._adopt_files(term, batch, inspections, findings)
        return refused

    async def _adopt_unknown(self, term: Term, known: CompactIdSet, findings: Findings) -> None:
        scan = self._volume.scan_objects()
        while chunk := await next_chunk(scan, _SCAN_BATCH):
            unknown: list[ObjectId] = []
            for found in chunk:
                if isinstance(found, UnreadableFile):
                    findings.add_unreadable(found.path, found.reason)
                elif isinstance(found, UnknownFile):
                    findings.add_foreign(found.path)
                elif not found.in_trash and found.object_id not in known:
                    unknown.append(found.object_id)
            findings.objects += len(chunk)
            if unknown:
                await self._adopt_files(term, unknown, await self._adoption.inspect(unknown), findings)

    async def _adopt_files(
        self,
        term: Term,
        object_ids: Sequence[ObjectId],
        inspections: Sequence[SeenFile | VolumeError | None],
        findings: Findings,
    ) -> Sequence[ObjectId]:
        """Returns the objects that were not adopted."""
        taken = set[ObjectId]()
        for object_id, inspection in zip(object_ids, inspections, strict=True):
            if isinstance(inspection, VolumeError):
                findings.add_unreadable(object_id, inspection)
        seen = [inspection for inspection in inspections if isinstance(inspection, SeenFile)]
        outcomes = await self._adoption.adopt_files(term, seen)
        for one, outcome in zip(seen, outcomes, strict=True):
            object_id = one.found.object_id
            if isinstance(outcome, VolumeError):
                findings.add_unreadable(object_id, outcome)
                continue
            if outcome is not AdoptionResult.NOT_ADOPTED:
                findings.adopted += 1
                taken.add(object_id)
            if outcome is AdoptionResult.DAMAGED:
                # It is in the index, so no worker can store a good file under the name while this one is removed
                logger.warning("object_damaged", object_id=object_id)
                await self._remover.purge(term, object_id, "damaged")
        return [object_id for object_id in object_ids if object_id not in taken]

    async def _check_entries(self, term: Term, known: CompactIdSet, findings: Findings) -> None:
        """Drop entries without a file, and purge files of another size than their entry.

        Only entries that the store had before the scan are checked. Later ones were on the volume when they were
        adopted or published. An entry is dropped only if it is still of the same generation.
        """
        if not len(known):
            return
        async for batch in self._state.entries():
            older = [entry for entry in batch if entry.object_id in known]
            sizes = await run_blocking(self._sizes, older)
            for entry, size in zip(older, sizes, strict=True):
                if entry.evicting or size == entry.size:
                    continue
                if isinstance(size, VolumeError):
                    findings.add_unreadable(entry.object_id, size)
                elif size is not None:
                    # Race: 1. the entries are read, 2. the object is replaced by a version of another size, 3. its size
                    # is looked at.
                    latest = await self._state.entry(entry.object_id)
                    if latest is None or latest.generation != entry.generation:
                        continue
                    logger.warning("object_damaged", object_id=entry.object_id, bytes=size)
                    await self._remover.purge(term, entry.object_id, "damaged")
                elif await self._state.forget(entry.object_id, entry.generation):
                    self._index.removed(entry.object_id)
                    findings.dropped += 1
                    RECONCILED.labels("dropped_record").inc()
                    logger.info("index_entry_dropped", object_id=entry.object_id)

    def _sizes(self, entries: Sequence[IndexEntry]) -> list[int | VolumeError | None]:
        return [self._size(entry.object_id) for entry in entries]

    def _size(self, object_id: ObjectId) -> int | VolumeError | None:
        try:
            seen = self._volume.find_object(object_id)
        except VolumeError as error:
            return error
        return None if seen is None else seen.size

    def _report(self, findings: Findings, seconds: float) -> None:
        RECONCILE_TIME.observe(seconds)
        UNKNOWN_FILES.set(findings.foreign_count)
        if findings.foreign_count:
            logger.warning("unknown_files_found", count=findings.foreign_count, examples=findings.foreign)
        logger.info(
            "reconciliation_finished",
            objects=findings.objects,
            adopted=findings.adopted,
            dropped=findings.dropped,
            unsettled=findings.unreadable,
            seconds=round(seconds, 3),
        )


# The store's sums are compared with what they are sums of. They can differ when one key is lost and another kept, or
# when an operator changes them.
#
#     each pass of the evictor   the sum has changed by more than moved since the pass before: two numbers
#     each minute                the sum is compared with all entries, read a batch at a time with rests in between
#
# A difference is repaired at once, and counted. Until then the limit does not hold.

_RECOUNT_THRESHOLD = 20_000
"""Up to so many entries are recounted at once: the store needs some 20 ms for them."""

_MAX_REST = 1.0  # seconds
_REST_SHARE = 9.0
"""Rests between two batches of entries, as a multiple of the time that a batch takes: a tenth of one core at most."""

NOEVICTION = "noeviction"


class UsageCheck:
    """Corrects the store's sums of used and reserved bytes."""

    def __init__(self, state: StateStore) -> None:
        self._state = state
        self._last: Usage | None = None

    async def run(self, term: Term, *, rest_share: float = 0.0) -> bool:
        """Make used and reserved bytes the sums of the entries and of the fetches. Returns whether they were not.

        `rest_share`: how long to rest between two batches of entries, as a multiple of the time that a batch takes.
        """
        entries = await self._may_be_wrong(rest_share)
        return await self._recount(term, entries=entries)

    async def run_slowly(self, term: Term) -> bool:
        """As `run`, beside other work."""
        return await self.run(term, rest_share=_REST_SHARE)

    async def watch(self, term: Term, usage: Usage) -> bool:
        """Correct the sums if they have changed by more than moved since the last call. Returns whether they were so.

        This finds at once whatever changes the sum and nothing else.
        """
        last, self._last = self._last, usage
        if last is None or not usage.reconciled or not last.reconciled:
            return False
        moved = usage.churn - last.churn
        changed = abs((usage.used - usage.leaving) - (last.used - last.leaving))
        if moved >= 0 and changed <= moved:
            return False
        return await self._recount(term, entries=True)

    async def _recount(self, term: Term, *, entries: bool) -> bool:
        drift = await self._state.recount(term, entries=entries)
        if drift:
            self._last = None
            RECONCILED.labels("recounted").inc()
            logger.warning("usage_recounted", wrong_bytes=drift)
        return drift > 0

    async def _may_be_wrong(self, rest_share: float) -> bool:
        """Add up all entries while they come and go. Bytes that moved during the scan may or may not be in the sum, so
        only a larger difference proves that the store's sum is wrong. A smaller one is found in a quieter hour."""
        before = await self._state.usage()
        if before.objects <= _RECOUNT_THRESHOLD:
            return True
        counted, began_at = 0, time.monotonic()
        async for batch in self._state.entries():
            counted += sum(footprint(entry.size) for entry in batch)
            await asyncio.sleep(min(_MAX_REST, (time.monotonic() - began_at) * rest_share))
            began_at = time.monotonic()
        after = await self._state.usage()
        moved = after.churn - before.churn
        return moved < 0 or abs(after.used - after.leaving - counted) > moved

    async def check_maxmemory_policy(self) -> None:
        """Warn if the server drops keys when its memory is full. Sums and what they are sums of would differ then."""
        stats = await self._state.server_stats()
        if stats is None:
            return
        evicts = stats.eviction != NOEVICTION
        STATE_STORE_EVICTS.set(evicts)
        if evicts:
            logger.warning("state_store_eviction_enabled", maxmemory_policy=stats.eviction, wanted=NOEVICTION)
