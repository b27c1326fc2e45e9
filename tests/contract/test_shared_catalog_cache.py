"""What the shared catalog cache promises to the processes of a node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from distributor_node.shared.adapters.state_redis.caches import RedisSharedCatalogCache
from distributor_node.shared.domain.conditionals import Validators
from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.objects import ContentHash, DistributionBucket, MediaObject, ObjectId
from distributor_node.shared.ports.catalog import CacheLookup, NewAnswer, SharedCatalogCache

ONE, TWO = ObjectId("1"), ObjectId("2")
FULL = MediaObject(
    ONE,
    2**53 + 1,
    content_hash=ContentHash("blake3", bytes(range(32))),
    media_type="text/vtt",
    buckets=(DistributionBucket("0:1", frozenset({3, 4})), DistributionBucket("0:2")),
    accepted=False,
    sources=("https://one.example/api/v1/files/1", "https://two.example/api/v1/files/1"),
    validators=Validators('"of-the-source"', 784111777),
)


@dataclass
class Harness:
    """Two instances with the same keys, as two processes have them."""

    cache: SharedCatalogCache
    other: SharedCatalogCache


@pytest.fixture
async def harness(redis_url: str, redis_prefix: str) -> AsyncIterator[Harness]:
    cache, other = (RedisSharedCatalogCache(redis_url, redis_prefix, 5.0, "squid") for _ in range(2))
    await cache.open()
    await other.open()
    yield Harness(cache, other)
    await cache.close()
    await other.close()


async def lock(cache: SharedCatalogCache, object_id: ObjectId, owner: str, seconds: float) -> CacheLookup:
    (lookup,) = await cache.get_or_lock([object_id], owner, seconds)
    return lookup


@pytest.mark.parametrize("answer", [FULL, MediaObject(ONE, None), None], ids=["full", "bare", "absent"])
async def test_a_cached_answer_is_returned_unchanged(harness: Harness, answer: MediaObject | None) -> None:
    assert await harness.cache.get(ONE) is None
    await harness.cache.put([NewAnswer(ONE, answer, 50, 100)])
    cached = await harness.other.get(ONE)
    assert cached is not None
    assert cached.answer == answer
    assert 0 < cached.fresh_for <= 50
    assert await harness.other.get(TWO) is None


async def test_one_caller_gets_the_lock(harness: Harness) -> None:
    assert await lock(harness.cache, ONE, "a", 50) == CacheLookup(None, owns_lock=True)
    assert await lock(harness.other, ONE, "b", 50) == CacheLookup(None, owns_lock=False)
    assert (await lock(harness.other, TWO, "b", 50)).owns_lock


async def test_a_fresh_answer_is_not_looked_up_again(harness: Harness) -> None:
    assert (await lock(harness.cache, ONE, "a", 50)).owns_lock
    await harness.cache.put([NewAnswer(ONE, FULL, 50, 100)])
    lookup = await lock(harness.other, ONE, "b", 50)
    assert not lookup.owns_lock
    assert lookup.cached is not None
    assert lookup.cached.answer == FULL


async def test_a_stale_answer_is_returned_and_looked_up_again(harness: Harness) -> None:
    assert (await lock(harness.cache, ONE, "a", 50)).owns_lock
    await harness.cache.put([NewAnswer(ONE, FULL, 0.05, 100)])
    await asyncio.sleep(0.1)
    lookup = await lock(harness.other, ONE, "b", 50)
    assert lookup.owns_lock
    assert lookup.cached is not None
    assert lookup.cached.answer == FULL
    assert lookup.cached.fresh_for <= 0


async def test_one_call_is_for_many_objects(harness: Harness) -> None:
    other = replace(FULL, object_id=TWO)
    absent, held, new = map(ObjectId, "345")
    answers = [NewAnswer(ONE, FULL, 50, 100), NewAnswer(TWO, other, 0, 100), NewAnswer(absent, None, 50, 100)]
    await harness.cache.put(answers)
    assert (await lock(harness.cache, held, "a", 50)).owns_lock
    found = await harness.other.get_or_lock([ONE, TWO, absent, held, new], "b", 50)
    assert [lookup.owns_lock for lookup in found] == [False, True, False, False, True]
    cached = [lookup.cached for lookup in found]
    assert [None if one is None else (one.answer, one.fresh_for > 0) for one in cached] == [
        (FULL, True),
        (other, False),
        (None, True),
        None,
        None,
    ]
    # What is put releases the lock of each.
    await harness.other.put([NewAnswer(TWO, other, 0, 100), NewAnswer(new, None, 0, 100)])
    await asyncio.sleep(0.05)
    assert all(lookup.owns_lock for lookup in await harness.cache.get_or_lock([TWO, new], "a", 50))


async def test_answers_expire(harness: Harness) -> None:
    await harness.cache.put([NewAnswer(ONE, FULL, 0.05, 0.05)])
    await asyncio.sleep(0.1)
    assert await harness.other.get(ONE) is None


async def test_the_lock_is_released_by_its_holder_only(harness: Harness) -> None:
    assert (await lock(harness.cache, ONE, "a", 50)).owns_lock
    await harness.other.unlock(ONE, "b")
    assert not (await lock(harness.other, ONE, "b", 50)).owns_lock
    await harness.cache.unlock(ONE, "a")
    assert (await lock(harness.other, ONE, "b", 50)).owns_lock


async def test_the_lock_expires(harness: Harness) -> None:
    assert (await lock(harness.cache, ONE, "a", 0.05)).owns_lock
    await asyncio.sleep(0.1)
    assert (await lock(harness.other, ONE, "b", 50)).owns_lock


async def test_different_catalogs_share_nothing(redis_url: str, redis_prefix: str) -> None:
    one, two = (RedisSharedCatalogCache(redis_url, redis_prefix, 5.0, name) for name in ("one", "two"))
    await one.open()
    await two.open()
    await one.put([NewAnswer(ONE, FULL, 50, 100)])
    assert await two.get(ONE) is None
    await one.close()
    await two.close()


async def test_an_unreachable_shared_cache_fails_in_time(redis_prefix: str) -> None:
    cache = RedisSharedCatalogCache("redis://127.0.0.1:1/0", redis_prefix, 0.5, "squid")
    await cache.open()
    async with asyncio.timeout(60):
        with pytest.raises(StateStoreUnavailable):
            await lock(cache, ONE, "a", 50)
    await cache.close()


async def test_an_outdated_answer_is_asked_for_again_and_kept_for_outages(harness: Harness) -> None:
    await harness.cache.put([NewAnswer(ONE, FULL, 50, 100)])
    await harness.other.expire(FULL)
    lookup = await lock(harness.cache, ONE, "a", 50)
    assert lookup.owns_lock
    assert lookup.cached is not None
    assert lookup.cached.answer == FULL
    assert lookup.cached.fresh_for <= 0


async def test_a_newer_answer_is_not_outdated_by_an_older_one(harness: Harness) -> None:
    await harness.cache.expire(FULL)
    newer = replace(FULL, validators=Validators('"newer"'))
    await harness.cache.put([NewAnswer(ONE, newer, 50, 100)])
    await harness.other.expire(FULL)
    lookup = await lock(harness.cache, ONE, "a", 50)
    assert not lookup.owns_lock
    assert lookup.cached is not None
    assert lookup.cached.answer == newer
