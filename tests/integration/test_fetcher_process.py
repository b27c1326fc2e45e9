"""The fetcher as a process, on real Redis and RabbitMQ: fetch, stop, kill."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import GeneratedContent, bytes_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.shared.adapters.queue_rabbitmq import RabbitJobQueue
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.jobs import FetchJob, RetryPlan
from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import FetchPhase
from tests.end_to_end.stack import ServiceProcess, Stack
from tests.integration.fetcher_harness import hash_of
from tests.waiting import eventually

pytestmark = pytest.mark.servers

OBJECT_ID = ObjectId.parse("7")
SIZE = 4 * 1024 * 1024
DATA = GeneratedContent(7, SIZE).read(0, SIZE)
OTHER = b"<h1>other bytes</h1>" * 100
SLOW = Fault(bytes_per_second=1024 * 1024)


@dataclass(slots=True)
class Harness:
    stack: Stack
    node: StorageNode
    state: RedisStateStore
    queue: RabbitJobQueue
    volume: Volume

    async def start(self) -> ServiceProcess:
        fetcher = self.stack.add(
            "fetcher", DISTRIBUTOR_FETCH__LEASE="2", DISTRIBUTOR_FETCH__LEASE_RENEWAL="0.5"
        )
        await fetcher.healthy()
        return fetcher

    async def publish(self) -> None:
        wanted = MediaObject(
            OBJECT_ID, SIZE, hash_of(DATA), "video/mp4", sources=(self.node.object_url(OBJECT_ID),)
        )
        await self.queue.publish(FetchJob(wanted, "r-1", time.time()))

    def forged_job(self, object_id: str) -> FetchJob:
        """A job an hour old, with other bytes, from elsewhere, as a restored broker delivers it."""
        url = self.node.object_url("8")
        return FetchJob(
            MediaObject(ObjectId(object_id), len(OTHER), hash_of(OTHER), "text/html", sources=(url,)),
            "r-0",
            time.time() - 3600,
        )

    async def until_partial(self, size: int) -> None:
        async def grown() -> bool:
            reader = self.volume.open_partial(OBJECT_ID)
            if reader is None:
                return False
            grown = reader.state().size
            reader.close()
            return grown >= size

        await eventually(grown, seconds=20)

    async def assert_stored(self) -> None:
        async def stored() -> bool:
            return (await self.state.usage()).objects == 1

        await eventually(stored, seconds=20)
        found = self.volume.open_object(OBJECT_ID)
        assert found is not None
        assert found.read(0, SIZE + 1) == DATA
        assert found.record.media_type == "video/mp4"
        found.close()
        usage = await self.state.usage()
        assert (usage.used, usage.reserved, usage.fetches) == (footprint(SIZE), 0, 0)


@pytest.fixture
async def harness(tmp_path: Path, redis_url: str, amqp_url: str) -> AsyncIterator[Harness]:
    prefix = f"fetcher-{uuid.uuid4().hex[:8]}"
    async with AsyncExitStack() as stack:
        listed = bytes_object(OBJECT_ID, DATA, "video/mp4")
        node = await stack.enter_async_context(StorageNode([listed, bytes_object("8", OTHER)]).run())
        services = Stack(tmp_path, redis_url, amqp_url, prefix)
        services.write_manifest([listed], [f"{node.api_url}/files/"])
        stack.callback(services.kill_all)
        volume = Volume(services.volume)
        stack.callback(volume.close)
        state = RedisStateStore(redis_url, f"{prefix}:", 1024**3, StateTimeouts(lease_seconds=2.0))
        queue = RabbitJobQueue(amqp_url, prefix, RetryPlan((5.0, 30.0, 120.0, 600.0)), 5.0, 24 * 3600 * 1000)
        for opened in (state, queue):
            stack.push_async_callback(opened.close)
            await opened.open()
        term = await state.lead("test", 3600)
        assert term is not None
        await state.set_reconciled(term)
        yield Harness(services, node, state, queue, volume)


async def test_a_job_becomes_an_object(harness: Harness) -> None:
    fetcher = await harness.start()
    await harness.publish()
    await harness.assert_stored()
    assert await fetcher.stop() == 0


async def test_a_stopped_fetchers_job_goes_to_another(harness: Harness) -> None:
    harness.node.faults.add(SLOW, Match(first=1))
    fetcher = await harness.start()
    await harness.publish()
    await harness.until_partial(500_000)
    assert await fetcher.stop() == 0
    fetch = (await harness.state.find(OBJECT_ID)).fetch
    assert fetch is not None
    assert fetch.phase is FetchPhase.PARKED
    await harness.start()
    await harness.assert_stored()
    assert harness.node.requests[1].range is not None


async def test_a_killed_fetchers_job_is_resumed_by_another(harness: Harness) -> None:
    harness.node.faults.add(SLOW, Match(first=1))
    fetcher = await harness.start()
    await harness.publish()
    await harness.until_partial(500_000)
    fetcher.kill()
    await harness.start()
    await harness.assert_stored()
    assert harness.node.requests[1].range is not None


async def test_an_old_job_is_carried_out_as_the_catalog_says(harness: Harness) -> None:
    await harness.queue.publish(harness.forged_job(OBJECT_ID))
    await harness.start()
    await harness.assert_stored()


async def test_a_job_for_an_object_that_is_not_in_the_catalog_is_dropped(harness: Harness) -> None:
    await harness.queue.publish(harness.forged_job("8"))
    await harness.publish()
    fetcher = await harness.start()
    await harness.assert_stored()  # of object 7 alone
    assert harness.volume.open_object(ObjectId("8")) is None
    assert not [request for request in harness.node.requests if request.path.endswith("/8")]
    assert await fetcher.stop() == 0
    logged = [json.loads(line) for line in harness.stack.logs().splitlines() if line.startswith("{")]
    named = {
        (event["event"], event.get("object_id"), event.get("request_id"))
        for event in logged
        if event["event"] in {"job_dropped", "job_ended"}
    }
    assert named == {("job_dropped", "8", "r-0"), ("job_ended", "7", "r-1")}
