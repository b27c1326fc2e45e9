"""What the shared source stats promise to the processes of a node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from distributor_node.shared.adapters.sources.health import SourceHealthRegistry, SourceStatsSync
from distributor_node.shared.adapters.state_redis.caches import RedisSharedSourceStats
from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.source_order import RATE_MEMORY, SourceHealth, SourceStatsDelta
from distributor_node.shared.ports.source_stats import (
    MAX_CORRUPTED_COPIES,
    CorruptedCopy,
    SharedSources,
    SharedSourceStats,
)

ONE, TWO = ObjectId("1"), ObjectId("2")
A, B = "one.example:81", "two.example"


@dataclass
class Harness:
    """Two instances with the same keys, as two processes have them."""

    stats: SharedSourceStats
    other: SharedSourceStats

    async def tell(self, name: str, delta: SourceStatsDelta, now: float = 100.0) -> None:
        await self.stats.sync({name: delta}, [], now)

    async def learn(self, now: float = 0.0) -> SharedSources:
        return await self.other.sync({}, [], now)


@pytest.fixture
async def harness(redis_url: str, redis_prefix: str) -> AsyncIterator[Harness]:
    stats, other = (RedisSharedSourceStats(redis_url, redis_prefix, 5.0) for _ in range(2))
    await stats.open()
    await other.open()
    yield Harness(stats, other)
    await stats.close()
    await other.close()


async def test_nothing_is_known_at_first(harness: Harness) -> None:
    assert await harness.learn() == SharedSources({}, [])


async def test_observations_are_shared_between_processes(harness: Harness) -> None:
    await harness.tell(A, SourceStatsDelta(SourceHealth(first_bytes=(0.25, 0.5))))
    await harness.tell(B, SourceStatsDelta(SourceHealth(failures=2, last_failure_at=97.0)))
    health = (await harness.learn()).health
    assert health[A].first_bytes == (0.25, 0.5)
    assert (health[A].failures, health[A].unreachable_at) == (0, None)
    assert health[B].failures == 2


async def test_the_sender_receives_the_totals_in_the_same_call(harness: Harness) -> None:
    shared = await harness.stats.sync({A: SourceStatsDelta(SourceHealth(first_bytes=(0.5,)))}, [], 0.0)
    assert shared.health[A].first_bytes == (0.5,)


async def test_times_use_the_callers_clock(harness: Harness) -> None:
    seen = SourceHealth(failures=1, last_failure_at=97.0, unreachable_at=99.0)
    await harness.tell(A, SourceStatsDelta(seen), now=100.0)
    health = (await harness.learn(now=5000.0)).health[A]
    assert health.last_failure_at == pytest.approx(4997.0, abs=0.5)
    assert health.unreachable_at == pytest.approx(4999.0, abs=0.5)


async def test_the_last_ten_answers_make_the_mean(harness: Harness) -> None:
    await harness.tell(
        A, SourceStatsDelta(SourceHealth(first_bytes=tuple(float(number) for number in range(8))))
    )
    await harness.tell(A, SourceStatsDelta(SourceHealth(first_bytes=(8.0, 9.0, 10.0, 11.0))))
    assert (await harness.learn()).health[A].first_bytes == tuple(float(number) for number in range(2, 12))


async def test_failures_add_up_until_a_success(harness: Harness) -> None:
    failed = SourceStatsDelta(SourceHealth(failures=2, last_failure_at=100.0))
    await harness.tell(A, failed)
    await harness.tell(A, failed)
    assert (await harness.learn()).health[A].failures == 4
    await harness.tell(A, SourceStatsDelta(SourceHealth(failures=1, last_failure_at=100.0), succeeded=True))
    assert (await harness.learn()).health[A].failures == 1
    await harness.tell(A, SourceStatsDelta(succeeded=True, reached=True))
    assert (await harness.learn()).health[A].failures == 0


async def test_a_good_probe_ends_a_failed_one_and_no_more(harness: Harness) -> None:
    seen = SourceHealth(failures=1, last_failure_at=99.0, unreachable_at=100.0)
    await harness.tell(A, SourceStatsDelta(seen))
    assert (await harness.learn()).health[A].unreachable_at is not None
    await harness.tell(A, SourceStatsDelta(SourceHealth(first_bytes=(0.5,)), reached=True))
    health = (await harness.learn()).health[A]
    assert (health.unreachable_at, health.failures) == (None, 1)


async def test_corrupt_copies_are_reported_until_they_expire(harness: Harness) -> None:
    await harness.stats.sync({}, [CorruptedCopy(ONE, A, 50), CorruptedCopy(TWO, B, 0.05)], 0.0)
    await asyncio.sleep(0.1)
    (copy,) = (await harness.learn()).corrupted
    assert (copy.object_id, copy.source) == (ONE, A)
    assert 0 < copy.seconds_left < 50


async def test_corrupted_copies_are_bounded(harness: Harness) -> None:
    first = [CorruptedCopy(ObjectId(f"{number}"), A, 10 + number) for number in range(MAX_CORRUPTED_COPIES)]
    await harness.stats.sync({}, first, 0.0)
    await harness.stats.sync({}, [CorruptedCopy(TWO, B, 10_000)], 0.0)
    kept = {(copy.object_id, copy.source) for copy in (await harness.learn()).corrupted}
    assert len(kept) == MAX_CORRUPTED_COPIES
    assert (TWO, B) in kept
    assert (ObjectId("0"), A) not in kept


async def test_two_processes_share_one_order(harness: Harness) -> None:
    registries = [SourceHealthRegistry(), SourceHealthRegistry()]
    stats_syncs = [
        SourceStatsSync(registries[0], harness.stats, 3600),
        SourceStatsSync(registries[1], harness.other, 3600),
    ]
    urls = ["http://one.example:81/1", "http://two.example/1"]
    registries[0].record_failure(urls[0])
    registries[0].record_corrupted(ONE, urls[1])
    for stats_sync in stats_syncs:
        await stats_sync.sync()
    assert registries[1].best_first(urls) == (urls[1], urls[0])
    assert registries[1].best_first(urls, ONE) == (urls[0],)


async def test_rates_are_shared_until_they_are_forgotten(harness: Harness) -> None:
    await harness.tell(A, SourceStatsDelta(rate=1_000_000.0))
    await harness.tell(B, SourceStatsDelta(SourceHealth(first_bytes=(0.5,))))
    rates = (await harness.learn()).rates
    assert list(rates) == [A]
    assert rates[A].rate == 1_000_000
    assert 0 < rates[A].seconds_left <= RATE_MEMORY
    await harness.tell(A, SourceStatsDelta(rate=500_000.0))
    assert (await harness.learn()).rates[A].rate == 750_000


async def test_a_running_download_of_one_process_ranks_the_sources_of_another(harness: Harness) -> None:
    now = 10.0
    registries = [SourceHealthRegistry(), SourceHealthRegistry(clock=lambda: now)]
    urls = ["http://one.example:81/1", "http://two.example/1"]
    registries[0].record_rate(urls[0], 9_000)
    for registry, stats in zip(registries, (harness.stats, harness.other), strict=True):
        await SourceStatsSync(registry, stats, 3600).sync()
    assert registries[1].rate_of(urls[0]) == 9_000
    assert registries[1].best_first(urls) == (urls[1], urls[0])
    registries[1].record_rate(urls[0], 1_000_000)
    await SourceStatsSync(registries[1], harness.other, 3600).sync()
    assert registries[1].best_first(urls) == (urls[0], urls[1])
    now += RATE_MEMORY + 1
    assert registries[1].rate_of(urls[0]) is None


async def test_an_unreachable_shared_store_loses_no_local_statistics(redis_prefix: str) -> None:
    stats = RedisSharedSourceStats("redis://127.0.0.1:1/0", redis_prefix, 0.5)
    registry = SourceHealthRegistry()
    async with asyncio.timeout(60), SourceStatsSync(registry, stats, 3600) as stats_sync:
        with pytest.raises(StateStoreUnavailable):
            await stats.sync({}, [], 0.0)
        registry.record_failure("http://one.example:81/1")
        await stats_sync.sync()
        assert registry.health_of("one.example:81").failures == 1
