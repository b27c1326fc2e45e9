"""The operator's part of the state store: orders, pins, purges, warming, tokens."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from shared.domain.objects import ObjectId
from shared.domain.orders import OperatorState, OperatorStateSnapshot
from shared.domain.space import footprint
from shared.domain.warming import WarmingScope
from shared.ports.order_book import PurgeWish
from shared.ports.state_store import Announcement, Topic
from tests.contract.state_world import ONE, THREE, TWO, World

STOPPED = OperatorState(
    stopped=True, worker_ordered=True, worker_id=7, buckets_ordered=True, buckets=frozenset({"0:1"})
)


class TestOperatorState:
    async def test_there_are_none_at_first(self, world: World) -> None:
        assert await world.store.operator_state() is None

    async def test_are_seen_by_all(self, world: World) -> None:
        written = await world.store.change_operator_state(0, STOPPED)
        assert written is not None
        assert written.version > 0
        assert await world.other.operator_state() == written
        assert replace(written, version=0) == STOPPED

    async def test_are_changed_from_the_version_that_was_seen_alone(self, world: World) -> None:
        first = await world.store.change_operator_state(0, STOPPED)
        assert first is not None
        assert await world.other.change_operator_state(0, OperatorState()) is None
        second = await world.other.change_operator_state(first.version, OperatorState(draining=True))
        assert second is not None
        assert second.version > first.version
        assert await world.store.operator_state() == second

    async def test_one_of_many_at_once_wins(self, world: World) -> None:
        changes = (world.store.change_operator_state(0, OperatorState(shutdowns=n)) for n in range(10))
        assert sum(changed is not None for changed in await asyncio.gather(*changes)) == 1

    async def test_changes_are_announced(self, world: World) -> None:
        async with world.other.listen() as news:
            assert await anext(news) == Announcement(Topic.SETTINGS_CHANGED)
            await world.store.change_operator_state(0, STOPPED)
            assert await anext(news) == Announcement(Topic.SETTINGS_CHANGED)

    async def test_a_copy_is_taken_over_only_if_there_are_none(self, world: World) -> None:
        snapshot = OperatorStateSnapshot(replace(STOPPED, version=5), frozenset({ONE, TWO}))
        assert await world.store.restore_operator_state(snapshot)
        restored = await world.store.operator_state()
        assert restored is not None
        assert replace(restored, version=0) == STOPPED
        assert await world.store.pinned() == {ONE, TWO}
        assert not await world.other.restore_operator_state(
            OperatorStateSnapshot(OperatorState(), frozenset({THREE}))
        )
        assert await world.store.operator_state() == restored
        assert await world.store.pinned() == {ONE, TWO}


class TestPins:
    async def test_are_counted_once(self, world: World) -> None:
        assert await world.store.change_pins(pin=[ONE, TWO]) == 2
        assert await world.other.change_pins(pin=[TWO, THREE]) == 1
        assert await world.store.change_pins(unpin=[ONE, ObjectId("9")]) == 1
        assert await world.store.pinned() == {TWO, THREE}

    async def test_give_the_orders_a_new_version_and_leave_them_as_they_are(self, world: World) -> None:
        await world.store.change_pins(pin=[ONE])
        first = await world.store.operator_state()
        assert first is not None
        stopped = await world.store.change_operator_state(first.version, STOPPED)
        await world.store.change_pins(pin=[ONE])
        assert await world.store.operator_state() == stopped
        await world.store.change_pins(unpin=[ONE])
        last = await world.store.operator_state()
        assert last is not None
        assert stopped is not None
        assert last.version > stopped.version
        assert replace(last, version=0) == STOPPED

    async def test_keep_an_object_from_eviction_but_not_from_removal(self, world: World) -> None:
        term = await world.reconciled()
        await world.stored(ONE, 100)
        await world.store.change_pins(pin=[ONE])
        assert not await world.store.begin_eviction(term, ONE, 0)
        assert await world.taken() == (footprint(100), 0)
        assert await world.store.begin_eviction(term, ONE, 0, even_pinned=True)
        assert await world.store.finish_eviction(term, ONE) == footprint(100)
        assert await world.store.pinned() == {ONE}

    async def test_unpinned_it_may_go(self, world: World) -> None:
        term = await world.reconciled()
        await world.stored(ONE, 100)
        await world.store.change_pins(pin=[ONE])
        await world.store.change_pins(unpin=[ONE])
        assert await world.store.begin_eviction(term, ONE, 0)


class TestPurges:
    async def test_are_wanted_until_they_are_ended(self, world: World) -> None:
        term = await world.reconciled()
        await world.other.want_purges([ONE, TWO, THREE])
        wishes = await world.store.purges_wanted(10)
        assert {wish.object_id for wish in wishes} == {ONE, TWO, THREE}
        assert len(await world.store.purges_wanted(2)) == 2
        for wish in wishes:
            await world.store.end_purge(term, wish)
        assert not await world.store.purges_wanted(10)

    async def test_a_later_wish_stays(self, world: World) -> None:
        term = await world.reconciled()
        await world.store.want_purges([ONE])
        [earlier] = await world.store.purges_wanted(10)
        await world.store.want_purges([ONE])
        await world.store.end_purge(term, earlier)
        [later] = await world.store.purges_wanted(10)
        assert later.serial > earlier.serial

    async def test_are_ended_by_the_leader_alone(self, world: World) -> None:
        term = await world.reconciled()
        await world.store.want_purges([ONE])
        [wish] = await world.store.purges_wanted(10)
        await world.store.resign(term)
        await world.store.end_purge(term, wish)
        assert await world.store.purges_wanted(10) == [PurgeWish(ONE, wish.serial)]

    async def test_are_announced(self, world: World) -> None:
        async with world.other.listen() as news:
            await anext(news)
            await world.store.want_purges([ONE])
            assert (await anext(news)).topic is Topic.PURGE_WANTED


class TestWarming:
    async def test_one_at_a_time(self, world: World) -> None:
        assert await world.store.warming() is None
        assert await world.store.lease_warming("api-1", 60) is None
        ordered = await world.store.start_warming(WarmingScope(bucket_id="0:1"))
        assert ordered is not None
        assert ordered.state == "waiting"
        assert await world.other.warming() == ordered
        assert await world.other.start_warming(WarmingScope()) is None
        assert await world.store.lease_warming("api-1", 60) == ordered
        over = replace(ordered, state="finished", total=3, done=1, skipped=1, failed=1)
        assert await world.store.lease_warming("api-1", 60, over) == over
        assert await world.other.warming() == over
        assert await world.store.lease_warming("api-1", 60) is None
        again = await world.store.start_warming(WarmingScope((ONE, TWO)))
        assert again is not None
        assert again.serial > ordered.serial

    async def test_is_tended_by_one(self, world: World) -> None:
        await world.store.start_warming(WarmingScope())
        assert await world.store.lease_warming("api-1", 60)
        assert await world.other.lease_warming("api-2", 60) is None
        assert await world.store.lease_warming("api-1", 60)

    async def test_passes_on_when_its_holder_falls_silent(self, world: World) -> None:
        ordered = await world.store.start_warming(WarmingScope())
        assert ordered is not None
        progress = replace(ordered, state="fetching", total=9)
        assert await world.store.lease_warming("api-1", 0.2, progress) == progress

        async def taken_over() -> bool:
            return await world.other.lease_warming("api-2", 60) == progress

        await world.until(taken_over)
        assert await world.store.lease_warming("api-1", 60, progress) is None

    async def test_progress_of_another_one_is_not_written(self, world: World) -> None:
        ordered = await world.store.start_warming(WarmingScope())
        assert ordered is not None
        stale = replace(ordered, serial=ordered.serial - 1, total=5)
        assert await world.store.lease_warming("api-1", 60, stale) == ordered


class TestTickets:
    async def test_can_be_used_once_by_anybody(self, world: World) -> None:
        uses = [store.consume_token_id("a", time.time(), 60) for store in (world.store, world.other) * 5]
        assert sum(await asyncio.gather(*uses)) == 1
        assert await world.store.consume_token_id("b", time.time(), 60)

    async def test_are_forgotten_after_a_while(self, world: World) -> None:
        assert await world.store.consume_token_id("a", time.time(), 0.2)

        async def forgotten() -> bool:
            return await world.other.consume_token_id("a", time.time(), 60)

        await world.until(forgotten)
