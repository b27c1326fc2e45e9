"""The standalone node: API, fetcher and evictor in one event loop, with state store and job queue in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from distributor_node.services.api.service import make_context, serve_api
from distributor_node.services.evictor.evictor import Evictor
from distributor_node.services.evictor.main import build_source_monitor
from distributor_node.services.fetcher.fetcher import Fetcher, max_connections
from distributor_node.shared.domain.errors import ConfigurationError, VolumeError
from distributor_node.shared.observability.metrics import describe_build
from distributor_node.shared.ports.state_store import StateStore
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
from distributor_node.shared.runtime.process import (
    VERSION,
    exempt_startup_from_collection,
    retain_freed_memory,
)
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


class ReplaceableFetcher:
    """The fetcher of this process. The demo stops it in the middle of its work, and has another one start."""

    def __init__(self, make: Callable[[], Fetcher]) -> None:
        self._make = make
        self._task: asyncio.Task[None] | None = None
        self._may_start = asyncio.Event()
        self._may_start.set()

    async def serve(self) -> None:
        """Serve until cancelled. Raises what a fetcher ends with."""
        while True:
            await self._may_start.wait()
            self._task = asyncio.create_task(self._make().serve(), name="one-fetcher")
            try:
                await asyncio.wait({self._task})
            except asyncio.CancelledError:
                await cancel_and_wait(self._task)
                raise
            if not self._task.cancelled():
                self._task.result()

    async def replace(self, pause: float) -> None:
        """Stop the fetcher, and start another one after `pause` seconds.

        As at a shutdown the partial files stay, the leases are released and the jobs return to their queue.
        """
        self._may_start.clear()
        try:
            if self._task is not None:
                await cancel_and_wait(self._task)
            await asyncio.sleep(pause)
        finally:
            self._may_start.set()


@dataclass(frozen=True, slots=True)
class RunningNode:
    """What the demo takes in hand of a standalone node."""

    state: StateStore
    fetcher: ReplaceableFetcher


async def run_standalone(
    scope: ServiceScope,
    settings: Settings,
    on_listening: Callable[[int], None] | None = None,
    on_running: Callable[[RunningNode], None] | None = None,
) -> None:
    """The main of a standalone node. `on_listening` is called with the public port, `on_running` before the services.

    At a shutdown the API stops first, because its pending responses need the fetcher.
    """
    settings.check_for("standalone")
    listener = activated_socket(PUBLIC_SOCKET)
    resources = scope.resources
    await resources.enter_async_context(build_tracing(settings, "standalone"))
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
        build_source_client(settings, max_connections=max_connections(settings.fetch), large_reads=True)
    )
    proxying = await resources.enter_async_context(
        build_source_client(settings, max_connections=settings.public_api.max_proxied)
    )
    most = max_connections(settings.fetch) + settings.public_api.max_proxied
    peers = build_peers(settings, stats_sync.registry, max_connections=most)
    if peers is not None:
        await resources.enter_async_context(peers)
    describe_build(VERSION, "standalone")
    retain_freed_memory()
    scope.reloads.extend(reloads_of(catalog))
    reader = build_failover_reader(downloads, stats_sync.registry, peers)
    fetcher = ReplaceableFetcher(
        lambda: Fetcher(settings, state, queue, volume, catalog, reader, shares_loop=True)
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
    exempt_startup_from_collection()
    if on_running is not None:
        on_running(RunningNode(state, fetcher))
    async with asyncio.TaskGroup() as services:
        background = [
            services.create_task(evictor.serve(), name="evictor"),
            services.create_task(fetcher.serve(), name="fetcher"),
        ]
        await serve_api(
            context,
            scope.stop_requested,
            service="standalone",
            listener=listener,
            on_listening=on_listening,
            parts=[evictor.report],
        )
        for task in reversed(background):
            await cancel_and_wait(task)
