"""Rates of state store calls on a full Redis, and how fast a working evictor frees space."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from redis import asyncio as aioredis

from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.ports.state_store import Access, Granted, Lease, Term

Item = TypeVar("Item")

PREFIX = "distributor:"
_TIMES = StateTimeouts(operation_timeout=10.0)
_OBJECTS = 5_000
_CONCURRENCY = 32
_FIRST_ID = 9_000_000_000
_BATCH, _BATCHES = 1_000, 50
_LEADER_SECONDS = 30.0


async def redis_memory(url: str) -> int:
    """Bytes that Redis has in use."""
    client = aioredis.Redis.from_url(url, protocol=2)
    try:
        return int((await client.info("memory"))["used_memory"])
    finally:
        await client.aclose()


class StoreVerbs:
    """Calls of each verb a second, from one process with 32 calls under way."""

    def __init__(self, url: str, limit: int) -> None:
        self._store = RedisStateStore(url, PREFIX, limit, _TIMES)

    async def measure(self) -> dict[str, float]:
        await self._store.open()
        try:
            return await self._measure()
        finally:
            await self._store.close()

    async def _measure(self) -> dict[str, float]:
        ids = [ObjectId(_FIRST_ID + number) for number in range(_OBJECTS)]
        store, leases = self._store, list[Lease]()
        term = await _lead(store)

        async def begin(object_id: ObjectId) -> None:
            begun = await store.begin(object_id, 4096, "benchmark")
            if not isinstance(begun, Granted):
                raise RuntimeError(f"no lease: {begun}")
            leases.append(begun.lease)

        async def record(_: ObjectId) -> None:
            await store.record_accesses([Access(object_id, 1, time.time()) for object_id in ids[:_BATCH]])

        figures = {
            "claim_per_second": await _rate(lambda each: store.claim(each, "benchmark"), ids),
            "begin_per_second": await _rate(begin, ids),
            "commit_per_second": await _rate(lambda lease: store.commit(lease, time.time()), leases),
            "accesses_per_second": _BATCH * await _rate(record, ids[:_BATCHES]),
        }

        async def evict(object_id: ObjectId) -> None:
            if not await store.begin_eviction(term, object_id, 0.0):
                raise RuntimeError(f"{object_id} cannot be evicted")
            await store.finish_eviction(term, object_id)

        figures["evict_per_second"] = await _rate(evict, ids)
        await store.resign(term)
        return figures


async def _lead(store: RedisStateStore) -> Term:
    """Once the evictor that was stopped is no longer leader."""
    async with asyncio.timeout(_LEADER_SECONDS):
        while (term := await store.lead("benchmark", 600)) is None:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.1)
    return term


async def _rate(verb: Callable[[Item], Awaitable[object]], items: Sequence[Item]) -> float:
    remaining = iter(list(items))

    async def work() -> None:
        for item in remaining:
            await verb(item)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(_CONCURRENCY)))
    return len(items) / (time.perf_counter() - began)


class EvictionMonitor:
    """Looks at the usage while an evictor works."""

    def __init__(self, url: str, limit: int) -> None:
        self._store = RedisStateStore(url, PREFIX, limit, _TIMES)

    async def rate_until_below(self, used_bytes: float, seconds: float) -> float:
        """Objects evicted a second, from the first one seen to go; TimeoutError if usage stays above for so long."""
        await self._store.open()
        try:
            async with asyncio.timeout(seconds):
                return await self._rate(used_bytes)
        finally:
            await self._store.close()

    async def _rate(self, used_bytes: float) -> float:
        first = usage = await self._store.usage()
        began = time.perf_counter()
        while usage.used > used_bytes:
            await asyncio.sleep(0.02)
            usage = await self._store.usage()
            if usage.objects >= first.objects:
                first, began = usage, time.perf_counter()
        return (first.objects - usage.objects) / (time.perf_counter() - began)
