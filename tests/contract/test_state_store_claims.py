"""The state store as the API uses it: find, claim, queue, release. For both adapters."""

from __future__ import annotations

import asyncio

import pytest

from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.state_redis import store as redis_store
from distributor_node.shared.domain.eviction import PriorityBasis
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import AdmissionQuestion, SecondHitAdmission, footprint
from distributor_node.shared.ports.state_store import (
    FailureCause,
    FetchPhase,
    Granted,
    ObjectStatus,
    PolicyState,
    StateStore,
)
from tests.contract.state_harness import ONE, THREE, TWO, Harness


class TestFind:
    async def test_knows_nothing_at_first(self, harness: Harness) -> None:
        object_status = await harness.store.find(ONE)
        assert object_status.fetch is None
        assert object_status.failure is None

    async def test_has_no_side_effects(self, harness: Harness) -> None:
        await harness.reconciled()
        await harness.stored(ONE, 10)
        await harness.store.claim(TWO, "api-1")
        await harness.store.record_failure(THREE, "unreachable", 60)
        before = await harness.dump()
        for object_id in (ONE, TWO, THREE, ObjectId("unknown")):
            await harness.store.find(object_id)
        assert await harness.dump() == before

    async def test_leaves_an_expired_claim_unchanged(self, brief: Harness) -> None:
        await brief.store.claim(ONE, "api-1")
        before = await brief.dump()
        await brief.advance_clock(brief.times.claim_seconds + 0.05)
        assert await brief.phase(ONE) is None
        assert await brief.dump() == before

    async def test_reports_the_holder_and_remaining_time(self, harness: Harness) -> None:
        await harness.store.claim(ONE, "api-1")
        await harness.advance_clock(0.02)
        fetch = (await harness.store.find(ONE)).fetch
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


class TestTrace:
    async def test_is_that_of_the_claim_then_of_the_fetch(self, harness: Harness) -> None:
        await harness.reconciled()
        assert (await harness.store.claim(ONE, "api-1", trace="of-the-claim")).won

        async def trace() -> str:
            fetch = (await harness.other.find(ONE)).fetch
            assert fetch is not None
            return fetch.trace

        assert await trace() == "of-the-claim"
        refused = await harness.other.claim(ONE, "api-2", trace="of-another")
        assert refused.status.fetch is not None
        assert refused.status.fetch.trace == "of-the-claim"
        await harness.store.mark_queued(ONE, "api-1")
        assert await trace() == "of-the-claim"
        granted = await harness.store.begin(ONE, 10, "worker-1", 0, "of-the-fetch")
        assert isinstance(granted, Granted)
        assert await trace() == "of-the-fetch"
        await harness.store.renew(granted.lease, "http://source/")
        assert await trace() == "of-the-fetch"

    async def test_of_the_claim_stays_where_the_fetch_has_none(self, harness: Harness) -> None:
        await harness.reconciled()
        await harness.store.claim(ONE, "api-1", trace="of-the-claim")
        await harness.store.begin(ONE, 10, "worker-1")
        fetch = (await harness.store.find(ONE)).fetch
        assert fetch is not None
        assert fetch.trace == "of-the-claim"
        await harness.store.claim(TWO, "api-1")
        fetch = (await harness.store.find(TWO)).fetch
        assert fetch is not None
        assert fetch.trace == ""


class TestClaim:
    async def test_fifty_at_once_have_one_winner(self, harness: Harness) -> None:
        stores = [harness.store, harness.other] * 25
        claims = await asyncio.gather(*(store.claim(ONE, f"api-{n}") for n, store in enumerate(stores)))
        assert sum(claim.won for claim in claims) == 1
        for claim in claims:
            in_the_way = claim.status.fetch
            assert (in_the_way is None) == claim.won
            assert in_the_way is None or in_the_way.phase is FetchPhase.CLAIMED

    async def test_is_refused_while_a_failure_is_remembered(self, harness: Harness) -> None:
        await harness.store.record_failure(ONE, "every source failed: é", 60)
        claim = await harness.store.claim(ONE, "api-1")
        assert not claim.won
        assert claim.status.failure is not None
        assert claim.status.failure.reason == "every source failed: é"
        assert 50 < claim.status.failure.seconds_left <= 60

    async def test_evidence_ends_a_failure_of_its_cause_alone(self, harness: Harness) -> None:
        await harness.store.record_failure(ONE, "none\tanswers", 60, FailureCause.SOURCES)
        failure = (await harness.other.find(ONE)).failure
        assert failure is not None
        assert (failure.reason, failure.cause) == ("none\tanswers", FailureCause.SOURCES)
        assert not await harness.other.refute_failure(ONE, FailureCause.CORRUPT)
        assert not (await harness.store.claim(ONE, "api-1")).won
        assert await harness.other.refute_failure(ONE, FailureCause.SOURCES)
        assert not await harness.other.refute_failure(ONE, FailureCause.SOURCES)
        assert (await harness.store.claim(ONE, "api-1")).won

    async def test_a_failure_without_a_cause_is_one_of_another_kind(self, harness: Harness) -> None:
        await harness.store.record_failure(ONE, "no space", 60)
        failure = (await harness.other.find(ONE)).failure
        assert failure is not None
        assert failure.cause is FailureCause.OTHER
        assert not await harness.other.refute_failure(ONE, FailureCause.SOURCES)

    async def test_failures_are_forgotten_in_time(self, harness: Harness) -> None:
        await harness.store.record_failure(ONE, "refused", 0.1)

        async def won() -> bool:
            return (await harness.store.claim(ONE, "api-1")).won

        await harness.until(won)

    async def test_expires(self, brief: Harness) -> None:
        assert (await brief.store.claim(ONE, "api-1")).won
        assert not (await brief.store.claim(ONE, "api-2")).won
        await brief.until_phase(ONE, None)
        assert (await brief.store.claim(ONE, "api-2")).won

    async def test_is_refused_while_queued_and_fetching(self, harness: Harness) -> None:
        await harness.reconciled()
        await harness.store.claim(ONE, "api-1")
        await harness.store.mark_queued(ONE, "api-1")
        queued = await harness.store.claim(ONE, "api-2")
        assert not queued.won
        assert queued.status.fetch is not None
        assert queued.status.fetch.phase is FetchPhase.QUEUED
        assert 30 < queued.status.fetch.lease_left <= 60
        await harness.begin_fetch(ONE, 100)
        fetching = await harness.store.claim(ONE, "api-2")
        assert not fetching.won
        assert fetching.status.fetch is not None
        assert fetching.status.fetch.phase is FetchPhase.FETCHING

    async def test_over_a_parked_fetch_keeps_its_reservation(self, harness: Harness) -> None:
        await harness.reconciled()
        await harness.store.park(await harness.begin_fetch(ONE, 100))
        assert (await harness.store.claim(ONE, "api-1")).won
        assert await harness.phase(ONE) is FetchPhase.CLAIMED
        assert await harness.used_and_reserved() == (0, footprint(100))
        resumed = await harness.store.begin(ONE, 100, "worker-2")
        assert isinstance(resumed, Granted)
        assert resumed.resumed
        assert await harness.used_and_reserved() == (0, footprint(100))

    async def test_over_a_parked_fetch_expires_to_parked(self, brief: Harness) -> None:
        await brief.reconciled()
        await brief.store.park(await brief.begin_fetch(ONE, 100))
        await brief.store.claim(ONE, "api-1")
        await brief.store.mark_queued(ONE, "api-1")
        await brief.until_phase(ONE, FetchPhase.PARKED)
        assert await brief.used_and_reserved() == (0, footprint(100))


async def admitted(
    store: StateStore, object_id: ObjectId, size: int, above: int | None = 1000, **changes: float
) -> bool:
    """Whether a claim is won. A won claim is released."""
    low = int(changes.pop("low", 0))
    question = AdmissionQuestion(size, above, low, **{"window": 60.0, "view_window": 0.2} | changes)
    claim = await store.claim(object_id, "api-1", question)
    assert claim.won == claim.admitted, "nothing else is in the way"
    assert claim.status == ObjectStatus(None, None)
    if claim.won:
        await store.release_claim(object_id, "api-1")
    else:
        assert await store.find(object_id) == ObjectStatus(None, None), "nothing is claimed"
    return claim.won


class TestAdmission:
    async def test_a_large_object_is_admitted_on_its_second_view_in_whatever_process(
        self, harness: Harness
    ) -> None:
        await harness.reconciled()
        await harness.stored(THREE, 5000)
        assert await admitted(harness.store, ONE, 1000), "not large"
        assert not await admitted(harness.store, ONE, 1001)
        assert not await admitted(harness.other, ONE, 1001), "the same view"
        assert not await admitted(harness.other, TWO, 1001)
        await harness.advance_clock(0.25)
        assert await admitted(harness.other, ONE, 1001)

    async def test_with_room_left_every_object_is_admitted_and_its_first_view_remembered(
        self, harness: Harness
    ) -> None:
        await harness.reconciled()
        await harness.stored(THREE, 5000)
        assert await admitted(harness.store, ONE, 1001, low=footprint(5000))
        await harness.advance_clock(0.25)
        assert await admitted(harness.store, ONE, 1001)
        await harness.begin_fetch(TWO, 1)
        assert not await admitted(harness.store, ObjectId("4"), 1001, low=footprint(5000)), (
            "reserved bytes count"
        )

    async def test_a_first_view_is_forgotten_after_the_window(self, harness: Harness) -> None:
        await harness.reconciled()
        await harness.stored(THREE, 5000)
        for _ in range(2):
            assert not await admitted(harness.store, ONE, 1001, window=0.1, view_window=0.01)
            await harness.advance_clock(0.15)

    async def test_the_threshold_follows_the_mean_view(self, harness: Harness) -> None:
        term = await harness.reconciled()
        await harness.stored(THREE, 800_000)
        above = 2 * footprint(800_000)
        assert await admitted(harness.store, ONE, above, None), (
            "no view is counted: the mean of what is stored"
        )
        assert not await admitted(harness.store, ONE, above + 1, None)
        basis = PriorityBasis(0.0, "gdsf", 1.0, views=10.0, viewed_bytes=1e7)
        await harness.store.save_policy(term, [], PolicyState(basis, ""))
        assert await admitted(harness.store, TWO, 2_000_000, None)
        assert not await admitted(harness.store, TWO, 2_000_001, None)
        await harness.store.save_policy(
            term, [], PolicyState(PriorityBasis(0.0, "gdsf", 1.0, 10.0, 10.0), "")
        )
        assert await admitted(harness.store, ObjectId("4"), 1024**2, None), "never below 1 MiB"
        assert not await admitted(harness.store, ObjectId("4"), 1024**2 + 1, None)

    async def test_the_memory_is_bounded(self, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(redis_store, "MAX_FIRST_VIEWS", 3)
        if isinstance(harness.store, MemoryStateStore):
            harness.store.tables.first_views = SecondHitAdmission(3)
        await harness.reconciled()
        await harness.stored(THREE, 5000)
        for number in range(5):
            assert not await admitted(harness.store, ObjectId(f"n{number}"), 1001)
            await harness.advance_clock(0.01)
        await harness.advance_clock(0.25)
        assert await admitted(harness.store, ObjectId("n2"), 1001)
        assert not await admitted(harness.store, ObjectId("n0"), 1001)

    async def test_a_fetch_that_was_begun_is_continued(self, harness: Harness) -> None:
        await harness.reconciled()
        await harness.stored(THREE, 5000)
        await harness.store.park(await harness.begin_fetch(ONE, 2000))
        claim = await harness.store.claim(ONE, "api-1", AdmissionQuestion(2000, 1000, 0, 60.0))
        assert claim.won

    async def test_what_is_in_the_way_comes_before_admission(self, harness: Harness) -> None:
        await harness.store.record_failure(ONE, "unreachable", 60)
        claim = await harness.store.claim(ONE, "api-1", AdmissionQuestion(1001, 1000, -1, 60.0))
        assert claim.status.failure is not None
        assert claim.admitted


class TestMarkQueuedAndWithdraw:
    @pytest.mark.parametrize("parked", [False, True])
    async def test_a_job_that_waits_long_is_not_published_again(self, brief: Harness, parked: bool) -> None:
        await brief.reconciled()
        if parked:
            await brief.store.park(await brief.begin_fetch(ONE, 100))
        assert (await brief.store.claim(ONE, "api-1")).won
        await brief.store.mark_queued(ONE, "api-1")
        await brief.until_phase(ONE, FetchPhase.PARKED if parked else None)
        await brief.store.fetches()
        again = await brief.store.claim(ONE, "api-2")
        assert not again.won
        assert again.status.fetch is not None
        assert again.status.fetch.phase is FetchPhase.QUEUED
        assert await brief.used_and_reserved() == (0, footprint(100) if parked else 0)

        async def lost() -> bool:
            return (await brief.store.claim(ONE, "api-2")).won

        await brief.until(lost)

    async def test_claims_have_rising_serials(self, harness: Harness) -> None:
        first = await harness.store.claim(ONE, "api-1")
        await harness.store.release_claim(ONE, "api-1")
        second = await harness.store.claim(ONE, "api-1")
        assert 0 < first.serial < second.serial

    async def test_only_the_claimant_may(self, harness: Harness) -> None:
        await harness.store.claim(ONE, "api-1")
        await harness.store.mark_queued(ONE, "api-2")
        assert await harness.phase(ONE) is FetchPhase.CLAIMED
        await harness.store.release_claim(ONE, "api-2")
        assert await harness.phase(ONE) is FetchPhase.CLAIMED

    async def test_a_late_mark_leaves_a_newer_claim_alone(self, harness: Harness) -> None:
        """1. A job is published, and fetched at once. 2. The same process claims the object again. 3. The mark of the
        first claim comes."""
        await harness.reconciled()
        first = await harness.store.claim(ONE, "api-1")
        await harness.store.release(await harness.begin_fetch(ONE, 100))
        second = await harness.store.claim(ONE, "api-1")
        await harness.store.mark_queued(ONE, "api-1", first.serial)
        assert await harness.phase(ONE) is FetchPhase.CLAIMED
        await harness.store.mark_queued(ONE, "api-1", second.serial)
        assert await harness.phase(ONE) is FetchPhase.QUEUED

    async def test_a_faster_worker_is_not_disturbed(self, harness: Harness) -> None:
        await harness.reconciled()
        await harness.store.claim(ONE, "api-1")
        await harness.begin_fetch(ONE, 100)
        await harness.store.mark_queued(ONE, "api-1")
        for claimant in ("api-1", None):
            await harness.store.release_claim(ONE, claimant)
            assert await harness.phase(ONE) is FetchPhase.FETCHING

    @pytest.mark.parametrize("queued", [False, True])
    async def test_a_released_claim_is_removed(self, harness: Harness, queued: bool) -> None:
        await harness.store.claim(ONE, "api-1")
        if queued:
            await harness.store.mark_queued(ONE, "api-1")
        await harness.store.release_claim(ONE, "api-1")
        assert await harness.phase(ONE) is None
        assert (await harness.store.claim(ONE, "api-2")).won

    @pytest.mark.parametrize("claimant", ["api-1", None])
    @pytest.mark.parametrize("parked", [False, True])
    async def test_a_queue_mark_is_released_after_it_has_expired(
        self, brief: Harness, parked: bool, claimant: str | None
    ) -> None:
        """Its job has ended. As long as it counted as waiting, no other would be published."""
        await brief.reconciled()
        if parked:
            await brief.store.park(await brief.begin_fetch(ONE, 100))
        await brief.store.claim(ONE, "api-1")
        await brief.store.mark_queued(ONE, "api-1")
        await brief.until_phase(ONE, FetchPhase.PARKED if parked else None)
        await brief.store.release_claim(ONE, claimant)
        assert await brief.phase(ONE) is (FetchPhase.PARKED if parked else None)
        assert await brief.used_and_reserved() == (0, footprint(100) if parked else 0)
        assert (await brief.store.claim(ONE, "api-2")).won

    @pytest.mark.parametrize("claimant", ["api-1", None])
    async def test_the_claim_of_another_job_stays(self, harness: Harness, claimant: str | None) -> None:
        first = await harness.store.claim(ONE, "api-1")
        await harness.store.release_claim(ONE, "api-1", first.serial)
        assert await harness.phase(ONE) is None
        second = await harness.store.claim(ONE, "api-1")
        await harness.store.mark_queued(ONE, "api-1")
        await harness.store.release_claim(ONE, claimant, first.serial)
        assert await harness.phase(ONE) is FetchPhase.QUEUED
        await harness.store.release_claim(ONE, claimant, second.serial)
        assert await harness.phase(ONE) is None

    async def test_a_released_claim_with_a_reservation_is_parked(self, harness: Harness) -> None:
        await harness.reconciled()
        await harness.store.park(await harness.begin_fetch(ONE, 100))
        await harness.store.claim(ONE, "api-1")
        await harness.store.release_claim(ONE, "api-1")
        assert await harness.phase(ONE) is FetchPhase.PARKED
        assert await harness.used_and_reserved() == (0, footprint(100))

    async def test_an_expired_claim_cannot_be_queued(self, brief: Harness) -> None:
        await brief.store.claim(ONE, "api-1")
        await brief.until_phase(ONE, None)
        await brief.store.mark_queued(ONE, "api-1")
        assert await brief.phase(ONE) is None
