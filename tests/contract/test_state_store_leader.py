"""Leadership, eviction, adoption: the evictor's side of the state store, for both adapters."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from shared.domain.objects import ObjectId
from shared.domain.space import footprint
from shared.ports.state_store import (
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
from tests.contract.state_world import LIMIT, ONE, THREE, TWO, World


class TestLeadership:
    async def test_one_at_a_time(self, world: World) -> None:
        terms = await asyncio.gather(*(world.store.lead(f"evictor {n}", 60) for n in range(10)))
        [term] = [term for term in terms if term]
        assert await world.store.lead(term.holder, 60) == term

    async def test_passes_on_when_it_runs_out(self, world: World) -> None:
        first = await world.store.lead("evictor-1", 0.1)
        assert first is not None
        taken_over: list[Term] = []

        async def led() -> bool:
            term = await world.store.lead("evictor-2", 60)
            taken_over.extend([term] if term else [])
            return bool(term)

        await world.until(led)
        assert taken_over[0].token > first.token
        await world.store.resign(first)
        assert await world.store.lead("evictor-1", 60) is None

    async def test_resigned_is_free_at_once(self, world: World) -> None:
        first = await world.store.lead("evictor-1", 60)
        assert first is not None
        await world.store.resign(first)
        second = await world.store.lead("evictor-1", 60)
        assert second is not None
        assert second.token > first.token

    async def test_an_old_terms_verbs_do_nothing(self, world: World) -> None:
        old = await world.reconciled()
        await world.stored(ONE, 100)
        await world.stored(TWO, 100)
        await world.store.park(await world.begun(THREE, 100))
        assert await world.store.begin_eviction(old, TWO, 0)
        await world.store.resign(old)
        assert await world.store.lead("evictor-2", 60)
        before = await world.dump()
        assert not await world.store.begin_eviction(old, ONE, 0)
        assert await world.store.finish_eviction(old, TWO) == 0
        await world.store.cancel_eviction(old, TWO)
        assert not await world.store.adopt(old, IndexEntry(ObjectId("4"), 1, 1, 1.0))
        assert not await world.store.adopt_partial(old, ObjectId("5"), 1)
        assert await world.store.steal_lease(old, THREE) is None
        await world.lose("fetches")
        before = await world.dump()
        assert await world.store.recount(old) == 0
        await world.store.set_reconciled(old)
        await world.store.save_policy(old, [IndexEntry(ONE, 100, 9, 9.0)], PolicyState(9.0, ""))
        await world.store.resign(old)
        assert await world.dump() == before


class TestEviction:
    async def test_counts_as_used_until_it_is_finished(self, world: World) -> None:
        term = await world.reconciled()
        await world.stored(ONE, 100)
        assert await world.store.begin_eviction(term, ONE, 0)
        assert not await world.store.begin_eviction(term, ONE, 0)
        assert await world.taken() == (footprint(100), 0)
        assert isinstance(await world.store.begin(ONE, 100, "worker-1"), HeldElsewhere)
        assert await world.store.finish_eviction(term, ONE) == footprint(100)
        assert await world.store.finish_eviction(term, ONE) == 0
        assert await world.taken() == (0, 0)
        assert isinstance(await world.store.begin(ONE, 100, "worker-1"), Granted)

    async def test_cancelled_is_stored_again(self, world: World) -> None:
        term = await world.reconciled()
        await world.stored(ONE, 100)
        await world.store.begin_eviction(term, ONE, 0)
        [[entry]] = [batch async for batch in world.store.entries()]
        assert entry.evicting
        await world.store.cancel_eviction(term, ONE)
        assert isinstance(await world.store.begin(ONE, 100, "worker-1"), AlreadyStored)
        assert await world.store.finish_eviction(term, ONE) == 0

    async def test_is_refused_for_what_is_unknown_or_not_idle(self, world: World) -> None:
        term = await world.reconciled()
        assert not await world.store.begin_eviction(term, ONE, 0)
        await world.store.adopt(term, IndexEntry(ONE, 100, 1, time.time() - 30))
        assert not await world.store.begin_eviction(term, ONE, 60)
        assert await world.store.begin_eviction(term, ONE, 20)


class TestRecount:
    async def test_finds_nothing_wrong_with_what_the_verbs_have_counted(self, world: World) -> None:
        term = await world.reconciled()
        await world.stored(ONE, 100)
        await world.stored(TWO, 200)
        await world.begun(THREE, 300)
        await world.store.begin_eviction(term, TWO, 0)
        await world.store.claim(ObjectId("4"), "api-1")
        before = await world.dump()
        assert await world.store.recount(term) == 0
        assert await world.dump() == before

    async def test_puts_lost_sums_right(self, world: World) -> None:
        term = await world.reconciled()
        await world.stored(ONE, 100)
        await world.store.park(await world.begun(TWO, 200))
        await world.lose("usage")
        assert await world.taken() == (0, 0)
        assert await world.store.recount(term, entries=False) == footprint(200)
        assert await world.taken() == (0, footprint(200))
        assert await world.store.recount(term) == footprint(100)
        assert await world.taken() == (footprint(100), footprint(200))

    async def test_takes_away_what_belongs_to_nothing(self, world: World) -> None:
        term = await world.reconciled()
        await world.stored(ONE, 100)
        await world.begun(TWO, 200)
        await world.lose("objects")
        await world.lose("fetches")
        assert await world.store.recount(term) == footprint(100) + footprint(200)
        assert await world.taken() == (0, 0)

    async def test_over_many_entries_while_they_come_and_go(self, world: World) -> None:
        term = await world.reconciled()
        for first in range(0, 3000, 500):
            await world.store.adopt_many(
                term, [IndexEntry(ObjectId(f"o{number}"), 1, 1, 1.0) for number in range(first, first + 500)]
            )
        await world.lose("usage")

        async def come_and_go() -> None:
            for number in range(100):
                await world.store.adopt(term, IndexEntry(ObjectId(f"new{number}"), 7, 1, 1.0))
                await world.other.begin_eviction(term, ObjectId(f"o{number}"), 0)
                await world.other.finish_eviction(term, ObjectId(f"o{number}"))

        await asyncio.gather(come_and_go(), *(world.store.recount(term) for _ in range(20)))
        assert await world.taken() == (2900 * footprint(1) + 100 * footprint(7), 0)

    async def test_turnover_tells_what_moved(self, world: World) -> None:
        term = await world.reconciled()
        before = (await world.store.usage()).churn
        await world.stored(ONE, 100)
        await world.store.begin_eviction(term, ONE, 0)
        await world.store.finish_eviction(term, ONE)
        assert (await world.store.usage()).churn - before == 2 * footprint(100)


class TestAdoption:
    async def test_of_a_complete_file_whatever_the_limit_says(self, world: World) -> None:
        term = await world.reconciled()
        entry = IndexEntry(ONE, 2 * LIMIT, 7, 1234.5, 0.1)
        assert await world.store.adopt(term, entry)
        assert not await world.store.adopt(term, entry)
        assert await world.taken() == (footprint(2 * LIMIT), 0)
        [[kept]] = [batch async for batch in world.store.entries()]
        assert replace(kept, generation=0) == entry
        assert isinstance(await world.store.begin(TWO, 0, "worker-1"), NoSpace)

    async def test_ends_a_parked_fetch_but_not_a_live_one(self, world: World) -> None:
        term = await world.reconciled()
        lease = await world.begun(ONE, 100)
        assert not await world.store.adopt(term, IndexEntry(ONE, 100, 1, 1.0))
        await world.store.park(lease)
        assert await world.store.adopt(term, IndexEntry(ONE, 100, 1, 1.0))
        assert await world.taken() == (footprint(100), 0)
        assert await world.phase(ONE) is None

    async def test_ends_a_claim(self, world: World) -> None:
        term = await world.reconciled()
        await world.store.park(await world.begun(ONE, 100))
        await world.store.claim(ONE, "api-1")
        assert await world.store.adopt(term, IndexEntry(ONE, 100, 1, 1.0))
        assert await world.taken() == (footprint(100), 0)

    async def test_of_a_run_out_lease(self, brief: World) -> None:
        term = await brief.reconciled()
        lease = await brief.begun(ONE, 100)
        await brief.until_phase(ONE, FetchPhase.PARKED)
        assert await brief.store.adopt(term, IndexEntry(ONE, 100, 1, 1.0))
        assert not await brief.store.commit(lease, time.time())
        assert await brief.taken() == (footprint(100), 0)

    async def test_of_a_partial_file_whatever_the_limit_says(self, world: World) -> None:
        term = await world.reconciled()
        assert await world.store.adopt_partial(term, ONE, LIMIT)
        assert not await world.store.adopt_partial(term, ONE, LIMIT)
        assert await world.phase(ONE) is FetchPhase.PARKED
        assert await world.taken() == (0, footprint(LIMIT))

    async def test_of_a_partial_file_under_a_live_claim(self, world: World) -> None:
        term = await world.reconciled()
        await world.store.claim(ONE, "api-1")
        assert await world.store.adopt_partial(term, ONE, 100)
        assert await world.phase(ONE) is FetchPhase.CLAIMED
        granted = await world.store.begin(ONE, 100, "worker-1")
        assert isinstance(granted, Granted)
        assert granted.resumed
        assert not await world.store.adopt_partial(term, ONE, 100)
        assert await world.taken() == (0, footprint(100))

    async def test_of_a_partial_file_beside_the_whole_object_whose_fetch_ends(self, world: World) -> None:
        """The new entry takes the place of the old one: the bytes are counted once."""
        term = await world.reconciled()
        assert await world.store.adopt(term, IndexEntry(ONE, 700, 1, 1.0))
        assert await world.store.adopt_partial(term, ONE, 300)
        lease = await world.store.steal_lease(term, ONE)
        assert lease is not None
        assert await world.store.commit(lease, time.time())
        assert await world.taken() == (footprint(300), 0)

    async def test_seized_can_be_released(self, world: World) -> None:
        term = await world.reconciled()
        assert await world.store.steal_lease(term, ONE) is None
        worker = await world.begun(ONE, 100)
        assert await world.store.steal_lease(term, ONE) is None
        await world.store.park(worker)
        lease = await world.store.steal_lease(term, ONE)
        assert lease is not None
        assert lease == Lease(ONE, lease.token, 100, term.holder)
        assert isinstance(await world.store.begin(ONE, 100, "worker-2"), HeldElsewhere)
        await world.store.release(lease)
        assert await world.taken() == (0, 0)

    async def test_a_run_out_lease_can_be_seized(self, brief: World) -> None:
        term = await brief.reconciled()
        lost = await brief.begun(ONE, 100)
        await brief.until_phase(ONE, FetchPhase.PARKED)
        assert await brief.store.steal_lease(term, ONE)
        assert not await brief.store.renew(lost)


class TestPolicy:
    async def test_starts_from_nothing(self, world: World) -> None:
        assert await world.store.load_policy_state() == PolicyState()

    async def test_figures_are_saved_and_gone_entries_passed_over(self, world: World) -> None:
        term = await world.reconciled()
        await world.stored(ONE, 100)
        await world.stored(TWO, 100)
        await world.store.begin_eviction(term, TWO, 0)
        changed = [IndexEntry(known, 5, 3, 1234.25, 0.1) for known in (ONE, TWO, THREE)]
        await world.store.save_policy(term, changed, PolicyState(0.1, ""))
        kept = {entry.object_id: entry async for batch in world.store.entries() for entry in batch}
        assert set(kept) == {ONE, TWO}
        for entry in kept.values():
            assert (entry.size, entry.frequency, entry.last_access, entry.priority) == (100, 3, 1234.25, 0.1)
        assert kept[TWO].evicting
        assert await world.store.finish_eviction(term, TWO) == footprint(100)


class TestManyAtOnce:
    async def test_are_adopted_as_one_by_one(self, world: World) -> None:
        term = await world.reconciled()
        await world.stored(ONE, 100)
        await world.store.park(await world.begun(TWO, 70))
        entries = [IndexEntry(known, 300, 1, 1.0, 0.5) for known in (ONE, TWO, THREE, THREE)]
        assert list(await world.store.adopt_many(term, entries)) == [False, True, True, False]
        assert await world.taken() == (footprint(100) + 2 * footprint(300), 0)
        generations = await world.entry_generations()
        assert len(set(generations.values())) == 3
        assert list(await world.store.adopt_many(term, [])) == []

    async def test_are_evicted_as_one_by_one(self, world: World) -> None:
        term = await world.reconciled()
        four, five = ObjectId("4"), ObjectId("5")
        for object_id, idle in ((ONE, 30), (TWO, 30), (THREE, 1)):
            await world.store.adopt(term, IndexEntry(object_id, 100, 1, time.time() - idle))
        await world.store.change_pins([TWO])
        before = await world.entry_generations()
        asked = [ONE, TWO, THREE, four, ONE]
        assert list(await world.store.begin_evictions(term, asked, 20)) == [True, False, False, False, False]
        assert (await world.entry_generations())[ONE] > before[ONE]
        finished = await world.store.finish_evictions(term, [ONE, TWO, five])
        assert list(finished) == [footprint(100), 0, 0]
        assert await world.taken() == (2 * footprint(100), 0)
        assert list(await world.store.begin_evictions(term, [], 0)) == []
        assert list(await world.store.finish_evictions(term, [])) == []

    async def test_of_an_old_term_are_left_alone(self, world: World) -> None:
        old = await world.reconciled()
        await world.stored(ONE, 100)
        await world.store.resign(old)
        before = await world.dump()
        assert list(await world.store.adopt_many(old, [IndexEntry(TWO, 1, 1, 1.0)])) == [False]
        assert list(await world.store.begin_evictions(old, [ONE], 0)) == [False]
        assert list(await world.store.finish_evictions(old, [ONE])) == [0]
        assert await world.dump() == before


class TestStoredValues:
    async def test_are_kept_as_they_are(self, world: World) -> None:
        term = await world.reconciled()
        entry = IndexEntry(ONE, 2**41 + 1, 2**31 - 1, 1_795_492_317.123456, 123456789.12345679)
        await world.store.adopt(term, entry)
        [[kept]] = [batch async for batch in world.store.entries()]
        assert (kept.size, kept.frequency, kept.priority) == (entry.size, entry.frequency, entry.priority)
        assert 0 <= entry.last_access - kept.last_access <= ACCESS_TIME_RESOLUTION
