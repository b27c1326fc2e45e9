"""One API process: opens its adapters, serves its application, applies operator state, and watches the volume."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import structlog

from distributor_node.services.api.access_log import AccessLog
from distributor_node.services.api.accesses import AccessCounter, Viewers
from distributor_node.services.api.assets.handler import AssetHandler
from distributor_node.services.api.clients import ClientAddresses, SlowClients
from distributor_node.services.api.context import ApiContext, CurrentAssignment
from distributor_node.services.api.dashboard.feed import Feed
from distributor_node.services.api.dashboard.server import DashboardServer
from distributor_node.services.api.fast_path.handler import build_fast_path
from distributor_node.services.api.fast_path.protocol import FastPathProtocol, PeerProtocol
from distributor_node.services.api.fetch_capacity import FetchCapacity, FetchEvents
from distributor_node.services.api.health import HealthChecks
from distributor_node.services.api.listen import ListenAddress
from distributor_node.services.api.operator.app import operator_api
from distributor_node.services.api.operator.explain import ObjectExplainer
from distributor_node.services.api.sanic_app import (
    ApiApplication,
    TracedAssets,
    build_app,
    unregister_application,
)
from distributor_node.services.api.server import PublicServer
from distributor_node.services.api.status import UsageReader
from distributor_node.shared.adapters.peers import CopyOffers, Peers
from distributor_node.shared.adapters.sources.failover import FailoverReader
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.errors import ConfigurationError, VolumeError
from distributor_node.shared.observability import tracing
from distributor_node.shared.observability.metrics import (
    Render,
    describe_build,
    has_exemplars,
    render_in_thread,
    render_openmetrics,
)
from distributor_node.shared.observability.probe_server import Probes, ProbeServer
from distributor_node.shared.ports.catalog import Catalog
from distributor_node.shared.ports.job_queue import JobQueue
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
from distributor_node.shared.runtime.operator_state import OperatorStateWatcher
from distributor_node.shared.runtime.process import (
    VERSION,
    exempt_startup_from_collection,
    process_name,
)
from distributor_node.shared.runtime.process_reports import Part, ProcessKind, ProcessReporter
from distributor_node.shared.runtime.run_service import ServiceScope
from distributor_node.shared.runtime.systemd import READY, notify
from distributor_node.shared.settings.model import Settings
from distributor_node.shared.waiting import cancel_and_wait

_CLOSING_SECONDS = 3.0

logger = structlog.get_logger()


def make_context(
    settings: Settings,
    volume: Volume,
    state: StateStore,
    queue: JobQueue,
    catalog: Catalog,
    failover_reader: FailoverReader,
    peers: Peers | None = None,
) -> ApiContext:
    """Build the context of the handlers. The ports must be open before the first request."""
    operator_state = OperatorStateWatcher(state, volume.root, settings.assignment)
    offers, rules = None, settings.peers.rules
    if peers is not None and rules is not None and rules.copies > 1:
        offers = CopyOffers(peers, rules, volume.complete_record)
    return ApiContext(
        settings=settings,
        volume=volume,
        state=state,
        queue=queue,
        catalog=catalog,
        failover_reader=failover_reader,
        accesses=AccessCounter(state, observe=None if offers is None else offers.note_views),
        assignment=CurrentAssignment(settings.assignment),
        fetch_events=FetchEvents(state, operator_state.wake, volume),
        fetch_capacity=FetchCapacity(state),
        viewers=Viewers(state, settings.fetch.window),
        operator_state=operator_state,
        client_addresses=ClientAddresses(settings.public_api.trusted_proxies),
        slow_clients=SlowClients(settings.public_api.minimum_client_rate),
        copy_offers=offers,
        peers=peers,
    )


async def run_api(
    scope: ServiceScope,
    settings: Settings,
    *,
    probe_path: Path | None = None,
    listener: socket.socket | None = None,
) -> bool:
    """Open the adapters and serve until a stop is requested.

    `probe_path`, `listener`: see `serve_api`. Returns whether an operator has shut the node down.
    """
    resources = scope.resources
    await resources.enter_async_context(build_tracing(settings, "api"))
    volume = build_volume(settings)
    resources.callback(volume.close)
    try:
        await asyncio.to_thread(volume.prepare)
    except VolumeError as error:
        # Fetchers and evictor write to the volume. This service only reads.
        logger.warning("volume_not_writable", reason=str(error))
    state, queue, catalog = build_state_store(settings), build_job_queue(settings), build_catalog(settings)
    for port in (catalog, state, queue):
        await port.open()
        resources.push_async_callback(port.close)
    stats_sync = await resources.enter_async_context(build_source_stats_sync(settings))
    client = await resources.enter_async_context(
        build_source_client(settings, max_connections=settings.public_api.max_proxied)
    )
    peers = build_peers(settings, stats_sync.registry, max_connections=settings.public_api.max_proxied)
    if peers is not None:
        await resources.enter_async_context(peers)
    describe_build(VERSION, "api")
    failover_reader = build_failover_reader(client, stats_sync.registry, peers)
    context = make_context(settings, volume, state, queue, catalog, failover_reader, peers)
    scope.reloads.extend(reloads_of(catalog))
    exempt_startup_from_collection()
    await serve_api(context, scope.stop_requested, probe_path=probe_path, listener=listener)
    return context.operator_state.shutting_down


async def serve_api(
    context: ApiContext,
    stop_requested: asyncio.Event,
    *,
    service: Literal["api", "standalone"] = "api",
    probe_path: Path | None = None,
    listener: socket.socket | None = None,
    on_listening: Callable[[int], None] | None = None,
    parts: Sequence[Part] = (),
) -> None:
    """Serve until `stop_requested`, then let responses finish within the shutdown deadline, less the time for closing.

    `service` has its own default port for health and metrics. `probe_path`: a Unix socket for them instead, in a worker
    that shares the public port with others and whose supervisor answers for all.
    `listener`: the public port, if systemd has opened it.

    `on_listening` is called with the port, once the operator port is open too, unless an operator has stopped the API.
    `parts`: what other services in this process report for the node's page.
    Raises ConfigurationError if a port is unavailable.
    """
    settings = context.settings
    assets = AssetHandler(context)
    traced = tracing.installed_tracer() is not None
    application = build_app(context, TracedAssets(assets) if traced else assets)
    application.ctx.slow_clients = context.slow_clients
    application.ctx.log_requests, application.ctx.log_hits = settings.log.access == "json", settings.log.hits
    application.ctx.client_of = context.client_addresses.address_of if settings.log.client_address else None
    access_log = application.ctx.access_log = (
        AccessLog(settings.log.access_file, context.client_addresses)
        if settings.log.access == "combined"
        else None
    )
    fast_path = application.ctx.fast_path = build_fast_path(context, access_log)
    shared_port = probe_path is not None
    servers = make_servers(application, settings, listener, shared_port=shared_port)
    server = servers[0]
    drain = max(settings.shutdown_deadline - _CLOSING_SECONDS, settings.shutdown_deadline / 2)
    controller = OperatorStateController(context, servers, drain)
    health = HealthChecks(context, application.ctx.usage, lambda: server.is_open)

    async def metrics(render: Render = render_in_thread) -> tuple[bytes, str]:
        if fast_path is not None:
            fast_path.hit_metrics.flush()
        return await health.metrics(render)

    probe_server = ProbeServer(
        settings.metrics.host,
        settings.metrics.port_of(service),
        Probes(
            health.readiness,
            metrics,
            openmetrics=partial(metrics, render_openmetrics) if traced and has_exemplars() else None,
        ),
        path=probe_path,
    )
    resources = AsyncExitStack()
    try:
        await resources.enter_async_context(probe_server)
        await controller.start()
        async with (
            operator_api(context, process_name(), shared_port=shared_port),
            asyncio.TaskGroup() as group,
        ):
            # Not before the operator port is open: if it is in use, the process ends instead.
            if on_listening is not None and server.is_open:
                on_listening(server.port)
            notify(READY)
            controller_task = group.create_task(controller.run(stop_requested), name="operator-state")
            tasks = [
                group.create_task(context.operator_state.run(), name="watch-operator-state"),
                group.create_task(context.accesses.run(), name="flush-accesses"),
                group.create_task(context.fetch_events.run(), name="fetch-events"),
                group.create_task(context.fetch_capacity.run(), name="fetch-capacity"),
                group.create_task(context.viewers.run(), name="viewers"),
                group.create_task(watch_volume(context.volume), name="watch-volume"),
                group.create_task(
                    context.slow_clients.watch_space(context.state, settings.storage.watermarks.high),
                    name="watch-space",
                ),
                group.create_task(application.ctx.squid_status.run(), name="squid-status"),
                *(
                    group.create_task(work, name=name)
                    for name, work in dashboard_works(
                        context, application.ctx.usage, health, service, parts
                    ).items()
                ),
            ]
            optional = {
                "copy-offers": context.copy_offers,
                "access-log": access_log,
                "object-cache": None if fast_path is None else fast_path.objects,
            }
            tasks.extend(
                group.create_task(part.run(), name=name)
                for name, part in optional.items()
                if part is not None
            )
            await stop_requested.wait()
            await cancel_and_wait(controller_task)
            await controller.stop()
            for task in tasks:
                task.cancel()
        await context.accesses.close()
    finally:
        for each in servers:
            await each.close(0, ending=True)
        await resources.aclose()
        if fast_path is not None:
            await fast_path.close()
        if access_log is not None:
            await access_log.close()
        await assets.close()
        await application.ctx.usage.close()
        unregister_application(application)


def make_servers(
    application: ApiApplication, settings: Settings, listener: socket.socket | None, *, shared_port: bool
) -> Sequence[PublicServer]:
    """Make the server of the public port, and that of the port for peers, if they have one of their own."""
    public, peers = settings.public_api, settings.peers
    address = ListenAddress(public.host, public.port, shared_port, inherited=listener)
    servers = [PublicServer(application, address, FastPathProtocol)]
    if peers.enabled and peers.port is not None:
        own = ListenAddress(peers.host, peers.port, shared_port, setting="peers")
        servers.append(PublicServer(application, own, PeerProtocol))
    return servers


def dashboard_works(
    context: ApiContext,
    usage: UsageReader,
    health: HealthChecks,
    kind: ProcessKind,
    parts: Sequence[Part],
) -> dict[str, Coroutine[Any, Any, None]]:
    """Return what runs for the node's page, by name: reports, history, and the server where the port is free."""
    settings = context.settings
    if not settings.dashboard.enabled:
        return {}
    reporter = ProcessReporter(context.state, kind, [context.viewers.positions, health.report, *parts])
    explainer = ObjectExplainer(context.state, context.volume, settings.evictor)
    feed = Feed(context, usage, health, explainer)
    server = DashboardServer(settings.dashboard, feed, context.state, reporter.wake)
    return {"report-process": reporter.run(), "dashboard-history": feed.run(), "dashboard": server.run()}


# Operator state in one API process: the assignment, the open or closed public port, the shutdown.

_RETRY_SECONDS = 0.5


class OperatorStateController:
    """Applies the node's operator state to this process."""

    def __init__(self, context: ApiContext, servers: Sequence[PublicServer], drain: float) -> None:
        """`servers`: the public port, and that for peers, if it has one of its own; they open and close together.

        `drain`: seconds that responses in progress get when the ports are closed.
        """
        self._context, self._servers, self._drain = context, servers, drain
        self._close_tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load the operator state, and open the ports unless the API is stopped.

        Raises ConfigurationError if a port is unavailable.
        """
        await self._context.operator_state.load()
        self._update_assignment()
        if not self._context.operator_state.current.stopped:
            await self._open_all()

    async def run(self, stop_requested: asyncio.Event) -> None:
        """Apply each change of the operator state, until cancelled. A shutdown sets `stop_requested`."""
        operator_state = self._context.operator_state
        while True:
            # Read before the first await: a change during this pass starts another one.
            seen = operator_state.current
            self._update_assignment()
            if operator_state.shutting_down and not stop_requested.is_set():
                logger.info("shutdown_requested_by_operator")
                stop_requested.set()
            stopped = operator_state.current.stopped
            is_open = [server.is_open for server in self._servers]
            if stopped and any(is_open):
                # In a task: responses in progress continue, and the port may be opened again before they end.
                closing = asyncio.create_task(self._close_all(), name="close-public-port")
                self._close_tasks.add(closing)
                closing.add_done_callback(self._close_tasks.discard)
            elif not stopped and not all(is_open) and not await self._open():
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            await operator_state.wait_until(lambda now, seen=seen: now != seen)  # type: ignore[misc]

    async def stop(self) -> None:
        """Close the ports, and wait for closes in progress. Call it after `run` has ended."""
        await self._close_all(ending=True)
        if self._close_tasks:
            await asyncio.wait(self._close_tasks)

    async def _open(self) -> bool:
        try:
            await self._open_all()
        except ConfigurationError as error:
            logger.error("port_open_failed", reason=str(error))
            return False
        return True

    async def _open_all(self) -> None:
        for server in self._servers:
            await server.open()

    async def _close_all(self, *, ending: bool = False) -> None:
        await asyncio.gather(*(server.close(self._drain, ending=ending) for server in self._servers))

    def _update_assignment(self) -> None:
        self._context.assignment.current = self._context.operator_state.assignment


# Detection of a volume that is unmounted or replaced while the service runs.

WATCH_INTERVAL = 2.0


async def watch_volume(volume: Volume, seconds: float = WATCH_INTERVAL) -> None:
    """Check the volume every `seconds`, until cancelled. Later reads go to the volume that is mounted now."""
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
