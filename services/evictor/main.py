"""Entry point of the evictor process."""

from __future__ import annotations

import asyncio

from distributor_node.services.evictor.evictor import Evictor
from distributor_node.services.evictor.source_probes import MonitorTimes, SourceMonitor
from distributor_node.shared.adapters.sources.health import SourceStatsSync
from distributor_node.shared.domain.errors import ConfigurationError, VolumeError
from distributor_node.shared.observability.metrics import describe_build, render_in_thread
from distributor_node.shared.observability.probe_server import Probes, ProbeServer, ready_without
from distributor_node.shared.ports.catalog import Catalog
from distributor_node.shared.runtime.factories import (
    build_catalog,
    build_source_prober,
    build_source_stats_sync,
    build_state_store,
    build_volume,
    reloads_of,
)
from distributor_node.shared.runtime.process import VERSION, mmap_large_blocks
from distributor_node.shared.runtime.process_reports import ProcessReporter
from distributor_node.shared.runtime.run_service import ServiceScope, run_service, run_until
from distributor_node.shared.runtime.systemd import READY, notify
from distributor_node.shared.settings.model import Settings
from distributor_node.shared.waiting import background


def run(settings: Settings) -> int:
    """Run until a signal; returns the exit code."""

    async def main(scope: ServiceScope) -> None:
        await run_evictor(scope, settings)

    return run_service(main, name="evictor", settings=settings)


async def run_evictor(scope: ServiceScope, settings: Settings) -> None:
    """Build the evictor and serve. If it ends by itself, the process ends, and its supervisor restarts it."""
    describe_build(VERSION, "evictor")
    mmap_large_blocks()
    resources = scope.resources
    volume = build_volume(settings)
    resources.callback(volume.close)
    try:
        await asyncio.to_thread(volume.prepare)
    except VolumeError as error:
        raise ConfigurationError(f"storage.path: {error}") from error
    state, catalog = build_state_store(settings), build_catalog(settings)
    for opened in (state, catalog):
        resources.push_async_callback(opened.close)
        await opened.open()
    stats_sync = await resources.enter_async_context(build_source_stats_sync(settings))
    monitor = await resources.enter_async_context(build_source_monitor(settings, catalog, stats_sync))
    scope.reloads.extend(reloads_of(catalog))
    evictor = Evictor(settings, state, volume, catalog, monitor)
    await resources.enter_async_context(
        ProbeServer(
            settings.metrics.host,
            settings.metrics.port_of("evictor"),
            Probes(ready_without(evictor.problems), render_in_thread),
        )
    )
    if settings.dashboard.enabled:
        reporter = ProcessReporter(state, "evictor", [evictor.report])
        await resources.enter_async_context(background(reporter.run(), "report-process"))
    notify(READY)
    await run_until(scope.stop_requested, evictor.serve(), "evictor")


def build_source_monitor(settings: Settings, catalog: Catalog, stats_sync: SourceStatsSync) -> SourceMonitor:
    """A monitor for the caller to open and close; `stats_sync` is open already."""
    prober = build_source_prober(settings, stats_sync.registry)
    return SourceMonitor(catalog, stats_sync, prober, MonitorTimes(settings.sources.probe_interval))
