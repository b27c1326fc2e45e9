"""When a request does not wait for a fetch to begin."""

from __future__ import annotations

import time

import pytest

from distributor_node.services.api.fetch_capacity import (
    START_GRACE,
    TRIAL_INTERVAL,
    FetchCapacity,
    VainReason,
)
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.ports.state_store import StateStore, WorkerReport

ONE, TWO, THREE, FOUR = map(ObjectId, "1234")
SLOW, GOOD = "http://slow:80/files/1", "http://good:80/files/1"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class World:
    """A capacity and the store that it reads, with a clock of their own."""

    def __init__(self, store: StateStore | None = None) -> None:
        self.clock = Clock()
        self.store: StateStore = store or MemoryStateStore(1_000_000, StateTimeouts(), self.clock)
        self.capacity = FetchCapacity(self.store, self.clock)

    async def report(
        self, worker: str = "w", running: int = 0, wait: float = 0.0, full: tuple[str, ...] = ()
    ) -> None:
        waiting = 1 if wait else 0
        await self.store.report_worker(WorkerReport(worker, 8, running, waiting, wait, full), 3.5)
        await self.capacity.refresh()

    async def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        await self.capacity.refresh()

    def wait_in_vain(self, object_id: ObjectId, seconds: float = 3.0) -> None:
        began_at = self.clock.now
        self.clock.now += seconds
        self.capacity.record_vain(object_id, began_at)


@pytest.fixture
def world() -> World:
    return World()


async def test_without_any_knowledge_a_request_waits(world: World) -> None:
    assert world.capacity.vain_reason(ONE) is None
    assert world.capacity.workers_alive is None


async def test_just_after_the_start_a_worker_may_be_about_to_begin(world: World) -> None:
    """A standalone node answers requests before its fetcher has sent a heartbeat."""
    await world.capacity.refresh()
    assert world.capacity.vain_reason(ONE) is None
    await world.pass_time(START_GRACE - 0.1)
    assert world.capacity.vain_reason(ONE) is None


async def test_without_a_worker_no_request_waits(world: World) -> None:
    await world.pass_time(START_GRACE)
    assert world.capacity.vain_reason(ONE) is VainReason.NO_WORKER
    assert world.capacity.vain_reason(ONE, waits=True) is VainReason.NO_WORKER
    assert world.capacity.workers_alive == 0


async def test_a_worker_whose_heartbeat_has_expired_is_not_waited_for(world: World) -> None:
    await world.report()
    assert world.capacity.vain_reason(ONE) is None
    await world.pass_time(4.0)
    assert world.capacity.vain_reason(ONE) is VainReason.NO_WORKER
    await world.report()
    assert world.capacity.vain_reason(ONE) is None


async def test_full_slots_are_waited_for_while_their_queue_moves(world: World) -> None:
    await world.report(running=8)
    assert world.capacity.vain_reason(ONE) is None
    await world.report(running=8, wait=0.2)
    assert world.capacity.vain_reason(ONE) is None
    await world.report(running=8, wait=2.0)
    assert world.capacity.vain_reason(ONE) is VainReason.BUSY


async def test_one_worker_with_a_free_slot_is_enough(world: World) -> None:
    await world.report("full", running=8, wait=9.0)
    await world.report("free", running=7)
    assert world.capacity.vain_reason(ONE) is None
    assert world.capacity.waiting == 1
    assert world.capacity.running == 15
    assert world.capacity.free == 1


async def test_slots_of_full_sources_count_for_objects_of_no_other_source(world: World) -> None:
    await world.report(running=3, wait=2.0, full=("slow:80",))
    assert world.capacity.vain_reason(ONE, [SLOW]) is VainReason.BUSY
    assert world.capacity.vain_reason(ONE, [SLOW, GOOD]) is None
    assert world.capacity.vain_reason(ONE, []) is None


async def test_an_object_that_did_not_begin_in_time_is_not_waited_for_until_it_begins(world: World) -> None:
    await world.report()
    world.wait_in_vain(ONE)
    await world.report()
    assert world.capacity.vain_reason(ONE) is VainReason.NOT_BEGUN
    assert world.capacity.vain_reason(TWO) is None
    world.capacity.record_begun(ONE)
    assert world.capacity.vain_reason(ONE) is None


async def test_after_one_wait_in_vain_without_a_sign_of_life_none_waits(world: World) -> None:
    await world.report()
    world.clock.now += 0.5
    world.wait_in_vain(ONE)
    for other in (TWO, THREE, FOUR):
        assert world.capacity.vain_reason(other) is VainReason.NOT_CONSUMED
    world.capacity.record_begun(TWO)
    assert world.capacity.vain_reason(THREE) is None


async def test_without_the_state_store_one_wait_in_vain_is_enough(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("no-redis")
    store = RedisStateStore(f"unix://{folder}/none.sock", "t:", 1_000, StateTimeouts(operation_timeout=0.3))
    await store.open()
    world = World(store)
    began = time.monotonic()
    await world.capacity.refresh()
    assert world.capacity.workers_alive is None
    assert world.capacity.vain_reason(ONE) is None
    world.wait_in_vain(ONE)
    assert world.capacity.vain_reason(TWO) is VainReason.NOT_CONSUMED
    assert time.monotonic() - began < 3
    await store.close()


async def test_a_free_worker_that_takes_no_job_is_believed_three_times(world: World) -> None:
    for object_id in (ONE, TWO, THREE):
        await world.report()
        assert world.capacity.vain_reason(object_id) is None
        assert not world.capacity.not_consumed
        world.clock.now += 0.5
        began_at = world.clock.now
        world.clock.now += 3.0
        await world.report()
        world.capacity.record_vain(object_id, began_at)
    assert world.capacity.vain_reason(FOUR) is VainReason.NOT_CONSUMED
    assert world.capacity.not_consumed


async def test_one_request_at_a_time_learns_whether_fetches_begin_again(world: World) -> None:
    await world.report()
    world.clock.now += 0.5
    world.wait_in_vain(ONE)
    world.clock.now += TRIAL_INTERVAL
    await world.report()
    world.clock.now += 4.0
    world.wait_in_vain(TWO, 0.0)
    world.clock.now += TRIAL_INTERVAL
    assert world.capacity.vain_reason(THREE) is None
    assert world.capacity.vain_reason(THREE, waits=True) is None
    assert world.capacity.vain_reason(FOUR) is VainReason.NOT_CONSUMED
