"""Looking, claiming, queueing, withdrawing: the requests' side of the state store, for both adapters."""

from __future__ import annotations

import asyncio

import pytest

from shared.domain.objects import ObjectId
from shared.domain.space import footprint
from shared.ports.state_store import (
    FetchPhase,
    Granted,
)
from tests.contract.state_world import ONE, THREE, TWO, World


class TestFind:
    async def test_knows_nothing_at_first(self, world: World) -> None:
        object_status = await world.store.find(ONE)
        assert object_status.fetch is None
        assert object_status.failure is None

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
        assert await brief.phase(ONE) is None
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
            in_the_way = claim.status.fetch
            assert (in_the_way is None) == claim.won
            assert in_the_way is None or in_the_way.phase is FetchPhase.CLAIMED

    async def test_is_refused_while_a_failure_is_remembered(self, world: World) -> None:
        await world.store.record_failure(ONE, "every source failed: é", 60)
        claim = await world.store.claim(ONE, "api-1")
        assert not claim.won
        assert claim.status.failure is not None
        assert claim.status.failure.reason == "every source failed: é"
        assert 50 < claim.status.failure.seconds_left <= 60

    async def test_failures_are_forgotten_in_time(self, world: World) -> None:
        await world.store.record_failure(ONE, "refused", 0.1)

        async def won() -> bool:
            return (await world.store.claim(ONE, "api-1")).won

        await world.until(won)

    async def test_runs_out(self, brief: World) -> None:
        assert (await brief.store.claim(ONE, "api-1")).won
        assert not (await brief.store.claim(ONE, "api-2")).won
        await brief.until_phase(ONE, None)
        assert (await brief.store.claim(ONE, "api-2")).won

    async def test_is_refused_while_queued_and_fetching(self, world: World) -> None:
        await world.reconciled()
        await world.store.claim(ONE, "api-1")
        await world.store.mark_queued(ONE, "api-1")
        queued = await world.store.claim(ONE, "api-2")
        assert not queued.won
        assert queued.status.fetch is not None
        assert queued.status.fetch.phase is FetchPhase.QUEUED
        assert 30 < queued.status.fetch.lease_left <= 60
        await world.begun(ONE, 100)
        fetching = await world.store.claim(ONE, "api-2")
        assert not fetching.won
        assert fetching.status.fetch is not None
        assert fetching.status.fetch.phase is FetchPhase.FETCHING

    async def test_over_a_parked_fetch_keeps_its_reservation(self, world: World) -> None:
        await world.reconciled()
        await world.store.park(await world.begun(ONE, 100))
        assert (await world.store.claim(ONE, "api-1")).won
        assert await world.phase(ONE) is FetchPhase.CLAIMED
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
        await brief.until_phase(ONE, FetchPhase.PARKED)
        assert await brief.taken() == (0, footprint(100))


class TestMarkQueuedAndWithdraw:
    async def test_only_the_claimant_may(self, world: World) -> None:
        await world.store.claim(ONE, "api-1")
        await world.store.mark_queued(ONE, "api-2")
        assert await world.phase(ONE) is FetchPhase.CLAIMED
        await world.store.release_claim(ONE, "api-2")
        assert await world.phase(ONE) is FetchPhase.CLAIMED

    async def test_a_worker_that_was_faster_is_not_disturbed(self, world: World) -> None:
        await world.reconciled()
        await world.store.claim(ONE, "api-1")
        await world.begun(ONE, 100)
        await world.store.mark_queued(ONE, "api-1")
        await world.store.release_claim(ONE, "api-1")
        assert await world.phase(ONE) is FetchPhase.FETCHING

    @pytest.mark.parametrize("queued", [False, True])
    async def test_withdrawn_is_gone(self, world: World, queued: bool) -> None:
        await world.store.claim(ONE, "api-1")
        if queued:
            await world.store.mark_queued(ONE, "api-1")
        await world.store.release_claim(ONE, "api-1")
        assert await world.phase(ONE) is None
        assert (await world.store.claim(ONE, "api-2")).won

    async def test_withdrawn_over_a_reservation_is_parked(self, world: World) -> None:
        await world.reconciled()
        await world.store.park(await world.begun(ONE, 100))
        await world.store.claim(ONE, "api-1")
        await world.store.release_claim(ONE, "api-1")
        assert await world.phase(ONE) is FetchPhase.PARKED
        assert await world.taken() == (0, footprint(100))

    async def test_a_claim_that_ran_out_cannot_be_queued(self, brief: World) -> None:
        await brief.store.claim(ONE, "api-1")
        await brief.until_phase(ONE, None)
        await brief.store.mark_queued(ONE, "api-1")
        assert await brief.phase(ONE) is None
