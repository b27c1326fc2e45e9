"""What the node says of itself: /status and /buckets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import structlog

from services.api.context import ApiContext
from services.api.errors import RETRY_LATER, HttpError
from services.api.query_node import SquidAndChainStatus, SquidStatusPoller, url_without_credentials
from services.api.version import VERSION
from shared.adapters.volume import FoundObject, Volume
from shared.domain.errors import CatalogUnavailable, StateStoreUnavailable, VolumeError
from shared.domain.space import RECORD_BYTES, Usage, footprint
from shared.settings.network import CatalogSettings

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

    def __init__(
        self, context: ApiContext, usage: UsageReader, squid_status: SquidStatusPoller | None
    ) -> None:
        """`squid_status`: of the catalog, if it is a squid."""
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
        found = SquidAndChainStatus() if self._squid_status is None else await self._squid_status.read()
        return {
            "url": _catalog_url(self._context.settings.catalog),
            "chainHead": found.chain_head,
            "blocksProcessed": found.blocks_processed,
            "packageVersion": found.version,
        }

    async def close(self) -> None:
        """End what is asked in the background."""
        if self._squid_status is not None:
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


def _catalog_url(catalog: CatalogSettings) -> str:
    """Where the catalog is asked: the squid, or the origin's scheme and host, without credentials; a file has no URL to
    show."""
    if catalog.kind == "joystream":
        return url_without_credentials(catalog.squid)
    if catalog.kind != "origin" or not catalog.origin:
        return ""
    parts = urlsplit(catalog.origin)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
