"""RabbitMQ restarts, freezes, loses the queue or blocks publishers: misses are proxied, then fetched again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import MIB, generated_object
from tests.chaos.figures import record_result
from tests.chaos.harness import ChaosHarness, chaos_harness, mixed_objects
from tests.chaos.http import cache_all, completed_downloads, events, get_all, get_correct
from tests.chaos.invariants import wait_until_settled
from tests.servers.rabbitmq_server import RabbitServer
from tests.servers.redis_server import RedisServer
from tests.waiting import eventually

OBJECTS = mixed_objects(64)
UNDER_WAY, DURING, AFTER = OBJECTS[:24], OBJECTS[24:48], OBJECTS[48:]
FaultInjector = Callable[[ChaosHarness], Awaitable[None] | AbstractAsyncContextManager[None]]


async def restarted(chaos: ChaosHarness) -> None:
    await asyncio.to_thread(chaos.rabbit.restart)


async def killed(chaos: ChaosHarness) -> None:
    await asyncio.to_thread(chaos.rabbit.kill)
    await asyncio.to_thread(chaos.rabbit.start)


async def queue_deleted(chaos: ChaosHarness) -> None:
    """The broker cancels the consumer, too."""
    await asyncio.to_thread(chaos.rabbit.delete_queue, f"{chaos.prefix}.jobs")


async def connections_closed(chaos: ChaosHarness) -> None:
    await asyncio.to_thread(chaos.rabbit.close_all_connections)


@asynccontextmanager
async def frozen(chaos: ChaosHarness) -> AsyncIterator[None]:
    chaos.rabbit.freeze()
    try:
        yield
    finally:
        chaos.rabbit.thaw()


@asynccontextmanager
async def memory_alarm(chaos: ChaosHarness) -> AsyncIterator[None]:
    await asyncio.to_thread(chaos.rabbit.raise_memory_alarm)
    try:
        yield
    finally:
        await asyncio.to_thread(chaos.rabbit.clear_memory_alarm)


@asynccontextmanager
async def black_hole(chaos: ChaosHarness) -> AsyncIterator[None]:
    chaos.to_rabbit.unresponsive = True
    yield
    chaos.to_rabbit.heal()


async def three_downloads_started(chaos: ChaosHarness) -> None:
    """Whichever source each of them was begun at."""
    logs = (chaos.first.requests, chaos.second.requests)
    await eventually(lambda: sum(map(len, logs)) >= 3, 20, pause=0.05)


async def run_scenario(chaos: ChaosHarness, fault: FaultInjector, seconds: float) -> None:
    """Downloads under way and jobs waiting when it begins, misses while it lasts and after it."""
    chaos.stack.environment["DISTRIBUTOR_FETCH__CONCURRENCY"] = "3"
    await chaos.up(OBJECTS, 400 * MIB)
    for node in (chaos.first, chaos.second):
        node.faults.add(Fault(bytes_per_second=MIB // 2))
    under_way = asyncio.create_task(get_all(chaos, UNDER_WAY, at_once=24))
    await three_downloads_started(chaos)
    began = time.monotonic()
    broken = fault(chaos)
    if isinstance(broken, AbstractAsyncContextManager):
        async with broken:
            misses = await get_all(chaos, DURING, 8)
            await asyncio.sleep(max(0.0, seconds - (time.monotonic() - began)))
    else:
        fixed = asyncio.ensure_future(broken)
        misses = await get_all(chaos, DURING, 8)
        await fixed
    over = time.monotonic()
    for node in (chaos.first, chaos.second):
        node.faults.clear()
    await under_way
    await cache_all(chaos, AFTER[:1])
    resumed = time.monotonic() - over
    everything = await cache_all(
        chaos, OBJECTS, 240.0
    )  # jobs of a deleted queue must be late before others follow
    rest = await wait_until_settled(chaos, OBJECTS)
    downloads = completed_downloads(chaos)
    assert set(downloads) == {item.object_id for item in OBJECTS}
    assert max(downloads.values()) == 1, f"downloaded twice: {downloads.most_common(5)}"
    record_result(
        f"rabbitmq_{fault.__name__}", requests=len(OBJECTS), failed=0, misses=len(misses),
        proxied=sum(answer.headers["x-data-source"] == "external" for answer in misses),
        fetching_again_after=resumed, all_cached_after=everything, at_rest_after=rest,
    )  # fmt: skip


@pytest.mark.chaos
@pytest.mark.timeout(300)
async def test_the_queue_is_deleted_and_its_consumer_cancelled(chaos: ChaosHarness) -> None:
    await run_scenario(chaos, queue_deleted, 0)


@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", [restarted, killed])
async def test_the_broker_restarts(chaos: ChaosHarness, fault: FaultInjector) -> None:
    await run_scenario(chaos, fault, 0)


@pytest.mark.timeout(180)
async def test_its_connections_are_closed(chaos: ChaosHarness) -> None:
    await run_scenario(chaos, connections_closed, 0)


@pytest.mark.chaos
@pytest.mark.timeout(300)
async def test_the_broker_is_frozen_for_30_seconds(chaos: ChaosHarness) -> None:
    await run_scenario(chaos, frozen, 30)


@pytest.mark.chaos
@pytest.mark.timeout(300)
async def test_a_memory_alarm_blocks_publishers(chaos: ChaosHarness) -> None:
    await run_scenario(chaos, memory_alarm, 5)


@pytest.mark.chaos
@pytest.mark.timeout(300)
async def test_the_connection_to_the_broker_goes_dead(chaos: ChaosHarness) -> None:
    await run_scenario(chaos, black_hole, 20)


@pytest.fixture
def rabbitmq_with_short_timeout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """It takes a worker that has not acknowledged for 3 s for dead."""
    with RabbitServer(tmp_path_factory.mktemp("impatient"), {"consumer_timeout": "3000"}) as server:
        yield server


@pytest.mark.chaos
@pytest.mark.timeout(120)
async def test_a_download_longer_than_the_consumer_timeout_ends_once(
    tmp_path: Path, own_redis: RedisServer, rabbitmq_with_short_timeout: RabbitServer
) -> None:
    item = generated_object("1", 12 * MIB)
    async with chaos_harness(tmp_path, own_redis, rabbitmq_with_short_timeout) as chaos:
        chaos.stack.environment["DISTRIBUTOR_JOB_QUEUE__CONSUMER_TIMEOUT"] = "3"
        await chaos.up([item], 100 * MIB, fetchers=2)
        for node in (chaos.first, chaos.second):
            node.faults.add(Fault(bytes_per_second=MIB), Match(object_id="1"))
        began = time.monotonic()
        await get_correct(chaos, item)
        took = time.monotonic() - began
        await chaos.stack.until_hit("1")
        await wait_until_settled(chaos, [item])
        downloads = [
            record for node in (chaos.first, chaos.second) for record in node.requests.of("1", "GET")
        ]
        lost = [
            event
            for process in chaos.stack.of("fetcher")
            for event in events(process, "consumer_session_lost")
        ]
        assert lost, "the broker never lost patience: nothing was tried"
        assert completed_downloads(chaos) == {"1": 1}
        assert len(downloads) == 1, "one download, whatever was delivered again"
        record_result(
            "consumer_timeout", download_seconds=took, consumer_timeout=3, deliveries_lost=len(lost), failed=0
        )
