"""The evictor, to be run in its own process or as a task of the standalone node."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from distributor_node.services.evictor.adoption import Adoption, PartialReaper
from distributor_node.services.evictor.assignment import AssignmentCheck, VersionCheck
from distributor_node.services.evictor.eviction import Eviction, EvictionRules
from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.services.evictor.integrity import Repair, Scrub
from distributor_node.services.evictor.leader_election import LeaderElection, run_periodically
from distributor_node.services.evictor.leader_tasks import EvictorParts, LeaderTasks
from distributor_node.services.evictor.node_import import ImportCopier, NodeImport
from distributor_node.services.evictor.operator_state import OperatorStateBackup, Purger
from distributor_node.services.evictor.reconcile import Reconciliation
from distributor_node.services.evictor.removal import ObjectRemover
from distributor_node.services.evictor.source_probes import SourceMonitor
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.adapters.volume.intake import ImportSource
from distributor_node.shared.domain.errors import StateStoreUnavailable, VolumeError
from distributor_node.shared.domain.eviction import make_policy
from distributor_node.shared.observability.metrics import (
    PARTIAL_OBJECTS,
    PARTIAL_RESERVED,
    STORAGE_HIGH_WATERMARK,
    STORAGE_LIMIT,
    STORAGE_OBJECTS,
    STORAGE_RESERVED,
    STORAGE_USED,
)
from distributor_node.shared.ports.catalog import Catalog
from distributor_node.shared.ports.state_store import StateStore, Term
from distributor_node.shared.runtime.factories import revision_of
from distributor_node.shared.runtime.operator_state import OperatorStateWatcher
from distributor_node.shared.runtime.process import process_name
from distributor_node.shared.runtime.threads import run_blocking
from distributor_node.shared.settings.model import Settings


class Evictor:
    """Leads or stands by: call `serve`, and cancel it to stop."""

    def __init__(
        self,
        settings: Settings,
        state: StateStore,
        volume: Volume,
        catalog: Catalog,
        sources: SourceMonitor | None = None,
    ) -> None:
        """The caller opens and closes `state`, `volume` and `catalog`: the standalone node shares them with its API and
        fetcher. `sources` is run while this evictor leads.
        """
        self._settings, self._state, self._volume = settings.evictor, state, volume
        self._high_watermark = settings.storage.watermarks.high
        self._parts = _make_parts(settings, state, volume, catalog, sources)
        self._leads = False
        self._election = LeaderElection(
            state,
            holder=process_name(),
            seconds=self._settings.leadership,
            renewal=self._settings.leadership_renewal,
        )

    async def serve(self) -> None:
        """Lead or stand by until cancelled, then resign."""
        async with asyncio.TaskGroup() as group:
            group.create_task(run_periodically("report usage", self._report_usage), name="evictor-usage")
            group.create_task(self._election.serve(self._lead), name="evictor-leadership")

    async def problems(self) -> Sequence[str]:
        """What keeps this evictor from working, in words; for health checks. A standby is as healthy as the leader."""
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

    async def report(self, watched: bool) -> Mapping[str, Any]:
        """What the node's page shows of this evictor: whether it leads, what it removed, and the map of the volume.

        `watched`: see ProcessReporter. What was removed is told in any case, because it is asked for afterwards.
        """
        if not self._leads:
            return {"leads": False}
        removed = list(self._parts.remover.recent)
        counted = {"map": await self._parts.index.size_and_idle_map()} if watched else {}
        return {"leads": True, "removed": removed, **counted}

    async def _lead(self, term: Term) -> None:
        self._leads = True
        try:
            await LeaderTasks(term, self._state, self._parts, self._settings, self._election.renew_now).run()
        finally:
            self._leads = False

    async def _report_usage(self) -> float:
        """Set the usage gauges. Standbys do so too: the gauges of a former leader must not show old values."""
        usage = await self._state.usage()
        STORAGE_LIMIT.set(usage.limit)
        STORAGE_HIGH_WATERMARK.set(self._high_watermark)
        STORAGE_USED.set(usage.used)
        STORAGE_RESERVED.set(usage.reserved)
        STORAGE_OBJECTS.set(usage.objects)
        PARTIAL_OBJECTS.set(usage.parked)
        PARTIAL_RESERVED.set(usage.parked_bytes)
        return self._settings.interval


def _make_parts(
    settings: Settings, state: StateStore, volume: Volume, catalog: Catalog, sources: SourceMonitor | None
) -> EvictorParts:
    policy = partial(make_policy, settings.evictor.policy, settings.evictor.cost_per_miss)
    index = EvictionIndex(state, volume, policy)
    remover = ObjectRemover(state, volume, index)
    node_import, copier = _make_node_import(settings, state, volume, catalog)
    adoption = Adoption(state, volume, index, node_import)
    keep, space_wait = settings.evictor.partial_keep, settings.fetch.space_wait
    reaper = PartialReaper(state, volume, adoption, index, keep, space_wait)
    rules = EvictionRules(settings.storage.watermarks, settings.evictor.min_idle)
    can_list, revision = catalog.can_list, revision_of(catalog)
    watcher = OperatorStateWatcher(state, volume.root, settings.assignment)
    return EvictorParts(
        volume=volume,
        index=index,
        remover=remover,
        reaper=reaper,
        eviction=Eviction(state, index, remover, reaper, rules),
        reconciliation=Reconciliation(state, volume, index, remover, adoption, reaper),
        repair=Repair(
            volume, catalog, remover, (lambda: watcher.assignment) if can_list else None, node_import
        ),
        assignment=AssignmentCheck(
            catalog,
            index,
            remover,
            settings.assignment,
            can_list,
            volume.root,
            shares_ids=settings.catalog.kind == "joystream",
        ),
        versions=None if revision is None else VersionCheck(catalog, revision, volume, remover),
        scrub=Scrub(volume, remover, settings.evictor.scrub_rate),
        operator_state=OperatorStateBackup(state, volume.root, watcher),
        purger=Purger(state, volume, remover, reaper, node_import),
        sources=sources,
        node_import=node_import,
        copier=copier,
    )


def _make_node_import(
    settings: Settings, state: StateStore, volume: Volume, catalog: Catalog
) -> tuple[NodeImport, ImportCopier] | tuple[None, None]:
    storage = settings.storage
    if storage.import_assets is None:
        return None, None
    import_source = ImportSource(storage.path, storage.import_assets)
    node_import = NodeImport(state, import_source, storage.import_cache_state)
    return node_import, ImportCopier(state, volume, catalog, import_source, node_import)
