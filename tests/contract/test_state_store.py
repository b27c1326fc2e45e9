"""What a state store is, for both adapters."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from shared.domain.objects import ObjectId
from shared.domain.space import RECORD_BYTES, footprint
from shared.ports.state_store import (
    Access,
    AlreadyStored,
    Announcement,
    FetchPhase,
    Granted,
    HeldElsewhere,
    IndexEntry,
    Lease,
    NeverFits,
    NoSpace,
    NotAccounted,
    PolicyState,
    Term,
    Topic,
)
from tests.contract.state_world import BRIEF, LIMIT, LONG, World, memory_world, redis_world

ONE, TWO, THREE = ObjectId("1"), ObjectId("2"), ObjectId("3")


@pytest.fixture(params=["memory", "redis"])
async def world(request: pytest.FixtureRequest, redis_prefix: str) -> AsyncIterator[World]:
    """Nothing runs out by itself during a test."""
    if request.param == "memory":
        async with memory_world(LONG) as made:
            yield made
    else:
        async with redis_world(request.getfixturevalue("redis_url"), redis_prefix, LONG) as made:
            yield made


@pytest.fixture(params=["memory", "redis"])
async def brief(request: pytest.FixtureRequest, redis_prefix: str) -> AsyncIterator[World]:
    """Claims, marks and leases run out after some tenths of a second."""
    if request.param == "memory":
        async with memory_world(BRIEF) as made:
            yield made
    else:
        async with redis_world(request.getfixturevalue("redis_url"), redis_prefix, BRIEF) as made:
            yield made


async def phase_of(world: World, object_id: ObjectId) -> FetchPhase | None:
    fetch = (await world.store.find(object_id)).fetch
    return fetch.phase if fetch else None


async def until_phase(world: World, object_id: ObjectId, phase: FetchPhase | None) -> None:
    async def there() -> bool:
        return await phase_of(world, object_id) is phase

    await world.until(there)


class TestFind:
    async def test_knows_nothing_at_first(self, world: World) -> None:
        standing = await world.store.find(ONE)
        assert standing.fetch is None
        assert standing.failure is None

    async def test_has_no_side_effects(self, world: World) -> None:
        await world.reconciled()
        await world.stored(ONE, 10)
        await world.store.claim(TWO, "api-1")
        await world.store.record_failure(THREE, "unreachable", 60)
        before = await world.dump()
        for object_id in (ONE, TWO, THREE, ObjectId("unknown")):
            await world.store.find(object_id)
        assert await world.dump() == before

    async def test_leaves_a_claim_that_ran_out_as_it_is(self, brief: World) -> None:
        await brief.store.claim(ONE, "api-1")
        before = await brief.dump()
        await brief.let_pass(0.35)
        assert await phase_of(brief, ONE) is None
        assert await brief.dump() == before

    async def test_tells_who_and_how_long(self, world: World) -> None:
        await world.store.claim(ONE, "api-1")
        await world.let_pass(0.02)
        fetch = (await world.store.find(ONE)).fetch
        assert fetch is not None
        assert (fetch.object_id, fetch.phase, fetch.size, fetch.worker) == (
            ONE,
            FetchPhase.CLAIMED,
            0,
            "api-1",
        )
        assert fetch.source is None
        assert 5 < fetch.lease_left < 10
        assert 0.01 < fetch.age < 5


class TestClaim:
    async def test_fifty_at_once_have_one_winner(self, world: World) -> None:
        stores = [world.store, world.other] * 25
        claims = await asyncio.gather(*(store.claim(ONE, f"api-{n}") for n, store in enumerate(stores)))
        assert sum(claim.won for claim in claims) == 1
        for claim in claims:
            in_the_way = claim.standing.fetch
            assert (in_the_way is None) == claim.won
            assert in_the_way is None or in_the_way.phase is FetchPhase.CLAIMED

    async def test_is_refused_while_a_failure_is_remembered(self, world: World) -> None:
        await world.store.record_failure(ONE, "every source failed: é", 60)
        claim = await world.store.claim(ONE, "api-1")
        assert not claim.won
        assert claim.standing.failure is not None
        assert claim.standing.failure.reason == "every source failed: é"
        assert 50 < claim.standing.failure.seconds_left <= 60

    async def test_failures_are_forgotten_in_time(self, world: World) -> None:
        await world.store.record_failure(ONE, "refused", 0.1)

        async def won() -> bool:
            return (await world.store.claim(ONE, "api-1")).won

        await world.until(won)

    async def test_runs_out(self, brief: World) -> None:
        assert (await brief.store.claim(ONE, "api-1")).won
        assert not (await brief.store.claim(ONE, "api-2")).won
        await until_phase(brief, ONE, None)
        assert (await brief.store.claim(ONE, "api-2")).won

    async def test_is_refused_while_queued_and_fetching(self, world: World) -> None:
        await world.reconciled()
        await world.store.claim(ONE, "api-1")
        await world.store.mark_queued(ONE, "api-1")
        queued = await world.store.claim(ONE, "api-2")
        assert not queued.won
        assert queued.standing.fetch is not None
        assert queued.standing.fetch.phase is FetchPhase.QUEUED
        assert 30 < queued.standing.fetch.lease_left <= 60
        await world.begun(ONE, 100)
        fetching = await world.store.claim(ONE, "api-2")
        assert not fetching.won
        assert fetching.standing.fetch is not None
        assert fetching.standing.fetch.phase is FetchPhase.FETCHING

    async def test_over_a_parked_fetch_keeps_its_reservation(self, world: World) -> None:
        await world.reconciled()
        await world.store.park(await world.begun(ONE, 100))
        assert (await world.store.claim(ONE, "api-1")).won
        assert await phase_of(world, ONE) is FetchPhase.CLAIMED
        assert await world.taken() == (0, footprint(100))
        resumed = await world.store.begin(ONE, 100, "worker-2")
        assert isinstance(resumed, Granted)
        assert resumed.resumed
        assert await world.taken() == (0, footprint(100))

    async def test_over_a_parked_fetch_runs_out_to_parked(self, brief: World) -> None:
        await brief.reconciled()
        await brief.store.park(await brief.begun(ONE, 100))
        await brief.store.claim(ONE, "api-1")
        await brief.store.mark_queued(ONE, "api-1")
        await until_phase(brief, ONE, FetchPhase.PARKED)
        assert await brief.taken() == (0, footprint(100))


class TestMarkQueuedAndWithdraw:
    async def test_only_the_claimant_may(self, world: World) -> None:
        await world.store.claim(ONE, "api-1")
        await world.store.mark_queued(ONE, "api-2")
        assert await phase_of(world, ONE) is FetchPhase.CLAIMED
        await world.store.withdraw(ONE, "api-2")
        assert await phase_of(world, ONE) is FetchPhase.CLAIMED

    async def test_a_worker_that_was_faster_is_not_disturbed(self, world: World) -> None:
        await world.reconciled()
        await world.store.claim(ONE, "api-1")
        await world.begun(ONE, 100)
        await world.store.mark_queued(ONE, "api-1")
        await world.store.withdraw(ONE, "api-1")
        assert await phase_of(world, ONE) is FetchPhase.FETCHING

    @pytest.mark.parametrize("queued", [False, True])
    async def test_withdrawn_is_gone(self, world: World, queued: bool) -> None:
        await world.store.claim(ONE, "api-1")
        if queued:
            await world.store.mark_queued(ONE, "api-1")
        await world.store.withdraw(ONE, "api-1")
        assert await phase_of(world, ONE) is None
        assert (await world.store.claim(ONE, "api-2")).won

    async def test_withdrawn_over_a_reservation_is_parked(self, world: World) -> None:
        await world.reconciled()
        await world.store.park(await world.begun(ONE, 100))
        await world.store.claim(ONE, "api-1")
        await world.store.withdraw(ONE, "api-1")
        assert await phase_of(world, ONE) is FetchPhase.PARKED
        assert await world.taken() == (0, footprint(100))

    async def test_a_claim_that_ran_out_cannot_be_queued(self, brief: World) -> None:
        await brief.store.claim(ONE, "api-1")
        await until_phase(brief, ONE, None)
        await brief.store.mark_queued(ONE, "api-1")
        assert await phase_of(brief, ONE) is None


class TestBegin:
    async def test_grants_and_reserves(self, world: World) -> None:
        await world.reconciled()
        granted = await world.store.begin(ONE, 100, "worker-1")
        assert isinstance(granted, Granted)
        assert not granted.resumed
        assert (granted.lease.object_id, granted.lease.size, granted.lease.worker) == (ONE, 100, "worker-1")
        assert await world.taken() == (0, footprint(100))
        assert (await world.store.usage()).fetches == 1

    async def test_nothing_before_the_volume_is_accounted_for(self, world: World) -> None:
        assert not (await world.store.usage()).accounted
        assert await world.store.begin(ONE, 100, "worker-1") == NotAccounted()
        await world.reconciled()
        assert (await world.store.usage()).accounted
        assert isinstance(await world.store.begin(ONE, 100, "worker-1"), Granted)

    async def test_one_lease_per_object(self, world: World) -> None:
        await world.reconciled()
        stores = [world.store, world.other] * 10
        answers = await asyncio.gather(*(store.begin(ONE, 100, f"w-{n}") for n, store in enumerate(stores)))
        assert sum(isinstance(answer, Granted) for answer in answers) == 1
        held = [answer for answer in answers if isinstance(answer, HeldElsewhere)]
        assert len(held) == 19
        assert all(10 < answer.seconds_left <= 15 for answer in held)
        assert await world.taken() == (0, footprint(100))

    async def test_not_even_twice_to_the_same_worker(self, world: World) -> None:
        await world.reconciled()
        await world.begun(ONE, 100)
        assert isinstance(await world.store.begin(ONE, 100, "worker-1"), HeldElsewhere)

    async def test_of_a_stored_object_names_its_generation(self, world: World) -> None:
        await world.reconciled()
        await world.stored(ONE, 100)
        assert await world.store.begin(ONE, 100, "worker-1") == AlreadyStored(await world.generation(ONE))

    async def test_to_the_last_byte_and_no_further(self, world: World) -> None:
        await world.reconciled()
        await world.begun(ONE, LIMIT - 2 * RECORD_BYTES - 10)
        assert await world.store.begin(TWO, 11, "worker-1") == NoSpace(missing=1)
        assert isinstance(await world.store.begin(TWO, 10, "worker-1"), Granted)
        assert (await world.store.usage()).free == 0

    async def test_of_what_can_never_fit(self, world: World) -> None:
        await world.reconciled()
        assert await world.store.begin(ONE, LIMIT - RECORD_BYTES + 1, "worker-1") == NeverFits()
        assert isinstance(await world.store.begin(ONE, LIMIT - RECORD_BYTES, "worker-1"), Granted)

    @pytest.mark.parametrize("seed", range(3))
    async def test_many_at_once_never_pass_the_limit(self, world: World, seed: int) -> None:
        await world.reconciled()
        chance = random.Random(seed)
        sizes = [chance.randrange(1, 100_000) for _ in range(60)]

        async def fetch(number: int, size: int) -> None:
            store = world.store if number % 2 else world.other
            granted = await store.begin(ObjectId(f"object-{number}"), size, "worker-1")
            usage = await world.store.usage()
            assert usage.used + usage.reserved <= LIMIT
            if isinstance(granted, Granted) and number % 3 == 0:
                assert await store.commit(granted.lease, time.time())
            if isinstance(granted, Granted) and number % 3 == 1:
                await store.release(granted.lease)

        await asyncio.gather(*(fetch(number, size) for number, size in enumerate(sizes)))

    async def test_granted_forgets_failure_and_wish(self, world: World) -> None:
        await world.reconciled()
        await world.store.record_failure(ONE, "refused", 60)
        await world.store.want_space(ONE, 100, 60)
        await world.begun(ONE, 100)
        assert (await world.store.find(ONE)).failure is None
        assert await world.store.space_wanted() == 0

    @pytest.mark.parametrize("size", [40, 100, 200])
    async def test_over_a_parked_fetch_adjusts_its_reservation(self, world: World, size: int) -> None:
        await world.reconciled()
        await world.store.park(await world.begun(ONE, 100))
        granted = await world.store.begin(ONE, size, "worker-2")
        assert isinstance(granted, Granted)
        assert granted.resumed
        assert await world.taken() == (0, footprint(size))

    async def test_over_a_parked_fetch_that_grew_too_large(self, world: World) -> None:
        await world.reconciled()
        await world.begun(TWO, LIMIT - footprint(100) - footprint(0))
        await world.store.park(await world.begun(ONE, 100))
        assert await world.store.begin(ONE, 101, "worker-2") == NoSpace(missing=1)
        assert await phase_of(world, ONE) is FetchPhase.PARKED
        assert isinstance(await world.store.begin(ONE, 100, "worker-2"), Granted)


class TestLease:
    async def test_tokens_rise(self, world: World) -> None:
        await world.reconciled()
        first = await world.begun(ONE, 100)
        await world.store.park(first)
        second = await world.begun(ONE, 100)
        assert second.token > first.token

    async def test_renewed_lives_on_and_names_its_source(self, brief: World) -> None:
        await brief.reconciled()
        lease = await brief.begun(ONE, 100)
        for _ in range(8):
            assert await brief.store.renew(lease, "http://source-1/files/1")
            await brief.let_pass(0.05)
        assert await brief.store.renew(lease)
        fetch = (await brief.store.find(ONE)).fetch
        assert fetch is not None
        assert (fetch.phase, fetch.source) == (FetchPhase.FETCHING, "http://source-1/files/1")

    async def test_run_out_is_parked_with_its_reservation_and_another_takes_over(self, brief: World) -> None:
        await brief.reconciled()
        lost = await brief.begun(ONE, 100, "worker-1")
        await until_phase(brief, ONE, FetchPhase.PARKED)
        assert await brief.taken() == (0, footprint(100))
        granted = await brief.store.begin(ONE, 100, "worker-2")
        assert isinstance(granted, Granted)
        assert granted.resumed
        assert not await brief.store.renew(lost)
        assert not await brief.store.commit(lost, time.time())
        await brief.store.release(lost)
        await brief.store.park(lost)
        assert await brief.taken() == (0, footprint(100))
        assert await brief.store.commit(granted.lease, time.time())
        assert await brief.taken() == (footprint(100), 0)

    async def test_run_out_but_taken_by_nobody_is_still_the_holders(self, brief: World) -> None:
        await brief.reconciled()
        first, second = await brief.begun(ONE, 100), await brief.begun(TWO, 100)
        await until_phase(brief, ONE, FetchPhase.PARKED)
        await until_phase(brief, TWO, FetchPhase.PARKED)
        assert await brief.store.renew(first)
        assert await phase_of(brief, ONE) is FetchPhase.FETCHING
        assert await brief.store.commit(second, time.time())

    async def test_claimed_over_is_lost(self, brief: World) -> None:
        await brief.reconciled()
        lease = await brief.begun(ONE, 100)
        await until_phase(brief, ONE, FetchPhase.PARKED)
        assert (await brief.store.claim(ONE, "api-1")).won
        assert not await brief.store.renew(lease)

    async def test_parked_or_released_is_over(self, world: World) -> None:
        await world.reconciled()
        parked, released = await world.begun(ONE, 100), await world.begun(TWO, 100)
        await world.store.park(parked)
        await world.store.release(released)
        assert await phase_of(world, ONE) is FetchPhase.PARKED
        assert await phase_of(world, TWO) is None
        assert await world.taken() == (0, footprint(100))
        for lease in (parked, released):
            assert not await world.store.renew(lease)
            assert not await world.store.commit(lease, time.time())

    async def test_forged_is_refused(self, world: World) -> None:
        await world.reconciled()
        lease = await world.begun(ONE, 100)
        for forged in (replace(lease, token=lease.token + 1), replace(lease, worker="worker-2")):
            assert not await world.store.renew(forged)
            assert not await world.store.commit(forged, time.time())
            await world.store.release(forged)
        assert await phase_of(world, ONE) is FetchPhase.FETCHING


class TestCommit:
    async def test_turns_reserved_into_used(self, world: World) -> None:
        await world.reconciled()
        lease = await world.begun(ONE, 100)
        stored_at = time.time() - 5
        assert await world.store.commit(lease, stored_at)
        assert await world.taken() == (footprint(100), 0)
        usage = await world.store.usage()
        assert (usage.objects, usage.fetches) == (1, 0)
        assert (await world.store.find(ONE)).fetch is None
        [[entry]] = [batch async for batch in world.store.entries()]
        assert (entry.object_id, entry.size, entry.frequency, entry.evicting) == (ONE, 100, 1, False)
        assert entry.last_access == pytest.approx(stored_at)

    async def test_twice_counts_once(self, world: World) -> None:
        await world.reconciled()
        lease = await world.begun(ONE, 100)
        assert await world.store.commit(lease, time.time())
        assert not await world.store.commit(lease, time.time())
        assert await world.taken() == (footprint(100), 0)

    async def test_a_clock_that_is_ahead_gives_no_access_in_the_future(self, world: World) -> None:
        await world.reconciled()
        await world.store.commit(await world.begun(ONE, 100), time.time() + 3600)
        [[entry]] = [batch async for batch in world.store.entries()]
        assert entry.last_access < time.time() + 60


class TestForget:
    async def test_only_the_generation_that_was_seen(self, world: World) -> None:
        await world.reconciled()
        await world.stored(ONE, 100)
        generation = await world.generation(ONE)
        assert not await world.store.forget(ONE, generation + 1)
        assert await world.store.forget(ONE, generation)
        assert not await world.store.forget(ONE, generation)
        assert await world.taken() == (0, 0)
        await world.stored(ONE, 100)
        assert not await world.store.forget(ONE, generation)
        assert await world.taken() == (footprint(100), 0)

    async def test_not_what_began_to_be_evicted_since(self, world: World) -> None:
        term = await world.reconciled()
        await world.stored(ONE, 100)
        seen = await world.generation(ONE)
        assert await world.store.begin_eviction(term, ONE, 0)
        assert not await world.store.forget(ONE, seen)
        assert await world.store.forget(ONE, await world.generation(ONE))
        assert await world.store.finish_eviction(term, ONE) == 0
        assert await world.taken() == (0, 0)


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
        assert await world.store.seize(old, THREE) is None
        await world.store.set_accounted(old)
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
        assert await phase_of(world, ONE) is None

    async def test_ends_a_claim(self, world: World) -> None:
        term = await world.reconciled()
        await world.store.park(await world.begun(ONE, 100))
        await world.store.claim(ONE, "api-1")
        assert await world.store.adopt(term, IndexEntry(ONE, 100, 1, 1.0))
        assert await world.taken() == (footprint(100), 0)

    async def test_of_a_run_out_lease(self, brief: World) -> None:
        term = await brief.reconciled()
        lease = await brief.begun(ONE, 100)
        await until_phase(brief, ONE, FetchPhase.PARKED)
        assert await brief.store.adopt(term, IndexEntry(ONE, 100, 1, 1.0))
        assert not await brief.store.commit(lease, time.time())
        assert await brief.taken() == (footprint(100), 0)

    async def test_of_a_partial_file_whatever_the_limit_says(self, world: World) -> None:
        term = await world.reconciled()
        assert await world.store.adopt_partial(term, ONE, LIMIT)
        assert not await world.store.adopt_partial(term, ONE, LIMIT)
        assert await phase_of(world, ONE) is FetchPhase.PARKED
        assert await world.taken() == (0, footprint(LIMIT))

    async def test_of_a_partial_file_under_a_live_claim(self, world: World) -> None:
        term = await world.reconciled()
        await world.store.claim(ONE, "api-1")
        assert await world.store.adopt_partial(term, ONE, 100)
        assert await phase_of(world, ONE) is FetchPhase.CLAIMED
        granted = await world.store.begin(ONE, 100, "worker-1")
        assert isinstance(granted, Granted)
        assert granted.resumed
        assert not await world.store.adopt_partial(term, ONE, 100)
        assert await world.taken() == (0, footprint(100))

    async def test_seized_can_be_released(self, world: World) -> None:
        term = await world.reconciled()
        assert await world.store.seize(term, ONE) is None
        worker = await world.begun(ONE, 100)
        assert await world.store.seize(term, ONE) is None
        await world.store.park(worker)
        lease = await world.store.seize(term, ONE)
        assert lease is not None
        assert lease == Lease(ONE, lease.token, 100, term.holder)
        assert isinstance(await world.store.begin(ONE, 100, "worker-2"), HeldElsewhere)
        await world.store.release(lease)
        assert await world.taken() == (0, 0)

    async def test_a_run_out_lease_can_be_seized(self, brief: World) -> None:
        term = await brief.reconciled()
        lost = await brief.begun(ONE, 100)
        await until_phase(brief, ONE, FetchPhase.PARKED)
        assert await brief.store.seize(term, ONE)
        assert not await brief.store.renew(lost)


class TestWishes:
    async def test_add_up_one_per_object(self, world: World) -> None:
        await world.store.want_space(ONE, 100, 60)
        await world.store.want_space(TWO, 200, 60)
        await world.store.want_space(TWO, 300, 60)
        assert await world.store.space_wanted() == footprint(100) + footprint(300)

    async def test_run_out(self, world: World) -> None:
        await world.store.want_space(ONE, 100, 0.1)
        await world.store.want_space(TWO, 200, 60)

        async def only_the_second() -> bool:
            return await world.store.space_wanted() == footprint(200)

        await world.until(only_the_second)


class TestLists:
    async def test_entries_are_all_there(self, world: World) -> None:
        term = await world.reconciled()
        wanted = {ObjectId(f"object-{number}") for number in range(1500)}
        for object_id in wanted:
            await world.store.adopt(term, IndexEntry(object_id, 1, 1, 1.0))
        assert set(await world.entry_generations()) == wanted
        assert (await world.store.usage()).objects == 1500

    async def test_fetches_are_those_that_amount_to_something(self, brief: World) -> None:
        await brief.reconciled()
        await brief.store.claim(ONE, "api-1")
        await brief.begun(TWO, 100)
        assert {fetch.object_id for fetch in await brief.store.fetches()} == {ONE, TWO}
        await until_phase(brief, ONE, None)
        await until_phase(brief, TWO, FetchPhase.PARKED)
        [parked] = await brief.store.fetches()
        assert (parked.object_id, parked.phase, parked.size) == (TWO, FetchPhase.PARKED, 100)
        assert parked.lease_left == 0
        assert (await brief.store.usage()).fetches == 0


class TestAccessLog:
    async def test_is_read_in_order_from_a_position(self, world: World) -> None:
        batches = [[Access(ONE, number, 1000.5 + number), Access(TWO, 1, 2.0)] for number in range(5)]
        for batch in batches:
            await world.other.record_accesses(batch)
        position, first = await world.store.read_accesses("", 2)
        assert list(first) == batches[0] + batches[1]
        position, rest = await world.store.read_accesses(position, 100)
        assert list(rest) == batches[2] + batches[3] + batches[4]
        assert await world.store.read_accesses(position, 100) == (position, [])

    async def test_an_empty_hand_over_is_nothing(self, world: World) -> None:
        await world.store.record_accesses([])
        assert await world.store.read_accesses("", 10) == ("", [])

    async def test_is_dropped_before_the_saved_position(self, world: World) -> None:
        term = await world.reconciled()
        positions = [""]
        for number in range(4):
            await world.store.record_accesses([Access(ONE, number, 1.0)])
            positions.append((await world.store.read_accesses(positions[-1], 1))[0])
        await world.store.save_policy(term, [], PolicyState(1.5, positions[3]))
        assert await world.store.load_policy_state() == PolicyState(1.5, positions[3])
        _, left = await world.store.read_accesses("", 10)
        assert [access.views for access in left] == [2, 3]
        _, left = await world.store.read_accesses(positions[3], 10)
        assert [access.views for access in left] == [3]


class TestPolicy:
    async def test_starts_from_nothing(self, world: World) -> None:
        assert await world.store.load_policy_state() == PolicyState()

    async def test_figures_are_saved_and_gone_entries_passed_over(self, world: World) -> None:
        term = await world.reconciled()
        await world.stored(ONE, 100)
        await world.stored(TWO, 100)
        await world.store.begin_eviction(term, TWO, 0)
        figures = [IndexEntry(known, 5, 3, 1234.25, 0.1) for known in (ONE, TWO, THREE)]
        await world.store.save_policy(term, figures, PolicyState(0.1, ""))
        kept = {entry.object_id: entry async for batch in world.store.entries() for entry in batch}
        assert set(kept) == {ONE, TWO}
        for entry in kept.values():
            assert (entry.size, entry.frequency, entry.last_access, entry.priority) == (100, 3, 1234.25, 0.1)
        assert kept[TWO].evicting
        assert await world.store.finish_eviction(term, TWO) == footprint(100)


class TestAnnouncements:
    async def test_reach_the_other_processes(self, world: World) -> None:
        async with asyncio.timeout(5), world.other.listen() as heard:
            assert await anext(heard) == Announcement(Topic.SETTINGS_CHANGED)
            await world.store.announce(Announcement(Topic.SPACE_FREED))
            assert await anext(heard) == Announcement(Topic.SPACE_FREED)

    async def test_come_with_the_verbs(self, world: World) -> None:
        term = await world.reconciled()
        async with asyncio.timeout(5), world.other.listen() as heard:
            await anext(heard)
            await world.store.want_space(ONE, 100, 60)
            assert await anext(heard) == Announcement(Topic.SPACE_WANTED, ONE)
            lease = await world.begun(ONE, 100)
            assert await anext(heard) == Announcement(Topic.FETCH_CHANGED, ONE)
            await world.store.renew(lease, "http://source-1/files/1")
            assert await anext(heard) == Announcement(Topic.FETCH_CHANGED, ONE)
            await world.store.commit(lease, time.time())
            assert await anext(heard) == Announcement(Topic.FETCH_CHANGED, ONE)
            await world.store.begin_eviction(term, ONE, 0)
            await world.store.finish_eviction(term, ONE)
            assert await anext(heard) == Announcement(Topic.SPACE_FREED, ONE)

    async def test_a_slow_reader_loses_the_oldest(self, world: World) -> None:
        async with asyncio.timeout(20), world.store.listen() as heard:
            for number in range(1500):
                await world.store.announce(Announcement(Topic.FETCH_CHANGED, str(number)))
            last = Announcement(Topic.FETCH_CHANGED, "1499")
            received = 0
            while await anext(heard) != last:
                received += 1
            assert received < 1500
