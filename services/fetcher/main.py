"""Entry point of the fetcher process."""

from __future__ import annotations

from distributor_node.services.fetcher.fetcher import Fetcher, max_connections
from distributor_node.shared.observability.metrics import describe_build, render_in_thread
from distributor_node.shared.observability.probe_server import Probes, ProbeServer, ready_without
from distributor_node.shared.runtime.factories import (
    build_catalog,
    build_failover_reader,
    build_job_queue,
    build_peers,
    build_source_client,
    build_source_stats_sync,
    build_state_store,
    build_tracing,
    build_volume,
    reloads_of,
)
from distributor_node.shared.runtime.process import VERSION, retain_freed_memory
from distributor_node.shared.runtime.process_reports import ProcessReporter
from distributor_node.shared.runtime.run_service import ServiceScope, run_service, run_until
from distributor_node.shared.runtime.systemd import READY, notify
from distributor_node.shared.settings.model import Settings
from distributor_node.shared.waiting import background


def run(settings: Settings) -> int:
    """Work until a signal. Returns the exit code."""

    async def main(scope: ServiceScope) -> None:
        await run_fetcher(scope, settings)

    return run_service(main, name="fetcher", settings=settings)


async def run_fetcher(scope: ServiceScope, settings: Settings) -> None:
    """Run a fetcher until a stop is requested. If it ends by itself, the process ends and is restarted from outside."""
    describe_build(VERSION, "fetcher")
    retain_freed_memory()
    resources = scope.resources
    await resources.enter_async_context(build_tracing(settings, "fetcher"))
    volume = build_volume(settings)
    resources.callback(volume.close)
    state, queue, catalog = build_state_store(settings), build_job_queue(settings), build_catalog(settings)
    client = build_source_client(settings, max_connections=max_connections(settings.fetch), large_reads=True)
    stats_sync = build_source_stats_sync(settings)
    for opened in (catalog, state, queue, stats_sync, client):
        resources.push_async_callback(opened.close)
        await opened.open()
    scope.reloads.extend(reloads_of(catalog))
    peers = build_peers(settings, stats_sync.registry, max_connections=max_connections(settings.fetch))
    if peers is not None:
        await resources.enter_async_context(peers)
    failover_reader = build_failover_reader(client, stats_sync.registry, peers)
    fetcher = Fetcher(settings, state, queue, volume, catalog, failover_reader)
    await resources.enter_async_context(
        ProbeServer(
            settings.metrics.host,
            settings.metrics.port_of("fetcher"),
            Probes(ready_without(fetcher.problems), render_in_thread),
        )
    )
    if settings.dashboard.enabled:
        reporter = ProcessReporter(state, "fetcher")
        await resources.enter_async_context(background(reporter.run(), "report-process"))
    notify(READY)
    await run_until(scope.stop_requested, fetcher.serve(), "fetcher")
