"""Which job gets a slot: in total, per source, by viewers; and what becomes of jobs that wait too long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from distributor_node.services.fetcher.scheduler import (
    DISPLACEMENT_TIME,
    EVICTION_TIME,
    MIN_STAY,
    VIEWED_NOW,
    JobScheduler,
    Slot,
    SlotLimits,
)
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.domain.jobs import FetchJob, JobOutcome, Nack, Requeue
from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import WorkerReport

SLOW, GOOD, OTHER = "slow", "good", "other"
LIMIT = 10_000


def job(object_id: int, *sources: str, low_priority: bool = False) -> FetchJob:
    """One that a client has asked for just now."""
    urls = tuple(f"http://{source}/files/{object_id}" for source in sources or (GOOD,))
    wanted = MediaObject(ObjectId(str(object_id)), 100, sources=urls)
    return FetchJob(wanted, "r", published_at=time.time(), low_priority=low_priority)


def in_order(wanted: MediaObject) -> Sequence[str]:
    return wanted.sources


@dataclass
class Held:
    """A job that waits for a slot or has one, until `end`."""

    started: list[int]
    result: Slot | JobOutcome | None = None
    end: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class World:
    """A scheduler, and the jobs that were given to it."""

    def __init__(self, total: int = 2, per_source: int = 2) -> None:
        self.now = 1_000.0
        self.store = MemoryStateStore(LIMIT, StateTimeouts(), lambda: self.now)
        self.scheduler = JobScheduler(
            self.store, "worker-1", SlotLimits(total, per_source), in_order, lambda: self.now
        )
        self.started: list[int] = []
        self.held: dict[int, Held] = {}

    async def take(self, *jobs: FetchJob) -> None:
        for one in jobs:
            number, held = int(one.object_id), Held(self.started)
            self.held[number] = held
            held.task = asyncio.create_task(self._run(one, number, held))
            await settle()

    async def _run(self, one: FetchJob, number: int, held: Held) -> None:
        async with self.scheduler.slot(one) as held.result:
            if isinstance(held.result, Slot):
                self.started.append(number)
                await held.end.wait()

    async def end(self, number: int) -> None:
        self.held[number].end.set()
        await settle()

    async def later(self, seconds: float) -> None:
        self.now += seconds
        await self.scheduler.tick()
        await settle()

    def outcome(self, number: int) -> Slot | JobOutcome | None:
        return self.held[number].result


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@asynccontextmanager
async def world(total: int = 2, per_source: int = 2) -> AsyncIterator[World]:
    made = World(total, per_source)
    try:
        yield made
    finally:
        tasks = [held.task for held in made.held.values() if held.task]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        report = made.scheduler.report()
        assert (report.running, report.waiting, report.full_sources) == (0, 0, ())


async def test_only_so_many_run_at_once() -> None:
    async with world(total=2) as one:
        await one.take(job(1), job(2), job(3), job(4))
        assert one.started == [1, 2]
        await one.end(1)
        assert one.started == [1, 2, 3]
        report = one.scheduler.report()
        assert (report.slots, report.running, report.waiting) == (2, 2, 1)


async def test_a_full_source_keeps_no_other_out() -> None:
    async with world(total=8, per_source=2) as one:
        await one.take(*(job(number, SLOW) for number in range(1, 6)))
        assert one.started == [1, 2]
        await one.take(job(6, GOOD))
        assert one.started == [1, 2, 6]
        assert one.scheduler.report().full_sources == (SLOW,)
        await one.end(2)
        assert one.started == [1, 2, 6, 3]


async def test_another_source_of_the_object_is_used_instead_of_a_full_one() -> None:
    async with world(total=8, per_source=1) as one:
        await one.take(job(1, SLOW, GOOD), job(2, SLOW, GOOD), job(3, SLOW, GOOD))
        assert one.started == [1, 2]
        first, second = one.outcome(1), one.outcome(2)
        assert isinstance(first, Slot)
        assert isinstance(second, Slot)
        assert (first.url, second.url) == ("http://slow/files/1", "http://good/files/2")
        assert one.scheduler.report().full_sources == (SLOW, GOOD)


async def test_a_download_that_goes_on_elsewhere_frees_its_source() -> None:
    async with world(total=8, per_source=1) as one:
        await one.take(job(1, SLOW, GOOD), job(2, SLOW))
        slot = one.outcome(1)
        assert isinstance(slot, Slot)
        slot.move_to("http://good/files/1")
        await one.later(1.0)
        assert one.started == [1, 2]
        assert one.scheduler.report().full_sources == (GOOD, SLOW)


async def test_an_object_with_viewers_goes_before_those_without() -> None:
    async with world(total=1) as one:
        await one.take(job(1), job(2), job(3), job(4))
        await one.later(VIEWED_NOW + 1)
        await one.store.record_viewers([ObjectId("4")])
        await one.later(0.1)
        await one.end(1)
        await one.end(4)
        assert one.started[:2] == [1, 4]


async def test_of_objects_without_viewers_the_one_left_last_is_first_and_warming_is_last() -> None:
    async with world(total=1) as one:
        await one.take(job(1), job(2, low_priority=True), job(3), job(4))
        for number in (4, 3):
            await one.store.record_viewers([ObjectId(str(number))])
            await one.later(1.0)
        await one.later(VIEWED_NOW + 1)
        for number in (1, 3, 4):
            await one.end(number)
        assert one.started == [1, 3, 4, 2]


async def test_a_warming_job_that_is_viewed_goes_first() -> None:
    async with world(total=1) as one:
        await one.take(job(1), job(2, low_priority=True), job(3))
        await one.later(VIEWED_NOW + 1)
        await one.store.record_viewers([ObjectId("2")])
        await one.later(0.1)
        await one.end(1)
        assert one.started == [1, 2]


async def test_of_those_with_viewers_the_one_that_waits_longest_is_first() -> None:
    async with world(total=1) as one:
        await one.take(job(1), job(2))
        await one.later(1.0)
        await one.take(job(3))
        await one.store.record_viewers([ObjectId("2"), ObjectId("3")])
        await one.later(1.0)
        await one.end(1)
        assert one.started == [1, 2]


async def test_a_job_without_any_source_runs_and_fails_by_itself() -> None:
    async with world(total=1) as one:
        await one.take(FetchJob(MediaObject(ObjectId("1"), 100), "r", time.time()))
        slot = one.outcome(1)
        assert isinstance(slot, Slot)
        assert slot.url is None


async def test_a_job_that_is_cancelled_leaves_its_place() -> None:
    async with world(total=1) as one:
        await one.take(job(1), job(2), job(3))
        for number in (2, 1):
            task = one.held[number].task
            assert task is not None
            task.cancel()
            await settle()
        assert one.started == [1, 3]


async def test_jobs_go_to_a_worker_with_free_slots() -> None:
    async with world(total=1) as one:
        await one.take(job(1), job(2), job(3), job(4))
        await one.store.report_worker(WorkerReport("worker-2", 4, 2, 0, 0.0), 60)
        await one.later(1.0)
        assert [one.outcome(number) for number in (2, 3)] == [Nack(), Nack()]
        assert one.outcome(4) is None
        await one.store.report_worker(WorkerReport("worker-2", 4, 4, 0, 0.0), 60)
        await one.later(1.0)
        assert one.outcome(4) is None


async def test_jobs_stay_where_another_worker_has_no_slot_for_their_source() -> None:
    async with world(total=4, per_source=1) as one:
        await one.take(job(1, SLOW), job(2, SLOW))
        await one.store.report_worker(WorkerReport("worker-2", 4, 1, 0, 0.0, (SLOW,)), 60)
        await one.later(1.0)
        assert one.outcome(2) is None


async def test_where_too_many_wait_the_last_ones_are_delayed() -> None:
    async with world(total=4, per_source=1) as one:
        await one.take(*(job(number, SLOW) for number in range(1, 13)))
        await one.later(1.0)
        assert one.scheduler.report().waiting == 9
        delayed = [number for number in range(1, 13) if one.outcome(number) == Requeue("no free slot")]
        assert delayed == [11, 12]


async def test_beside_paused_downloads_fewer_may_wait() -> None:
    """Their messages are held too. Otherwise jobs of a full source would keep all new ones out."""
    async with world(total=4, per_source=1) as one:
        limits = SlotLimits(4, 1)
        for number in range(1, limits.paused + 1):
            await one.take(job(number, GOOD))
            slot = one.outcome(number)
            assert isinstance(slot, Slot)
            slot.pause()
        first = limits.paused + 1
        await one.take(*(job(number, SLOW) for number in range(first, limits.held + 1)))
        await one.later(1.0)
        report = one.scheduler.report()
        assert (report.running, report.waiting) == (1, 4)
        assert limits.paused + report.running + report.waiting < limits.held  # the worker sees new jobs


async def test_heartbeats_tell_how_long_the_oldest_job_waits() -> None:
    async with world(total=1) as one:
        await one.take(job(1), job(2))
        await one.later(2.0)
        await one.take(job(3))
        await one.later(1.0)
        [report] = await one.store.workers()
        assert (report.worker, report.waiting, report.longest_wait) == ("worker-1", 2, 3.0)


async def test_heartbeats_begin_at_once_and_end_with_the_worker() -> None:
    store = MemoryStateStore(1_000, StateTimeouts(), time.time)
    scheduler = JobScheduler(store, "worker-1", SlotLimits(1, 1), in_order)
    running = asyncio.create_task(scheduler.run())
    await settle()
    assert [report.worker for report in await store.workers()] == ["worker-1"]
    running.cancel()
    await asyncio.wait({running})
    assert await store.workers() == []


async def test_without_the_state_store_jobs_run_in_the_order_of_their_arrival(tmp_path: object) -> None:
    store = RedisStateStore(f"unix://{tmp_path}/none.sock", "t:", 1_000, StateTimeouts(operation_timeout=0.3))
    await store.open()
    async with world(total=1) as one:
        one.scheduler._state = store
        await one.take(job(1), job(2))
        await one.scheduler.tick()
        await one.end(1)
        assert one.started == [1, 2]
    await store.close()


async def test_a_paused_download_leaves_its_slot_and_takes_one_again_at_once() -> None:
    async with world(total=1, per_source=1) as one:
        await one.take(job(1), job(2), job(3))
        slot = one.outcome(1)
        assert isinstance(slot, Slot)
        slot.pause()
        await settle()
        assert one.started == [1, 2]
        assert one.scheduler.report().running == 1
        slot.resume()
        slot.resume()
        assert one.scheduler.report().running == 2
        await one.end(2)
        assert one.started == [1, 2]  # the slot is taken
        await one.end(1)
        assert one.started == [1, 2, 3]


async def test_a_download_that_ends_while_it_is_paused_frees_nothing_twice() -> None:
    async with world(total=2, per_source=2) as one:
        await one.take(job(1), job(2))
        slot = one.outcome(1)
        assert isinstance(slot, Slot)
        slot.pause()
        slot.move_to("http://other/files/1")
        await one.end(1)
        assert one.scheduler.report().running == 1
        assert one.scheduler.report().full_sources == ()


async def test_of_too_many_paused_downloads_the_first_is_asked_to_end() -> None:
    limits = SlotLimits(1, 9)
    async with world(total=1, per_source=9) as one:
        slots = []
        for number in range(1, limits.paused + 3):
            await one.take(job(number))
            slot = one.outcome(number)
            assert isinstance(slot, Slot)
            slots.append(slot)
            slot.pause()
        assert [slot.is_displaced for slot in slots] == [True, True] + [False] * limits.paused
        slots[0].resume()  # a viewer has come
        assert not slots[0].is_displaced


async def test_what_no_viewer_needs_is_read_only_while_no_job_waits() -> None:
    async with world(total=2, per_source=1) as one:
        await one.take(job(1))
        slot = one.outcome(1)
        assert isinstance(slot, Slot)
        assert one.scheduler.has_spare_slot(slot)
        slot.pause()
        assert one.scheduler.has_spare_slot(slot)
        await one.take(job(2))  # of the same source
        assert not one.scheduler.has_spare_slot(slot)
        await one.take(job(3))
        slot.resume()
        assert not one.scheduler.has_spare_slot(slot)
        await one.end(2)
        await one.end(1)


async def paused(one: World, *spare: int) -> list[Slot]:
    """Downloads that wait for their viewers, one after the other, each with room that it does not use."""
    slots = []
    for number, missing in enumerate(spare, start=1):
        await one.take(job(number))
        slot = one.outcome(number)
        assert isinstance(slot, Slot)
        slot.pause(missing)
        slots.append(slot)
    return slots


async def want(one: World, missing: int, object_id: str = "90") -> None:
    """A job waits for room: so many bytes more than are free."""
    term = await one.store.lead("evictor", 3600)
    assert term is not None
    await one.store.set_reconciled(term)
    free = (await one.store.usage()).free
    await one.store.request_space(ObjectId(object_id), free + missing - footprint(0), 3600)


async def test_paused_downloads_whose_room_others_need_are_asked_to_end_as_many_as_are_needed() -> None:
    async with world(total=1, per_source=9) as one:
        slots = await paused(one, 300, 300, 300)
        await want(one, 500)
        await one.later(MIN_STAY)
        assert not any(slot.is_displaced for slot in slots), "the evictor may find other room"
        await one.later(EVICTION_TIME)
        assert [slot.is_displaced for slot in slots] == [True, True, False]
        await one.later(DISPLACEMENT_TIME / 2)
        assert [slot.is_displaced for slot in slots] == [True, True, False], "their room counts"


async def test_the_room_that_paused_downloads_would_give_is_reported() -> None:
    """The evictor counts on it."""
    async with world(total=1, per_source=9) as one:
        slots = await paused(one, 300, 200)
        assert one.scheduler.report().spare == 0, "they keep their room for a while"
        await one.later(MIN_STAY)
        assert one.scheduler.report().spare == 500
        slots[0].resume()
        assert one.scheduler.report().spare == 200


async def test_downloads_that_do_not_end_do_not_stand_for_others() -> None:
    async with world(total=1, per_source=9) as one:
        slots = await paused(one, 300, 300)
        await want(one, 200)
        await one.later(MIN_STAY)
        await one.later(EVICTION_TIME)
        assert [slot.is_displaced for slot in slots] == [True, False]
        await one.later(DISPLACEMENT_TIME)
        assert [slot.is_displaced for slot in slots] == [True, True]


async def test_none_is_asked_to_end_where_all_together_would_not_be_enough() -> None:
    async with world(total=1, per_source=9) as one:
        slots = await paused(one, 300, 300)
        await want(one, 5000)
        await one.later(MIN_STAY)
        await one.later(EVICTION_TIME)
        assert not any(slot.is_displaced for slot in slots)


async def test_the_second_worker_waits_for_what_the_first_one_gives() -> None:
    async with world(total=1, per_source=9) as one:
        [slot] = await paused(one, 300)
        await want(one, 300)
        await one.store.report_worker(WorkerReport("0", 8, 0, 0, 0.0), 3600)
        await one.later(MIN_STAY)
        await one.later(EVICTION_TIME)
        assert not slot.is_displaced
        await one.later(EVICTION_TIME)
        assert slot.is_displaced


async def test_a_download_keeps_its_room_from_when_it_was_reserved() -> None:
    async with world(total=1, per_source=9) as one:
        [slot] = await paused(one, 300)
        await want(one, 300)
        await one.later(MIN_STAY)
        slot.take_room()
        await one.later(EVICTION_TIME)
        assert not slot.is_displaced
        await one.later(MIN_STAY)
        assert slot.is_displaced


async def test_none_is_asked_to_end_for_room_that_the_evictor_has_made() -> None:
    async with world(total=1, per_source=9) as one:
        [slot] = await paused(one, 300)
        await want(one, 500)
        await one.later(MIN_STAY)
        one.store.tables.space_requests.clear()  # it was granted
        await one.later(EVICTION_TIME)
        await want(one, 500)
        await one.later(0.1)
        assert not slot.is_displaced
        await want(one, 0)
        await one.later(10 * EVICTION_TIME)
        assert not slot.is_displaced


async def test_a_download_keeps_its_room_for_a_while_and_one_that_reads_keeps_it() -> None:
    async with world(total=2, per_source=9) as one:
        await want(one, 200)
        slots = await paused(one, 300)
        await one.take(job(2))
        await one.later(0.1)
        await one.later(EVICTION_TIME)
        assert [slot.is_displaced for slot in slots] == [False]
        await one.later(MIN_STAY)
        assert [slot.is_displaced for slot in slots] == [True]
        slots[0].resume()  # a viewer has come nearer
        await one.later(MIN_STAY)
        assert [slot.is_displaced for slot in slots] == [False]


async def test_a_download_that_has_all_of_its_bytes_gives_no_room() -> None:
    async with world(total=1, per_source=9) as one:
        slots = await paused(one, 0, 300)
        await want(one, 100)
        await one.later(MIN_STAY)
        await one.later(EVICTION_TIME)
        assert [slot.is_displaced for slot in slots] == [False, True]
