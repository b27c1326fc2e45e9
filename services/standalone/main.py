"""The standalone node: API, fetcher and evictor in one event loop, with state store and job queue in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from distributor_node.services.api.service import make_context, serve_api
from distributor_node.services.evictor.evictor import Evictor
from distributor_node.services.evictor.main import build_source_monitor
from distributor_node.services.fetcher.fetcher import Fetcher
from distributor_node.shared.domain.errors import ConfigurationError, VolumeError
from distributor_node.shared.observability.metrics import describe_build
from distributor_node.shared.runtime.factories import (
    build_catalog,
    build_failover_reader,
    build_job_queue,
    build_peers,
    build_source_client,
    build_source_stats_sync,
    build_state_store,
    build_volume,
    reloads_of,
)
from distributor_node.shared.runtime.process import VERSION, retain_freed_memory
from distributor_node.shared.runtime.run_service import ServiceScope, run_service
from distributor_node.shared.runtime.systemd import PUBLIC_SOCKET, activated_socket
from distributor_node.shared.waiting import cancel_and_wait

if TYPE_CHECKING:
    from distributor_node.shared.settings.model import Settings

logger = structlog.get_logger()


def run(settings: Settings) -> int:
    """Serve until a signal, and return the exit code."""

    async def main(scope: ServiceScope) -> None:
        await run_standalone(scope, settings)

    return run_service(main, name="standalone", settings=settings)


async def run_standalone(
    scope: ServiceScope, settings: Settings, on_listening: Callable[[int], None] | None = None
) -> None:
    """The main of a standalone node. `on_listening` is called with the public port.

    At a shutdown the API stops first, because its pending responses need the fetcher.
    """
    settings.check_for("standalone")
    listener = activated_socket(PUBLIC_SOCKET)
    resources = scope.resources
    volume = build_volume(settings)
    resources.callback(volume.close)
    try:
        await asyncio.to_thread(volume.prepare)
        resources.callback(volume.lock_standalone())
    except VolumeError as error:
        raise ConfigurationError(f"storage.path: {error}") from error
    state, queue, catalog = build_state_store(settings), build_job_queue(settings), build_catalog(settings)
    for port in (catalog, state, queue):
        resources.push_async_callback(port.close)
        await port.open()
    stats_sync = await resources.enter_async_context(build_source_stats_sync(settings))
    monitor = await resources.enter_async_context(build_source_monitor(settings, catalog, stats_sync))
    downloads = await resources.enter_async_context(
        build_source_client(settings, max_connections=settings.fetch.concurrency)
    )
    proxying = await resources.enter_async_context(
        build_source_client(settings, max_connections=settings.public_api.max_proxied)
    )
    most = settings.fetch.concurrency + settings.public_api.max_proxied
    peers = build_peers(settings, stats_sync.registry, max_connections=most)
    if peers is not None:
        await resources.enter_async_context(peers)
    describe_build(VERSION, "standalone")
    retain_freed_memory()
    scope.reloads.extend(reloads_of(catalog))
    fetcher = Fetcher(
        settings, state, queue, volume, catalog, build_failover_reader(downloads, stats_sync.registry, peers)
    )
    evictor = Evictor(settings, state, volume, catalog, monitor)
    context = make_context(
        settings,
        volume,
        state,
        queue,
        catalog,
        build_failover_reader(proxying, stats_sync.registry, peers),
        peers,
    )
    async with asyncio.TaskGroup() as services:
        background = [
            services.create_task(evictor.serve(), name="evictor"),
            services.create_task(fetcher.serve(), name="fetcher"),
        ]
        await serve_api(
            context, scope.stop_requested, service="standalone", listener=listener, on_listening=on_listening
        )
        for task in reversed(background):
            await cancel_and_wait(task)
