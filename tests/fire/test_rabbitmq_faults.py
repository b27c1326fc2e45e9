"""RabbitMQ restarts, stands still, loses the queue, blocks publishers: misses are proxied, work goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from services.demo.knobs import Behaviour, Match
from services.demo.objects import MIB, generated_object
from tests.fire.asking import ask_all, ask_right, cache_all, events, fetched
from tests.fire.figures import note
from tests.fire.inspection import settled
from tests.fire.world import FireWorld, fire_world, mixed_objects
from tests.servers.rabbitmq_server import RabbitServer
from tests.servers.redis_server import RedisServer

OBJECTS = mixed_objects(64)
UNDER_WAY, DURING, AFTER = OBJECTS[:24], OBJECTS[24:48], OBJECTS[48:]
Fault = Callable[[FireWorld], Awaitable[None] | AbstractAsyncContextManager[None]]


async def restarted(fire: FireWorld) -> None:
    await asyncio.to_thread(fire.rabbit.restart)


async def killed(fire: FireWorld) -> None:
    await asyncio.to_thread(fire.rabbit.kill)
    await asyncio.to_thread(fire.rabbit.start)


async def queue_deleted(fire: FireWorld) -> None:
    """The broker cancels the consumer, too."""
    await asyncio.to_thread(fire.rabbit.delete_queue, f"{fire.prefix}.jobs")


async def connections_closed(fire: FireWorld) -> None:
    await asyncio.to_thread(fire.rabbit.close_all_connections)


@asynccontextmanager
async def frozen(fire: FireWorld) -> AsyncIterator[None]:
    fire.rabbit.freeze()
    try:
        yield
    finally:
        fire.rabbit.thaw()


@asynccontextmanager
async def memory_alarm(fire: FireWorld) -> AsyncIterator[None]:
    await asyncio.to_thread(fire.rabbit.raise_memory_alarm)
    try:
        yield
    finally:
        await asyncio.to_thread(fire.rabbit.clear_memory_alarm)


@asynccontextmanager
async def a_black_hole(fire: FireWorld) -> AsyncIterator[None]:
    fire.to_rabbit.deaf = True
    yield
    fire.to_rabbit.heal()


async def three_under_way(fire: FireWorld) -> None:
    """Whichever source each of them was begun at."""
    logs = (fire.first.requests, fire.second.requests)
    async with asyncio.timeout(20):
        while sum(map(len, logs)) < 3:  # noqa: ASYNC110 - two logs, an event each
            await asyncio.sleep(0.05)


async def through(fire: FireWorld, fault: Fault, seconds: float) -> None:
    """Downloads under way and jobs waiting when it begins, misses while it lasts and after it."""
    fire.stack.environment["DISTRIBUTOR_FETCH__CONCURRENCY"] = "3"
    await fire.up(OBJECTS, 400 * MIB)
    for node in (fire.first, fire.second):
        node.knobs.add(Behaviour(bytes_per_second=MIB // 2))
    under_way = asyncio.create_task(ask_all(fire, UNDER_WAY, at_once=24))
    await three_under_way(fire)
    began = time.monotonic()
    broken = fault(fire)
    if isinstance(broken, AbstractAsyncContextManager):
        async with broken:
            misses = await ask_all(fire, DURING, 8)
            await asyncio.sleep(max(0.0, seconds - (time.monotonic() - began)))
    else:
        fixed = asyncio.ensure_future(broken)
        misses = await ask_all(fire, DURING, 8)
        await fixed
    over = time.monotonic()
    for node in (fire.first, fire.second):
        node.knobs.clear()
    await under_way
    await cache_all(fire, AFTER[:1])
    resumed = time.monotonic() - over
    everything = await cache_all(fire, OBJECTS)
    rest = await settled(fire, OBJECTS)
    downloads = fetched(fire)
    assert set(downloads) == {item.object_id for item in OBJECTS}
    assert max(downloads.values()) == 1, f"downloaded twice: {downloads.most_common(5)}"
    note(
        f"rabbitmq_{fault.__name__}", requests=len(OBJECTS), failed=0, misses=len(misses),
        proxied=sum(answer.headers["x-data-source"] == "external" for answer in misses),
        fetching_again_after=resumed, all_cached_after=everything, at_rest_after=rest,
    )  # fmt: skip


@pytest.mark.fire
@pytest.mark.timeout(300)
async def test_the_queue_is_deleted_and_its_consumer_cancelled(fire: FireWorld) -> None:
    await through(fire, queue_deleted, 0)


@pytest.mark.fire
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", [restarted, killed])
async def test_the_broker_restarts(fire: FireWorld, fault: Fault) -> None:
    await through(fire, fault, 0)


@pytest.mark.timeout(180)
async def test_its_connections_are_closed(fire: FireWorld) -> None:
    await through(fire, connections_closed, 0)


@pytest.mark.fire
@pytest.mark.timeout(300)
async def test_the_broker_stands_still_for_30_seconds(fire: FireWorld) -> None:
    await through(fire, frozen, 30)


@pytest.mark.fire
@pytest.mark.timeout(300)
async def test_a_memory_alarm_blocks_publishers(fire: FireWorld) -> None:
    await through(fire, memory_alarm, 5)


@pytest.mark.fire
@pytest.mark.timeout(300)
async def test_the_line_to_the_broker_goes_dead(fire: FireWorld) -> None:
    await through(fire, a_black_hole, 20)


@pytest.fixture
def impatient_rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """It takes a worker that has not acknowledged for 3 s for dead."""
    with RabbitServer(tmp_path_factory.mktemp("impatient"), {"consumer_timeout": "3000"}) as server:
        yield server


@pytest.mark.fire
@pytest.mark.timeout(120)
async def test_a_download_longer_than_the_consumer_timeout_ends_once(
    tmp_path: Path, own_redis: RedisServer, impatient_rabbitmq: RabbitServer
) -> None:
    item = generated_object("1", 12 * MIB)
    async with fire_world(tmp_path, own_redis, impatient_rabbitmq) as fire:
        fire.stack.environment["DISTRIBUTOR_JOB_QUEUE__CONSUMER_TIMEOUT"] = "3"
        await fire.up([item], 100 * MIB, fetchers=2)
        for node in (fire.first, fire.second):
            node.knobs.add(Behaviour(bytes_per_second=MIB), Match(object_id="1"))
        began = time.monotonic()
        await ask_right(fire, item)
        took = time.monotonic() - began
        await fire.stack.until_hit("1")
        await settled(fire, [item])
        downloads = [record for node in (fire.first, fire.second) for record in node.requests.of("1", "GET")]
        lost = [
            event
            for process in fire.stack.of("fetcher")
            for event in events(process, "consumer_session_lost")
        ]
        assert lost, "the broker never lost patience: nothing was tried"
        assert fetched(fire) == {"1": 1}
        assert len(downloads) == 1, "one download, whoever delivered what again"
        note(
            "consumer_timeout", download_seconds=took, consumer_timeout=3, deliveries_lost=len(lost), failed=0
        )
