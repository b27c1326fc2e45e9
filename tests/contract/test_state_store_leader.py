"""The state store as the evictor uses it: leadership, eviction, adoption. For both adapters."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from distributor_node.shared.domain.eviction import PriorityBasis
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import (
    ACCESS_TIME_RESOLUTION,
    AlreadyStored,
    FetchPhase,
    Granted,
    HeldElsewhere,
    IndexEntry,
    Lease,
    NoSpace,
    PolicyState,
    Term,
)
from tests.contract.state_harness import LIMIT, ONE, THREE, TWO, Harness


class TestLeadership:
    async def test_one_at_a_time(self, harness: Harness) -> None:
        terms = await asyncio.gather(*(harness.store.lead(f"evictor {n}", 60) for n in range(10)))
        [term] = [term for term in terms if term]
        assert await harness.store.lead(term.holder, 60) == term

    async def test_passes_on_when_it_expires(self, harness: Harness) -> None:
        first = await harness.store.lead("evictor-1", 0.1)
        assert first is not None
        taken_over: list[Term] = []

        async def led() -> bool:
            term = await harness.store.lead("evictor-2", 60)
            taken_over.extend([term] if term else [])
            return bool(term)

        await harness.until(led)
        assert taken_over[0].token > first.token
        await harness.store.resign(first)
        assert await harness.store.lead("evictor-1", 60) is None

    async def test_resigned_is_free_at_once(self, harness: Harness) -> None:
        first = await harness.store.lead("evictor-1", 60)
        assert first is not None
        await harness.store.resign(first)
        second = await harness.store.lead("evictor-1", 60)
        assert second is not None
        assert second.token > first.token

    async def test_calls_of_an_old_term_do_nothing(self, harness: Harness) -> None:
        old = await harness.reconciled()
        await harness.stored(ONE, 100)
        await harness.stored(TWO, 100)
        await harness.store.park(await harness.begin_fetch(THREE, 100))
        assert await harness.store.begin_eviction(old, TWO, 0)
        await harness.store.resign(old)
        assert await harness.store.lead("evictor-2", 60)
        before = await harness.dump()
        assert not await harness.store.begin_eviction(old, ONE, 0)
        assert await harness.store.finish_eviction(old, TWO) == 0
        await harness.store.cancel_eviction(old, TWO)
        assert not await harness.store.adopt(old, IndexEntry(ObjectId("4"), 1, 1, 1.0))
        assert not await harness.store.adopt_partial(old, ObjectId("5"), 1)
        assert await harness.store.steal_lease(old, THREE) is None
        await harness.lose("fetches")
        before = await harness.dump()
        assert await harness.store.recount(old) == 0
        await harness.store.set_reconciled(old)
        await harness.store.save_policy(
            old, [IndexEntry(ONE, 100, 9, 9.0)], PolicyState(PriorityBasis(9.0), "")
        )
        await harness.store.resign(old)
        assert await harness.dump() == before


class TestEviction:
    async def test_counts_as_used_until_it_is_finished(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.stored(ONE, 100)
        assert await harness.store.begin_eviction(term, ONE, 0)
        assert not await harness.store.begin_eviction(term, ONE, 0)
        assert await harness.used_and_reserved() == (footprint(100), 0)
        assert isinstance(await harness.store.begin(ONE, 100, "worker-1"), HeldElsewhere)
        assert await harness.store.finish_eviction(term, ONE) == footprint(100)
        assert await harness.store.finish_eviction(term, ONE) == 0
        assert await harness.used_and_reserved() == (0, 0)
        assert isinstance(await harness.store.begin(ONE, 100, "worker-1"), Granted)

    async def test_detached_counts_on_and_can_be_fetched_again(self, harness: Harness) -> None:
        """The old file is still being sent."""
        term = await harness.reconciled()
        await harness.stored(ONE, 100)
        assert not await harness.store.detach_eviction(term, ONE)
        await harness.store.begin_eviction(term, ONE, 0)
        assert not await harness.store.detach_eviction(replace(term, token=term.token - 1), ONE)
        assert await harness.store.detach_eviction(term, ONE)
        assert not await harness.store.detach_eviction(term, ONE)
        usage = await harness.store.usage()
        assert (usage.used, usage.leaving, usage.objects) == (footprint(100), footprint(100), 0)
        assert isinstance(await harness.store.begin(TWO, LIMIT - footprint(100), "worker-1"), NoSpace)
        assert isinstance(await harness.store.begin(ONE, 50, "worker-1"), Granted)

    async def test_cancelled_is_stored_again(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.stored(ONE, 100)
        await harness.store.begin_eviction(term, ONE, 0)
        [[entry]] = [batch async for batch in harness.store.entries()]
        assert entry.evicting
        await harness.store.cancel_eviction(term, ONE)
        assert isinstance(await harness.store.begin(ONE, 100, "worker-1"), AlreadyStored)
        assert await harness.store.finish_eviction(term, ONE) == 0

    async def test_is_rejected_for_what_is_unknown_or_not_idle(self, harness: Harness) -> None:
        term = await harness.reconciled()
        assert not await harness.store.begin_eviction(term, ONE, 0)
        await harness.store.adopt(term, IndexEntry(ONE, 100, 1, time.time() - 30))
        assert not await harness.store.begin_eviction(term, ONE, 60)
        assert await harness.store.begin_eviction(term, ONE, 20)


class TestRecount:
    async def test_finds_no_difference_after_normal_calls(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.stored(ONE, 100)
        await harness.stored(TWO, 200)
        await harness.begin_fetch(THREE, 300)
        await harness.store.begin_eviction(term, TWO, 0)
        await harness.store.claim(ObjectId("4"), "api-1")
        before = await harness.dump()
        assert await harness.store.recount(term) == 0
        assert await harness.dump() == before

    async def test_restores_lost_counters(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.stored(ONE, 100)
        await harness.store.park(await harness.begin_fetch(TWO, 200))
        await harness.lose("usage")
        assert await harness.used_and_reserved() == (0, 0)
        assert await harness.store.recount(term, entries=False) == footprint(200)
        assert await harness.used_and_reserved() == (0, footprint(200))
        assert await harness.store.recount(term) == footprint(100)
        assert await harness.used_and_reserved() == (footprint(100), footprint(200))

    async def test_removes_orphaned_reservations(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.stored(ONE, 100)
        await harness.begin_fetch(TWO, 200)
        await harness.lose("objects")
        await harness.lose("fetches")
        assert await harness.store.recount(term) == footprint(100) + footprint(200)
        assert await harness.used_and_reserved() == (0, 0)

    async def test_over_many_entries_while_they_come_and_go(self, harness: Harness) -> None:
        term = await harness.reconciled()
        for first in range(0, 3000, 500):
            await harness.store.adopt_many(
                term, [IndexEntry(ObjectId(f"o{number}"), 1, 1, 1.0) for number in range(first, first + 500)]
            )
        await harness.lose("usage")

        async def come_and_go() -> None:
            for number in range(100):
                await harness.store.adopt(term, IndexEntry(ObjectId(f"new{number}"), 7, 1, 1.0))
                await harness.other.begin_eviction(term, ObjectId(f"o{number}"), 0)
                await harness.other.finish_eviction(term, ObjectId(f"o{number}"))

        await asyncio.gather(come_and_go(), *(harness.store.recount(term) for _ in range(20)))
        assert await harness.used_and_reserved() == (2900 * footprint(1) + 100 * footprint(7), 0)

    async def test_removed_files_that_are_still_sent_count_as_used(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.stored(ONE, 100)
        await harness.store.set_leaving(term, 5000)
        usage = await harness.store.usage()
        assert (usage.used, usage.leaving) == (footprint(100) + 5000, 5000)
        assert isinstance(await harness.store.begin(TWO, LIMIT - 6000, "worker-1"), NoSpace)
        await harness.store.recount(term)
        assert (await harness.store.usage()).used == footprint(100) + 5000
        await harness.store.set_leaving(replace(term, token=term.token - 1), 0)
        assert (await harness.store.usage()).leaving == 5000

    async def test_churn_reports_what_moved(self, harness: Harness) -> None:
        term = await harness.reconciled()
        before = (await harness.store.usage()).churn
        await harness.stored(ONE, 100)
        await harness.store.begin_eviction(term, ONE, 0)
        await harness.store.finish_eviction(term, ONE)
        assert (await harness.store.usage()).churn - before == 2 * footprint(100)


class TestAdoption:
    async def test_of_a_complete_file_whatever_the_limit_says(self, harness: Harness) -> None:
        term = await harness.reconciled()
        entry = IndexEntry(ONE, 2 * LIMIT, 7, 1234.5, 0.1)
        assert await harness.store.adopt(term, entry)
        assert not await harness.store.adopt(term, entry)
        assert await harness.used_and_reserved() == (footprint(2 * LIMIT), 0)
        [[kept]] = [batch async for batch in harness.store.entries()]
        assert replace(kept, generation=0) == entry
        assert isinstance(await harness.store.begin(TWO, 0, "worker-1"), NoSpace)

    async def test_ends_a_parked_fetch_but_not_a_live_one(self, harness: Harness) -> None:
        term = await harness.reconciled()
        lease = await harness.begin_fetch(ONE, 100)
        assert not await harness.store.adopt(term, IndexEntry(ONE, 100, 1, 1.0))
        await harness.store.park(lease)
        assert await harness.store.adopt(term, IndexEntry(ONE, 100, 1, 1.0))
        assert await harness.used_and_reserved() == (footprint(100), 0)
        assert await harness.phase(ONE) is None

    async def test_ends_a_claim(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.store.park(await harness.begin_fetch(ONE, 100))
        await harness.store.claim(ONE, "api-1")
        assert await harness.store.adopt(term, IndexEntry(ONE, 100, 1, 1.0))
        assert await harness.used_and_reserved() == (footprint(100), 0)

    async def test_of_an_expired_lease(self, brief: Harness) -> None:
        term = await brief.reconciled()
        lease = await brief.begin_fetch(ONE, 100)
        await brief.until_phase(ONE, FetchPhase.PARKED)
        assert await brief.store.adopt(term, IndexEntry(ONE, 100, 1, 1.0))
        assert not await brief.store.commit(lease, time.time())
        assert await brief.used_and_reserved() == (footprint(100), 0)

    async def test_of_a_partial_file_whatever_the_limit_says(self, harness: Harness) -> None:
        term = await harness.reconciled()
        assert await harness.store.adopt_partial(term, ONE, LIMIT)
        assert not await harness.store.adopt_partial(term, ONE, LIMIT)
        assert await harness.phase(ONE) is FetchPhase.PARKED
        assert await harness.used_and_reserved() == (0, footprint(LIMIT))

    async def test_of_a_partial_file_under_a_live_claim(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.store.claim(ONE, "api-1")
        assert await harness.store.adopt_partial(term, ONE, 100)
        assert await harness.phase(ONE) is FetchPhase.CLAIMED
        granted = await harness.store.begin(ONE, 100, "worker-1")
        assert isinstance(granted, Granted)
        assert granted.resumed
        assert not await harness.store.adopt_partial(term, ONE, 100)
        assert await harness.used_and_reserved() == (0, footprint(100))

    async def test_of_a_partial_file_beside_the_whole_object_whose_fetch_ends(self, harness: Harness) -> None:
        """The new entry takes the place of the old one: the bytes are counted once."""
        term = await harness.reconciled()
        assert await harness.store.adopt(term, IndexEntry(ONE, 700, 1, 1.0))
        assert await harness.store.adopt_partial(term, ONE, 300)
        lease = await harness.store.steal_lease(term, ONE)
        assert lease is not None
        assert await harness.store.commit(lease, time.time())
        assert await harness.used_and_reserved() == (footprint(300), 0)

    async def test_stolen_can_be_released(self, harness: Harness) -> None:
        term = await harness.reconciled()
        assert await harness.store.steal_lease(term, ONE) is None
        worker = await harness.begin_fetch(ONE, 100)
        assert await harness.store.steal_lease(term, ONE) is None
        await harness.store.park(worker)
        lease = await harness.store.steal_lease(term, ONE)
        assert lease is not None
        assert lease == Lease(ONE, lease.token, 100, term.holder)
        assert isinstance(await harness.store.begin(ONE, 100, "worker-2"), HeldElsewhere)
        await harness.store.release(lease)
        assert await harness.used_and_reserved() == (0, 0)

    async def test_stolen_makes_no_job_superfluous(self, harness: Harness) -> None:
        """1. A fetch is parked, and its job returns to the queue. 2. A request claims it and cannot publish another.
        3. The evictor measures the file. 4. The job of 1 is delivered.
        """
        term = await harness.reconciled()
        job = (await harness.store.claim(ONE, "api-1")).serial
        granted = await harness.store.begin(ONE, 100, "worker-1", job)
        assert isinstance(granted, Granted)
        await harness.store.park(granted.lease)
        assert (await harness.store.claim(ONE, "api-1")).won
        await harness.store.release_claim(ONE, "api-1")
        lease = await harness.store.steal_lease(term, ONE)
        assert lease is not None
        assert isinstance(await harness.store.begin(ONE, 100, "worker-1", job), HeldElsewhere)
        await harness.store.park(lease, 50)
        assert isinstance(await harness.store.begin(ONE, 100, "worker-1", job), Granted)

    async def test_an_expired_lease_can_be_stolen(self, brief: Harness) -> None:
        term = await brief.reconciled()
        lost = await brief.begin_fetch(ONE, 100)
        await brief.until_phase(ONE, FetchPhase.PARKED)
        assert await brief.store.steal_lease(term, ONE)
        assert not await brief.store.renew(lost)


class TestPolicy:
    async def test_starts_from_nothing(self, harness: Harness) -> None:
        assert await harness.store.load_policy_state() == PolicyState()

    async def test_policy_data_is_saved_and_removed_entries_are_skipped(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.stored(ONE, 100)
        await harness.stored(TWO, 100)
        await harness.store.begin_eviction(term, TWO, 0)
        changed = [IndexEntry(known, 5, 3, 1234.25, 0.1) for known in (ONE, TWO, THREE)]
        await harness.store.save_policy(term, changed, PolicyState(PriorityBasis(0.1), ""))
        kept = {entry.object_id: entry async for batch in harness.store.entries() for entry in batch}
        assert set(kept) == {ONE, TWO}
        for entry in kept.values():
            assert (entry.size, entry.frequency, entry.last_access, entry.priority) == (100, 3, 1234.25, 0.1)
        assert kept[TWO].evicting
        assert await harness.store.finish_eviction(term, TWO) == footprint(100)


class TestManyAtOnce:
    async def test_batch_adoption_equals_one_by_one(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.stored(ONE, 100)
        await harness.store.park(await harness.begin_fetch(TWO, 70))
        entries = [IndexEntry(known, 300, 1, 1.0, 0.5) for known in (ONE, TWO, THREE, THREE)]
        assert list(await harness.store.adopt_many(term, entries)) == [False, True, True, False]
        assert await harness.used_and_reserved() == (footprint(100) + 2 * footprint(300), 0)
        generations = await harness.entry_generations()
        assert len(set(generations.values())) == 3
        assert list(await harness.store.adopt_many(term, [])) == []

    async def test_batch_eviction_equals_one_by_one(self, harness: Harness) -> None:
        term = await harness.reconciled()
        four, five = ObjectId("4"), ObjectId("5")
        for object_id, idle in ((ONE, 30), (TWO, 30), (THREE, 1)):
            await harness.store.adopt(term, IndexEntry(object_id, 100, 1, time.time() - idle))
        await harness.store.change_pins([TWO])
        before = await harness.entry_generations()
        asked = [ONE, TWO, THREE, four, ONE]
        assert list(await harness.store.begin_evictions(term, asked, 20)) == [
            True,
            False,
            False,
            False,
            False,
        ]
        assert (await harness.entry_generations())[ONE] > before[ONE]
        finished = await harness.store.finish_evictions(term, [ONE, TWO, five])
        assert list(finished) == [footprint(100), 0, 0]
        assert await harness.used_and_reserved() == (2 * footprint(100), 0)
        assert list(await harness.store.begin_evictions(term, [], 0)) == []
        assert list(await harness.store.finish_evictions(term, [])) == []

    async def test_of_an_old_term_are_left_alone(self, harness: Harness) -> None:
        old = await harness.reconciled()
        await harness.stored(ONE, 100)
        await harness.store.resign(old)
        before = await harness.dump()
        assert list(await harness.store.adopt_many(old, [IndexEntry(TWO, 1, 1, 1.0)])) == [False]
        assert list(await harness.store.begin_evictions(old, [ONE], 0)) == [False]
        assert list(await harness.store.finish_evictions(old, [ONE])) == [0]
        assert await harness.dump() == before


class TestStoredValues:
    async def test_are_stored_unchanged(self, harness: Harness) -> None:
        term = await harness.reconciled()
        entry = IndexEntry(ONE, 2**41 + 1, 2**31 - 1, 1_795_492_317.123456, 123456789.12345679)
        await harness.store.adopt(term, entry)
        [[kept]] = [batch async for batch in harness.store.entries()]
        assert (kept.size, kept.frequency, kept.priority) == (entry.size, entry.frequency, entry.priority)
        assert 0 <= entry.last_access - kept.last_access <= ACCESS_TIME_RESOLUTION
