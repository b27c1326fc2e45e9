"""Look-ups at a real squid: many objects in one query, in one process and in two that share Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace

import pytest

from distributor_node.services.demo.objects import bytes_object
from distributor_node.services.demo.squid import SquidFaults, TestSquid
from distributor_node.shared.adapters.catalogs.cached import CachedCatalog, CacheLimits
from distributor_node.shared.adapters.catalogs.joystream import JoystreamCatalog, SquidLimits
from distributor_node.shared.adapters.state_redis.caches import RedisSharedCatalogCache
from distributor_node.shared.domain.errors import CatalogUnavailable
from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.waiting import wait_event

COUNT = 600
RATE = 20.0  # queries a second, of all processes together
LIMITS = CacheLimits(
    positive_ttl=3600, negative_ttl=5, max_in_flight=16, wait=1.4, query_timeout=5, max_rate=RATE
)
UNKNOWN = ObjectId("1000000")


def ids(start: int, count: int) -> list[ObjectId]:
    return [ObjectId(str(number)) for number in range(start, start + count)]


@pytest.fixture
async def squid() -> AsyncIterator[TestSquid]:
    objects = [bytes_object(object_id, b"a") for object_id in ids(1, COUNT)]
    async with TestSquid(objects, ["https://one.example/"]).run() as squid:
        yield squid


@asynccontextmanager
async def processes(
    squid: TestSquid, count: int = 1, redis: tuple[str, str] | None = None, limits: CacheLimits = LIMITS
) -> AsyncIterator[Sequence[CachedCatalog]]:
    """As many API processes have: each with its share of the rate. `redis`: URL and prefix."""
    limits = replace(limits, max_rate=limits.max_rate / count)
    async with AsyncExitStack() as stack:
        catalogs = []
        for _ in range(count):
            inner = JoystreamCatalog(squid.url, SquidLimits(timeout=5.0), refuse_private=True)
            shared = None if redis is None else RedisSharedCatalogCache(*redis, 0.5, "squid")
            catalog = CachedCatalog(inner, limits, shared_cache=shared)
            await catalog.open()
            stack.push_async_callback(catalog.close)
            catalogs.append(catalog)
        yield catalogs


def queries(squid: TestSquid) -> int:
    return len(squid.requests)


async def test_one_query_answers_for_many_objects(squid: TestSquid) -> None:
    async with processes(squid) as (catalog,):
        wanted = [*ids(1, 3), UNKNOWN]
        alone = [await catalog.look_up(object_id) for object_id in wanted]
    squid.requests.clear()
    async with processes(squid) as (catalog,):
        assert await asyncio.gather(*(catalog.look_up(object_id) for object_id in wanted)) == alone
    assert [record.operation for record in squid.requests] == ["DataObjects"]


async def test_an_object_that_the_squid_cannot_describe_costs_no_other_its_answer(squid: TestSquid) -> None:
    squid.faults = SquidFaults(poison=("7",))
    async with processes(squid) as (catalog,):
        outcomes = await asyncio.gather(
            *(catalog.look_up(object_id) for object_id in ids(1, 50)), return_exceptions=True
        )
    failed = [object_id for object_id, outcome in zip(ids(1, 50), outcomes, strict=True)
              if not isinstance(outcome, MediaObject)]  # fmt: skip
    assert failed == ["7"]
    assert queries(squid) <= 16


async def test_a_squid_that_fails_every_query_is_not_asked_for_each_object(squid: TestSquid) -> None:
    squid.faults = SquidFaults(errors=True)
    async with processes(squid) as (catalog,):
        outcomes = await asyncio.gather(
            *(catalog.look_up(object_id) for object_id in ids(1, 50)), return_exceptions=True
        )
    assert all(isinstance(outcome, CatalogUnavailable) for outcome in outcomes)
    assert queries(squid) <= 6


async def test_too_large_a_response_is_divided(squid: TestSquid) -> None:
    squid.faults = SquidFaults(huge=14 * 256 * 1024, operations=("DataObjects",))
    inner = JoystreamCatalog(squid.url, SquidLimits(timeout=5.0), refuse_private=True)
    await inner.open()
    # A response for 16 objects may have 4 MiB, one for 8 less than the padding alone.
    assert len(await inner.look_up_batch(ids(1, 16))) == 16
    squid.requests.clear()
    squid.faults = SquidFaults(huge=17 * 1024 * 1024, operations=("DataObjects",), spare=0)
    with pytest.raises(CatalogUnavailable, match="larger than"):
        await inner.look_up_batch(ids(1, 16))
    assert queries(squid) == 3
    await inner.close()


async def test_a_squid_without_batches_is_asked_for_one_object_at_a_time(squid: TestSquid) -> None:
    squid.faults = SquidFaults(schema="without_batches")
    async with processes(squid) as (catalog,):
        found = await asyncio.gather(*(catalog.look_up(object_id) for object_id in [*ids(1, 5), UNKNOWN]))
        assert [item.object_id if item else None for item in found] == [*ids(1, 5), None]
        squid.requests.clear()
        await asyncio.gather(*(catalog.look_up(object_id) for object_id in ids(11, 5)))
    assert {record.operation for record in squid.requests} == {"DataObject"}


async def test_another_object_in_the_response_is_an_error(squid: TestSquid) -> None:
    inner = JoystreamCatalog(squid.url, SquidLimits(timeout=5.0), refuse_private=True)
    await inner.open()
    squid.faults = SquidFaults(errors_beside_data=True)
    with pytest.raises(CatalogUnavailable):
        await inner.look_up_batch(ids(1, 3))
    await inner.close()


async def test_a_cold_page_of_a_hundred_objects_is_five_queries_at_most(squid: TestSquid) -> None:
    squid.faults = SquidFaults(latency=0.6)
    async with processes(squid) as (catalog,):
        found = await asyncio.gather(*(catalog.look_up(object_id, "a") for object_id in ids(1, 100)))
    assert [item.object_id for item in found if item] == ids(1, 100)
    assert queries(squid) <= 5


async def test_what_the_squid_has_answered_is_used(squid: TestSquid) -> None:
    squid.faults = SquidFaults(latency=0.3)
    async with processes(squid) as (catalog,):

        async def client(number: int) -> int:
            served = 0
            for object_id in ids(1, COUNT)[number::40] + ids(1, COUNT)[number::60]:
                try:
                    served += await catalog.look_up(object_id, f"client {number}") is not None
                except CatalogUnavailable:
                    await asyncio.sleep(0.1)
            return served

        served = sum(await asyncio.gather(*(client(number) for number in range(40))))
        asked = [object_id for record in squid.requests for object_id in record.object_ids]
        used = sum(1 for object_id in set(asked) if object_id in catalog._entries)
    assert served > 0
    # No object is asked for twice, and each answer is kept.
    assert used >= 0.95 * len(asked)
    assert all(record.finished_at is not None for record in squid.requests)


@pytest.mark.servers
async def test_a_flood_of_unknown_ids_keeps_no_one_out(
    squid: TestSquid, redis_url: str, redis_prefix: str
) -> None:
    squid.faults = SquidFaults(latency=0.3)
    over = asyncio.Event()
    async with processes(squid, 2, (redis_url, redis_prefix)) as catalogs:

        async def stranger(number: int) -> None:
            asked = 0
            while not over.is_set():
                asked += 1
                with suppress(CatalogUnavailable):
                    await catalogs[number % 2].look_up(ObjectId(f"9{number:03}{asked:06}"), "stranger")
                await wait_event(over, 0.5)

        started = time.monotonic()
        strangers = [asyncio.create_task(stranger(number)) for number in range(200)]
        await squid.requests.wait_for(lambda requests: len(requests) >= 4)
        found: list[MediaObject | None] = []
        for object_id in ids(1, 8):
            found.append(await catalogs[len(found) % 2].look_up(object_id, "viewer"))
        over.set()
        await asyncio.gather(*strangers)
        took = time.monotonic() - started
    assert [item.object_id for item in found if item] == ids(1, 8)
    assert queries(squid) <= RATE * (took + 1)
    assert max(map(len, (record.object_ids for record in squid.requests))) > 10


@pytest.mark.servers
async def test_an_object_known_after_a_404_is_known_to_all_processes(
    squid: TestSquid, redis_url: str, redis_prefix: str
) -> None:
    limits = replace(LIMITS, negative_ttl=0.2, unaccepted_ttl=0.2)
    squid.faults = SquidFaults(missing_objects=("1",))
    async with processes(squid, 2, (redis_url, redis_prefix), limits) as catalogs:
        assert [await catalog.look_up(ObjectId("1"), "a") for catalog in catalogs] == [None, None]
        squid.faults = SquidFaults()
        for catalog in catalogs:
            async with asyncio.timeout(5):
                while await catalog.look_up(ObjectId("1"), "a") is None:  # noqa: ASYNC110 — as a client polls
                    await asyncio.sleep(0.05)
