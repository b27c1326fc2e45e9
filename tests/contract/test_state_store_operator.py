"""The state store as the operator API uses it: operator state, pins, purges, warming, tokens. For both adapters."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.operator_state import OperatorState, OperatorStateSnapshot, WarmingScope
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import Announcement, PurgeRequest, Topic
from tests.contract.state_harness import ONE, THREE, TWO, Harness

STOPPED = OperatorState(
    stopped=True, worker_ordered=True, worker_id=7, buckets_ordered=True, buckets=frozenset({"0:1"})
)


class TestOperatorState:
    async def test_are_empty_at_first(self, harness: Harness) -> None:
        assert await harness.store.operator_state() is None

    async def test_are_seen_by_all(self, harness: Harness) -> None:
        written = await harness.store.change_operator_state(0, STOPPED)
        assert written is not None
        assert written.version > 0
        assert await harness.other.operator_state() == written
        assert replace(written, version=0) == STOPPED

    async def test_are_changed_only_from_the_version_that_was_seen(self, harness: Harness) -> None:
        first = await harness.store.change_operator_state(0, STOPPED)
        assert first is not None
        assert await harness.other.change_operator_state(0, OperatorState()) is None
        second = await harness.other.change_operator_state(first.version, OperatorState(draining=True))
        assert second is not None
        assert second.version > first.version
        assert await harness.store.operator_state() == second

    async def test_one_of_many_at_once_wins(self, harness: Harness) -> None:
        changes = (harness.store.change_operator_state(0, OperatorState(shutdowns=n)) for n in range(10))
        assert sum(changed is not None for changed in await asyncio.gather(*changes)) == 1

    async def test_changes_are_announced(self, harness: Harness) -> None:
        async with harness.other.listen() as news:
            assert await anext(news) == Announcement(Topic.SETTINGS_CHANGED)
            await harness.store.change_operator_state(0, STOPPED)
            assert await anext(news) == Announcement(Topic.SETTINGS_CHANGED)

    async def test_a_backup_is_restored_only_if_there_is_no_state(self, harness: Harness) -> None:
        snapshot = OperatorStateSnapshot(replace(STOPPED, version=5), frozenset({ONE, TWO}))
        assert await harness.store.restore_operator_state(snapshot)
        restored = await harness.store.operator_state()
        assert restored is not None
        assert replace(restored, version=0) == STOPPED
        assert await harness.store.pinned() == {ONE, TWO}
        assert not await harness.other.restore_operator_state(
            OperatorStateSnapshot(OperatorState(), frozenset({THREE}))
        )
        assert await harness.store.operator_state() == restored
        assert await harness.store.pinned() == {ONE, TWO}


class TestPins:
    async def test_are_counted_once(self, harness: Harness) -> None:
        assert await harness.store.change_pins(pin=[ONE, TWO]) == {ONE, TWO}
        assert await harness.other.change_pins(pin=[TWO, THREE]) == {THREE}
        assert await harness.store.change_pins(unpin=[ONE, ObjectId("9")]) == {ONE}
        assert await harness.store.pinned() == {TWO, THREE}

    async def test_increment_the_version_and_leave_the_operator_state_unchanged(
        self, harness: Harness
    ) -> None:
        await harness.store.change_pins(pin=[ONE])
        first = await harness.store.operator_state()
        assert first is not None
        stopped = await harness.store.change_operator_state(first.version, STOPPED)
        await harness.store.change_pins(pin=[ONE])
        assert await harness.store.operator_state() == stopped
        await harness.store.change_pins(unpin=[ONE])
        last = await harness.store.operator_state()
        assert last is not None
        assert stopped is not None
        assert last.version > stopped.version
        assert replace(last, version=0) == STOPPED

    async def test_keep_an_object_from_eviction_but_not_from_removal(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.stored(ONE, 100)
        await harness.store.change_pins(pin=[ONE])
        assert not await harness.store.begin_eviction(term, ONE, 0)
        assert await harness.used_and_reserved() == (footprint(100), 0)
        assert await harness.store.begin_eviction(term, ONE, 0, even_pinned=True)
        assert await harness.store.finish_eviction(term, ONE) == footprint(100)
        assert await harness.store.pinned() == {ONE}

    async def test_unpinned_it_may_be_evicted(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.stored(ONE, 100)
        await harness.store.change_pins(pin=[ONE])
        await harness.store.change_pins(unpin=[ONE])
        assert await harness.store.begin_eviction(term, ONE, 0)


class TestPurges:
    async def test_are_pending_until_they_are_completed(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.other.request_purges([ONE, TWO, THREE])
        requests = await harness.store.pending_purges(10)
        assert {request.object_id for request in requests} == {ONE, TWO, THREE}
        assert len(await harness.store.pending_purges(2)) == 2
        for request in requests:
            await harness.store.complete_purge(term, request)
        assert not await harness.store.pending_purges(10)

    async def test_a_later_purge_request_stays(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.store.request_purges([ONE])
        [earlier] = await harness.store.pending_purges(10)
        await harness.store.request_purges([ONE])
        await harness.store.complete_purge(term, earlier)
        [later] = await harness.store.pending_purges(10)
        assert later.serial > earlier.serial

    async def test_are_completed_by_the_leader_only(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.store.request_purges([ONE])
        [request] = await harness.store.pending_purges(10)
        await harness.store.resign(term)
        await harness.store.complete_purge(term, request)
        assert await harness.store.pending_purges(10) == [PurgeRequest(ONE, request.serial)]

    async def test_are_announced(self, harness: Harness) -> None:
        async with harness.other.listen() as news:
            await anext(news)
            await harness.store.request_purges([ONE])
            assert (await anext(news)).topic is Topic.PURGE_REQUESTED


class TestWarming:
    async def test_one_at_a_time(self, harness: Harness) -> None:
        assert await harness.store.warming() is None
        assert await harness.store.lease_warming("api-1", 60) is None
        ordered = await harness.store.start_warming(WarmingScope(bucket_id="0:1"))
        assert ordered is not None
        assert ordered.state == "waiting"
        assert await harness.other.warming() == ordered
        assert await harness.other.start_warming(WarmingScope()) is None
        assert await harness.store.lease_warming("api-1", 60) == ordered
        over = replace(
            ordered,
            state="finished",
            total=3,
            done=1,
            skipped=1,
            failed=1,
            skipped_for={"unknown": 1},
            not_warmed=(("7", "unknown"), ("8", "failed")),
        )
        assert await harness.store.lease_warming("api-1", 60, over) == over
        assert await harness.other.warming() == over
        assert await harness.store.lease_warming("api-1", 60) is None
        again = await harness.store.start_warming(WarmingScope((ONE, TWO)))
        assert again is not None
        assert again.serial > ordered.serial

    async def test_is_leased_by_one(self, harness: Harness) -> None:
        await harness.store.start_warming(WarmingScope())
        assert await harness.store.lease_warming("api-1", 60)
        assert await harness.other.lease_warming("api-2", 60) is None
        assert await harness.store.lease_warming("api-1", 60)

    async def test_passes_on_when_its_holder_stops_renewing(self, harness: Harness) -> None:
        ordered = await harness.store.start_warming(WarmingScope())
        assert ordered is not None
        progress = replace(ordered, state="fetching", total=9)
        assert await harness.store.lease_warming("api-1", 0.2, progress) == progress

        async def taken_over() -> bool:
            return await harness.other.lease_warming("api-2", 60) == progress

        await harness.until(taken_over)
        assert await harness.store.lease_warming("api-1", 60, progress) is None

    async def test_progress_of_another_holder_is_not_written(self, harness: Harness) -> None:
        ordered = await harness.store.start_warming(WarmingScope())
        assert ordered is not None
        stale = replace(ordered, serial=ordered.serial - 1, total=5)
        assert await harness.store.lease_warming("api-1", 60, stale) == ordered


class TestTokenIds:
    async def test_can_be_consumed_only_once(self, harness: Harness) -> None:
        await harness.store.lead("evictor-1", 60)  # the store has begun
        uses = [store.consume_token_id("a", time.time(), 60) for store in (harness.store, harness.other) * 5]
        assert sum(await asyncio.gather(*uses)) == 1
        assert await harness.store.consume_token_id("b", time.time(), 60)

    async def test_expire(self, harness: Harness) -> None:
        await harness.store.lead("evictor-1", 60)  # the store has begun
        assert await harness.store.consume_token_id("a", time.time(), 1.0)

        async def forgotten() -> bool:
            return await harness.other.consume_token_id("a", time.time(), 60)

        await harness.until(forgotten)

    async def test_issued_before_the_store_began_are_rejected(self, harness: Harness) -> None:
        await harness.store.lead("evictor-1", 60)
        assert not await harness.store.consume_token_id("a", time.time() - 100, 300)
        assert await harness.store.consume_token_id("a", time.time() + 1, 300)
