"""What a leader does during one term: periodic tasks, each with its own interval and wake-up event."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import structlog

from distributor_node.services.evictor.adoption import PartialReaper
from distributor_node.services.evictor.assignment import AssignmentCheck, VersionCheck
from distributor_node.services.evictor.eviction import Eviction
from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.services.evictor.integrity import Repair, Scrub
from distributor_node.services.evictor.leader_election import run_periodically
from distributor_node.services.evictor.node_import import ImportCopier, NodeImport
from distributor_node.services.evictor.operator_state import OperatorStateBackup, Purger
from distributor_node.services.evictor.reconcile import Reconciliation
from distributor_node.services.evictor.removal import ObjectRemover
from distributor_node.services.evictor.source_probes import SourceMonitor
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.errors import CatalogUnavailable, DistributorError, StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import Usage
from distributor_node.shared.observability.metrics import DEVICE_FREE_INODES, DEVICE_INODES, PARTIAL_HELD
from distributor_node.shared.ports.state_store import StateStore, Term, Topic
from distributor_node.shared.runtime.operator_state import POLL_INTERVAL
from distributor_node.shared.runtime.threads import run_blocking
from distributor_node.shared.settings.model import EvictorSettings

REFRESH_INTERVAL, SAVE_INTERVAL, SWEEP_INTERVAL = 1.0, 5.0, 10.0  # seconds
USAGE_CHECK_INTERVAL = 60.0  # seconds
_COMPLETE_BATCH = 100
_MAX_FREED = 10_000  # objects to look at again in one sweep; reconciliation finds the others
_MIN_RESYNC_INTERVAL = 5.0  # seconds between two comparisons of all entries on suspicion
_RELIST_INTERVAL = (
    600.0  # seconds until the catalog's whole list, an expensive query, is read again after a failure
)
_CATALOG_RETRY_INTERVAL = 60.0  # seconds between attempts while the catalog is unavailable
_MAX_RECONCILE_BACKOFF = 60.0  # seconds between two failed reconciliations

Step = Callable[[], Awaitable[float | None]]

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class EvictorParts:
    """The parts of one evictor. They outlive terms: each term has its own `LeaderTasks` with the same parts."""

    volume: Volume
    index: EvictionIndex  # the policy with all objects
    eviction: Eviction  # makes room
    remover: ObjectRemover  # finishes removals that were in use
    reconciliation: Reconciliation  # makes the index match the volume
    reaper: PartialReaper  # partial files
    repair: Repair  # files without a record
    scrub: Scrub  # corrupt files
    assignment: AssignmentCheck  # objects that are not assigned to this node any more
    versions: VersionCheck | None  # versions that the catalog's list has replaced; None: it has no such list
    operator_state: OperatorStateBackup
    purger: Purger  # the operator's purges
    sources: SourceMonitor | None  # None: another process probes
    node_import: NodeImport | None  # None: nothing to import, in both
    copier: ImportCopier | None


class LeaderTasks:
    """Runs the tasks of one term until cancelled."""

    def __init__(
        self,
        term: Term,
        state: StateStore,
        parts: EvictorParts,
        settings: EvictorSettings,
        renew_now: Callable[[], None],
    ) -> None:
        """`renew_now`: called when the store seems to have lost its data, and so perhaps our term."""
        self._term, self._state, self._parts, self._settings = term, state, parts, settings
        self._renew_now = renew_now
        # Wake-ups of the tasks
        self._space_event, self._reconcile_event = asyncio.Event(), asyncio.Event()
        self._repair_event, self._assignment_event = asyncio.Event(), asyncio.Event()
        self._operator_state_event, self._purge_event = asyncio.Event(), asyncio.Event()

        self._index_loaded = asyncio.Event()
        self._reconciled = False  # the last reconciliation succeeded, and the store has kept its data since
        self._failed_reconciliations = 0
        self._replacements = parts.volume.replacements  # of the volume, as of the last check
        self._freed_ids: set[ObjectId] = set()  # released since the last sweep
        self._needs_resync = False  # index and store may differ
        self._resynced_at, self._saved_at = -math.inf, time.monotonic()

    async def run(self) -> None:
        """Run all tasks until cancelled. Errors that are not worth retrying pass through, as an ExceptionGroup."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._listen(), name="evictor-listen")
                group.create_task(self._run_periodically("load index", self._load_index), name="evictor-load")
                await self._index_loaded.wait()
                for name, step, wake in self._schedule():
                    group.create_task(self._run_periodically(name, step, wake), name=f"evictor-{name}")
        finally:
            await self._save_on_exit()

    def _schedule(self) -> list[tuple[str, Step, asyncio.Event | None]]:
        tasks: list[tuple[str, Step, asyncio.Event | None]] = [
            ("make room", self._evict, self._space_event),
            ("keep index", self._keep_index, None),
            ("reconcile", self._reconcile, self._reconcile_event),
            ("check usage", self._check_usage, None),
            ("sweep", self._sweep, None),
            ("repair", self._repair, self._repair_event),
            ("check assignment", self._check_assignment, self._assignment_event),
            ("back up operator state", self._back_up_operator_state, self._operator_state_event),
            ("purge", self._purge, self._purge_event),
        ]
        if self._settings.scrub_rate:
            tasks.append(("scrub", self._scrub, None))
        if self._parts.versions is not None:
            tasks.append(("check versions", self._check_versions, None))
        if self._parts.copier is not None:
            tasks.append(("copy assets", self._copy, None))
        if self._parts.sources is not None:
            tasks.append(("watch sources", self._parts.sources.step, None))
        return tasks

    async def _run_periodically(self, name: str, step: Step, wake: asyncio.Event | None = None) -> None:
        await run_periodically(name, step, wake, self._mark_for_resync)

    def _mark_for_resync(self, error: DistributorError) -> None:
        """A call may have succeeded although its reply was lost. Resync, so that a removal in progress is finished."""
        if isinstance(error, StateStoreUnavailable):
            self._needs_resync = True

    async def _listen(self) -> None:
        async with self._state.listen() as announcements:
            async for announcement in announcements:
                if announcement.topic is Topic.SPACE_REQUESTED:
                    self._space_event.set()
                elif announcement.topic is Topic.SETTINGS_CHANGED:
                    self._operator_state_event.set()
                elif announcement.topic is Topic.PURGE_REQUESTED:
                    self._purge_event.set()
                elif announcement.topic is Topic.SPACE_FREED:
                    self._record_freed(announcement.object_id)
                elif announcement.topic is Topic.FETCH_CHANGED:
                    self._parts.index.mark_changed(announcement.object_id)

    def _record_freed(self, object_id: str) -> None:
        if object_id and len(self._freed_ids) < _MAX_FREED:
            self._freed_ids.add(ObjectId(object_id))

    async def _load_index(self) -> None:
        await self._parts.index.load()
        await self._restore_operator_state()
        self._index_loaded.set()

    async def _check_volume(self) -> None:
        """VolumeError while there is no volume. If it has been replaced, the index says nothing of the new one."""
        volume = self._parts.volume
        await run_blocking(volume.check)
        if volume.replacements != self._replacements:
            self._replacements = volume.replacements
            self._reconciled = False
            logger.warning("volume_replaced", volume=str(volume.root))
            self._reconcile_event.set()

    async def _evict(self) -> float:
        await self._check_volume()
        if self._needs_resync and time.monotonic() - self._resynced_at > _MIN_RESYNC_INTERVAL:
            await self._resync()
        await self._parts.remover.complete_all(self._term, _COMPLETE_BATCH)
        await self._parts.remover.settle_trash(self._term)
        usage = await self._state.usage()
        if await self._parts.reconciliation.usage_check.watch(self._term, usage):
            usage = await self._state.usage()
        if usage.reconciled:
            device = await run_blocking(self._parts.volume.device_space)
            if device.files is not None and device.free_files is not None:
                DEVICE_FREE_INODES.set(device.free_files)
                DEVICE_INODES.set(device.files)
            await self._parts.eviction.run(self._term, usage, device)
            self._needs_resync = self._needs_resync or (
                self._parts.eviction.blocked and self._count_mismatch(usage) > 0
            )
        if self._reconciled and not (usage.reconciled and _is_possible(usage)):
            self._reconciled = False
            logger.warning("state_store_data_lost", used=usage.used, objects=usage.objects)
            self._renew_now()
            self._reconcile_event.set()
        return self._settings.interval

    async def _resync(self) -> None:
        self._needs_resync = False
        self._resynced_at = time.monotonic()
        await self._parts.index.resync()

    def _count_mismatch(self, usage: Usage) -> int:
        index = self._parts.index
        return abs(usage.objects - index.objects - len(index.evicting))

    async def _keep_index(self) -> float:
        await self._parts.index.refresh()
        if time.monotonic() - self._saved_at >= SAVE_INTERVAL:
            await self._parts.index.save(self._term)
            self._saved_at = time.monotonic()
        return REFRESH_INTERVAL

    async def _reconcile(self) -> float:
        await self._restore_operator_state()
        if self._parts.node_import is not None:
            await self._parts.node_import.link_files(partial(self._parts.reconciliation.recheck, self._term))
        self._reconciled = await self._parts.reconciliation.run(self._term)
        if self._reconciled:
            self._failed_reconciliations = 0
            self._repair_event.set()
            return self._settings.reconcile_interval
        self._failed_reconciliations += 1
        return min(_MAX_RECONCILE_BACKOFF, 2.0 ** min(self._failed_reconciliations, 10))

    async def _sweep(self) -> float:
        await asyncio.sleep(min(SWEEP_INTERVAL, self._settings.partial_keep))
        await self._parts.reaper.sweep(self._term)
        freed, self._freed_ids = self._freed_ids, set()
        await self._parts.reconciliation.recheck(self._term, list(freed))
        usage = await self._state.usage()
        # Announcements get lost. A small difference is due to objects that are being stored or removed now
        if self._count_mismatch(usage) > usage.objects // 100:
            self._needs_resync = True
        if self._parts.node_import is not None and await self._parts.node_import.has_importable():
            self._reconcile_event.set()  # it imports them, and counts them at once
        return 0.0

    async def _check_usage(self) -> float:
        if not self._reconciled:
            return REFRESH_INTERVAL
        await self._parts.reconciliation.usage_check.run_slowly(self._term)
        return USAGE_CHECK_INTERVAL

    async def _repair(self) -> float:
        try:
            if self._reconciled:
                await self._parts.repair.run(self._term)
                if self._parts.node_import is not None:
                    await self._parts.node_import.finish()
        except CatalogUnavailable as error:
            logger.warning("repair_deferred", reason=str(error))
            return _CATALOG_RETRY_INTERVAL
        return self._settings.reconcile_interval

    async def _copy(self) -> float | None:
        if self._parts.copier is None:
            return None
        return await self._parts.copier.run() if self._reconciled else REFRESH_INTERVAL

    async def _check_assignment(self) -> float:
        if not self._reconciled:
            return REFRESH_INTERVAL
        done = await self._parts.assignment.run(self._term)
        interval = self._settings.assignment_interval
        return interval if done else min(_RELIST_INTERVAL, interval)

    async def _check_versions(self) -> float | None:
        if self._parts.versions is None:
            return None
        return await self._parts.versions.step(self._term) if self._reconciled else REFRESH_INTERVAL

    async def _restore_operator_state(self) -> None:
        """An emptied store has lost pins and assignment too. Restore them before anything is evicted."""
        await self._parts.operator_state.restore()
        self._apply_operator_state()

    async def _back_up_operator_state(self) -> float:
        try:
            await self._parts.operator_state.save(self._term)
        finally:
            self._apply_operator_state()  # even if the copy could not be written
        return POLL_INTERVAL

    def _apply_operator_state(self) -> None:
        self._parts.eviction.pinned = self._parts.operator_state.pinned
        if self._parts.assignment.change(self._parts.operator_state.watcher.assignment):
            self._assignment_event.set()

    async def _purge(self) -> float:
        return await self._parts.purger.step(self._term)

    async def _scrub(self) -> float:
        return await self._parts.scrub.step(self._term)

    async def _save_on_exit(self) -> None:
        """Save what has changed since the last save. The store refuses it if the term is over."""
        PARTIAL_HELD.set(0)
        if self._parts.sources is not None:
            self._parts.sources.clear_gauges()
        if not self._index_loaded.is_set():
            return
        try:
            await self._parts.index.save(self._term)
        except StateStoreUnavailable as error:
            logger.info("index_save_failed", reason=str(error))


def _is_possible(usage: Usage) -> bool:
    """False if the store has lost all entries but kept their sum: nothing is left to evict then."""
    return usage.objects > 0 or usage.used == usage.leaving
