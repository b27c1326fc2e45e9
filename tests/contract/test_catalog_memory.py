"""What every catalog memory promises, run against each of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest

from shared.adapters.state_memory.catalog_memory import MemoryCatalogMemory
from shared.adapters.state_redis.catalog_memory import RedisCatalogMemory
from shared.domain.errors import StateStoreUnavailable
from shared.domain.objects import ContentHash, DistributionBucket, MediaObject, ObjectId
from shared.ports.catalog_memory import CatalogMemory, Consultation
from tests.contract.state_world import FakeClock

ONE, TWO = ObjectId("1"), ObjectId("2")
FULL = MediaObject(
    ONE,
    2**53 + 1,
    content_hash=ContentHash("blake3", bytes(range(32))),
    media_type="text/vtt",
    buckets=(DistributionBucket("0:1", frozenset({3, 4})), DistributionBucket("0:2")),
    accepted=False,
    sources=("https://one.example/api/v1/files/1", "https://two.example/api/v1/files/1"),
    validator='what "they" call it\n',
)


@dataclass
class World:
    """`memory` and `other` are two processes' doors to one memory."""

    memory: CatalogMemory
    other: CatalogMemory
    let_pass: Callable[[float], Awaitable[None]]


@pytest.fixture(params=["memory", "redis"])
async def world(request: pytest.FixtureRequest, redis_prefix: str) -> AsyncIterator[World]:
    if request.param == "memory":
        clock = FakeClock()

        async def let_pass(seconds: float) -> None:
            clock.now += seconds

        memory = MemoryCatalogMemory(clock)
        yield World(memory, memory, let_pass)
        return
    url = request.getfixturevalue("redis_url")
    doors = [RedisCatalogMemory(url, redis_prefix, 5.0, "squid") for _ in range(2)]
    for door in doors:
        await door.open()
    yield World(doors[0], doors[1], asyncio.sleep)
    for door in doors:
        await door.close()


@pytest.mark.parametrize("answer", [FULL, MediaObject(ONE, None), None], ids=["full", "bare", "absent"])
async def test_an_answer_is_recalled_as_it_was(world: World, answer: MediaObject | None) -> None:
    assert await world.memory.recall(ONE) is None
    await world.memory.remember(ONE, answer, 50, 100)
    remembered = await world.other.recall(ONE)
    assert remembered is not None
    assert remembered.answer == answer
    assert 0 < remembered.fresh_left <= 50
    assert await world.other.recall(TWO) is None


async def test_one_is_told_to_ask(world: World) -> None:
    assert await world.memory.consult(ONE, "a", 50) == Consultation(None, must_ask=True)
    assert await world.other.consult(ONE, "b", 50) == Consultation(None, must_ask=False)
    assert (await world.other.consult(TWO, "b", 50)).must_ask


async def test_nobody_is_told_to_ask_what_is_fresh(world: World) -> None:
    assert (await world.memory.consult(ONE, "a", 50)).must_ask
    await world.memory.remember(ONE, FULL, 50, 100)
    consultation = await world.other.consult(ONE, "b", 50)
    assert not consultation.must_ask
    assert consultation.remembered is not None
    assert consultation.remembered.answer == FULL


async def test_what_is_stale_is_told_and_asked_anew(world: World) -> None:
    assert (await world.memory.consult(ONE, "a", 50)).must_ask
    await world.memory.remember(ONE, FULL, 0.05, 100)
    await world.let_pass(0.1)
    consultation = await world.other.consult(ONE, "b", 50)
    assert consultation.must_ask
    assert consultation.remembered is not None
    assert consultation.remembered.answer == FULL
    assert consultation.remembered.fresh_left <= 0


async def test_answers_go_at_their_end(world: World) -> None:
    await world.memory.remember(ONE, FULL, 0.05, 0.05)
    await world.let_pass(0.1)
    assert await world.other.recall(ONE) is None


async def test_the_right_to_ask_is_given_up_by_its_holder_alone(world: World) -> None:
    assert (await world.memory.consult(ONE, "a", 50)).must_ask
    await world.other.give_up(ONE, "b")
    assert not (await world.other.consult(ONE, "b", 50)).must_ask
    await world.memory.give_up(ONE, "a")
    assert (await world.other.consult(ONE, "b", 50)).must_ask


async def test_the_right_to_ask_runs_out(world: World) -> None:
    assert (await world.memory.consult(ONE, "a", 0.05)).must_ask
    await world.let_pass(0.1)
    assert (await world.other.consult(ONE, "b", 50)).must_ask


async def test_different_catalogs_share_nothing(redis_url: str, redis_prefix: str) -> None:
    one, two = (RedisCatalogMemory(redis_url, redis_prefix, 5.0, name) for name in ("one", "two"))
    await one.open()
    await two.open()
    await one.remember(ONE, FULL, 50, 100)
    assert await two.recall(ONE) is None
    await one.close()
    await two.close()


async def test_a_memory_out_of_reach_says_so_in_time(redis_prefix: str) -> None:
    memory = RedisCatalogMemory("redis://127.0.0.1:1/0", redis_prefix, 0.5, "squid")
    await memory.open()
    async with asyncio.timeout(2):
        with pytest.raises(StateStoreUnavailable):
            await memory.consult(ONE, "a", 50)
    await memory.close()
