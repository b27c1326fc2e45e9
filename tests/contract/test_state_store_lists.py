"""Space requests, lists, the access log and announcements of the state store. For both adapters."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

from distributor_node.shared.domain.eviction import PriorityBasis
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import (
    Access,
    Announcement,
    FetchPhase,
    IndexEntry,
    PolicyState,
    Topic,
)
from tests.contract.state_harness import ONE, TWO, Harness

BASIS = PriorityBasis(1.5, "gdsf", 12_345.75, views=7.5, viewed_bytes=1 / 3, exponent=0.7, first_weight=0.3)


class TestSpaceRequests:
    async def test_add_up_with_one_per_object(self, harness: Harness) -> None:
        await harness.store.request_space(ONE, 100, 60)
        await harness.store.request_space(TWO, 200, 60)
        await harness.store.request_space(TWO, 300, 60)
        assert sum(await harness.store.space_requests()) == footprint(100) + footprint(300)
        assert sorted(await harness.store.space_requests()) == [footprint(100), footprint(300)]

    async def test_expire(self, harness: Harness) -> None:
        await harness.store.request_space(ONE, 100, 0.1)
        await harness.store.request_space(TWO, 200, 60)

        async def only_the_second() -> bool:
            return sum(await harness.store.space_requests()) == footprint(200)

        await harness.until(only_the_second)


class TestLists:
    async def test_entries_are_all_there(self, harness: Harness) -> None:
        term = await harness.reconciled()
        wanted = {ObjectId(f"object-{number}") for number in range(1500)}
        for object_id in wanted:
            await harness.store.adopt(term, IndexEntry(object_id, 1, 1, 1.0))
        assert set(await harness.entry_generations()) == wanted
        assert (await harness.store.usage()).objects == 1500

    async def test_a_reader_of_entries_may_leave(self, harness: Harness) -> None:
        """Nothing goes on for it: the page that was asked for ahead is given up."""
        term = await harness.reconciled()
        ids = [ObjectId(f"object-{number}") for number in range(5000)]
        for at in range(0, len(ids), 1000):
            await harness.store.adopt_many(
                term, [IndexEntry(object_id, 1, 1, 1.0) for object_id in ids[at : at + 1000]]
            )
        before = asyncio.all_tasks()
        async with aclosing(harness.other.entries()) as batches:  # type: ignore[type-var]
            async for batch in batches:
                assert 0 < len(batch) < len(ids)
                break
        assert asyncio.all_tasks() <= before
        assert set(await harness.entry_generations()) == set(ids)

    async def test_one_entry_is_what_the_whole_list_says_of_it(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.store.adopt(term, IndexEntry(ONE, 123, 4, 1000.5, 2.25))
        await harness.store.adopt(term, IndexEntry(TWO, 5, 1, 1.0))
        assert await harness.store.begin_eviction(term, TWO, 0.0)
        listed = {entry.object_id: entry async for batch in harness.other.entries() for entry in batch}
        assert await harness.other.entry(ONE) == listed[ONE]
        assert await harness.other.entry(TWO) == listed[TWO]
        assert (listed[ONE].size, listed[ONE].frequency, listed[ONE].last_access) == (123, 4, 1000.5)
        assert (listed[ONE].priority, listed[TWO].evicting) == (2.25, True)
        assert await harness.other.entry(ObjectId("absent")) is None

    async def test_fetches_lists_only_active_ones(self, brief: Harness) -> None:
        await brief.reconciled()
        await brief.store.claim(ONE, "api-1")
        await brief.begin_fetch(TWO, 100)
        assert {fetch.object_id for fetch in await brief.store.fetches()} == {ONE, TWO}
        await brief.until_phase(ONE, None)
        await brief.until_phase(TWO, FetchPhase.PARKED)
        [parked] = await brief.store.fetches()
        assert (parked.object_id, parked.phase, parked.size) == (TWO, FetchPhase.PARKED, 100)
        assert parked.lease_left == 0
        assert (await brief.store.usage()).fetches == 0


class TestAccessLog:
    async def test_is_read_in_order_from_a_position(self, harness: Harness) -> None:
        batches = [[Access(ONE, number, 1000.5 + number), Access(TWO, 1, 2.0)] for number in range(5)]
        for batch in batches:
            await harness.other.record_accesses(batch)
        position, first = await harness.store.read_accesses("", 2)
        assert list(first) == batches[0] + batches[1]
        position, rest = await harness.store.read_accesses(position, 100)
        assert list(rest) == batches[2] + batches[3] + batches[4]
        assert await harness.store.read_accesses(position, 100) == (position, [])

    async def test_an_empty_flush_does_nothing(self, harness: Harness) -> None:
        await harness.store.record_accesses([])
        assert await harness.store.read_accesses("", 10) == ("", [])

    async def test_is_dropped_before_the_saved_position(self, harness: Harness) -> None:
        term = await harness.reconciled()
        positions = [""]
        for number in range(4):
            await harness.store.record_accesses([Access(ONE, number, 1.0)])
            positions.append((await harness.store.read_accesses(positions[-1], 1))[0])
        await harness.store.save_policy(term, [], PolicyState(BASIS, positions[3]))
        assert await harness.store.load_policy_state() == PolicyState(BASIS, positions[3])
        _, left = await harness.store.read_accesses("", 10)
        assert [access.views for access in left] == [2, 3]
        _, left = await harness.store.read_accesses(positions[3], 10)
        assert [access.views for access in left] == [3]


class TestAnnouncements:
    async def test_reach_the_other_processes(self, harness: Harness) -> None:
        async with asyncio.timeout(60), harness.other.listen() as heard:
            assert await anext(heard) == Announcement(Topic.SETTINGS_CHANGED)
            await harness.store.announce(Announcement(Topic.SPACE_FREED))
            assert await anext(heard) == Announcement(Topic.SPACE_FREED)

    async def test_come_with_the_verbs(self, harness: Harness) -> None:
        term = await harness.reconciled()
        async with asyncio.timeout(60), harness.other.listen() as heard:
            await anext(heard)
            await harness.store.request_space(ONE, 100, 60)
            assert await anext(heard) == Announcement(Topic.SPACE_REQUESTED, ONE)
            lease = await harness.begin_fetch(ONE, 100)  # not announced: nothing of it can be sent yet
            await harness.store.renew(lease, "http://source-1/files/1")
            assert await anext(heard) == Announcement(Topic.FETCH_CHANGED, ONE)
            await harness.store.commit(lease, time.time())
            assert await anext(heard) == Announcement(Topic.FETCH_CHANGED, ONE)
            await harness.store.begin_eviction(term, ONE, 0)
            await harness.store.finish_eviction(term, ONE)
            assert await anext(heard) == Announcement(Topic.SPACE_FREED, ONE)
            parked = await harness.begin_fetch(TWO, 100)
            await harness.store.park(parked)
            assert await anext(heard) == Announcement(Topic.FETCH_CHANGED, TWO)
            await harness.begin_fetch(TWO, 100)  # of the bytes that are there, some can be sent
            assert await anext(heard) == Announcement(Topic.FETCH_CHANGED, TWO)

    async def test_a_slow_reader_loses_the_oldest_events(self, harness: Harness) -> None:
        async with asyncio.timeout(60), harness.store.listen() as heard:
            for number in range(1500):
                await harness.store.announce(Announcement(Topic.FETCH_CHANGED, str(number)))
            last = Announcement(Topic.FETCH_CHANGED, "1499")
            received = 0
            while await anext(heard) != last:
                received += 1
            assert received < 1500


class TestServerStats:
    async def test_are_available_where_there_is_a_server(self, harness: Harness) -> None:
        before = await harness.store.server_stats()
        await harness.store.usage()
        after = await harness.store.server_stats()
        if before is None or after is None:
            assert before is after
            return
        assert after.memory > 100_000
        assert after.memory_limit == 0
        assert after.clients >= 1
        assert after.commands > before.commands
        assert after.saving
