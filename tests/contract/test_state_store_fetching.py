"""The state store as fetchers use it: leases and reservations. For both adapters."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace

import pytest

from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import RECORD_BYTES, footprint
from distributor_node.shared.ports.state_store import (
    AlreadyStored,
    FetchPhase,
    Granted,
    HeldElsewhere,
    IndexEntry,
    NeverFits,
    NoSpace,
    NotReconciled,
    PolicyState,
    Superseded,
)
from tests.contract.state_harness import LIMIT, ONE, TWO, Harness


class TestParkedWithLess:
    """The reservation of a parked fetch shrinks to what its file holds, and `begin` claims the rest."""

    async def parked(self, harness: Harness, size: int, held: int) -> None:
        await harness.store.park(await harness.begin_fetch(ONE, size), held)

    async def test_only_what_is_held_counts(self, harness: Harness) -> None:
        await harness.reconciled()
        await self.parked(harness, 5000, 700)
        assert await harness.used_and_reserved() == (0, footprint(700))
        fetch = (await harness.store.find(ONE)).fetch
        assert fetch is not None
        assert (fetch.phase, fetch.size, fetch.reserved) == (FetchPhase.PARKED, 5000, footprint(700))
        assert fetch.is_shrunk
        usage = await harness.store.usage()
        assert (usage.parked, usage.parked_bytes) == (1, footprint(700))
        assert await harness.store.recount(harness.term) == 0

    async def test_it_never_grows(self, harness: Harness) -> None:
        await harness.reconciled()
        await self.parked(harness, 5000, 9000)
        assert await harness.used_and_reserved() == (0, footprint(5000))
        lease = await harness.store.steal_lease(harness.term, ONE)
        assert lease is not None
        await harness.store.park(lease, 700)
        lease = await harness.store.steal_lease(harness.term, ONE)
        assert lease is not None
        assert lease.size == 700
        await harness.store.park(lease, 800)
        await harness.store.park(lease, 10)  # this lease has ended
        assert await harness.used_and_reserved() == (0, footprint(700))

    async def test_a_resume_claims_the_rest_to_the_last_byte_and_no_further(self, harness: Harness) -> None:
        await harness.reconciled()
        await self.parked(harness, 5000, 700)
        await harness.begin_fetch(TWO, LIMIT - RECORD_BYTES - footprint(5000) + 1)
        assert await harness.store.begin(ONE, 5000, "worker-2") == NoSpace(missing=1)
        assert await harness.phase(ONE) is FetchPhase.PARKED  # as it was
        granted = await harness.store.begin(ONE, 4999, "worker-2")
        assert isinstance(granted, Granted)
        assert granted.resumed
        assert granted.lease.surplus == 0
        usage = await harness.store.usage()
        assert usage.free == 0
        assert (usage.parked, usage.parked_bytes) == (0, 0)
        assert await harness.store.commit(granted.lease, time.time())
        assert (await harness.store.usage()).used == footprint(4999)

    async def test_claims_keep_it_small(self, harness: Harness) -> None:
        """Until a worker begins, whatever becomes of its job."""
        await harness.reconciled()
        await self.parked(harness, 5000, 700)
        assert (await harness.store.claim(ONE, "api-1")).won
        await harness.store.mark_queued(ONE, "api-1")
        fetch = (await harness.store.find(ONE)).fetch
        assert fetch is not None
        assert (fetch.phase, fetch.size, fetch.reserved) == (FetchPhase.QUEUED, 5000, footprint(700))
        await harness.store.release_claim(ONE, "api-1")
        assert await harness.phase(ONE) is FetchPhase.PARKED
        assert await harness.used_and_reserved() == (0, footprint(700))
        lease = await harness.store.steal_lease(harness.term, ONE)
        assert lease is not None
        await harness.store.release(lease)
        assert await harness.used_and_reserved() == (0, 0)

    async def test_a_stolen_lease_that_runs_out_leaves_it_as_it_was(self, brief: Harness) -> None:
        await brief.reconciled()
        await self.parked(brief, 5000, 700)
        assert await brief.store.steal_lease(brief.term, ONE)
        await brief.until_phase(ONE, FetchPhase.PARKED)
        assert await brief.used_and_reserved() == (0, footprint(700))
        fetch = (await brief.store.find(ONE)).fetch
        assert fetch is not None
        assert fetch.size == 5000

    async def test_a_file_that_turns_out_larger_is_counted(self, harness: Harness) -> None:
        """After the store has lost its last second."""
        await harness.reconciled()
        await self.parked(harness, 5000, 700)
        assert not await harness.store.adopt_partial(harness.term, ONE, 600)
        assert await harness.store.adopt_partial(harness.term, ONE, 5000)
        assert await harness.used_and_reserved() == (0, footprint(5000))
        lease = await harness.store.steal_lease(harness.term, ONE)
        assert lease is not None
        await harness.store.park(lease, 800)
        assert await harness.used_and_reserved() == (0, footprint(800))
        fetch = (await harness.store.find(ONE)).fetch
        assert fetch is not None
        assert fetch.size == 5000

    async def test_what_it_keeps_need_not_be_freed_for_it(self, harness: Harness) -> None:
        await harness.reconciled()
        await self.parked(harness, 5000, 700)
        await harness.store.request_space(ONE, 5000, 60)
        assert sum(await harness.store.space_requests()) == 4300
        lease = await harness.store.steal_lease(harness.term, ONE)
        assert lease is not None
        await harness.store.release(lease)
        assert sum(await harness.store.space_requests()) == footprint(5000)

    async def test_views_are_saved_with_it_and_stay(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await self.parked(harness, 5000, 700)
        entries = [IndexEntry(known, 700, 3, 1234.25, 0.1) for known in (ONE, TWO)]
        await harness.store.save_policy(term, entries, PolicyState())
        assert (await harness.store.claim(ONE, "api-1")).won
        granted = await harness.store.begin(ONE, 5000, "worker-2")
        assert isinstance(granted, Granted)
        [fetch] = await harness.store.fetches()
        assert (fetch.views, fetch.last_access, fetch.priority) == (3, 1234.25, 0.1)
        assert await harness.store.commit(granted.lease, time.time())
        entry = await harness.store.entry(ONE)
        assert entry is not None
        assert entry.frequency == 3

    @pytest.mark.parametrize("seed", range(3))
    async def test_many_resumes_at_once_never_pass_the_limit(self, harness: Harness, seed: int) -> None:
        await harness.reconciled()
        chance, objects = random.Random(seed), [ObjectId(f"{number}") for number in range(10, 40)]
        sizes = {known: chance.randrange(20_000, 90_000) for known in objects}
        for known in objects:
            await harness.store.park(
                await harness.begin_fetch(known, sizes[known]), chance.randrange(1, 20_000)
            )
        stores = [harness.store, harness.other]
        answers = await asyncio.gather(
            *(chance.choice(stores).begin(known, sizes[known], "worker") for known in objects)
        )
        granted = [answer.lease for answer in answers if isinstance(answer, Granted)]
        assert 0 < len(granted) < len(objects)
        usage = await harness.store.usage()
        assert usage.used + usage.reserved <= LIMIT
        assert await harness.store.recount(harness.term) == 0


class TestResize:
    """Of an object whose length was not known at its beginning."""

    async def test_a_reservation_grows_and_shrinks(self, harness: Harness) -> None:
        await harness.reconciled()
        lease = await harness.begin_fetch(ONE, 100)
        for size in (500, 500, 70):
            assert await harness.store.resize(lease, size)
            assert await harness.used_and_reserved() == (0, footprint(size))
        assert await harness.store.commit(lease, time.time())
        assert await harness.used_and_reserved() == (footprint(70), 0)
        [[entry]] = [batch async for batch in harness.store.entries()]
        assert entry.size == 70

    async def test_to_the_last_byte_and_no_further(self, harness: Harness) -> None:
        await harness.reconciled()
        lease = await harness.begin_fetch(ONE, 100)
        most = LIMIT - RECORD_BYTES
        assert not await harness.store.resize(lease, most + 1)
        assert await harness.used_and_reserved() == (0, footprint(100))
        assert await harness.store.resize(lease, most)
        assert await harness.used_and_reserved() == (0, LIMIT)

    async def test_not_with_a_lost_lease(self, harness: Harness) -> None:
        await harness.reconciled()
        lease = await harness.begin_fetch(ONE, 100)
        await harness.store.release(lease)
        assert not await harness.store.resize(lease, 50)
        assert await harness.used_and_reserved() == (0, 0)


class TestBegin:
    async def test_grants_and_reserves(self, harness: Harness) -> None:
        await harness.reconciled()
        granted = await harness.store.begin(ONE, 100, "worker-1")
        assert isinstance(granted, Granted)
        assert not granted.resumed
        assert (granted.lease.object_id, granted.lease.size, granted.lease.worker) == (ONE, 100, "worker-1")
        assert await harness.used_and_reserved() == (0, footprint(100))
        assert (await harness.store.usage()).fetches == 1

    async def test_nothing_before_reconciliation(self, harness: Harness) -> None:
        assert not (await harness.store.usage()).reconciled
        assert await harness.store.begin(ONE, 100, "worker-1") == NotReconciled()
        await harness.reconciled()
        assert (await harness.store.usage()).reconciled
        assert isinstance(await harness.store.begin(ONE, 100, "worker-1"), Granted)

    async def test_one_lease_per_object(self, harness: Harness) -> None:
        await harness.reconciled()
        stores = [harness.store, harness.other] * 10
        answers = await asyncio.gather(*(store.begin(ONE, 100, f"w-{n}") for n, store in enumerate(stores)))
        assert sum(isinstance(answer, Granted) for answer in answers) == 1
        held = [answer for answer in answers if isinstance(answer, HeldElsewhere)]
        assert len(held) == 19
        assert all(10 < answer.seconds_left <= 15 for answer in held)
        assert await harness.used_and_reserved() == (0, footprint(100))

    async def test_not_even_twice_to_the_same_worker(self, harness: Harness) -> None:
        await harness.reconciled()
        await harness.begin_fetch(ONE, 100)
        assert isinstance(await harness.store.begin(ONE, 100, "worker-1"), HeldElsewhere)

    async def test_of_a_stored_object_names_its_generation(self, harness: Harness) -> None:
        await harness.reconciled()
        await harness.stored(ONE, 100)
        assert await harness.store.begin(ONE, 100, "worker-1") == AlreadyStored(await harness.generation(ONE))

    async def test_another_job_is_superseded_while_one_is_carried_out(self, harness: Harness) -> None:
        await harness.reconciled()
        assert isinstance(await harness.store.begin(ONE, 100, "worker-1", claim=7), Granted)
        assert await harness.store.begin(ONE, 100, "worker-2", claim=8) == Superseded()
        # The same job, delivered again after its worker died; a job of an older version
        for claim in (7, 0):
            assert isinstance(await harness.store.begin(ONE, 100, "worker-2", claim=claim), HeldElsewhere)

    async def test_to_the_last_byte_and_no_further(self, harness: Harness) -> None:
        await harness.reconciled()
        await harness.begin_fetch(ONE, LIMIT - 2 * RECORD_BYTES - 10)
        assert await harness.store.begin(TWO, 11, "worker-1") == NoSpace(missing=1)
        assert isinstance(await harness.store.begin(TWO, 10, "worker-1"), Granted)
        assert (await harness.store.usage()).free == 0

    async def test_of_what_can_never_fit(self, harness: Harness) -> None:
        await harness.reconciled()
        assert await harness.store.begin(ONE, LIMIT - RECORD_BYTES + 1, "worker-1") == NeverFits()
        assert isinstance(await harness.store.begin(ONE, LIMIT - RECORD_BYTES, "worker-1"), Granted)

    @pytest.mark.parametrize("seed", range(3))
    async def test_many_at_once_never_pass_the_limit(self, harness: Harness, seed: int) -> None:
        await harness.reconciled()
        chance = random.Random(seed)
        sizes = [chance.randrange(1, 100_000) for _ in range(60)]

        async def fetch(number: int, size: int) -> None:
            store = harness.store if number % 2 else harness.other
            granted = await store.begin(ObjectId(f"object-{number}"), size, "worker-1")
            usage = await harness.store.usage()
            assert usage.used + usage.reserved <= LIMIT
            if isinstance(granted, Granted) and number % 3 == 0:
                assert await store.commit(granted.lease, time.time())
            if isinstance(granted, Granted) and number % 3 == 1:
                await store.release(granted.lease)

        await asyncio.gather(*(fetch(number, size) for number, size in enumerate(sizes)))

    async def test_a_grant_clears_the_space_request(self, harness: Harness) -> None:
        await harness.reconciled()
        await harness.store.request_space(ONE, 100, 60)
        await harness.begin_fetch(ONE, 100)
        assert sum(await harness.store.space_requests()) == 0

    @pytest.mark.parametrize("kept", [True, False])
    async def test_a_failure_is_hidden_while_another_attempt_runs(self, harness: Harness, kept: bool) -> None:
        await harness.reconciled()
        await harness.store.claim(ONE, "api-1")
        await harness.store.record_failure(ONE, "refused", 60)
        lease = await harness.begin_fetch(ONE, 100)
        assert (await harness.store.find(ONE)).failure is None
        claim = await harness.store.claim(ONE, "api-2")
        assert (claim.won, claim.status.failure) == (False, None)
        await (harness.store.park if kept else harness.store.release)(lease)
        claim = await harness.store.claim(ONE, "api-2")
        assert not claim.won
        assert claim.status.failure is not None
        assert claim.status.failure.reason == "refused"

    async def test_only_success_forgets_a_failure(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.store.record_failure(ONE, "refused", 60)
        await harness.stored(ONE, 100)
        await harness.store.begin_eviction(term, ONE, 0)
        await harness.store.finish_eviction(term, ONE)
        assert (await harness.store.find(ONE)).failure is None
        assert (await harness.store.claim(ONE, "api-1")).won

    async def test_a_failure_blocks_claiming_a_parked_fetch_until_it_expires(self, harness: Harness) -> None:
        await harness.reconciled()
        await harness.store.park(await harness.begin_fetch(ONE, 100))
        await harness.store.record_failure(ONE, "refused", 0.1)
        assert not (await harness.store.claim(ONE, "api-1")).won

        async def won() -> bool:
            return (await harness.store.claim(ONE, "api-1")).won

        await harness.until(won)

    async def test_a_larger_reservation_stays_until_the_worker_gives_it_back(self, harness: Harness) -> None:
        """1. A partial file of 850,000 bytes is parked. 2. The catalog says 10,000 now, a worker begins. 3. It dies
        before it cuts the file."""
        term = await harness.reconciled()
        await harness.store.park(await harness.begin_fetch(ONE, 850_000))
        await harness.begin_fetch(ONE, 10_000, "worker-2")
        assert await harness.used_and_reserved() == (0, footprint(850_000))
        assert isinstance(await harness.store.begin(TWO, 900_000, "worker-3"), NoSpace)
        await harness.store.recount(term)
        assert await harness.used_and_reserved() == (0, footprint(850_000))

    @pytest.mark.parametrize("end", ["commit", "release", "adopt"])
    async def test_every_end_of_a_fetch_releases_its_surplus(self, harness: Harness, end: str) -> None:
        term = await harness.reconciled()
        await harness.store.park(await harness.begin_fetch(ONE, 5000))
        assert (await harness.store.claim(ONE, "api-1")).won
        lease = await harness.begin_fetch(ONE, 100, "worker-2")
        assert lease.surplus == 4900
        if end == "commit":
            assert await harness.store.commit(lease, 1.0)
        elif end == "release":
            await harness.store.release(lease)
        else:
            await harness.store.park(lease)
            assert await harness.store.adopt(term, IndexEntry(ONE, 100, 1, 1.0))
        assert await harness.used_and_reserved() == (0 if end == "release" else footprint(100), 0)

    async def test_a_partial_file_larger_than_its_reservation_is_counted(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.store.park(await harness.begin_fetch(ONE, 100))
        assert await harness.store.adopt_partial(term, ONE, 5000)
        assert not await harness.store.adopt_partial(term, ONE, 4000)
        assert await harness.used_and_reserved() == (0, footprint(5000))
        lease = await harness.store.steal_lease(term, ONE)
        assert lease is not None
        await harness.store.park(lease)
        assert await harness.used_and_reserved() == (0, footprint(5000))

    @pytest.mark.parametrize("size", [40, 100, 200])
    async def test_over_a_parked_fetch_never_shrinks_its_reservation(
        self, harness: Harness, size: int
    ) -> None:
        await harness.reconciled()
        await harness.store.park(await harness.begin_fetch(ONE, 100))
        granted = await harness.store.begin(ONE, size, "worker-2")
        assert isinstance(granted, Granted)
        assert granted.resumed
        assert await harness.used_and_reserved() == (0, footprint(max(size, 100)))
        assert granted.lease.surplus == max(0, 100 - size)
        await harness.store.return_surplus(granted.lease)
        assert await harness.used_and_reserved() == (0, footprint(size))
        await harness.store.release(granted.lease)
        assert await harness.used_and_reserved() == (0, 0)

    async def test_over_a_parked_fetch_that_grew_too_large(self, harness: Harness) -> None:
        await harness.reconciled()
        await harness.begin_fetch(TWO, LIMIT - footprint(100) - footprint(0))
        await harness.store.park(await harness.begin_fetch(ONE, 100))
        assert await harness.store.begin(ONE, 101, "worker-2") == NoSpace(missing=1)
        assert await harness.phase(ONE) is FetchPhase.PARKED
        assert isinstance(await harness.store.begin(ONE, 100, "worker-2"), Granted)


class TestLease:
    async def test_tokens_rise(self, harness: Harness) -> None:
        await harness.reconciled()
        first = await harness.begin_fetch(ONE, 100)
        await harness.store.park(first)
        second = await harness.begin_fetch(ONE, 100)
        assert second.token > first.token

    async def test_renewal_extends_the_lease_and_records_its_source(self, brief: Harness) -> None:
        await brief.reconciled()
        lease = await brief.begin_fetch(ONE, 100)
        for _ in range(6):
            assert await brief.store.renew(lease, "http://source-1/files/1")
            await brief.advance_clock(brief.times.lease_seconds / 4)
        assert await brief.store.renew(lease)
        fetch = (await brief.store.find(ONE)).fetch
        assert fetch is not None
        assert (fetch.phase, fetch.source) == (FetchPhase.FETCHING, "http://source-1/files/1")

    async def test_expired_is_parked_with_its_reservation_and_another_takes_over(
        self, brief: Harness
    ) -> None:
        await brief.reconciled()
        lost = await brief.begin_fetch(ONE, 100, "worker-1")
        await brief.until_phase(ONE, FetchPhase.PARKED)
        assert await brief.used_and_reserved() == (0, footprint(100))
        granted = await brief.store.begin(ONE, 100, "worker-2")
        assert isinstance(granted, Granted)
        assert granted.resumed
        assert not await brief.store.renew(lost)
        assert not await brief.store.commit(lost, time.time())
        await brief.store.release(lost)
        await brief.store.park(lost)
        assert await brief.used_and_reserved() == (0, footprint(100))
        assert await brief.store.commit(granted.lease, time.time())
        assert await brief.used_and_reserved() == (footprint(100), 0)

    async def test_expired_but_unclaimed_still_belongs_to_the_holder(self, brief: Harness) -> None:
        await brief.reconciled()
        first, second = await brief.begin_fetch(ONE, 100), await brief.begin_fetch(TWO, 100)
        await brief.until_phase(ONE, FetchPhase.PARKED)
        await brief.until_phase(TWO, FetchPhase.PARKED)
        assert await brief.store.renew(first)
        assert await brief.phase(ONE) is FetchPhase.FETCHING
        assert await brief.store.commit(second, time.time())

    async def test_claimed_by_another_is_lost(self, brief: Harness) -> None:
        await brief.reconciled()
        lease = await brief.begin_fetch(ONE, 100)
        await brief.until_phase(ONE, FetchPhase.PARKED)
        assert (await brief.store.claim(ONE, "api-1")).won
        assert not await brief.store.renew(lease)

    async def test_parked_or_released_has_ended(self, harness: Harness) -> None:
        await harness.reconciled()
        parked, released = await harness.begin_fetch(ONE, 100), await harness.begin_fetch(TWO, 100)
        await harness.store.park(parked)
        await harness.store.release(released)
        assert await harness.phase(ONE) is FetchPhase.PARKED
        assert await harness.phase(TWO) is None
        assert await harness.used_and_reserved() == (0, footprint(100))
        for lease in (parked, released):
            assert not await harness.store.renew(lease)
            assert not await harness.store.commit(lease, time.time())

    async def test_forged_is_rejected(self, harness: Harness) -> None:
        await harness.reconciled()
        lease = await harness.begin_fetch(ONE, 100)
        for forged in (replace(lease, token=lease.token + 1), replace(lease, worker="worker-2")):
            assert not await harness.store.renew(forged)
            assert not await harness.store.commit(forged, time.time())
            await harness.store.release(forged)
        assert await harness.phase(ONE) is FetchPhase.FETCHING


class TestCommit:
    async def test_turns_reserved_into_used(self, harness: Harness) -> None:
        await harness.reconciled()
        lease = await harness.begin_fetch(ONE, 100)
        stored_at = time.time() - 5
        assert await harness.store.commit(lease, stored_at)
        assert await harness.used_and_reserved() == (footprint(100), 0)
        usage = await harness.store.usage()
        assert (usage.objects, usage.fetches) == (1, 0)
        assert (await harness.store.find(ONE)).fetch is None
        [[entry]] = [batch async for batch in harness.store.entries()]
        assert (entry.object_id, entry.size, entry.frequency, entry.evicting) == (ONE, 100, 1, False)
        assert entry.last_access == pytest.approx(stored_at)

    async def test_twice_counts_once(self, harness: Harness) -> None:
        await harness.reconciled()
        lease = await harness.begin_fetch(ONE, 100)
        assert await harness.store.commit(lease, time.time())
        assert not await harness.store.commit(lease, time.time())
        assert await harness.used_and_reserved() == (footprint(100), 0)

    async def test_a_clock_ahead_records_no_access_in_the_future(self, harness: Harness) -> None:
        await harness.reconciled()
        await harness.store.commit(await harness.begin_fetch(ONE, 100), time.time() + 3600)
        [[entry]] = [batch async for batch in harness.store.entries()]
        assert entry.last_access < time.time() + 60


class TestForget:
    async def test_only_the_generation_that_was_seen(self, harness: Harness) -> None:
        await harness.reconciled()
        await harness.stored(ONE, 100)
        generation = await harness.generation(ONE)
        assert not await harness.store.forget(ONE, generation + 1)
        assert await harness.store.forget(ONE, generation)
        assert not await harness.store.forget(ONE, generation)
        assert await harness.used_and_reserved() == (0, 0)
        await harness.stored(ONE, 100)
        assert not await harness.store.forget(ONE, generation)
        assert await harness.used_and_reserved() == (footprint(100), 0)

    async def test_not_an_entry_whose_eviction_started_since(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.stored(ONE, 100)
        seen = await harness.generation(ONE)
        assert await harness.store.begin_eviction(term, ONE, 0)
        assert not await harness.store.forget(ONE, seen)
        assert await harness.store.forget(ONE, await harness.generation(ONE))
        assert await harness.store.finish_eviction(term, ONE) == 0
        assert await harness.used_and_reserved() == (0, 0)
