"""/status and /buckets: usage of the volume, the squid's and the chain's status, the assignment, the version."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog

from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.errors import RETRY_LATER, HttpError
from distributor_node.shared.adapters.volume import FoundObject, Volume
from distributor_node.shared.domain.errors import CatalogUnavailable, StateStoreUnavailable, VolumeError
from distributor_node.shared.domain.space import RECORD_BYTES, Usage, footprint
from distributor_node.shared.observability.logging import OutageLog
from distributor_node.shared.ports.catalog import Catalog
from distributor_node.shared.runtime.process import VERSION
from distributor_node.shared.waiting import wait_event

USAGE_TTL = 1.0
MEASUREMENT_TTL = 30.0
_MEASUREMENT_TIMEOUT = 2.0

logger = structlog.get_logger()


class UsageReader:
    """Reads the usage of the volume: from the state store, else its last value, else measured on disk."""

    def __init__(self, context: ApiContext, clock: Callable[[], float] = time.monotonic) -> None:
        self._context = context
        self._clock = clock
        self._known: Usage | None = None
        self._known_at = 0.0
        self._measured: Usage | None = None
        self._measured_at = 0.0
        self._measuring: asyncio.Task[None] | None = None

    async def read(self) -> Usage:
        """Return the usage. Never fails, and reads the store at most once a second."""
        now = self._clock()
        if self._known is not None and now - self._known_at < USAGE_TTL:
            return self._known
        try:
            usage = await self._context.state.usage()
        except StateStoreUnavailable:
            return self._known or await self._measure()
        self._known, self._known_at = usage, self._clock()
        # A store that was emptied counts nothing until the evictor has reconciled it with the volume.
        return usage if usage.reconciled or usage.objects else await self._measure()

    async def _measure(self) -> Usage:
        stale = self._measured is None or self._clock() - self._measured_at >= MEASUREMENT_TTL
        if stale and self._measuring is None:
            self._measuring = asyncio.create_task(self._measure_once(), name="measure-volume")
        if self._measuring is not None:
            await asyncio.wait({self._measuring}, timeout=_MEASUREMENT_TIMEOUT)
        limit = self._context.settings.storage.limit
        return self._measured or Usage(limit, used=0, reserved=0, objects=0, fetches=0, reconciled=False)

    async def _measure_once(self) -> None:
        try:
            objects, used = await asyncio.to_thread(_count, self._context.volume)
            limit = self._context.settings.storage.limit
            self._measured = Usage(limit, used, reserved=0, objects=objects, fetches=0, reconciled=False)
        except VolumeError as error:
            logger.warning("volume_measurement_failed", reason=str(error))
        finally:
            self._measured_at = self._clock()
            self._measuring = None

    async def close(self) -> None:
        """Wait for a measurement in progress. Its thread cannot be cancelled."""
        if self._measuring is not None:
            await asyncio.wait({self._measuring}, timeout=_MEASUREMENT_TIMEOUT)


def _count(volume: Volume) -> tuple[int, int]:
    sizes = [footprint(found.size) for found in volume.scan_objects() if isinstance(found, FoundObject)]
    return len(sizes), sum(sizes)


class StatusReporter:
    """Builds the bodies of /status and /buckets."""

    def __init__(self, context: ApiContext, usage: UsageReader, squid_status: SquidStatusPoller) -> None:
        self._context = context
        self._usage = usage
        self._squid_status = squid_status
        self._started = time.monotonic()
        self._last_buckets: list[str] | None = None

    async def status(self) -> dict[str, Any]:
        """Return the fields of the published API (`id` to `downloadsInProgress`), and those that newer clients read."""
        usage, settings = await self._usage.read(), self._context.settings
        fields: dict[str, Any] = {
            "id": settings.id,
            "objectsInCache": usage.objects,
            "storageLimit": usage.limit,
            # Clients expect the bytes of the objects, without the records beside them.
            "storageUsed": max(0, usage.used - usage.objects * RECORD_BYTES),
            "uptime": int(time.monotonic() - self._started),
            "downloadsInProgress": usage.fetches,
            "downloadsQueued": usage.queued,
            "partialObjects": usage.parked,
            "partialBytes": usage.parked_size,
            "workersAlive": self._context.fetch_capacity.workers_alive or 0,
            "draining": self._context.operator_state.current.draining,
            "version": VERSION,
            "nodeEnv": settings.environment,
            "queryNodeStatus": await self._squid_status_fields(),
        }
        peers = self._context.peers
        if peers is not None:
            fields["peers"] = {"alive": sorted(peers.alive), "known": sorted(peers.known)}
        worker_id = self._context.assignment.current.worker_id
        if worker_id is not None:
            fields["workerId"] = worker_id
        return fields

    async def _squid_status_fields(self) -> dict[str, Any]:
        """Return the last known fields of the squid and the chain, with their ages."""
        found = await self._squid_status.read()
        return {
            "url": self._context.catalog.public_url,
            "chainHead": found.chain_head,
            "blocksProcessed": found.blocks_processed,
            "packageVersion": found.version,
            "age": _whole_seconds(found.age),
            "chainHeadAge": _whole_seconds(found.chain_head_age),
        }

    async def buckets(self) -> dict[str, Any]:
        """Return the assigned buckets, or the worker whose buckets are all assigned.

        Without an assignment: all buckets of the catalog. Raises HttpError 503 if the catalog is unavailable.
        """
        assignment = self._context.assignment.current
        if assignment.bucket_ids is not None:
            return {"bucketIds": sorted(assignment.bucket_ids, key=_bucket_order)}
        if assignment.worker_id is not None:
            return {"allByWorkerId": assignment.worker_id}
        try:
            self._last_buckets = sorted(await self._context.catalog.bucket_ids(), key=_bucket_order)
        except CatalogUnavailable as error:
            if self._last_buckets is None:
                raise HttpError(503, "The catalog is unavailable", "unavailable", RETRY_LATER) from error
        return {"bucketIds": self._last_buckets}


def _whole_seconds(age: float | None) -> int | None:
    return None if age is None else int(age)


def _bucket_order(bucket_id: str) -> tuple[int, int]:
    family, _, index = bucket_id.partition(":")
    return int(family), int(index)


# Status of the squid and the chain, polled in the background so that /status never waits long and is never empty.

POLL_INTERVAL = 15.0
"""Seconds between the end of a query and the next one."""
FIRST_READ_TIMEOUT = 0.3

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class SquidAndChainStatus:
    """Block numbers and the squid's version. 0 and "" for values that were never read."""

    chain_head: int = 0
    blocks_processed: int = 0
    version: str = ""
    age: float | None = None  # seconds since blocks_processed was read; None: never
    chain_head_age: float | None = None  # likewise for chain_head


class SquidStatusPoller:
    """Polls the squid and the chain, each by itself and independent of requests. Run `run` in a task."""

    def __init__(self, catalog: Catalog, clock: Callable[[], float] = time.monotonic) -> None:
        """`catalog`: opened and closed by its owner, later than this. `clock` in seconds."""
        self._catalog = catalog
        self._height = _Polled[int]("squid_height", clock)
        self._version = _Polled[str]("squid_version", clock)
        self._head = _Polled[int]("chain_head", clock)
        self._polled_once = asyncio.Event()

    async def run(self) -> None:
        """Poll until cancelled."""
        await asyncio.gather(self.poll_squid(), self.poll_chain())
        self._polled_once.set()
        async with asyncio.TaskGroup() as group:
            for poll in (self.poll_squid, self.poll_chain):
                group.create_task(_repeat(poll), name=f"status-{poll.__name__}")

    async def read(self) -> SquidAndChainStatus:
        """Return the last known values. Readers before the first poll has ended wait up to FIRST_READ_TIMEOUT."""
        if not self._polled_once.is_set():
            await wait_event(self._polled_once, FIRST_READ_TIMEOUT)
        return SquidAndChainStatus(
            chain_head=self._head.value or 0,
            blocks_processed=self._height.value or 0,
            version=self._version.value or "",
            age=self._height.age(),
            chain_head_age=self._head.age(),
        )

    async def poll_squid(self) -> None:
        """Ask the squid once."""
        try:
            status = await self._catalog.status()
        except CatalogUnavailable as error:
            self._height.fail(error)
            return
        self._height.set(status.blocks_processed)
        self._version.set(status.version)

    async def poll_chain(self) -> None:
        """Ask the chain once."""
        try:
            self._head.set(await self._catalog.chain_head())
        except CatalogUnavailable as error:
            self._head.fail(error)


async def _repeat(poll: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(POLL_INTERVAL)
        await poll()


class _Polled(Generic[_Value]):
    """The last known value of one query, and its age."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self._name, self._clock = name, clock
        self.value: _Value | None = None
        self._set_at = 0.0
        self._outage = OutageLog(logger, down="squid_status_unavailable", up="squid_status_recovered")

    def set(self, value: _Value | None) -> None:
        self._outage.succeeded(query=self._name)
        if value is not None:
            self.value, self._set_at = value, self._clock()

    def fail(self, error: CatalogUnavailable) -> None:
        self._outage.failed(error, query=self._name)

    def age(self) -> float | None:
        """Seconds since the value was read."""
        return None if self.value is None else max(0.0, self._clock() - self._set_at)
