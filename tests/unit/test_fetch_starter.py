"""Claim, publish, mark queued: completed even if the client disconnects."""

from __future__ import annotations

import asyncio
import time

import pytest

from distributor_node.services.api.assets.fetch_start import LATE, FetchStarter
from distributor_node.shared.adapters.queue_memory import MemoryJobQueue
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.domain.jobs import FetchJob, RetryPlan
from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.domain.space import AdmissionQuestion
from distributor_node.shared.ports.state_store import Claim, FetchPhase, WorkerReport
from tests.waiting import eventually

WANTED = MediaObject(ObjectId("1"), 10)


class SlowStore(MemoryStateStore):
    """Takes a moment, as one over a network does."""

    async def claim(
        self,
        object_id: ObjectId,
        claimant: str,
        admission: AdmissionQuestion | None = None,
        trace: str = "",
    ) -> Claim:
        claim = await super().claim(object_id, claimant, admission, trace)
        await asyncio.sleep(0.02)
        return claim


class SlowQueue(MemoryJobQueue):
    async def publish(self, job: FetchJob) -> None:
        await asyncio.sleep(0.02)
        await super().publish(job)


@pytest.fixture
def state() -> SlowStore:
    return SlowStore(1000, StateTimeouts(), time.time)


@pytest.fixture
async def queue() -> SlowQueue:
    queue = SlowQueue(RetryPlan())
    await queue.open()
    return queue


async def phase(state: MemoryStateStore) -> FetchPhase | None:
    fetch = (await state.find(WANTED.object_id)).fetch
    return fetch.phase if fetch else None


async def test_a_claim_is_marked_as_queued_after_the_first_moments_of_its_fetch() -> None:
    state = MemoryStateStore(1000, StateTimeouts(), time.time)
    queue = MemoryJobQueue(RetryPlan())
    await queue.open()
    starter = FetchStarter(state, queue, "api-1", lambda _: False)
    await starter.start(WANTED, "request")

    async def is_published() -> bool:
        return bool((await queue.depth()).ready)

    await eventually(is_published, pause=0)
    assert await phase(state) is FetchPhase.CLAIMED
    await starter.close()
    assert await phase(state) is FetchPhase.QUEUED


@pytest.mark.parametrize("leaves_after", [0.0, 0.01, 0.03])
async def test_a_client_that_leaves_leaves_no_claim_without_its_job(
    state: SlowStore, queue: SlowQueue, leaves_after: float
) -> None:
    starter = FetchStarter(state, queue, "api-1", lambda _: False)
    asking = asyncio.create_task(starter.start(WANTED, "r-1"))
    await asyncio.sleep(leaves_after)
    asking.cancel()
    await asyncio.wait({asking})
    await starter.close()
    # Cancelled before it began, nothing was claimed either.
    begun = await phase(state) is not None
    assert (await queue.depth()).ready == int(begun)
    assert await phase(state) in (FetchPhase.QUEUED, None)
    assert begun or leaves_after == 0.0


async def test_one_of_many_wins(state: SlowStore, queue: SlowQueue) -> None:
    starter = FetchStarter(state, queue, "api-1", lambda _: False)
    answers = await asyncio.gather(*(starter.start(WANTED, f"r-{number}") for number in range(20)))
    await starter.close()
    assert [claim.won for claim, _ in answers if claim is not None].count(True) == 1
    assert (await queue.depth()).ready == 1


async def test_an_object_stored_before_its_claim_needs_no_job(state: SlowStore, queue: SlowQueue) -> None:
    starter = FetchStarter(state, queue, "api-1", lambda _: True)
    claim, _ = await starter.start(WANTED, "r-1")
    await starter.close()
    assert claim is not None
    assert (claim.won, claim.status.fetch, claim.status.failure) == (False, None, None)
    assert (await queue.depth()).ready == 0
    assert await phase(state) is None


async def test_a_claim_whose_job_cannot_be_published_is_released(state: SlowStore, queue: SlowQueue) -> None:
    await queue.close()
    starter = FetchStarter(state, queue, "api-1", lambda _: False)
    claim, start = await starter.start(WANTED, "r-1")
    assert claim is not None
    assert claim.won
    await asyncio.wait_for(start.publish_failed.wait(), 60)
    await starter.close()
    assert await phase(state) is None


async def late_claims(waiting_jobs: bool, held_jobs: int) -> tuple[Claim | None, Claim | None]:
    """1. A job is published. 2. It is lost, unless `waiting_jobs`; a fetcher holds others. 3. An object is asked for
    twice when its job is late."""
    now = time.time()
    state = MemoryStateStore(1000, StateTimeouts(), lambda: now)
    queue, lost = MemoryJobQueue(RetryPlan()), MemoryJobQueue(RetryPlan())
    await queue.open()
    await lost.open()
    starter = FetchStarter(state, queue if waiting_jobs else lost, "api-1", lambda _: False)
    await starter.start(WANTED, "r-1")
    await starter.close()
    now += LATE
    await state.report_worker(WorkerReport("fetcher-1", 8, 8, held_jobs, 0.0), 3600)
    other = FetchStarter(state, queue, "api-2", lambda _: False)
    first, _ = await other.start(WANTED, "r-2")
    await other.close()
    second, _ = await other.start(WANTED, "r-3")
    await other.close()
    return first, second


async def test_a_job_that_waits_nowhere_is_published_again() -> None:
    first, second = await late_claims(waiting_jobs=False, held_jobs=0)
    assert first is not None
    assert second is not None
    assert (first.won, second.won) == (False, True)


@pytest.mark.parametrize(("waiting_jobs", "held_jobs"), [(True, 0), (False, 1)])
async def test_a_late_job_that_may_wait_is_not_published_again(waiting_jobs: bool, held_jobs: int) -> None:
    first, second = await late_claims(waiting_jobs, held_jobs)
    assert first is not None
    assert second is not None
    assert (first.won, second.won) == (False, False)


async def test_one_look_tells_of_all_late_jobs() -> None:
    """A mark that runs out is prolonged by a minute: who looks too late waits for another one."""
    now, objects = time.time(), [MediaObject(ObjectId(str(number)), 10) for number in range(20)]
    state = MemoryStateStore(1000, StateTimeouts(), lambda: now)
    queue, lost = MemoryJobQueue(RetryPlan()), MemoryJobQueue(RetryPlan())
    await queue.open()
    await lost.open()
    starter = FetchStarter(state, lost, "api-1", lambda _: False)
    for wanted in objects:
        await starter.start(wanted, "r-1")
    await starter.close()
    now += LATE + 1
    other = FetchStarter(state, queue, "api-2", lambda _: False)
    await asyncio.gather(*(other.start(wanted, "r-2") for wanted in objects))
    await other.close()
    answers = await asyncio.gather(*(other.start(wanted, "r-3") for wanted in objects))
    await other.close()
    assert all(claim is not None and claim.won for claim, _ in answers)
    assert (await queue.depth()).ready == len(objects)
