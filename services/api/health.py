"""/healthz, /readyz and /metrics.

A node is ready if its volume is mounted and no import of another node's objects is in progress. Without its state
store, job queue or catalog it still serves hits, and proxies most misses. Taking it out of service would lose that, so
these are reported as `degraded`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import structlog

from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.status import UsageReader
from distributor_node.shared.adapters.volume.intake import ImportSource
from distributor_node.shared.domain.errors import DistributorError, QueryRejected, VolumeError
from distributor_node.shared.observability.metrics import (
    PARTIAL_OBJECTS,
    PARTIAL_RESERVED,
    QUEUE_JOBS,
    STATE_STORE_CLIENTS,
    STATE_STORE_COMMANDS,
    STATE_STORE_MEMORY,
    STATE_STORE_MEMORY_LIMIT,
    STATE_STORE_SAVING,
    STORAGE_LIMIT,
    STORAGE_OBJECTS,
    STORAGE_RESERVED,
    STORAGE_USED,
    Render,
    render_in_thread,
)
from distributor_node.shared.observability.probe_server import Readiness

_CHECK_TIMEOUT = 2.0
IMPORT_READY_TIMEOUT = 600.0
REFUSED_LOOKUPS_SHOWN = 10.0
"""Seconds that a refused look-up makes the node degraded."""

MIN_FREE_BYTES = 16 * 1024 * 1024
"""Bytes free on the device behind the volume below which most fetches fail, whatever the storage limit is."""

LOOKUPS_FAIL = "the last look-ups failed"

logger = structlog.get_logger()


class HealthChecks:
    """Checks everything the node depends on, within two seconds."""

    def __init__(self, context: ApiContext, usage: UsageReader, is_serving: Callable[[], bool]) -> None:
        """`is_serving`: whether the public port is open."""
        self._context = context
        self._usage = usage
        self._is_serving = is_serving
        self._started = time.monotonic()
        self._import_done = context.settings.storage.import_assets is None

    async def readiness(self) -> Readiness:
        """Check public port, volume, state store, job queue, catalog and import."""
        (found, full), unfinished_import = await asyncio.gather(
            self._look(), asyncio.to_thread(self._check_import)
        )
        problems = (found.pop("public port"), found.pop("volume"), unfinished_import)
        degraded = (full, *found.values(), self._check_workers(), self._check_lookups())
        return Readiness(
            problems=tuple(problem for problem in problems if problem),
            degraded=tuple(missing for missing in degraded if missing),
        )

    async def dependencies(self) -> dict[str, str | None]:
        """What is wrong with each thing that the node depends on, in words; None: nothing."""
        found, full = await self._look()
        return {**found, "volume": found["volume"] or full}

    async def _look(self) -> tuple[dict[str, str | None], str | None]:
        """Likewise, and whether the device is full: hits are served from a full one, and misses are proxied."""
        volume, device, state_store, job_queue, catalog = await asyncio.gather(
            self._check("volume", self._check_volume),
            self._check("volume", self._check_device),
            self._check("state store", self._check_state_store),
            self._check("job queue", self._context.queue.ping),
            self._check("catalog", self._check_catalog),
        )
        found = {
            "public port": self.check_port(),
            "volume": volume,
            "state store": state_store,
            "job queue": job_queue,
            "catalog": catalog,
        }
        return found, None if volume else device

    def check_port(self) -> str | None:
        """Return what is wrong with the public port, in words. Asks no one."""
        if self._context.operator_state.current.stopped:
            return "stopped by an operator"
        return None if self._is_serving() else "the public port is closed"

    def _check_workers(self) -> str | None:
        capacity = self._context.fetch_capacity
        if capacity.workers_alive == 0:
            return "fetchers: none alive"
        return "job queue: not consumed" if capacity.not_consumed else None

    def _check_lookups(self) -> str | None:
        refused = self._context.refused_lookups.recent(REFUSED_LOOKUPS_SHOWN)
        return "look-ups: some are refused, too many wait for the catalog" if refused else None

    def _check_import(self) -> str | None:
        """Return a problem while the evictor imports an existing node's objects, for at most IMPORT_READY_TIMEOUT.

        Until then requests for them would be misses.
        """
        if self._import_done or time.monotonic() - self._started > IMPORT_READY_TIMEOUT:
            return None
        assets = self._context.settings.storage.import_assets
        if assets is not None:
            import_source = ImportSource(self._context.volume.root, assets)
            self._import_done = import_source.is_done()
            import_source.close()
        return None if self._import_done else "the import of the existing node's objects is in progress"

    async def _check_state_store(self) -> str | None:
        return "; ".join(await self._context.state.problems()) or None

    async def _check_catalog(self) -> str | None:
        """Ask what the node asks for its own assignment: a squid of another version may refuse just that.

        An origin is not asked, since it has nothing to list. So what became of the last look-ups counts as well.
        """
        worker_id = self._context.assignment.current.effective.worker_id
        await self._context.catalog.bucket_ids(worker_id)
        return LOOKUPS_FAIL if self._context.catalog.lookups_fail else None

    async def report(self, watched: bool) -> Mapping[str, Any]:
        """What the node's page shows of this process, beside the checks of the process that serves the page."""
        return {"lookups_fail": self._context.catalog.lookups_fail}

    async def _check_volume(self) -> None:
        await asyncio.to_thread(self._context.volume.check)

    async def _check_device(self) -> str | None:
        free = (await asyncio.to_thread(self._context.volume.device_space)).free_bytes
        return f"its device is full: {free} bytes are free" if free < MIN_FREE_BYTES else None

    async def _check(self, name: str, check: Callable[[], Awaitable[object]]) -> str | None:
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT):
                found = await check()
        except TimeoutError:
            return f"{name}: timeout"
        except VolumeError as error:
            return str(error)
        except QueryRejected as error:
            logger.info("dependency_unavailable", dependency=name, reason=str(error))
            return f"{name}: does not support a query that the node needs"
        except DistributorError as error:
            logger.info("dependency_unavailable", dependency=name, reason=str(error))
            return f"{name}: unavailable"
        return f"{name}: {found}" if isinstance(found, str) else None

    async def metrics(self, render: Render = render_in_thread) -> tuple[bytes, str]:
        """Return the metrics of this process, or of all workers in multiprocess mode, and their media type."""
        await asyncio.gather(
            self._update_usage(),
            self._check("state store", self._update_state_store),
            self._check("job queue", self._update_queue),
        )
        return await render()

    async def _update_usage(self) -> None:
        usage = await self._usage.read()
        STORAGE_USED.set(usage.used)
        STORAGE_RESERVED.set(usage.reserved)
        STORAGE_LIMIT.set(usage.limit)
        STORAGE_OBJECTS.set(usage.objects)
        PARTIAL_OBJECTS.set(usage.parked)
        PARTIAL_RESERVED.set(usage.parked_bytes)

    async def _update_state_store(self) -> None:
        stats = await self._context.state.server_stats()
        if stats is not None:
            STATE_STORE_MEMORY.set(stats.memory)
            STATE_STORE_MEMORY_LIMIT.set(stats.memory_limit)
            STATE_STORE_CLIENTS.set(stats.clients)
            STATE_STORE_COMMANDS.set(stats.commands)
            STATE_STORE_SAVING.set(stats.saving)

    async def _update_queue(self) -> None:
        depth = await self._context.queue.depth()
        for state, jobs in (("ready", depth.ready), ("delayed", depth.delayed), ("dead", depth.dead)):
            QUEUE_JOBS.labels(state=state).set(jobs)
