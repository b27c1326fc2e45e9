"""Fetches in trouble: other workers, lost leases, no space, a full disk, an index that contradicts the volume."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from services.demo.generated import GeneratedContent
from services.demo.knobs import Behaviour, Match
from shared.adapters.queue_memory import MemoryJobQueue
from shared.adapters.volume import Volume
from shared.domain.jobs import Done, Hopeless, JobOutcome, LookAgain, RetryPlan, TryLater
from shared.domain.objects import MediaObject, ObjectId, StoredRecord
from shared.domain.space import footprint
from shared.ports.state_store import FetchPhase, Granted, IndexEntry, Topic
from tests.integration.fetcher_world import LIMIT, OBJECT_ID, World, fetcher_world, until
from tests.mounting import small_file_system

SIZE = 3 * 1024 * 1024 + 17
DATA = GeneratedContent(7, SIZE).read(0, SIZE)
SLOW = Behaviour(bytes_per_second=2_000_000)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with fetcher_world(tmp_path / "volume", [DATA], lease=1.0) as ready:
        yield ready


def start(world: World, wanted: MediaObject | None = None) -> asyncio.Task[JobOutcome]:
    return asyncio.create_task(world.worker().handle(world.job(wanted or world.wanted(DATA))))


async def test_jobs_for_one_object_make_one_download(world: World) -> None:
    world.nodes[0].knobs.add(SLOW)
    outcomes = await asyncio.gather(*(start(world) for _ in range(8)))
    assert outcomes.count(Done("fetched")) == 1
    assert {type(outcome) for outcome in outcomes} <= {Done, LookAgain}
    assert len(world.nodes[0].requests) == 1
    assert world.stored() == DATA


async def test_a_job_waits_for_the_lease_of_a_dead_worker(world: World) -> None:
    assert isinstance(await world.state.begin(OBJECT_ID, SIZE, "dead"), Granted)
    assert await start(world) == Done("fetched")
    assert world.stored() == DATA


async def test_a_job_goes_on_where_the_worker_that_lost_its_delivery_fails(world: World) -> None:
    """The broker delivered the job again while the first worker, cut off from it, was still at work: that one's word on
    what becomes of the job arrives nowhere, and it fails."""
    world.nodes[0].knobs.add(Behaviour(bytes_per_second=400_000, cut_after=600_000))
    cut_off = start(world)
    await world.until_partial(100_000)
    queue = MemoryJobQueue(RetryPlan((0.05,)))
    await queue.open()
    await queue.publish(world.job(world.wanted(DATA)))
    consuming = asyncio.create_task(queue.consume(world.worker().handle, 1, world.obituary().write))
    assert isinstance(await cut_off, TryLater)
    world.nodes[0].knobs.clear()

    async def fetched() -> bool:
        return world.stored() == DATA

    await until(fetched, 15)
    consuming.cancel()
    await asyncio.wait({consuming})


async def test_a_lost_lease_ends_the_writing(world: World) -> None:
    """The index is emptied and another takes the object: what comes afterwards is not written."""
    world.nodes[0].knobs.add(SLOW)
    running = start(world)
    await world.until_partial(100_000)
    fetch = (await world.state.find(OBJECT_ID)).fetch
    assert fetch is not None
    world.state._tables.drop_fetch(OBJECT_ID)  # as a restarted state store would
    outcome = await running
    assert isinstance(outcome, TryLater)
    assert "lease" in outcome.reason
    size = world.partial_size()
    assert size is not None
    assert 0 < size < SIZE
    usage = await world.state.usage()
    assert usage.reserved == 0, "nothing was given back that was not held"


async def test_a_writer_that_lives_keeps_others_from_its_file(world: World) -> None:
    wanted = world.wanted(DATA)
    held = world.volume.open_partial_for_writing(
        StoredRecord(OBJECT_ID, SIZE, wanted.etag, wanted.content_hash, "video/mp4", stored_at=0)
    )
    try:
        outcome = await start(world)
        assert isinstance(outcome, TryLater)
        assert "held by another writer" in outcome.reason
    finally:
        held.close()
    assert await start(world) == Done("fetched")


async def test_no_space_is_asked_for_and_waited_for(tmp_path: Path) -> None:
    async with fetcher_world(tmp_path, [DATA], space_wait=5.0) as world:
        other = ObjectId.parse("8")
        size = LIMIT - footprint(SIZE)
        begun = await world.state.begin(other, size, "other")
        assert isinstance(begun, Granted)
        running = start(world)

        async def wished() -> bool:
            return await world.state.space_requested() == footprint(SIZE)

        await until(wished)
        await world.state.release(begun.lease)
        async with asyncio.timeout(2):
            assert await running == Done("fetched")
        assert await world.state.space_requested() == 0


async def test_no_space_in_time_is_tried_later(tmp_path: Path) -> None:
    async with fetcher_world(tmp_path, [DATA], space_wait=0.1) as world:
        begun = await world.state.begin(ObjectId.parse("8"), LIMIT - footprint(SIZE), "other")
        assert isinstance(begun, Granted)
        outcome = await start(world)
        assert isinstance(outcome, TryLater)
        assert outcome.reason.startswith("no space")
        assert len(world.nodes[0].requests) == 0


async def test_nothing_is_fetched_while_the_volume_is_not_accounted_for(tmp_path: Path) -> None:
    async with fetcher_world(tmp_path, [DATA], space_wait=0.1, reconciled=False) as world:
        assert isinstance(await start(world), TryLater)
        assert len(world.nodes[0].requests) == 0


@pytest.mark.parametrize("size", [None, LIMIT, LIMIT * 2])
async def test_what_can_never_be_cached_is_hopeless(world: World, size: int | None) -> None:
    assert isinstance(await start(world, MediaObject(OBJECT_ID, size, sources=world.sources)), Hopeless)


async def test_an_object_the_index_does_not_know_is_made_known(world: World) -> None:
    await start(world)
    before = await world.state.usage()
    world.state._tables.drop_object(world.state._tables.objects[OBJECT_ID])  # an emptied store
    assert await start(world) == Done("already cached")
    assert (await world.state.usage()) == before
    assert len(world.nodes[0].requests) == 1


@pytest.mark.parametrize("damage", ["gone", "cut"])
async def test_an_object_the_volume_has_lost_is_fetched_again(world: World, damage: str) -> None:
    await start(world)
    (path,) = world.volume.root.glob(f"objects/*/{OBJECT_ID}")
    if damage == "gone":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.truncate(100)
    assert await start(world) == Done("fetched")
    assert world.stored() == DATA
    usage = await world.state.usage()
    assert (usage.used, usage.reserved) == (footprint(SIZE), 0)


async def test_an_index_entry_without_a_file(world: World) -> None:
    await world.state.adopt(world.term, IndexEntry(OBJECT_ID, SIZE, 1, time.time()))
    assert await start(world) == Done("fetched")
    usage = await world.state.usage()
    assert (usage.used, usage.reserved, usage.objects) == (footprint(SIZE), 0, 1)


async def test_a_job_given_up_frees_its_space_and_is_remembered(world: World) -> None:
    world.nodes[0].knobs.add(Behaviour(cut_after=400_000))
    queue = MemoryJobQueue(RetryPlan((0.05,)))
    await queue.open()
    await queue.publish(world.job(world.wanted(DATA)))
    consuming = asyncio.create_task(queue.consume(world.worker().handle, 2, world.obituary().write))

    async def given_up() -> bool:
        return (await queue.depth()).dead == 1

    await until(given_up)
    consuming.cancel()
    await asyncio.wait({consuming})
    object_status = await world.state.find(OBJECT_ID)
    assert object_status.fetch is None
    assert object_status.failure is not None
    assert object_status.failure.reason.startswith("all sources failed")
    assert world.partial_size() is None
    assert (await world.state.usage()).reserved == 0


@pytest.mark.parametrize("trouble", ["sources", "bytes", "space", "disk"])
async def test_a_failed_attempt_makes_way_for_nobody_but_its_own_job(tmp_path: Path, trouble: str) -> None:
    """Whoever looks at the moment in which the lease is given back must not start the fetch anew."""
    content = b"?" + DATA[1:] if trouble == "bytes" else DATA
    async with fetcher_world(tmp_path, [content], space_wait=0.1, limit=2 * SIZE) as world:
        held = None
        if trouble == "sources":
            world.nodes[0].knobs.add(Behaviour(cut_after=400_000))
        elif trouble == "space":
            await world.state.begin(ObjectId("8"), SIZE, "other")
        elif trouble == "disk":
            held = world.volume.open_partial_for_writing(
                StoredRecord(OBJECT_ID, SIZE, '"x"', None, "video/mp4", 0)
            )
        await world.state.claim(OBJECT_ID, "api-1")
        await world.state.mark_queued(OBJECT_ID, "api-1")
        async with world.state.listen() as news:
            running = start(world)
            claims = []
            async for announcement in news:
                if announcement.topic is Topic.FETCH_CHANGED:
                    claims.append(await world.state.claim(OBJECT_ID, "api-2"))
                if claims and claims[-1].status.failure is not None:
                    break
            assert isinstance(await running, TryLater)
        assert not any(claim.won for claim in claims)
        claim = await world.state.claim(OBJECT_ID, "api-2")
        assert claim.status.failure is not None, "while its job waits in the delay queue"
        assert 60 < claim.status.failure.seconds_left <= 65, "and if that is lost, for a while longer"
        if held is not None:
            held.close()


async def test_a_consumer_that_stops_parks_what_it_does(world: World) -> None:
    world.nodes[0].knobs.add(SLOW, Match(first=1))
    queue = MemoryJobQueue(RetryPlan((0.05,)))
    await queue.open()
    await queue.publish(world.job(world.wanted(DATA)))
    consuming = asyncio.create_task(queue.consume(world.worker().handle, 2, world.obituary().write))
    await world.until_partial(100_000)
    consuming.cancel()
    await asyncio.wait({consuming})
    assert (await queue.depth()).ready == 1
    fetch = (await world.state.find(OBJECT_ID)).fetch
    assert fetch is not None
    assert fetch.phase is FetchPhase.PARKED


@pytest.mark.parametrize("steps", [*range(0, 60, 3), *range(60, 400, 20)])
async def test_stopped_at_any_moment_it_leaves_what_another_can_go_on_from(world: World, steps: int) -> None:
    """`steps` turns of the loop after the beginning."""
    running = start(world)
    for _ in range(steps):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait({running})
    usage = await world.state.usage()
    on_volume = world.partial_size() or 0
    assert usage.used + usage.reserved >= on_volume, "no byte that is not accounted for"
    assert usage.fetches == 0, "no lease that nobody keeps"
    assert await start(world) in (Done("fetched"), Done("already cached"))
    assert world.stored() == DATA
    usage = await world.state.usage()
    assert (usage.used, usage.reserved) == (footprint(SIZE), 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    with small_file_system(folder, "2m"):
        yield folder


async def test_a_full_disk_is_an_outcome(small_disk: Path) -> None:
    async with fetcher_world(small_disk, [DATA]) as world:
        outcome = await start(world)
        assert isinstance(outcome, TryLater)
        assert outcome.reason.startswith("volume full")
        assert world.partial_size() is None
        assert (await world.state.usage()).reserved == 0
        assert await world.state.space_requested() == footprint(SIZE)


async def test_a_volume_that_goes_is_refused_and_another_in_its_place_is_used(
    world: World, tmp_path: Path
) -> None:
    root = world.volume.root
    assert await start(world) == Done("fetched")
    root.rename(tmp_path / "former")
    root.mkdir()
    outcome = await start(world)
    assert isinstance(outcome, TryLater)
    assert "not there" in outcome.reason
    assert list(root.iterdir()) == []
    Volume(root).prepare()
    assert await start(world) == Done("fetched")
    assert world.stored() == DATA
    assert len(list(root.glob("objects/*/*"))) == 1
