"""The evictor as one thing to run: in its own process, or as a task of the standalone node."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Sequence
from functools import partial

from services.evictor.adoption import Adoption
from services.evictor.copying import Copying
from services.evictor.duty import DutyCheck
from services.evictor.eviction import Eviction, EvictionRules
from services.evictor.file_calls import run_blocking
from services.evictor.index import EvictionIndex
from services.evictor.leadership import Leadership
from services.evictor.order_keeping import OperatorStateBackup, PurgeWork
from services.evictor.pacing import repeat
from services.evictor.partials import Partials
from services.evictor.reconcile import Reconciliation
from services.evictor.removals import Removals
from services.evictor.repair import Repair
from services.evictor.scrub import Scrub
from services.evictor.source_watch import SourceWatch
from services.evictor.takeover import Takeover
from services.evictor.term_work import TermWork, Tools
from shared.adapters.volume import Volume
from shared.adapters.volume.intake import Intake
from shared.domain.errors import StateStoreUnavailable, VolumeError
from shared.domain.eviction import make_policy
from shared.observability.metrics import (
    STORAGE_HIGH_WATERMARK,
    STORAGE_LIMIT,
    STORAGE_OBJECTS,
    STORAGE_RESERVED,
    STORAGE_USED,
)
from shared.ports.catalog import Catalog
from shared.ports.state_store import StateStore, Term
from shared.runtime.orders import OperatorStateWatcher
from shared.settings.model import Settings


class Evictor:
    """`serve` until cancelled. `state`, `volume` and `catalog` are opened, prepared and closed by whoever made them;
    in standalone mode they are shared with the API and the fetcher."""

    def __init__(
        self,
        settings: Settings,
        state: StateStore,
        volume: Volume,
        catalog: Catalog,
        sources: SourceWatch | None = None,
    ) -> None:
        """`sources`: to be watched while this evictor leads."""
        self._settings, self._state, self._volume = settings.evictor, state, volume
        self._high_watermark = settings.storage.watermarks.high
        self._tools = _make_tools(settings, state, volume, catalog, sources)
        self._leadership = Leadership(
            state,
            holder=f"{settings.id}-{os.getpid()}-{uuid.uuid4().hex[:8]}",
            seconds=self._settings.leadership,
            renewal=self._settings.leadership_renewal,
        )

    async def serve(self) -> None:
        """Lead or stand by, for ever; resigns when cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(repeat("report usage", self._report_usage), name="evictor-usage")
            group.create_task(self._leadership.serve(self._lead), name="evictor-leadership")

    async def problems(self) -> Sequence[str]:
        """What keeps this evictor from working, in words. A standby is as healthy as the leader."""
        found = []
        try:
            await self._state.ping()
        except StateStoreUnavailable as error:
            found.append(str(error))
        try:
            await run_blocking(self._volume.check)
        except VolumeError as error:
            found.append(str(error))
        return found

    async def _lead(self, term: Term) -> None:
        await TermWork(term, self._state, self._tools, self._settings, self._leadership.confirm).run()

    async def _report_usage(self) -> float:
        """Standbys report too: the gauges of one that led before must not stand still."""
        usage = await self._state.usage()
        STORAGE_LIMIT.set(usage.limit)
        STORAGE_HIGH_WATERMARK.set(self._high_watermark)
        STORAGE_USED.set(usage.used)
        STORAGE_RESERVED.set(usage.reserved)
        STORAGE_OBJECTS.set(usage.objects)
        return self._settings.interval


def _make_tools(
    settings: Settings, state: StateStore, volume: Volume, catalog: Catalog, sources: SourceWatch | None
) -> Tools:
    policy = partial(make_policy, settings.evictor.policy, settings.evictor.cost_per_miss)
    index = EvictionIndex(state, volume, policy)
    removals = Removals(state, volume, index)
    takeover, copying = _make_takeover(settings, state, volume, catalog)
    adoption = Adoption(state, volume, index, takeover)
    partials = Partials(state, volume, adoption, settings.evictor.partial_keep, settings.fetch.space_wait)
    rules = EvictionRules(settings.storage.watermarks, settings.evictor.min_idle)
    can_list = settings.catalog.kind != "origin"
    watcher = OperatorStateWatcher(state, volume.root, settings.duty)
    return Tools(
        volume=volume,
        index=index,
        removals=removals,
        partials=partials,
        eviction=Eviction(state, index, removals, partials, rules),
        reconciliation=Reconciliation(state, volume, index, removals, adoption, partials),
        repair=Repair(volume, catalog, removals, (lambda: watcher.duty) if can_list else None, takeover),
        duty=DutyCheck(catalog, index, removals, settings.duty, can_list, volume.root),
        scrub=Scrub(volume, removals, settings.evictor.scrub_rate),
        operator_state=OperatorStateBackup(state, volume.root, watcher),
        purges=PurgeWork(state, volume, removals, partials),
        sources=sources,
        takeover=takeover,
        copying=copying,
    )


def _make_takeover(
    settings: Settings, state: StateStore, volume: Volume, catalog: Catalog
) -> tuple[Takeover, Copying] | tuple[None, None]:
    storage = settings.storage
    if storage.import_assets is None:
        return None, None
    intake = Intake(storage.path, storage.import_assets)
    takeover = Takeover(intake, storage.import_cache_state)
    return takeover, Copying(state, volume, catalog, intake, takeover)
