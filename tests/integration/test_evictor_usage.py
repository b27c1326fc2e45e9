"""Used bytes in Redis that something else has changed are corrected within a pass, or within a minute."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from distributor_node.services.evictor import leader_tasks, reconcile
from distributor_node.services.evictor.reconcile import UsageCheck
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import NoSpace
from tests.counters import counted
from tests.integration.evictor_harness import LIMIT, SIZE, EvictorHarness, evictor_harness
from tests.waiting import eventually

pytestmark = pytest.mark.servers
STORED = 3 * footprint(SIZE)


@pytest.fixture
async def harness(tmp_path: Path, redis_url: str, redis_prefix: str) -> AsyncIterator[EvictorHarness]:
    async with evictor_harness(tmp_path, (redis_url, redis_prefix)) as made:
        yield made


@pytest.fixture
async def server(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


def recounts() -> float:
    """Counted after the store has corrected the sum, so that a test which waits for the sum may read it too early."""
    return counted("distributor_reconciled_total", result="recounted")


async def begin_too_large(harness: EvictorHarness) -> object:
    """Ask for more than is free beside the stored objects, and less than the whole limit."""
    return await harness.state.begin(ObjectId("large"), LIMIT - STORED, "worker-1")


@pytest.mark.parametrize("used", [0, 10 * LIMIT])
async def test_a_changed_sum_is_corrected_by_the_next_pass(
    harness: EvictorHarness, server: Redis, redis_prefix: str, used: int
) -> None:
    before = recounts()
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("one", "two", "three")
        await asyncio.sleep(0.2)  # some passes
        assert recounts() == before, "what is stored by workers is no difference"
        await server.hset(f"{redis_prefix}usage", "used", str(used))
        await eventually(lambda: recounts() > before)
        assert (recounts(), await harness.used()) == (before + 1, STORED)
        assert isinstance(await begin_too_large(harness), NoSpace)
        assert sorted(await harness.entries()) == ["one", "three", "two"], "nothing was evicted for it"


@pytest.mark.parametrize("threshold", [20_000, 0], ids=["at once", "a batch at a time"])
async def test_a_sum_that_was_wrong_before_the_first_pass_is_corrected_within_the_interval(
    harness: EvictorHarness,
    server: Redis,
    redis_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    threshold: int,
) -> None:
    """The pass sees changes only. The comparison with the entries sees the rest."""

    async def never(*_: object) -> bool:
        return False

    monkeypatch.setattr(UsageCheck, "watch", never)
    monkeypatch.setattr(reconcile, "_RECOUNT_THRESHOLD", threshold)
    monkeypatch.setattr(leader_tasks, "USAGE_CHECK_INTERVAL", 0.2)
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("one", "two", "three")
        before = recounts()
        await server.hset(f"{redis_prefix}usage", "used", "1")
        await eventually(lambda: recounts() > before)
        assert (recounts(), await harness.used()) == (before + 1, STORED)
