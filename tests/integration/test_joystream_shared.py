"""Several processes of one node in front of one squid. Each catalog here stands for one process; they share a
Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from distributor_node.services.demo.objects import bytes_object
from distributor_node.services.demo.squid import SquidFaults, TestSquid
from distributor_node.shared.adapters.catalogs.cached import CachedCatalog, CacheLimits
from distributor_node.shared.adapters.catalogs.joystream import JoystreamCatalog, SquidLimits
from distributor_node.shared.adapters.state_redis.caches import RedisSharedCatalogCache
from distributor_node.shared.domain.errors import CatalogUnavailable
from distributor_node.shared.domain.objects import Assignment, ObjectId
from tests.servers.redis_server import RedisServer
from tests.waiting import eventually

ONE, UNKNOWN = ObjectId("1"), ObjectId("404")
LIMITS = CacheLimits(positive_ttl=60, negative_ttl=60, max_in_flight=8, wait=20.0, outage_pause=0.2)
HURRIED = replace(LIMITS, wait=2.0)
"""For questions that will not be answered."""
REDIS_TIMEOUT = 10.0

pytestmark = pytest.mark.servers


@pytest.fixture
async def squid() -> AsyncIterator[TestSquid]:
    async with TestSquid([bytes_object("1", b"a")], ["https://one.example/"]).run() as squid:
        yield squid


@asynccontextmanager
async def processes(
    squid: TestSquid,
    redis_url: str,
    prefix: str,
    count: int = 3,
    limits: CacheLimits = LIMITS,
    clock: Callable[[], float] = time.monotonic,
    redis_timeout: float = REDIS_TIMEOUT,
    assignment: Assignment | None = None,
) -> AsyncIterator[Sequence[CachedCatalog]]:
    async with AsyncExitStack() as stack:
        catalogs = []
        for _ in range(count):
            inner = JoystreamCatalog(squid.url, SquidLimits(timeout=limits.wait), refuse_private=True)
            memory = RedisSharedCatalogCache(redis_url, prefix, redis_timeout, "squid")
            catalog = CachedCatalog(inner, limits, clock, memory, assignment)
            await catalog.open()
            stack.push_async_callback(catalog.close)
            catalogs.append(catalog)
        yield catalogs


async def test_a_thousand_lookups_of_all_processes_are_one_call(
    squid: TestSquid, redis_url: str, redis_prefix: str
) -> None:
    squid.faults = SquidFaults(latency=0.3)
    async with processes(squid, redis_url, redis_prefix) as catalogs:
        asked = [catalogs[number % 3].look_up(ONE) for number in range(500)]
        asked += [catalogs[number % 3].look_up(UNKNOWN) for number in range(500)]
        found = await asyncio.gather(*asked)
        assert {item.size if item else None for item in found[:500]} == {1}
        assert set(found[500:]) == {None}
        assert [squid.requests.count_for(object_id) for object_id in (ONE, UNKNOWN)] == [1, 1]


async def test_a_new_process_knows_what_the_others_learned(
    squid: TestSquid, redis_url: str, redis_prefix: str
) -> None:
    async with processes(squid, redis_url, redis_prefix) as catalogs:
        known = [await catalogs[0].look_up(ONE), await catalogs[0].look_up(UNKNOWN)]
    async with processes(squid, redis_url, redis_prefix) as catalogs:
        assert [await catalogs[1].look_up(ONE), await catalogs[1].look_up(UNKNOWN)] == known
    assert len(squid.requests) == 2


@pytest.mark.parametrize(
    "fault", [SquidFaults(hang=True), SquidFaults(errors=True), None], ids=["hang", "errors", "down"]
)
async def test_a_process_started_in_an_outage_serves_cached_answers(
    squid: TestSquid, redis_url: str, redis_prefix: str, fault: SquidFaults | None
) -> None:
    brief = CacheLimits(positive_ttl=0.05, negative_ttl=0.05, max_in_flight=8, wait=20.0)
    async with processes(squid, redis_url, redis_prefix, limits=brief) as catalogs:
        known = await catalogs[0].look_up(ONE)
        assert known is not None
        assert await catalogs[0].look_up(UNKNOWN) is None
    await asyncio.sleep(0.1)  # the shared answers are stale now, on the clock of Redis
    if fault is None:
        await squid.start_outage()
    else:
        squid.faults = fault
    brief = replace(brief, wait=0.5, outage_pause=60)
    async with processes(squid, redis_url, redis_prefix, limits=brief) as catalogs:
        assert await catalogs[0].look_up(ONE) == known
        assert await catalogs[0].look_up(UNKNOWN) is None
        asked = len(squid.requests)
        assert await catalogs[0].look_up(ONE) == known
        assert len(squid.requests) == asked, "the outage is known"
        with pytest.raises(CatalogUnavailable):
            await catalogs[1].look_up(ObjectId("405"))


async def test_a_waiting_process_takes_over_a_failed_lookup(
    squid: TestSquid, redis_url: str, redis_prefix: str
) -> None:
    squid.faults = SquidFaults(hang=True)
    async with processes(squid, redis_url, redis_prefix, count=1) as second:
        async with processes(squid, redis_url, redis_prefix, count=1) as first:
            leader = asyncio.create_task(first[0].look_up(ONE))
            await squid.requests.wait_for(lambda requests: requests.in_flight == 1)
            follower = asyncio.create_task(second[0].look_up(ONE))
            await asyncio.sleep(0.1)
            assert len(squid.requests) == 1
            squid.faults = SquidFaults()
        with pytest.raises(CatalogUnavailable):
            await leader
        assert await follower is not None
        assert len(squid.requests) == 2


async def test_unknown_ids_at_a_hanging_squid_are_requested_once_by_all_processes(
    squid: TestSquid, redis_url: str, redis_prefix: str
) -> None:
    squid.faults = SquidFaults(hang=True)
    ids = [ObjectId(str(1000 + number)) for number in range(70)]
    async with processes(squid, redis_url, redis_prefix) as catalogs:
        asking = asyncio.gather(
            *(catalog.look_up(object_id) for object_id in ids for catalog in catalogs), return_exceptions=True
        )
        # All of them ask at the same time: every object is in a query of one of them.
        await squid.requests.wait_for(lambda requests: all(map(requests.count_for, ids)))
        await asyncio.sleep(0.5)
        assert max(squid.requests.count_for(object_id) for object_id in ids) == 1
        assert squid.requests.max_in_flight <= len(catalogs) * LIMITS.max_in_flight
    assert all(isinstance(outcome, CatalogUnavailable) for outcome in await asking)


async def test_unknown_ids_at_a_hanging_squid_wait_side_by_side(
    squid: TestSquid, redis_url: str, redis_prefix: str
) -> None:
    squid.faults = SquidFaults(hang=True)
    ids = [ObjectId(str(1000 + number)) for number in range(70)]
    one_after_another = len(ids) / HURRIED.max_in_flight * HURRIED.wait
    async with processes(squid, redis_url, redis_prefix, limits=HURRIED) as catalogs:
        started = time.monotonic()
        outcomes = await asyncio.gather(
            *(catalog.look_up(object_id, "a") for object_id in ids for catalog in catalogs),
            return_exceptions=True,
        )
        assert time.monotonic() - started < one_after_another / 2
    assert all(isinstance(outcome, CatalogUnavailable) for outcome in outcomes)
    assert squid.requests.max_in_flight <= 3 * HURRIED.max_in_flight


async def test_without_redis_each_process_looks_up_by_itself(
    squid: TestSquid, own_redis: RedisServer, redis_prefix: str
) -> None:
    async with processes(squid, own_redis.url, redis_prefix, redis_timeout=0.5) as catalogs:
        own_redis.kill()
        found = await asyncio.gather(*(catalog.look_up(ONE) for catalog in catalogs for _ in range(10)))
        assert all(item is not None for item in found)
        assert len(squid.requests) == 3
    squid.faults = SquidFaults(hang=True)
    async with processes(squid, own_redis.url, redis_prefix, limits=HURRIED, redis_timeout=0.5) as catalogs:
        with pytest.raises(CatalogUnavailable):
            await catalogs[0].look_up(UNKNOWN, "a")


async def test_a_hanging_redis_costs_a_lookup_no_more_than_its_timeout(
    squid: TestSquid, own_redis: RedisServer, redis_prefix: str
) -> None:
    async with processes(squid, own_redis.url, redis_prefix, count=1, redis_timeout=0.5) as catalogs:
        own_redis.freeze()
        try:
            started = time.monotonic()
            assert await catalogs[0].look_up(ONE) is not None
            assert time.monotonic() - started < LIMITS.wait / 2
        finally:
            own_redis.thaw()


async def test_only_answers_that_are_used_again_are_kept_for_days(
    squid: TestSquid, redis_url: str, redis_prefix: str
) -> None:
    """One client may ask for half a million objects once, and for objects that other nodes serve."""
    limits = CacheLimits(positive_ttl=0.02, negative_ttl=0.02, max_in_flight=8, wait=2.0)
    client = Redis.from_url(redis_url)

    async def kept(name: str, least: float, most: float) -> None:
        """Answers are shared a moment after they were given."""

        async def hours() -> bool:
            left = await client.pttl(f"{name}catalog:squid:answer:1")
            return least < float(left) / 3_600_000 < most

        await eventually(hours)

    async with processes(squid, redis_url, redis_prefix, 1, limits) as [door]:
        await door.look_up(ONE)
        await kept(redis_prefix, 23, 25)
        await asyncio.sleep(0.03)  # the answer is no longer fresh
        await door.look_up(ONE)
        await kept(redis_prefix, 24 * 6, 24 * 8)
    others = Assignment(bucket_ids=frozenset({"9:9"}))
    async with processes(squid, redis_url, redis_prefix + "2:", 1, limits, assignment=others) as [door]:
        await door.look_up(ONE)
        await asyncio.sleep(0.03)
        await door.look_up(ONE)
        await kept(redis_prefix + "2:", 0, 1)
    await client.aclose()


async def test_look_ups_that_come_together_share_the_calls_of_redis(
    squid: TestSquid, redis_url: str, redis_prefix: str
) -> None:
    client = Redis.from_url(redis_url)

    async def scripts_run() -> int:
        counts = await client.info("commandstats")
        return sum(int(counts.get(f"cmdstat_{name}", {"calls": 0})["calls"]) for name in ("eval", "evalsha"))

    async with processes(squid, redis_url, redis_prefix, 1) as [catalog]:
        await catalog.look_up(ONE)
        before = await scripts_run()
        unknown = [ObjectId(str(10**9 + number)) for number in range(200)]
        assert set(await asyncio.gather(*map(catalog.look_up, unknown))) == {None}
    # Closed, it has shared all of them.
    assert await scripts_run() - before <= 20
    async with processes(squid, redis_url, redis_prefix, 1) as [catalog]:
        squid.requests.clear()
        assert set(await asyncio.gather(*map(catalog.look_up, unknown))) == {None}
        assert list(squid.requests) == []
    await client.aclose()


async def test_what_was_answered_a_moment_ago_can_be_forgotten(
    squid: TestSquid, redis_url: str, redis_prefix: str
) -> None:
    """Race: 1. a client is answered; 2. a source contradicts the answer; 3. the answer is shared."""
    async with processes(squid, redis_url, redis_prefix, 1) as [catalog]:
        answer = await catalog.look_up(ONE)
        assert answer is not None
        await catalog.forget(answer)
        assert await catalog.look_up(ONE) == answer
        assert squid.requests.count_for(ONE) == 2
