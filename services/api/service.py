"""One API process: its adapters, its application, its port."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections.abc import Callable

import structlog

from distributor_node.services.api.accesses import AccessCounter
from distributor_node.services.api.assets.handler import AssetHandler
from distributor_node.services.api.context import ApiContext, CurrentAssignment
from distributor_node.services.api.fast_path.handler import build_fast_path
from distributor_node.services.api.fast_path.protocol import FastPathProtocol
from distributor_node.services.api.fetch_events import FetchEvents
from distributor_node.services.api.listen import ListenAddress
from distributor_node.services.api.operator.app import operator_api
from distributor_node.services.api.routes import build_app
from distributor_node.services.api.sanic_app import unregister_application
from distributor_node.services.api.server import PublicServer
from distributor_node.shared.adapters.sources.failover import FailoverReader
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.errors import ConfigurationError, VolumeError
from distributor_node.shared.observability.metrics import describe_build
from distributor_node.shared.ports.catalog import Catalog
from distributor_node.shared.ports.job_queue import JobQueue
from distributor_node.shared.ports.state_store import StateStore
from distributor_node.shared.runtime.factories import (
    build_catalog,
    build_failover_reader,
    build_job_queue,
    build_source_client,
    build_source_stats_sync,
    build_state_store,
    build_volume,
)
from distributor_node.shared.runtime.identity import VERSION
from distributor_node.shared.runtime.operator_state import OperatorStateWatcher
from distributor_node.shared.runtime.run_service import ServiceScope
from distributor_node.shared.settings.model import Settings

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


# How one API process follows the operator's orders: its assignment, its public port, its end.

_RETRY_SECONDS = 0.5


class OperatorStateController:
    """`drain`: seconds that answers under way get when the public port is closed."""

    def __init__(self, context: ApiContext, server: PublicServer, drain: float) -> None:
        self._context, self._server, self._drain = context, server, drain
        self._close_tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Know the orders, and open the port unless they say otherwise; ConfigurationError if it cannot be had."""
        await self._context.operator_state.load()
        self._update_assignment()
        if not self._context.operator_state.current.stopped:
            await self._server.open()

    async def run(self, stop_requested: asyncio.Event) -> None:
        """Until cancelled. An order to shut down sets `stop_requested`."""
        operator_state = self._context.operator_state
        while True:
            seen = (
                operator_state.current
            )  # before anything is waited for: what is ordered meanwhile is looked at next
            self._update_assignment()
            if operator_state.shutting_down and not stop_requested.is_set():
                logger.info("shutdown_requested_by_operator")
                stop_requested.set()
            stopped = operator_state.current.stopped
            if stopped and self._server.is_open:
                # Answers under way go on; the port may be opened again meanwhile.
                closing = asyncio.create_task(self._server.close(self._drain), name="close-public-port")
                self._close_tasks.add(closing)
                closing.add_done_callback(self._close_tasks.discard)
            elif not stopped and not self._server.is_open and not await self._open():
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            await operator_state.wait_until(lambda now, seen=seen: now != seen)  # type: ignore[misc]

    async def stop(self) -> None:
        """After `run`: close the port, and wait for what closes already."""
        await self._server.close(self._drain)
        if self._close_tasks:
            await asyncio.wait(self._close_tasks)

    async def _open(self) -> bool:
        try:
            await self._server.open()
        except ConfigurationError as error:
            logger.error("port_open_failed", reason=str(error))
            return False
        return True

    def _update_assignment(self) -> None:
        self._context.assignment.current = self._context.operator_state.assignment


# A volume that is replaced or unmounted while a service runs is noticed, and its return.

WATCH_INTERVAL = 2.0


async def watch_volume(volume: Volume, seconds: float = WATCH_INTERVAL) -> None:
    """Look again and again, until cancelled: what is read or written from then on is the volume that is there now."""
    present, replacements = True, volume.replacements
    while True:
        try:
            await asyncio.to_thread(volume.check)
        except VolumeError as error:
            if present:
                logger.error("volume_unavailable", reason=str(error))
            present = False
        else:
            if not present or volume.replacements != replacements:
                logger.warning("volume_replaced", volume=str(volume.root))
            present, replacements = True, volume.replacements
        await asyncio.sleep(seconds)
