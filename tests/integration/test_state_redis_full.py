"""A Redis whose memory is full: what holds and frees things works, and it recovers by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from distributor_node.shared.adapters.state_common import StateTimeouts, write_description
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.adapters.state_redis.caches import RedisSharedCatalogCache
from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.objects import (
    ContentHash,
    DistributionBucket,
    MediaObject,
    ObjectId,
)
from distributor_node.shared.domain.space import AdmissionQuestion
from distributor_node.shared.ports.catalog import NewAnswer
from distributor_node.shared.ports.state_store import Access, Granted, Lease, Term
from tests.servers.redis_server import RedisServer

LIMIT = 1_000_000
ANSWERS = 60_000
MAX_MEMORY = 24 * 1024 * 1024
ONE, TWO, THREE = ObjectId("1"), ObjectId("2"), ObjectId("3")


@pytest.fixture
def small_redis(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A server of 24 MiB (or `request.param` bytes) that evicts nothing."""
    size = getattr(request, "param", MAX_MEMORY)
    server = RedisServer(
        tmp_path, "--maxmemory", str(size), "--maxmemory-policy", "noeviction", "--appendonly", "no"
    )
    yield server.start()
    server.stop()


@pytest.fixture
async def store(small_redis: RedisServer) -> AsyncIterator[RedisStateStore]:
    store = RedisStateStore(small_redis.url, "node:", LIMIT, StateTimeouts(operation_timeout=5.0))
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def client(small_redis: RedisServer) -> AsyncIterator[Redis]:
    client = Redis.from_url(small_redis.url, protocol=2)
    yield client
    await client.aclose()


@pytest.fixture
async def cache(small_redis: RedisServer) -> AsyncIterator[RedisSharedCatalogCache]:
    cache = RedisSharedCatalogCache(small_redis.url, "node:", 5.0, "squid")
    await cache.open()
    yield cache
    await cache.close()


def answer_of(number: int) -> MediaObject:
    """As the catalog of the network describes an object: some 800 bytes in Redis."""
    return MediaObject(
        ObjectId(str(number)),
        10_000 + number,
        content_hash=ContentHash("blake3", bytes(32)),
        media_type="video/mp4",
        buckets=tuple(DistributionBucket(f"0:{bucket}", frozenset({bucket})) for bucket in range(3)),
        sources=tuple(
            f"https://storage-{node}.example.org/storage/api/v1/files/{number}" for node in range(5)
        ),
    )


async def memory_share(client: Redis) -> float:
    info = await client.info("memory")
    return int(info["used_memory"]) / int(info["maxmemory"])


async def has_work(store: RedisStateStore) -> tuple[Term, Lease]:
    """One object is stored, another one is being fetched."""
    term = await store.lead("evictor-1", 0.5)
    assert term is not None
    await store.set_reconciled(term)
    stored = await store.begin(ONE, 100, "worker-1")
    assert isinstance(stored, Granted)
    assert await store.commit(stored.lease, time.time() - 100)
    running = await store.begin(TWO, 100, "worker-1")
    assert isinstance(running, Granted)
    return term, running.lease


async def everything_works(store: RedisStateStore, lease: Lease) -> None:
    """A renewal, a change of leader, an eviction, a claim and what follows it."""
    assert await store.renew(lease)
    term = None
    while term is None:
        term = await store.lead("evictor-2", 600)
        await asyncio.sleep(0.05)
    assert await store.begin_eviction(term, ONE, 0.0)
    assert await store.finish_eviction(term, ONE) > 0
    assert (await store.claim(THREE, "api-1")).won
    await store.mark_queued(THREE, "api-1")
    granted = await store.begin(THREE, 100, "worker-1")
    assert isinstance(granted, Granted)
    assert await store.commit(granted.lease, time.time())
    assert await store.commit(lease, time.time())
    assert (await store.usage()).reserved == 0


async def test_first_views_make_room_and_every_object_is_admitted(
    store: RedisStateStore, client: Redis
) -> None:
    await has_work(store)
    question = AdmissionQuestion(2000, 1000, low_watermark=0)
    assert not (await store.claim(THREE, "api-1", question)).admitted
    assert await client.zcard("node:first_views") == 1
    number = 0
    while await memory_share(client) < 0.92:
        await client.set(f"something else {number}", bytes(100_000))
        number += 1
    assert 0.9 < await memory_share(client) < 1
    for object_id in (THREE, ObjectId("4")):
        assert (await store.claim(object_id, "api-1", question)).won
    assert not await client.exists("node:first_views")


async def test_catalog_answers_leave_room_for_the_index(
    store: RedisStateStore, cache: RedisSharedCatalogCache, client: Redis
) -> None:
    _, lease = await has_work(store)
    pipeline_width = 500
    for start in range(10, ANSWERS, pipeline_width):
        batch = range(start, min(ANSWERS, start + pipeline_width))
        answers = [NewAnswer(ObjectId(str(one)), answer_of(one), 3600, 7 * 24 * 3600) for one in batch]
        await asyncio.gather(*(cache.put(answers[at : at + 50]) for at in range(0, len(answers), 50)))
    assert await memory_share(client) < 0.95
    await everything_works(store, lease)
    assert await client.zcard("node:catalog:answers") > 1000


async def fill(client: Redis) -> None:
    """Catalog answers as version 0.1 wrote them: in no index, for seven days. Until the server refuses more."""
    for start in range(10, ANSWERS, 500):
        try:
            async with client.pipeline(transaction=False) as pipeline:
                for number in range(start, start + 500):
                    packed = b"%d " % (time.time() * 1000) + write_description(answer_of(number))
                    pipeline.set(f"node:catalog:squid:answer:{number}", packed, px=7 * 24 * 3600 * 1000)
                await pipeline.execute()
        except OutOfMemoryError:
            return
    raise AssertionError("the server is not full")


async def test_a_full_server_serves_what_holds_and_frees_and_recovers_by_itself(
    store: RedisStateStore, client: Redis
) -> None:
    _, lease = await has_work(store)
    await fill(client)
    with pytest.raises(StateStoreUnavailable):
        await store.record_accesses([Access(ONE, 1, 1.0)])
    assert any("of its maxmemory" in problem for problem in await store.problems())
    assert any("writes are refused" in problem for problem in await store.problems())
    await everything_works(store, lease)
    for _ in range(100):
        if await memory_share(client) < 0.9:
            break
        await store.lead("evictor-2", 600)  # as every second or so
    assert not await store.problems()
    await store.record_accesses([Access(ONE, 1, 1.0)])


async def test_answers_that_expire_first_are_dropped_first(small_redis: RedisServer) -> None:
    cache = RedisSharedCatalogCache(small_redis.url, "node:", 5.0, "squid", max_answers=10)
    await cache.open()
    for number in range(20):
        keep = 1000 if number < 5 else 100 + number
        await cache.put([NewAnswer(ObjectId(str(number)), answer_of(number), 10, keep)])
    kept = [number for number in range(20) if await cache.get(ObjectId(str(number))) is not None]
    assert kept == [*range(5), *range(15, 20)]
    await cache.close()


async def test_the_access_log_is_bounded_in_bytes(store: RedisStateStore, client: Redis) -> None:
    batch = [Access(ObjectId(f"{number:0100}"), 1, 1.0) for number in range(2000)]
    for _ in range(120):
        await store.record_accesses(batch)
    assert (await client.memory_usage("node:accesses") or 0) < 17 * 1024 * 1024
    assert await client.xlen("node:accesses") >= 30


@pytest.mark.parametrize("first", ["claim", "renew", "evict", "lead"])
async def test_each_call_works_by_itself_on_a_full_server(
    store: RedisStateStore, client: Redis, first: str
) -> None:
    """It does not depend on the room that another call has made."""
    term, lease = await has_work(store)
    await store.resign(term)
    new_term = None if first == "lead" else await store.lead("evictor-2", 600)
    await fill(client)
    match first:
        case "claim":
            assert (await store.claim(THREE, "api-1")).won
        case "renew":
            assert await store.renew(lease)
        case "lead":
            assert await store.lead("evictor-2", 600) is not None
        case _:
            assert new_term is not None
            assert await store.begin_eviction(new_term, ONE, 0.0)
            assert await store.finish_eviction(new_term, ONE) > 0


@pytest.mark.parametrize("call", ["claim", "begin", "lead"])
async def test_each_of_these_calls_frees_room_first(store: RedisStateStore, client: Redis, call: str) -> None:
    """So that a full server recovers although nothing else is called: no evictor leads, no worker lives."""
    await has_work(store)
    await fill(client)
    for number in range(100):
        if await memory_share(client) < 0.9:
            break
        match call:
            case "claim":
                await store.claim(ObjectId(f"claimed-{number}"), "api-1")
            case "begin":
                await store.begin(ObjectId(f"begun-{number}"), LIMIT // 2, "worker-2")
            case _:
                await store.lead("evictor-2", 600)
    assert await memory_share(client) < 0.9
    await store.record_accesses([Access(ONE, 1, 1.0)])
