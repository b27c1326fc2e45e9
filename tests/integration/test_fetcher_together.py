"""Fetches with other workers, lost leases, no space, a full disk, and an index that differs from the volume."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import GeneratedContent
from distributor_node.services.evictor.adoption import Adoption, PartialReaper
from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.services.evictor.removal import RemovalOutcome
from distributor_node.services.fetcher.fetcher import DeadLetterHandler
from distributor_node.shared.adapters.queue_memory import MemoryJobQueue
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.eviction import make_policy
from distributor_node.shared.domain.jobs import Ack, DeadLetter, JobOutcome, Requeue, Retry, RetryPlan
from distributor_node.shared.domain.objects import MediaObject, ObjectId, StoredRecord
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import (
    FailureCause,
    FetchPhase,
    Granted,
    IndexEntry,
    Lease,
    Topic,
)
from distributor_node.shared.runtime.threads import BlockingPool, Params, Result
from tests.integration.fetcher_harness import LIMIT, OBJECT_ID, Harness, fetcher_harness
from tests.mounting import small_file_system
from tests.waiting import eventually

SIZE = 3 * 1024 * 1024 + 17
DATA = GeneratedContent(7, SIZE).read(0, SIZE)
SLOW = Fault(bytes_per_second=2_000_000)


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    async with fetcher_harness(tmp_path / "volume", [DATA], lease=1.0) as ready:
        yield ready


class CountingPool(BlockingPool):
    """Counts its calls."""

    calls = 0

    async def run(
        self, call: Callable[Params, Result], /, *args: Params.args, **kwargs: Params.kwargs
    ) -> Result:
        self.calls += 1
        return await super().run(call, *args, **kwargs)


def start(harness: Harness, wanted: MediaObject | None = None) -> asyncio.Task[JobOutcome]:
    return asyncio.create_task(harness.worker().handle(harness.job(wanted or harness.wanted(DATA))))


async def test_jobs_for_one_object_make_one_download(harness: Harness) -> None:
    harness.nodes[0].faults.add(SLOW)
    outcomes = await asyncio.gather(*(start(harness) for _ in range(8)))
    assert outcomes.count(Ack("fetched")) == 1
    assert {type(outcome) for outcome in outcomes} <= {Ack, Requeue}
    assert len(harness.nodes[0].requests) == 1
    assert harness.stored() == DATA


async def test_a_superseded_job_ends_at_once(harness: Harness) -> None:
    assert isinstance(await harness.state.begin(OBJECT_ID, SIZE, "busy", claim=1), Granted)
    job = replace(harness.job(harness.wanted(DATA)), claim=2)
    assert await harness.worker().handle(job) == Ack("superseded")


async def test_a_job_waits_for_the_lease_of_a_dead_worker(harness: Harness) -> None:
    assert isinstance(await harness.state.begin(OBJECT_ID, SIZE, "dead"), Granted)
    assert await start(harness) == Ack("fetched")
    assert harness.stored() == DATA


async def test_a_job_resumes_where_the_worker_that_lost_its_delivery_failed(harness: Harness) -> None:
    """1. Worker A loses its connection to the broker while it fetches. 2. The broker redelivers the job to worker B.
    3. A fails, and its outcome reaches no broker. 4. B gets the lease and resumes."""
    harness.nodes[0].faults.add(Fault(bytes_per_second=400_000, cut_after=600_000))
    cut_off = start(harness)
    await harness.until_partial(100_000)
    queue = MemoryJobQueue(RetryPlan((0.05,)))
    await queue.open()
    await queue.publish(harness.job(harness.wanted(DATA)))
    consuming = asyncio.create_task(
        queue.consume(harness.worker().handle, 1, harness.dead_letter_handler().handle)
    )
    assert isinstance(await cut_off, Retry)
    harness.nodes[0].faults.clear()

    async def fetched() -> bool:
        return harness.stored() == DATA

    await eventually(fetched)
    consuming.cancel()
    await asyncio.wait({consuming})


async def test_a_lost_lease_ends_the_writing(harness: Harness) -> None:
    """After the index is emptied, no byte is written."""
    harness.nodes[0].faults.add(SLOW)
    running = start(harness)
    await harness.until_partial(100_000)
    fetch = (await harness.state.find(OBJECT_ID)).fetch
    assert fetch is not None
    harness.state.tables.drop_fetch(OBJECT_ID)  # as a restarted state store would
    outcome = await running
    assert isinstance(outcome, Retry)
    assert "lease" in outcome.reason
    size = harness.partial_size()
    assert size is not None
    assert 0 < size < SIZE
    usage = await harness.state.usage()
    assert usage.reserved == 0, "no reservation was released that was not held"


async def test_a_live_writer_locks_others_out_of_its_file(harness: Harness) -> None:
    wanted = harness.wanted(DATA)
    held = harness.volume.open_partial_for_writing(
        StoredRecord(OBJECT_ID, SIZE, wanted.etag, wanted.content_hash, "video/mp4", stored_at=0)
    )
    try:
        outcome = await start(harness)
        assert isinstance(outcome, Retry)
        assert "held by another writer" in outcome.reason
    finally:
        held.close()
    assert await start(harness) == Ack("fetched")


async def test_space_is_requested_and_waited_for(tmp_path: Path) -> None:
    async with fetcher_harness(tmp_path, [DATA], space_wait=3600) as harness:
        other = ObjectId.parse("8")
        size = LIMIT - footprint(SIZE)
        begun = await harness.state.begin(other, size, "other")
        assert isinstance(begun, Granted)
        running = start(harness)

        async def space_requested() -> bool:
            return sum(await harness.state.space_requests()) == footprint(SIZE)

        await eventually(space_requested)
        await harness.state.release(begun.lease)
        async with asyncio.timeout(60):
            assert await running == Ack("fetched")
        assert sum(await harness.state.space_requests()) == 0


async def test_no_space_in_time_is_retried_later(tmp_path: Path) -> None:
    async with fetcher_harness(tmp_path, [DATA], space_wait=0.1) as harness:
        begun = await harness.state.begin(ObjectId.parse("8"), LIMIT - footprint(SIZE), "other")
        assert isinstance(begun, Granted)
        outcome = await start(harness)
        assert isinstance(outcome, Retry)
        assert outcome.reason.startswith("no space")
        assert len(harness.nodes[0].requests) == 0


async def leave_a_part(harness: Harness) -> tuple[int, Lease]:
    """A fetch was given up, and another object has taken the room. Returns what is there, and the other's lease."""
    harness.nodes[0].faults.add(Fault(cut_after=700_000))
    assert isinstance(await start(harness), Retry)
    lease = await harness.state.steal_lease(harness.term, OBJECT_ID)
    held = harness.volume.measure_partial(OBJECT_ID)
    assert lease is not None
    assert held is not None
    await harness.state.park(lease, held)
    other = await harness.state.begin(ObjectId.parse("8"), LIMIT - footprint(SIZE), "other")
    assert isinstance(other, Granted)
    harness.nodes[0].faults.clear()
    harness.nodes[0].requests.clear()
    return held, other.lease


async def test_a_parked_fetch_that_gets_no_room_keeps_what_it_holds(tmp_path: Path) -> None:
    async with fetcher_harness(tmp_path, [DATA], space_wait=0.1) as harness:
        held, other = await leave_a_part(harness)
        outcome = await start(harness)
        assert isinstance(outcome, Retry)
        assert outcome.reason == f"no space: {footprint(0)} bytes missing"
        fetch = (await harness.state.find(OBJECT_ID)).fetch
        assert fetch is not None
        assert (fetch.phase, fetch.reserved) == (FetchPhase.PARKED, footprint(held))
        assert not harness.nodes[0].requests
        await harness.state.release(other)
        assert await start(harness) == Ack("fetched")
        assert harness.stored() == DATA
        assert [record.range for record in harness.nodes[0].requests] == [f"bytes={held}-{SIZE - 1}"]
        usage = await harness.state.usage()
        assert (usage.used, usage.reserved) == (footprint(SIZE), 0)


@pytest.mark.parametrize("then", ["continued", "evicted"])
async def test_a_part_whose_job_has_found_no_room_at_all_stays_accounted_for(
    tmp_path: Path, then: str
) -> None:
    """It is evicted as any other, and found again by the next request once the failure is forgotten."""
    async with fetcher_harness(tmp_path, [DATA], space_wait=0.1) as harness:
        state, volume = harness.state, harness.volume
        held, other = await leave_a_part(harness)
        assert await state.refute_failure(OBJECT_ID, FailureCause.SOURCES)
        claim = await state.claim(OBJECT_ID, "api-1")
        assert claim.won
        queue = MemoryJobQueue(RetryPlan((0.05,)))
        await queue.open()
        await queue.publish(replace(harness.job(harness.wanted(DATA)), claim=claim.serial))
        await state.mark_queued(OBJECT_ID, "api-1")
        handler = DeadLetterHandler(state, volume, harness.disk, "worker-last", failure_memory=0.01)
        consuming = asyncio.create_task(queue.consume(harness.worker().handle, 1, handler.handle))

        async def dead_lettered() -> bool:
            return (await queue.depth()).dead == 1

        await eventually(dead_lettered)
        consuming.cancel()
        await asyncio.wait({consuming})
        fetch, usage = (await state.find(OBJECT_ID)).fetch, await state.usage()
        assert fetch is not None
        assert (fetch.phase, fetch.size, fetch.reserved) == (FetchPhase.PARKED, SIZE, footprint(held))
        assert (usage.parked, usage.parked_bytes) == (1, footprint(held))
        assert harness.partial_size() == held
        if then == "evicted":
            index = EvictionIndex(state, volume, partial(make_policy, "gdsf"))
            reaper = PartialReaper(
                state, volume, Adoption(state, volume, index, None), index, keep=3600.0, space_wait=10.0
            )
            await reaper.prepare(harness.term)
            assert [entry.object_id for entry in index.policy.dump()] == [OBJECT_ID]
            assert await reaper.evict(harness.term, OBJECT_ID) is RemovalOutcome.REMOVED
            assert harness.partial_size() is None
            assert (await state.usage()).reserved == footprint(other.size)
            return
        await state.release(other)

        async def claimed() -> bool:
            return (await state.claim(OBJECT_ID, "api-2")).won

        await eventually(claimed)
        assert await start(harness) == Ack("fetched")
        assert harness.stored() == DATA
        assert [record.range for record in harness.nodes[0].requests] == [f"bytes={held}-{SIZE - 1}"]
        usage = await state.usage()
        assert (usage.used, usage.reserved) == (footprint(SIZE), 0)


async def test_nothing_is_fetched_before_reconciliation(tmp_path: Path) -> None:
    async with fetcher_harness(tmp_path, [DATA], space_wait=0.1, reconciled=False) as harness:
        assert isinstance(await start(harness), Retry)
        assert len(harness.nodes[0].requests) == 0


@pytest.mark.parametrize("size", [LIMIT, LIMIT * 2])
async def test_an_uncacheable_object_is_dead_lettered(harness: Harness, size: int) -> None:
    assert isinstance(await start(harness, MediaObject(OBJECT_ID, size, sources=harness.sources)), DeadLetter)


async def test_an_object_missing_from_the_index_is_reindexed(harness: Harness) -> None:
    await start(harness)
    before = await harness.state.usage()
    harness.state.tables.drop_object(harness.state.tables.objects[OBJECT_ID])  # an emptied store
    assert await start(harness) == Ack("already_cached")
    assert (await harness.state.usage()) == before
    assert len(harness.nodes[0].requests) == 1


async def test_an_object_of_another_size_is_reindexed_with_its_own(harness: Harness) -> None:
    await start(harness)
    before = await harness.state.usage()
    harness.state.tables.drop_object(harness.state.tables.objects[OBJECT_ID])
    listed = MediaObject(OBJECT_ID, len(DATA) + 500_000, sources=harness.sources)
    assert await start(harness, listed) == Ack("already_cached")
    assert (await harness.state.usage()) == before
    assert len(harness.nodes[0].requests) == 1


async def test_a_worker_that_dies_between_lease_and_look_leaves_nothing_reserved(tmp_path: Path) -> None:
    async with fetcher_harness(tmp_path, [DATA], lease=0.3) as harness:
        await start(harness)
        before = await harness.state.usage()
        harness.state.tables.drop_object(harness.state.tables.objects[OBJECT_ID])
        assert isinstance(await harness.state.begin(OBJECT_ID, len(DATA), "killed"), Granted)
        assert await start(harness) == Ack("already_cached")  # that lease is held, and the file is there
        await asyncio.sleep(0.4)
        assert await start(harness) == Ack("already_cached")
        assert (await harness.state.usage()) == before
        assert len(harness.nodes[0].requests) == 1


@pytest.mark.parametrize("resumed", [False, True])
async def test_without_a_volume_only_bytes_that_may_be_there_stay_reserved(
    harness: Harness, resumed: bool
) -> None:
    if resumed:
        granted = await harness.state.begin(OBJECT_ID, len(DATA), "stopped")
        assert isinstance(granted, Granted)
        await harness.state.park(granted.lease)
    harness.volume.root.rename(harness.volume.root.with_name("unmounted"))
    assert isinstance(await start(harness), Retry)
    assert (await harness.state.usage()).reserved == (footprint(len(DATA)) if resumed else 0)


async def test_a_client_waits_for_one_look_at_the_volume(harness: Harness) -> None:
    """Opening a file is quick; switching to a thread and back is not, for a small object."""
    harness.nodes[0].faults.add(Fault(hang_before_headers=True))
    harness.disk = pool = CountingPool(2)
    running = start(harness)

    async def asked() -> bool:
        return len(harness.nodes[0].requests) == 1

    await eventually(asked)
    calls = pool.calls
    running.cancel()
    await running
    await pool.close()
    assert calls == 1


@pytest.mark.parametrize("damage", ["gone", "cut"])
async def test_an_object_the_volume_has_lost_is_fetched_again(harness: Harness, damage: str) -> None:
    await start(harness)
    (path,) = harness.volume.root.glob(f"objects/*/{OBJECT_ID}")
    if damage == "gone":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.truncate(100)
    assert await start(harness) == Ack("fetched")
    assert harness.stored() == DATA
    usage = await harness.state.usage()
    assert (usage.used, usage.reserved) == (footprint(SIZE), 0)


async def test_an_index_entry_without_a_file(harness: Harness) -> None:
    await harness.state.adopt(harness.term, IndexEntry(OBJECT_ID, SIZE, 1, time.time()))
    assert await start(harness) == Ack("fetched")
    usage = await harness.state.usage()
    assert (usage.used, usage.reserved, usage.objects) == (footprint(SIZE), 0, 1)


async def test_a_dead_lettered_job_frees_its_space_and_its_failure_is_remembered(harness: Harness) -> None:
    harness.nodes[0].faults.add(Fault(cut_after=400_000))
    queue = MemoryJobQueue(RetryPlan((0.05,)))
    await queue.open()
    await queue.publish(harness.job(harness.wanted(DATA)))
    consuming = asyncio.create_task(
        queue.consume(harness.worker().handle, 2, harness.dead_letter_handler().handle)
    )

    async def dead_lettered() -> bool:
        return (await queue.depth()).dead == 1

    await eventually(dead_lettered)
    consuming.cancel()
    await asyncio.wait({consuming})
    object_status = await harness.state.find(OBJECT_ID)
    assert object_status.fetch is None
    assert object_status.failure is not None
    assert object_status.failure.reason.startswith("all sources failed")
    assert object_status.failure.cause is FailureCause.SOURCES
    assert harness.partial_size() is None
    assert (await harness.state.usage()).reserved == 0


async def test_after_a_dead_letter_another_job_may_be_published_once_the_failure_is_forgotten(
    harness: Harness,
) -> None:
    """Also if the queue mark of a job that never began has expired."""
    state = harness.state
    state.tables.timeouts = replace(state.tables.timeouts, queued_seconds=0.01)
    assert (await state.claim(OBJECT_ID, "api-1")).won
    await state.mark_queued(OBJECT_ID, "api-1")

    async def expired() -> bool:
        return (await state.find(OBJECT_ID)).fetch is None

    await eventually(expired)
    handler = DeadLetterHandler(state, harness.volume, harness.disk, "worker-last", failure_memory=0.01)
    await handler.handle(harness.job(harness.wanted(DATA)), "no space")

    async def claimed() -> bool:
        return (await state.claim(OBJECT_ID, "api-2")).won

    await eventually(claimed)


async def test_a_dead_letter_leaves_the_claim_of_another_job(harness: Harness) -> None:
    lost = await harness.state.claim(OBJECT_ID, "api-1")
    await harness.state.release_claim(OBJECT_ID, "api-1")
    assert (await harness.state.claim(OBJECT_ID, "api-2")).won
    await harness.state.mark_queued(OBJECT_ID, "api-2")
    job = replace(harness.job(harness.wanted(DATA)), claim=lost.serial)
    await harness.dead_letter_handler().handle(job, "no space")
    fetch = (await harness.state.find(OBJECT_ID)).fetch
    assert fetch is not None
    assert (fetch.phase, fetch.worker) == (FetchPhase.QUEUED, "api-2")


@pytest.mark.parametrize("trouble", ["sources", "bytes"])
async def test_what_a_dead_letter_leaves_of_a_partial_object(tmp_path: Path, trouble: str) -> None:
    """It is parked with what it holds. Bytes that failed verification are gone, others stay for the next job."""
    sent = DATA if trouble == "sources" else DATA[:-1] + b"?"
    async with fetcher_harness(tmp_path, [sent]) as harness:
        granted = await harness.state.begin(OBJECT_ID, SIZE, "worker-1")
        assert isinstance(granted, Granted)
        digest = harness.wanted(DATA).content_hash
        record = StoredRecord(OBJECT_ID, SIZE, None, digest, "video/mp4", 0)
        file = harness.volume.open_partial_for_writing(record)
        file.write(0, DATA[:500_000])
        file.close()
        await harness.state.park(granted.lease, 500_000)
        if trouble == "bytes":
            assert isinstance(await start(harness), Retry)
        await harness.dead_letter_handler().handle(harness.job(harness.wanted(DATA)), "all sources failed")
        kept = trouble == "sources"
        assert harness.partial_size() == (500_000 if kept else None)
        assert (await harness.state.usage()).reserved == (footprint(500_000) if kept else 0)


@pytest.mark.parametrize("trouble", ["sources", "bytes", "space", "disk"])
async def test_a_failed_attempt_blocks_other_jobs_until_its_retry(tmp_path: Path, trouble: str) -> None:
    """A request that sees the lease released must not win a claim before the delayed retry."""
    content = b"?" + DATA[1:] if trouble == "bytes" else DATA
    async with fetcher_harness(tmp_path, [content], space_wait=0.1, limit=2 * SIZE) as harness:
        held = None
        if trouble == "sources":
            harness.nodes[0].faults.add(Fault(cut_after=400_000))
        elif trouble == "space":
            await harness.state.begin(ObjectId("8"), SIZE, "other")
        elif trouble == "disk":
            held = harness.volume.open_partial_for_writing(
                StoredRecord(OBJECT_ID, SIZE, '"x"', None, "video/mp4", 0)
            )
        await harness.state.claim(OBJECT_ID, "api-1")
        await harness.state.mark_queued(OBJECT_ID, "api-1")
        async with harness.state.listen() as announcements:
            running = start(harness)
            claims = []
            async for announcement in announcements:
                if announcement.topic is Topic.FETCH_CHANGED:
                    claims.append(await harness.state.claim(OBJECT_ID, "api-2"))
                if claims and claims[-1].status.failure is not None:
                    break
            assert isinstance(await running, Retry)
        assert not any(claim.won for claim in claims)
        claim = await harness.state.claim(OBJECT_ID, "api-2")
        assert claim.status.failure is not None, "while its job waits in the delay queue"
        assert 60 < claim.status.failure.seconds_left <= 65, (
            "and some seconds longer, in case the job is lost"
        )
        if held is not None:
            held.close()


async def test_a_stopping_consumer_parks_its_fetches(harness: Harness) -> None:
    harness.nodes[0].faults.add(SLOW, Match(first=1))
    queue = MemoryJobQueue(RetryPlan((0.05,)))
    await queue.open()
    await queue.publish(harness.job(harness.wanted(DATA)))
    consuming = asyncio.create_task(
        queue.consume(harness.worker().handle, 2, harness.dead_letter_handler().handle)
    )
    await harness.until_partial(100_000)
    consuming.cancel()
    await asyncio.wait({consuming})
    assert (await queue.depth()).ready == 1
    fetch = (await harness.state.find(OBJECT_ID)).fetch
    assert fetch is not None
    assert fetch.phase is FetchPhase.PARKED


@pytest.mark.parametrize("steps", [*range(0, 60, 3), *range(60, 400, 20)])
async def test_stopped_at_any_moment_it_leaves_a_resumable_state(harness: Harness, steps: int) -> None:
    """Cancelled after `steps` turns of the event loop."""
    running = start(harness)
    for _ in range(steps):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait({running})
    usage = await harness.state.usage()
    on_volume = harness.partial_size() or 0
    assert usage.used + usage.reserved >= on_volume, "no byte that is not accounted for"
    assert usage.fetches == 0, "no lease without a worker"
    assert await start(harness) in (Ack("fetched"), Ack("already_cached"))
    assert harness.stored() == DATA
    usage = await harness.state.usage()
    assert (usage.used, usage.reserved) == (footprint(SIZE), 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    with small_file_system(folder, "2m"):
        yield folder


async def test_a_full_disk_is_an_outcome(small_disk: Path) -> None:
    async with fetcher_harness(small_disk, [DATA]) as harness:
        outcome = await start(harness)
        assert isinstance(outcome, Retry)
        assert outcome.reason.startswith("volume full")
        assert harness.partial_size() is None
        assert (await harness.state.usage()).reserved == 0
        assert sum(await harness.state.space_requests()) == footprint(SIZE)


async def test_a_missing_volume_is_rejected_and_its_replacement_is_used(
    harness: Harness, tmp_path: Path
) -> None:
    root = harness.volume.root
    assert await start(harness) == Ack("fetched")
    root.rename(tmp_path / "former")
    root.mkdir()
    outcome = await start(harness)
    assert isinstance(outcome, Retry)
    assert "missing" in outcome.reason
    assert list(root.iterdir()) == []
    Volume(root).prepare()
    assert await start(harness) == Ack("fetched")
    assert harness.stored() == DATA
    assert len(list(root.glob("objects/*/*"))) == 1
