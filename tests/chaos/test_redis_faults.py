"""Redis restarts, loses data, freezes, is full or slow: hits are unaffected, misses are proxied."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from distributor_node.services.demo.objects import MIB
from tests.chaos.figures import record_result
from tests.chaos.harness import ChaosHarness, mixed_objects
from tests.chaos.http import cache_all, get_all
from tests.chaos.invariants import wait_until_settled
from tests.chaos.latency import assert_latency_unaffected, measure_hits

OBJECTS = mixed_objects(100)
CACHED = [item for item in OBJECTS[:28] if item.size < 300_000]
BEFORE, DURING, AFTER = OBJECTS[28:44], OBJECTS[44:72], OBJECTS[72:88]
FaultInjector = Callable[[ChaosHarness], Awaitable[None] | AbstractAsyncContextManager[None]]


async def restarted(chaos: ChaosHarness) -> None:
    await asyncio.to_thread(chaos.redis.restart)


async def killed(chaos: ChaosHarness) -> None:
    """Its append-only file is up to a second old then."""
    await asyncio.to_thread(chaos.redis.kill)
    await asyncio.sleep(3)
    await asyncio.to_thread(chaos.redis.start)


async def emptied(chaos: ChaosHarness) -> None:
    assert await chaos.redis.command("FLUSHALL") == "+OK"


@asynccontextmanager
async def frozen(chaos: ChaosHarness) -> AsyncIterator[None]:
    chaos.redis.freeze()
    yield
    chaos.redis.thaw()


@asynccontextmanager
async def full(chaos: ChaosHarness) -> AsyncIterator[None]:
    assert await chaos.redis.command("CONFIG", "SET", "maxmemory-policy", "noeviction") == "+OK"
    assert await chaos.redis.command("CONFIG", "SET", "maxmemory", "1") == "+OK"
    yield
    assert await chaos.redis.command("CONFIG", "SET", "maxmemory", "0") == "+OK"


@asynccontextmanager
async def slow(chaos: ChaosHarness) -> AsyncIterator[None]:
    chaos.to_redis.delay = 2.0
    yield
    chaos.to_redis.heal()


@asynccontextmanager
async def black_hole(chaos: ChaosHarness) -> AsyncIterator[None]:
    chaos.to_redis.unresponsive = True
    yield
    chaos.to_redis.heal()


@asynccontextmanager
async def half_open(chaos: ChaosHarness) -> AsyncIterator[None]:
    chaos.to_redis.dropping_replies = True
    yield
    chaos.to_redis.heal()


async def run_scenario(chaos: ChaosHarness, name: str, fault: FaultInjector, seconds: float) -> None:
    """Hits all the time; misses before, during and after the fault; at the end the index is what the disk is."""
    await chaos.up(OBJECTS, 400 * MIB)
    await cache_all(chaos, CACHED)
    urls = [chaos.stack.url(item.object_id) for item in CACHED]
    async with measure_hits(urls, CACHED) as before:
        await asyncio.gather(get_all(chaos, BEFORE, 2), asyncio.sleep(5))
    async with measure_hits(urls, CACHED) as during:
        began = time.monotonic()
        broken = fault(chaos)
        if isinstance(broken, AbstractAsyncContextManager):
            async with broken:
                misses = await get_all(chaos, DURING, 4)
                await asyncio.sleep(max(0.0, seconds - (time.monotonic() - began)))
            proxied = sum(answer.headers["x-data-source"] == "external" for answer in misses)
            assert proxied >= len(misses) * 0.8, "misses are proxied while it lasts"
            recovery = await chaos.until_reconciled()
        else:
            await broken
            recovery = await chaos.until_reconciled()
            proxied = 0
            misses = await get_all(chaos, DURING, 4)
            await asyncio.sleep(seconds)
    async with measure_hits(urls, CACHED) as after:
        await asyncio.gather(get_all(chaos, AFTER, 2), asyncio.sleep(5))
    ratio = assert_latency_unaffected([before, after], during)
    fetched_again = await cache_all(chaos, [*DURING, *AFTER])
    rest = await wait_until_settled(chaos, OBJECTS)
    record_result(
        f"redis_{name}", hits=len(during.samples), hit_p99=during.p99, p99_ratio=ratio, misses=len(misses),
        proxied=proxied, failed=0, index_back_after=recovery, all_cached_after=fetched_again, at_rest_after=rest,
    )  # fmt: skip


@pytest.mark.timeout(180)
@pytest.mark.alone
async def test_redis_is_emptied(chaos: ChaosHarness) -> None:
    await run_scenario(chaos, "flushall", emptied, 3)


@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", [restarted, killed])
async def test_redis_restarts(chaos: ChaosHarness, fault: FaultInjector) -> None:
    await run_scenario(chaos, fault.__name__, fault, 5)


@pytest.mark.chaos
@pytest.mark.timeout(300)
async def test_redis_is_frozen_for_30_seconds(chaos: ChaosHarness) -> None:
    await run_scenario(chaos, "frozen_30s", frozen, 30)


@pytest.mark.chaos
@pytest.mark.timeout(300)
async def test_redis_is_out_of_memory(chaos: ChaosHarness) -> None:
    await run_scenario(chaos, "out_of_memory", full, 10)


@pytest.mark.chaos
@pytest.mark.timeout(300)
async def test_replies_of_redis_take_two_seconds(chaos: ChaosHarness) -> None:
    await run_scenario(chaos, "delayed_2s", slow, 10)


@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", [black_hole, half_open])
async def test_the_connection_to_redis_goes_dead(chaos: ChaosHarness, fault: FaultInjector) -> None:
    await run_scenario(chaos, fault.__name__, fault, 10)
