"""Large objects whose fetch waits for its viewers: what the API tells of them, and what follows when a fetch ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from distributor_node.shared.domain.jobs import Ack, FetchJob, JobOutcome
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import Followers, Viewer
from distributor_node.shared.ports.state_store import FetchPhase
from distributor_node.shared.waiting import background
from tests.integration.assets_harness import MIB, AssetsHarness, assets_harness
from tests.integration.test_assets_pending import ask
from tests.waiting import eventually

SIZE = 20 * MIB + 33
SMALL = 2 * MIB
ID, SMALL_ID = ObjectId("1"), ObjectId("2")


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[AssetsHarness]:
    """Nothing is proxied because it is slow."""
    async with assets_harness(
        tmp_path,
        fetch={"window": 4 * MIB},
        first_byte_wait=30.0,
        far_range_wait=30.0,
        stalled_fetch_wait=30.0,
    ) as running:
        running.add("1", SIZE)
        running.add("2", SMALL)
        yield running


async def followers(harness: AssetsHarness, object_id: ObjectId = ID) -> Followers:
    return await harness.context.state.followers(object_id)


async def until_viewers(harness: AssetsHarness, *viewers: Viewer) -> None:
    async def told() -> bool:
        return set((await followers(harness)).viewers) == set(viewers)

    await eventually(told)


async def test_bytes_of_a_fetch_that_has_ended_are_sent_at_once_and_a_job_continues_it(
    harness: AssetsHarness,
) -> None:
    fetch = await harness.begin("1", written=2 * MIB)
    fetch.partial.close()
    await harness.context.state.park(fetch.lease)
    assert (await harness.get("1", method="HEAD")).headers["x-cache"] == "pending"
    client = await ask(harness, "1")
    assert b"X-Cache: pending" in await client.read_head()
    assert await client.take(2 * MIB) == harness.data["1"][: 2 * MIB]
    assert await harness.jobs() == 1
    assert not harness.node.requests
    resumed = await harness.begin("1")
    resumed.written = 2 * MIB
    await resumed.complete()
    assert await client.rest() == harness.data["1"][2 * MIB :]
    assert not harness.node.requests


async def test_a_viewer_whose_fetch_ends_starts_it_again(harness: AssetsHarness) -> None:
    """Race: 1. a fetch gives up for lack of viewers; 2. one comes and follows it; 3. it is parked."""
    fetch = await harness.begin("1", written=MIB)
    client = await ask(harness, "1")
    await client.read_head()
    await client.take(MIB)
    fetch.partial.close()
    await harness.context.state.park(fetch.lease)
    await eventually(harness.has_job)
    await asyncio.sleep(0.3)
    assert await harness.jobs() == 1
    resumed = await harness.begin("1")
    resumed.written = MIB
    await resumed.complete()
    assert await client.rest() == harness.data["1"][MIB:]
    assert not harness.node.requests


async def test_a_failed_fetch_is_not_started_again_by_its_viewers(harness: AssetsHarness) -> None:
    fetch = await harness.begin("1", written=MIB)
    client = await ask(harness, "1")
    await client.read_head()
    await client.take(MIB)
    fetch.partial.close()
    await harness.context.state.record_failure(ID, "given up", 60)
    await harness.context.state.park(fetch.lease)
    assert await client.rest() == harness.data["1"][MIB:]  # from a source
    assert await harness.jobs() == 0


async def test_a_job_that_is_refused_again_and_again_is_published_at_intervals(
    harness: AssetsHarness,
) -> None:
    """What the worker refuses parks the fetch again, and tells all followers of it at once."""
    state, published = harness.context.state, 0

    async def refuse(job: FetchJob) -> JobOutcome:
        nonlocal published
        published += 1
        fetch = (await state.find(job.object_id)).fetch
        assert fetch is not None
        await state.release_claim(job.object_id, fetch.worker)
        return Ack("not_served")

    async def on_dead_letter(job: FetchJob, reason: str) -> None: ...

    fetch = await harness.begin("1", written=MIB)
    for client in [await ask(harness, "1") for _ in range(3)]:
        await client.read_head()
        await client.take(MIB)
    fetch.partial.close()
    async with background(harness.queue.consume(refuse, 4, on_dead_letter), "worker"):
        await state.park(fetch.lease)
        await asyncio.sleep(1.0)
    assert published == 1


async def test_where_a_viewer_is_is_told_while_it_follows_the_fetch(harness: AssetsHarness) -> None:
    fetch = await harness.begin("1", written=3 * MIB)
    client = await ask(harness, "1")
    await client.read_head()
    await client.take(3 * MIB)
    await until_viewers(harness, Viewer(0, 3 * MIB))
    assert (await followers(harness)).views == 1
    ranged = await ask(harness, "1", f"Range: bytes={MIB}-{2 * MIB}\r\n")
    await ranged.read_head()
    await ranged.take(MIB + 1)
    assert (await followers(harness)).views == 1  # of the same view
    client.writer.transport.abort()
    await until_viewers(harness)
    assert (await followers(harness)).told
    fetch.partial.close()


async def test_heads_and_what_is_proxied_are_no_viewers(harness: AssetsHarness) -> None:
    fetch = await harness.begin("1", written=MIB)
    assert (await harness.get("1", method="HEAD")).status == 200
    await asyncio.sleep(0.1)
    assert not (await followers(harness)).told
    last = await harness.get("1", {"Range": f"bytes={SIZE - 1000}-"})
    assert last.body == harness.data["1"][-1000:]
    found = await followers(harness)
    assert (found.told, found.views, found.viewers) == (True, 1, ())
    fetch.partial.close()


async def test_where_no_viewer_follows_a_fetch_it_does_not_wait_for_them(tmp_path: Path) -> None:
    """On a volume of several hosts all pending requests are proxied. No viewer would ever be near."""
    async with assets_harness(
        tmp_path, fetch={"window": 4 * MIB}, follow_growing_files=False, first_byte_wait=0.1
    ) as harness:
        harness.add("1", SIZE)
        fetch = await harness.begin("1", written=MIB)
        assert (await harness.get("1")).body == harness.data["1"]
        await harness.context.viewers.report()
        found = await followers(harness)
        assert (found.told, found.untold) == (False, True)
        fetch.partial.close()


async def test_a_response_that_needs_all_bytes_before_it_says_so(harness: AssetsHarness) -> None:
    """It is verified from the first byte on, wherever it begins."""
    fetch = await harness.begin("1", written=3 * MIB)
    client = await ask(harness, "1", f"Range: bytes={2 * MIB}-\r\n")
    await client.read_head()
    await client.take(MIB)
    await until_viewers(harness, Viewer(0, 3 * MIB))
    fetch.partial.close()


async def test_of_small_objects_nothing_is_told(harness: AssetsHarness) -> None:
    fetch = await harness.begin("2", written=MIB)
    client = await ask(harness, "2")
    await client.read_head()
    await client.take(MIB)
    await harness.context.viewers.report()
    found = await followers(harness, SMALL_ID)
    assert (found.told, found.untold) == (False, True)
    fetch.partial.close()
    await harness.context.state.park(fetch.lease)
    await eventually(harness.has_job)  # its follower starts it again, as that of a large one
    status = await harness.context.state.find(SMALL_ID)
    assert status.fetch is not None
    assert status.fetch.phase is not FetchPhase.PARKED
