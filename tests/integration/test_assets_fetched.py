"""API and fetcher together, in one process: what clients see while an object is fetched for real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.demo.knobs import Behaviour, Match
from services.fetcher.admission import Admission, AdmissionRules
from services.fetcher.disk import DiskThreads
from services.fetcher.download import Tools
from services.fetcher.lease_keeper import LeaseTimes
from services.fetcher.obituary import Obituary
from services.fetcher.postponement import Postponement
from services.fetcher.retrieval import Retrieval
from services.fetcher.worker import Worker
from tests.integration.assets_world import LIMIT, MIB, AssetsWorld, assets_world
from tests.integration.fetcher_world import RETRIES

SIZE = 2 * MIB + 11
RATE = 4 * MIB


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[AssetsWorld]:
    async with assets_world(tmp_path, first_byte_wait=3.0) as running, fetching(running):
        running.add("1", SIZE)
        yield running


@asynccontextmanager
async def fetching(world: AssetsWorld) -> AsyncIterator[None]:
    """A worker takes the jobs that the API publishes."""
    state, volume, disk = world.context.state, world.volume, DiskThreads(4)
    rules = AdmissionRules(LIMIT // 2, space_wait=0.3, lease=15.0)
    worker = Worker(
        Admission(state, volume, disk, rules, "worker-1"),
        Retrieval(
            Tools(state, world.context.failover_reader, disk), volume, LeaseTimes(lease=15.0, renewal=4.0)
        ),
        Postponement(state, RETRIES, failure_memory=60.0),
    )
    obituary = Obituary(state, volume, disk, "worker-1", failure_memory=60.0)
    consuming = asyncio.create_task(world.queue.consume(worker.handle, 4, obituary.write))
    try:
        yield
    finally:
        consuming.cancel()
        await asyncio.wait({consuming})
        await disk.close()


@pytest.mark.alone
async def test_many_first_requests_make_one_download_and_stream(world: AssetsWorld) -> None:
    world.node.knobs.add(Behaviour(bytes_per_second=RATE))
    answers = await asyncio.gather(*(world.get("1") for _ in range(20)))
    assert {answer.body for answer in answers} == {world.data["1"]}
    assert {answer.headers["x-data-source"] for answer in answers} == {"local"}
    assert [record.range for record in world.node.requests] == [None]
    assert len(world.second.requests) == 0
    # The source needs half a second for all of it; clients have the first bytes long before.
    assert all(answer.first_byte_after < 0.3 < answer.took for answer in answers)
    await world.until(lambda world: world.is_hit("1"))


async def test_the_first_viewers_of_an_object_without_a_type_are_told_its_sources(world: AssetsWorld) -> None:
    world.add("2", SIZE, media_type=None)
    world.node.knobs.add(Behaviour(bytes_per_second=RATE))
    answers = await asyncio.gather(*(world.get("2") for _ in range(3)))
    assert {answer.headers["x-data-source"] for answer in answers} == {"local"}
    assert {answer.headers["content-type"] for answer in answers} == {"video/mp4"}


async def test_a_source_that_dies_goes_unnoticed(world: AssetsWorld) -> None:
    world.node.knobs.add(Behaviour(cut_after=700_000, bytes_per_second=RATE))
    answer = await world.get("1")
    assert (answer.body, answer.headers["x-data-source"]) == (world.data["1"], "local")
    assert world.second.requests[0].range == f"bytes=700000-{SIZE - 1}"


async def test_wrong_bytes_from_the_first_source(world: AssetsWorld) -> None:
    world.node.knobs.add(Behaviour(flip_byte_at=5, bytes_per_second=RATE))
    answers = await asyncio.gather(*(world.get("1") for _ in range(5)))
    assert all(answer.body == world.data["1"] for answer in answers if answer.complete)
    async with asyncio.timeout(10):
        while (answer := await world.get("1")).headers["x-cache"] != "hit":
            assert not answer.complete or answer.body == world.data["1"]
    assert answer.body == world.data["1"]


async def test_the_end_of_a_slow_object_is_there_at_once(tmp_path: Path) -> None:
    async with (
        assets_world(tmp_path, first_byte_wait=3.0, far_range_distance=64 * 1024) as world,
        fetching(world),
    ):
        data = world.add("1", SIZE)
        world.node.knobs.add(Behaviour(bytes_per_second=MIB), Match(ranged=False))
        whole = asyncio.create_task(world.get("1"))
        await world.node.requests.wait_for(lambda log: len(log) == 1)
        end = await world.get("1", {"Range": "bytes=-4096"})
        assert (end.status, end.body, end.headers["x-data-source"]) == (206, data[-4096:], "external")
        start = await world.get("1", {"Range": "bytes=100-199"})
        assert (start.status, start.body, start.headers["x-data-source"]) == (206, data[100:200], "local")
        assert not whole.done()
        assert (await whole).body == data
