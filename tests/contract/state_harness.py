"""A state store under test, of either adapter, and a way to advance its clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from redis import asyncio as aioredis

from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import Usage
from distributor_node.shared.ports.state_store import FetchPhase, Granted, Lease, StateStore, Term

LIMIT = 1_000_000
ONE, TWO, THREE = ObjectId("1"), ObjectId("2"), ObjectId("3")
LONG = StateTimeouts(operation_timeout=20.0)
BRIEF = StateTimeouts(
    claim_seconds=1.0, queued_seconds=1.0, lost_job_seconds=4.0, lease_seconds=1.0, operation_timeout=20.0
)


class FakeClock:
    """POSIX time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@dataclass
class Harness:
    """A state store to test."""

    store: StateStore
    other: StateStore  # the same state, as another process sees it
    advance_clock: Callable[[float], Awaitable[None]]
    dump: Callable[[], Awaitable[object]]
    times: StateTimeouts
    lose: Callable[[str], Awaitable[None]]  # drops one part: "usage", "objects" or "fetches"
    term: Term = field(default_factory=lambda: Term("", 0))

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        """Let time pass until the condition holds, at most 30 seconds of the store's clock."""
        for _ in range(600):
            if await condition():
                return
            await self.advance_clock(0.05)
        raise AssertionError(f"not within 30 s: {condition.__qualname__}")

    async def phase(self, object_id: ObjectId) -> FetchPhase | None:
        fetch = (await self.store.find(object_id)).fetch
        return fetch.phase if fetch else None

    async def until_phase(self, object_id: ObjectId, phase: FetchPhase | None) -> None:
        async def there() -> bool:
            return await self.phase(object_id) is phase

        await self.until(there)

    async def reconciled(self) -> Term:
        """As after an evictor's first pass over an empty volume."""
        term = await self.store.lead("evictor-1", 600)
        assert term is not None
        await self.store.set_reconciled(term)
        self.term = term
        return term

    async def begin_fetch(self, object_id: ObjectId, size: int, worker: str = "worker-1") -> Lease:
        granted = await self.store.begin(object_id, size, worker)
        assert isinstance(granted, Granted)
        return granted.lease

    async def stored(self, object_id: ObjectId, size: int) -> None:
        assert await self.store.commit(await self.begin_fetch(object_id, size), time.time())

    async def used_and_reserved(self) -> tuple[int, int]:
        """Bytes used and reserved."""
        usage: Usage = await self.store.usage()
        return usage.used, usage.reserved

    async def generation(self, object_id: ObjectId) -> int:
        return (await self.entry_generations())[object_id]

    async def entry_generations(self) -> dict[ObjectId, int]:
        return {entry.object_id: entry.generation async for batch in self.store.entries() for entry in batch}


@asynccontextmanager
async def memory_harness(times: StateTimeouts, limit: int = LIMIT) -> AsyncIterator[Harness]:
    clock = FakeClock()
    store = MemoryStateStore(limit, times, clock)

    async def advance_clock(seconds: float) -> None:
        clock.now += seconds
        await asyncio.sleep(0)

    async def dump() -> object:
        return repr(store.tables)

    async def lose(part: str) -> None:
        tables = store.tables
        if part == "usage":
            tables.used, tables.reserved, tables.churn, tables.reconciled = 0, 0, 0, False
        else:
            (tables.objects if part == "objects" else tables.rows).clear()

    await store.open()
    yield Harness(store, store, advance_clock, dump, times, lose)
    await store.close()


@asynccontextmanager
async def redis_harness(
    url: str, prefix: str, times: StateTimeouts, limit: int = LIMIT
) -> AsyncIterator[Harness]:
    stores = [RedisStateStore(url, prefix, limit, times) for _ in range(2)]
    client = aioredis.Redis.from_url(url, protocol=2)

    async def dump() -> object:
        keys = sorted([key async for key in client.scan_iter(f"{prefix}*")])
        return {key: await client.dump(key) for key in keys}

    async def lose(part: str) -> None:
        await client.delete(f"{prefix}{part}")

    for store in stores:
        await store.open()
    try:
        yield Harness(stores[0], stores[1], asyncio.sleep, dump, times, lose)
    finally:
        for store in stores:
            await store.close()
        await client.aclose()
