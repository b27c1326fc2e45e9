"""What the node says of itself: /status and /buckets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog

from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.errors import RETRY_LATER, HttpError
from distributor_node.shared.adapters.volume import FoundObject, Volume
from distributor_node.shared.domain.errors import CatalogUnavailable, StateStoreUnavailable, VolumeError
from distributor_node.shared.domain.space import RECORD_BYTES, Usage, footprint
from distributor_node.shared.ports.catalog import Catalog
from distributor_node.shared.runtime.identity import VERSION

USAGE_TTL = 1.0
MEASUREMENT_TTL = 30.0
_MEASUREMENT_TIMEOUT = 2.0

logger = structlog.get_logger()


class UsageReader:
    """The usage of the volume, whatever is down: the store's word, else its last one, else what the disk says."""

    def __init__(self, context: ApiContext, clock: Callable[[], float] = time.monotonic) -> None:
        self._context = context
        self._clock = clock
        self._known: Usage | None = None
        self._known_at = 0.0
        self._measured: Usage | None = None
        self._measured_at = 0.0
        self._measuring: asyncio.Task[None] | None = None

    async def read(self) -> Usage:
        """Never fails; at most one question to the store a second."""
        now = self._clock()
        if self._known is not None and now - self._known_at < USAGE_TTL:
            return self._known
        try:
            usage = await self._context.state.usage()
        except StateStoreUnavailable:
            return self._known or await self._measure()
        self._known, self._known_at = usage, self._clock()
        # A store that was emptied counts nothing until the evictor has looked at the volume.
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
        """Wait for a measurement under way: its thread cannot be stopped."""
        if self._measuring is not None:
            await asyncio.wait({self._measuring}, timeout=_MEASUREMENT_TIMEOUT)


def _count(volume: Volume) -> tuple[int, int]:
    sizes = [footprint(found.size) for found in volume.scan_objects() if isinstance(found, FoundObject)]
    return len(sizes), sum(sizes)


class StatusReporter:
    """The bodies of /status and /buckets."""

    def __init__(self, context: ApiContext, usage: UsageReader, squid_status: SquidStatusPoller) -> None:
        self._context = context
        self._usage = usage
        self._squid_status = squid_status
        self._started = time.monotonic()
        self._last_buckets: list[str] | None = None

    async def status(self) -> dict[str, Any]:
        """Fields of the published API (`id` to `downloadsInProgress`), and those that newer clients read."""
        usage, settings = await self._usage.read(), self._context.settings
        fields: dict[str, Any] = {
            "id": settings.id,
            "objectsInCache": usage.objects,
            "storageLimit": usage.limit,
            # Clients mean the objects' bytes; the records beside them are our own affair.
            "storageUsed": max(0, usage.used - usage.objects * RECORD_BYTES),
            "uptime": int(time.monotonic() - self._started),
            "downloadsInProgress": usage.fetches,
            "version": VERSION,
            "nodeEnv": settings.environment,
            "queryNodeStatus": await self._squid_status_fields(),
        }
        worker_id = self._context.assignment.current.worker_id
        if worker_id is not None:
            fields["workerId"] = worker_id
        return fields

    async def _squid_status_fields(self) -> dict[str, Any]:
        """Field by field: who is silent costs nothing but its own fields."""
        found = await self._squid_status.read()
        return {
            "url": self._context.catalog.public_url,
            "chainHead": found.chain_head,
            "blocksProcessed": found.blocks_processed,
            "packageVersion": found.version,
        }

    async def close(self) -> None:
        """End what is asked in the background."""
        await self._squid_status.close()

    async def buckets(self) -> dict[str, Any]:
        """The assignment: its buckets, or all of one worker, or (no assignment set) all that the catalog knows."""
        assignment = self._context.assignment.current
        if assignment.bucket_ids is not None:
            return {"bucketIds": sorted(assignment.bucket_ids, key=_bucket_order)}
        if assignment.worker_id is not None:
            return {"allByWorkerId": assignment.worker_id}
        try:
            self._last_buckets = sorted(await self._context.catalog.bucket_ids(), key=_bucket_order)
        except CatalogUnavailable as error:
            if self._last_buckets is None:
                raise HttpError(503, "The catalog is out of reach", "unavailable", RETRY_LATER) from error
        return {"bucketIds": self._last_buckets}


def _bucket_order(bucket_id: str) -> tuple[int, int]:
    family, _, index = bucket_id.partition(":")
    return int(family), int(index)


# What the squid and the chain say of themselves, for /status: asked in the background, never waited for long.

POLL_INTERVAL = 10.0
STALE_AFTER = 60.0
"""Seconds that an answer is shown for after the squid or the chain has fallen silent."""
FIRST_READ_TIMEOUT = 0.3
_CLOSING_SECONDS = 5.0

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class SquidAndChainStatus:
    """Block numbers and the squid's version; 0 and "" for what nobody says."""

    chain_head: int = 0
    blocks_processed: int = 0
    version: str = ""


class SquidStatusPoller:
    """`read` costs nothing but memory: at most one question to each every ten seconds, however often it is called."""

    def __init__(self, catalog: Catalog, clock: Callable[[], float] = time.monotonic) -> None:
        """`catalog`: opened and closed by its owner, later than this. `clock` in seconds."""
        self._catalog, self._clock = catalog, clock
        self._height = _Polled[int]("squid_height", clock)
        self._version = _Polled[str]("squid_version", clock)
        self._head = _Polled[int]("chain_head", clock)
        self._next_poll_at = float("-inf")
        self._polling: asyncio.Task[None] | None = None

    async def read(self) -> SquidAndChainStatus:
        """What is known by now; the first readers wait a moment for it."""
        if self._polling is None and self._clock() >= self._next_poll_at:
            self._polling = asyncio.create_task(self._poll(), name="poll-squid-status")
        if self._polling is not None and self._next_poll_at == float("-inf"):
            await asyncio.wait({self._polling}, timeout=FIRST_READ_TIMEOUT)
        return SquidAndChainStatus(
            chain_head=self._head.value() or 0,
            blocks_processed=self._height.value() or 0,
            version=self._version.value() or "",
        )

    async def close(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.wait({self._polling}, timeout=_CLOSING_SECONDS)

    async def _poll(self) -> None:
        try:
            await asyncio.gather(self._poll_squid(), self._poll_chain())
        finally:
            self._next_poll_at = self._clock() + POLL_INTERVAL
            self._polling = None

    async def _poll_squid(self) -> None:
        try:
            status = await self._catalog.status()
        except CatalogUnavailable as error:
            self._height.fail(error)
            return
        self._height.set(status.blocks_processed)
        self._version.set(status.version)

    async def _poll_chain(self) -> None:
        try:
            self._head.set(await self._catalog.chain_head())
        except CatalogUnavailable as error:
            self._head.fail(error)


class _Polled(Generic[_Value]):
    """The last one to one question, and its age."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self._name, self._clock = name, clock
        self._value: _Value | None = None
        self._set_at = float("-inf")
        self._failed = False

    def set(self, value: _Value | None) -> None:
        self._failed = False
        if value is not None:
            self._value, self._set_at = value, self._clock()

    def fail(self, error: CatalogUnavailable) -> None:
        """Said once, until there is an answer again."""
        if not self._failed:
            logger.warning("squid_status_unavailable", query=self._name, reason=str(error))
        self._failed = True

    def value(self) -> _Value | None:
        return self._value if self._clock() - self._set_at < STALE_AFTER else None
