"""One API process: its adapters, its application, its port."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections.abc import Callable

import structlog

from services.api.accesses import AccessCounter
from services.api.app import build_app
from services.api.application import unregister_application
from services.api.assets.handler import AssetHandler
from services.api.context import ApiContext, CurrentAssignment
from services.api.fast_lane.building import build_fast_path
from services.api.fast_lane.protocol import FastPathProtocol
from services.api.listening import ListenAddress
from services.api.obedience import OperatorStateController
from services.api.operator.service import operator_api
from services.api.server import PublicServer
from services.api.version import VERSION
from services.api.wakeups import FetchEvents
from shared.adapters.sources.relay import FailoverReader
from shared.adapters.volume import Volume
from shared.domain.errors import VolumeError
from shared.observability.metrics import describe_build
from shared.ports.catalog import Catalog
from shared.ports.job_queue import JobQueue
from shared.ports.state_store import StateStore
from shared.runtime.adapters import (
    build_catalog,
    build_failover_reader,
    build_job_queue,
    build_source_client,
    build_source_stats_sync,
    build_state_store,
    build_volume,
)
from shared.runtime.orders import OperatorStateWatcher
from shared.runtime.run_service import ServiceScope
from shared.runtime.volume_watch import watch_volume
from shared.settings.model import Settings

_CLOSING_SECONDS = 3.0

logger = structlog.get_logger()


def make_context(
    settings: Settings,
    volume: Volume,
    state: StateStore,
    queue: JobQueue,
    catalog: Catalog,
    failover_reader: FailoverReader,
) -> ApiContext:
    """Put together what the handlers need; the ports are open, or will be before the first request."""
    operator_state = OperatorStateWatcher(state, volume.root, settings.assignment)
    return ApiContext(
        settings=settings,
        volume=volume,
        state=state,
        queue=queue,
        catalog=catalog,
        failover_reader=failover_reader,
        accesses=AccessCounter(state),
        assignment=CurrentAssignment(settings.assignment),
        fetch_events=FetchEvents(state, operator_state.wake),
        operator_state=operator_state,
    )


async def run_api(scope: ServiceScope, settings: Settings, *, shared_port: bool = False) -> bool:
    """The main of an API process. `shared_port`: other processes listen on the same port. True: it ended because an
    operator has ordered the node to shut down."""
    resources = scope.resources
    volume = build_volume(settings)
    resources.callback(volume.close)
    try:
        await asyncio.to_thread(volume.prepare)
    except VolumeError as error:
        # Fetchers and evictor need to write; this service needs to read.
        logger.warning("volume_not_writable", reason=str(error))
    state, queue, catalog = build_state_store(settings), build_job_queue(settings), build_catalog(settings)
    for port in (catalog, state, queue):
        await port.open()
        resources.push_async_callback(port.close)
    stats_sync = await resources.enter_async_context(build_source_stats_sync(settings))
    client = await resources.enter_async_context(
        build_source_client(settings, max_connections=settings.public_api.max_proxied)
    )
    describe_build(VERSION, "api")
    context = make_context(
        settings, volume, state, queue, catalog, build_failover_reader(client, stats_sync.registry)
    )
    await serve_api(context, scope.stop_requested, shared_port=shared_port)
    return context.operator_state.shutting_down


async def serve_api(
    context: ApiContext,
    stop_requested: asyncio.Event,
    *,
    shared_port: bool = False,
    on_listening: Callable[[int], None] | None = None,
) -> None:
    """Serve until `stop_requested`, then let answers end within the shutdown deadline (less what closing takes).

    `on_listening` is called with the port, unless an operator has stopped the public API. ConfigurationError if the
    port cannot be had.
    """
    settings = context.settings
    assets = AssetHandler(context)
    application = build_app(context, assets)
    application.ctx.log_hits = settings.log.hits
    fast_path = application.ctx.fast_path = build_fast_path(context)
    address = ListenAddress(settings.public_api.host, settings.public_api.port, shared_port)
    server = PublicServer(application, address, FastPathProtocol)
    drain = max(settings.shutdown_deadline - _CLOSING_SECONDS, settings.shutdown_deadline / 2)
    controller = OperatorStateController(context, server, drain)
    name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    try:
        await controller.start()
        if on_listening is not None and server.is_open:
            on_listening(server.port)
        async with (
            operator_api(context, name, shared_port=shared_port),
            asyncio.TaskGroup() as background,
        ):
            controller_task = background.create_task(controller.run(stop_requested), name="operator-state")
            tasks = [
                background.create_task(context.operator_state.run(), name="watch-operator-state"),
                background.create_task(context.accesses.run(), name="flush-accesses"),
                background.create_task(context.fetch_events.run(), name="fetch-events"),
                background.create_task(watch_volume(context.volume), name="watch-volume"),
            ]
            if fast_path is not None:
                tasks.append(background.create_task(fast_path.objects.run(), name="object-cache"))
            await stop_requested.wait()
            controller_task.cancel()
            await asyncio.wait({controller_task})
            await controller.stop()
            for task in tasks:
                task.cancel()
        await context.accesses.close()
    finally:
        await server.close(0)
        if fast_path is not None:
            await fast_path.close()
        await assets.close()
        await application.ctx.usage.close()
        await application.ctx.status_reporter.close()
        unregister_application(application)
