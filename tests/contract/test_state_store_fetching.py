"""Leases and reservations: the fetchers' side of the state store, for both adapters."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace

import pytest

from shared.domain.objects import ObjectId
from shared.domain.space import RECORD_BYTES, footprint
from shared.ports.state_store import (
    AlreadyStored,
    FetchPhase,
    Granted,
    HeldElsewhere,
    NeverFits,
    NoSpace,
    NotReconciled,
)
from tests.contract.state_world import LIMIT, ONE, TWO, World


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
        assert not (await world.store.usage()).reconciled
        assert await world.store.begin(ONE, 100, "worker-1") == NotReconciled()
        await world.reconciled()
        assert (await world.store.usage()).reconciled
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

    async def test_granted_forgets_the_wish(self, world: World) -> None:
        await world.reconciled()
        await world.store.request_space(ONE, 100, 60)
        await world.begun(ONE, 100)
        assert await world.store.space_requested() == 0

    @pytest.mark.parametrize("kept", [True, False])
    async def test_a_failure_is_out_of_sight_while_another_attempt_lives(
        self, world: World, kept: bool
    ) -> None:
        await world.reconciled()
        await world.store.claim(ONE, "api-1")
        await world.store.record_failure(ONE, "refused", 60)
        lease = await world.begun(ONE, 100)
        assert (await world.store.find(ONE)).failure is None
        claim = await world.store.claim(ONE, "api-2")
        assert (claim.won, claim.status.failure) == (False, None)
        await (world.store.park if kept else world.store.release)(lease)
        claim = await world.store.claim(ONE, "api-2")
        assert not claim.won
        assert claim.status.failure is not None
        assert claim.status.failure.reason == "refused"

    async def test_only_success_forgets_a_failure(self, world: World) -> None:
        term = await world.reconciled()
        await world.store.record_failure(ONE, "refused", 60)
        await world.stored(ONE, 100)
        await world.store.begin_eviction(term, ONE, 0)
        await world.store.finish_eviction(term, ONE)
        assert (await world.store.find(ONE)).failure is None
        assert (await world.store.claim(ONE, "api-1")).won

    async def test_a_failure_keeps_a_parked_fetch_from_being_claimed_until_it_runs_out(
        self, world: World
    ) -> None:
        await world.reconciled()
        await world.store.park(await world.begun(ONE, 100))
        await world.store.record_failure(ONE, "refused", 0.1)
        assert not (await world.store.claim(ONE, "api-1")).won

        async def won() -> bool:
            return (await world.store.claim(ONE, "api-1")).won

        await world.until(won)

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
        assert await world.phase(ONE) is FetchPhase.PARKED
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
        await brief.until_phase(ONE, FetchPhase.PARKED)
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
        await brief.until_phase(ONE, FetchPhase.PARKED)
        await brief.until_phase(TWO, FetchPhase.PARKED)
        assert await brief.store.renew(first)
        assert await brief.phase(ONE) is FetchPhase.FETCHING
        assert await brief.store.commit(second, time.time())

    async def test_claimed_over_is_lost(self, brief: World) -> None:
        await brief.reconciled()
        lease = await brief.begun(ONE, 100)
        await brief.until_phase(ONE, FetchPhase.PARKED)
        assert (await brief.store.claim(ONE, "api-1")).won
        assert not await brief.store.renew(lease)

    async def test_parked_or_released_is_over(self, world: World) -> None:
        await world.reconciled()
        parked, released = await world.begun(ONE, 100), await world.begun(TWO, 100)
        await world.store.park(parked)
        await world.store.release(released)
        assert await world.phase(ONE) is FetchPhase.PARKED
        assert await world.phase(TWO) is None
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
        assert await world.phase(ONE) is FetchPhase.FETCHING


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
