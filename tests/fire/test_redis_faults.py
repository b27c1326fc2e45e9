"""Redis restarts, forgets, stands still, is full, is slow: hits do not notice, misses are proxied."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from services.demo.objects import MIB
from tests.fire.asking import ask_all, cache_all
from tests.fire.figures import note
from tests.fire.inspection import settled
from tests.fire.latency import asking_hits, kept_their_latency
from tests.fire.world import FireWorld, mixed_objects

OBJECTS = mixed_objects(100)
CACHED = [item for item in OBJECTS[:28] if item.size < 300_000]
BEFORE, DURING, AFTER = OBJECTS[28:44], OBJECTS[44:72], OBJECTS[72:88]
Fault = Callable[[FireWorld], Awaitable[None] | AbstractAsyncContextManager[None]]


async def restarted(fire: FireWorld) -> None:
    await asyncio.to_thread(fire.redis.restart)


async def killed(fire: FireWorld) -> None:
    """Its append-only file is up to a second old then."""
    await asyncio.to_thread(fire.redis.kill)
    await asyncio.sleep(3)
    await asyncio.to_thread(fire.redis.start)


async def emptied(fire: FireWorld) -> None:
    assert await fire.redis.command("FLUSHALL") == "+OK"


@asynccontextmanager
async def frozen(fire: FireWorld) -> AsyncIterator[None]:
    fire.redis.freeze()
    yield
    fire.redis.thaw()


@asynccontextmanager
async def full(fire: FireWorld) -> AsyncIterator[None]:
    assert await fire.redis.command("CONFIG", "SET", "maxmemory-policy", "noeviction") == "+OK"
    assert await fire.redis.command("CONFIG", "SET", "maxmemory", "1") == "+OK"
    yield
    assert await fire.redis.command("CONFIG", "SET", "maxmemory", "0") == "+OK"


@asynccontextmanager
async def slow(fire: FireWorld) -> AsyncIterator[None]:
    fire.to_redis.delay = 2.0
    yield
    fire.to_redis.heal()


@asynccontextmanager
async def a_black_hole(fire: FireWorld) -> AsyncIterator[None]:
    fire.to_redis.deaf = True
    yield
    fire.to_redis.heal()


@asynccontextmanager
async def half_open(fire: FireWorld) -> AsyncIterator[None]:
    fire.to_redis.losing_replies = True
    yield
    fire.to_redis.heal()


async def through(fire: FireWorld, name: str, fault: Fault, seconds: float) -> None:
    """Hits all the time; misses before, during and after the fault; at the end the index is what the disk is."""
    await fire.up(OBJECTS, 400 * MIB)
    await cache_all(fire, CACHED)
    urls = [fire.stack.url(item.object_id) for item in CACHED]
    async with asking_hits(urls, CACHED) as before:
        await asyncio.gather(ask_all(fire, BEFORE, 2), asyncio.sleep(5))
    async with asking_hits(urls, CACHED) as during:
        began = time.monotonic()
        broken = fault(fire)
        if isinstance(broken, AbstractAsyncContextManager):
            async with broken:
                misses = await ask_all(fire, DURING, 4)
                await asyncio.sleep(max(0.0, seconds - (time.monotonic() - began)))
            proxied = sum(answer.headers["x-data-source"] == "external" for answer in misses)
            assert proxied >= len(misses) * 0.8, "misses are proxied while it lasts"
            recovery = await fire.until_reconciled()
        else:
            await broken
            recovery = await fire.until_reconciled()
            proxied = 0
            misses = await ask_all(fire, DURING, 4)
            await asyncio.sleep(seconds)
    async with asking_hits(urls, CACHED) as after:
        await asyncio.gather(ask_all(fire, AFTER, 2), asyncio.sleep(5))
    ratio = kept_their_latency([before, after], during)
    fetched_again = await cache_all(fire, [*DURING, *AFTER])
    rest = await settled(fire, OBJECTS)
    note(
        f"redis_{name}", hits=len(during.samples), hit_p99=during.p99, p99_ratio=ratio, misses=len(misses),
        proxied=proxied, failed=0, index_back_after=recovery, all_cached_after=fetched_again, at_rest_after=rest,
    )  # fmt: skip


@pytest.mark.timeout(180)
@pytest.mark.alone
async def test_redis_is_emptied(fire: FireWorld) -> None:
    await through(fire, "flushall", emptied, 3)


@pytest.mark.fire
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", [restarted, killed])
async def test_redis_restarts(fire: FireWorld, fault: Fault) -> None:
    await through(fire, fault.__name__, fault, 5)


@pytest.mark.fire
@pytest.mark.timeout(300)
async def test_redis_stands_still_for_30_seconds(fire: FireWorld) -> None:
    await through(fire, "frozen_30s", frozen, 30)


@pytest.mark.fire
@pytest.mark.timeout(300)
async def test_redis_is_out_of_memory(fire: FireWorld) -> None:
    await through(fire, "out_of_memory", full, 10)


@pytest.mark.fire
@pytest.mark.timeout(300)
async def test_replies_of_redis_take_two_seconds(fire: FireWorld) -> None:
    await through(fire, "delayed_2s", slow, 10)


@pytest.mark.fire
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", [a_black_hole, half_open])
async def test_the_line_to_redis_goes_dead(fire: FireWorld, fault: Fault) -> None:
    await through(fire, fault.__name__, fault, 10)
