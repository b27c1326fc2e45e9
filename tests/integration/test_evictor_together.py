"""Several evictors: one acts, another takes over, and one that was stopped does no harm when it goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from services.evictor.index import EvictionIndex
from services.evictor.leadership import Leadership
from services.evictor.removals import Outcome, Removals
from shared.adapters.state_memory import MemoryStateStore
from shared.adapters.state_times import StateTimeouts
from shared.adapters.volume import RemovalState
from shared.domain.errors import StateStoreUnavailable
from shared.domain.eviction import LruSp
from shared.domain.objects import ObjectId
from shared.domain.space import footprint
from shared.ports.state_store import HeldElsewhere, Term
from tests.integration.evictor_world import (
    LEADERSHIP,
    LIMIT,
    RENEWAL,
    SIZE,
    EvictorWorld,
    eventually,
    evictor_world,
)
from tests.servers.redis_server import RedisServer

ONE = ObjectId("one")


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.servers)])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EvictorWorld]:
    redis = None
    if request.param == "redis":
        redis = (request.getfixturevalue("redis_url"), request.getfixturevalue("redis_prefix"))
    async with evictor_world(tmp_path, redis) as made:
        yield made


class Candidate:
    """A leadership and a record of the terms it had."""

    def __init__(self, world: EvictorWorld, name: str) -> None:
        self.leadership = Leadership(world.state, name, LEADERSHIP, RENEWAL)
        self.acting = asyncio.Event()
        self.terms: list[Term] = []

    async def work(self, term: Term) -> None:
        self.terms.append(term)
        self.acting.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.acting.clear()


async def stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def test_one_leads_and_the_other_takes_over_at_once_when_it_resigns(world: EvictorWorld) -> None:
    first, second = Candidate(world, "first"), Candidate(world, "second")
    leading = asyncio.create_task(first.leadership.serve(first.work))
    await eventually(first.acting.is_set)
    standing_by = asyncio.create_task(second.leadership.serve(second.work))
    await asyncio.sleep(LEADERSHIP * 1.2)
    assert first.acting.is_set()
    assert not second.acting.is_set()
    await stop(leading)
    resigned = time.monotonic()
    await eventually(second.acting.is_set)
    assert time.monotonic() - resigned < RENEWAL * 2
    assert second.terms[0].token > first.terms[0].token
    await stop(standing_by)


async def test_a_leader_whose_term_the_store_forgot_begins_a_new_one(world: EvictorWorld) -> None:
    candidate = Candidate(world, "first")
    leading = asyncio.create_task(candidate.leadership.serve(candidate.work))
    await eventually(candidate.acting.is_set)
    await world.state.resign(candidate.terms[0])
    candidate.leadership.confirm()
    await eventually(lambda: len(candidate.terms) == 2)
    assert candidate.terms[1].token > candidate.terms[0].token
    await stop(leading)


@pytest.mark.servers
async def test_a_leader_that_cannot_renew_stops_before_its_term_is_over(
    tmp_path: Path, own_redis: RedisServer, redis_prefix: str
) -> None:
    async with evictor_world(tmp_path, (own_redis.url, redis_prefix)) as world:
        candidate = Candidate(world, "first")
        leading = asyncio.create_task(candidate.leadership.serve(candidate.work))
        await eventually(candidate.acting.is_set)
        frozen = time.monotonic()
        own_redis.freeze()
        await eventually(lambda: not candidate.acting.is_set())
        assert time.monotonic() - frozen < LEADERSHIP
        own_redis.thaw()
        await eventually(candidate.acting.is_set)
        await stop(leading)


async def test_the_work_of_a_failing_leader_ends_with_its_error(world: EvictorWorld) -> None:
    async def work(term: Term) -> None:
        raise ValueError("a fault of ours")

    with pytest.raises(ValueError, match="a fault of ours"):
        await Leadership(world.state, "first", LEADERSHIP, RENEWAL).serve(work)
    assert await world.state.lead("second", 1.0) is not None


async def test_a_stopped_leader_that_goes_on_removes_nothing_that_came_after(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        await world.store("one")
    old = await world.state.lead("old", 0.3)
    assert old is not None
    removal = world.volume.removal(ONE)
    assert removal.begin() is RemovalState.READY
    assert await world.state.begin_eviction(old, ONE, 0.0)
    await asyncio.sleep(0.4)  # stopped here, for longer than its term
    async with world.evictor():
        await eventually(world.reconciled)
        await asyncio.sleep(0.3)
        # The new leader waits for the lock, and meanwhile nobody can store a new file under the name
        assert (await world.entries())["one"].evicting
        assert await world.used() == footprint(SIZE)
        assert isinstance(await world.state.begin(ONE, SIZE, "worker"), HeldElsewhere)
        removal.unlink()
        assert await world.state.finish_eviction(old, ONE) == 0
        removal.close()

        async def finished() -> bool:
            return await world.entries() == {}

        await eventually(finished)
        await world.store("one")
        assert world.has("one")
        await eventually(world.true_to_the_volume)


async def test_without_a_term_nothing_is_removed(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        await world.store("one")
    removals = Removals(world.state, world.volume, EvictionIndex(world.state, world.volume, LruSp))
    stranger = Term("nobody", 1)
    assert await removals.evict(stranger, ONE, 0.0, "space") is Outcome.REFUSED
    assert await removals.purge(stranger, ONE, "operator") is Outcome.REFUSED
    assert world.has("one")


class FlakyStore(MemoryStateStore):
    """Whose answers get lost: `begin_evictions` works, and its caller does not learn of it."""

    lost_answers = 0

    async def begin_evictions(
        self, term: Term, object_ids: Sequence[ObjectId], min_idle: float
    ) -> Sequence[bool]:
        granted = await super().begin_evictions(term, object_ids, min_idle)
        if self.lost_answers:
            self.lost_answers -= 1
            raise StateStoreUnavailable("the answer was lost")
        return granted


async def test_a_removal_whose_answer_was_lost_is_finished_later(tmp_path: Path) -> None:
    async with evictor_world(tmp_path) as world:
        store = FlakyStore(LIMIT, StateTimeouts(), time.time)
        world.state = store
        async with world.evictor():
            await eventually(world.reconciled)
            await world.store(*[f"o{number}" for number in range(9)], age=3600)
            store.lost_answers = 2
            await world.store("o9")

            async def nothing_half_done() -> bool:
                entries = await world.entries()
                return len(entries) <= 5 and not any(entry.evicting for entry in entries.values())

            await eventually(nothing_half_done, 15.0)
            await eventually(world.true_to_the_volume)


async def test_never_above_the_limit_while_workers_fill_and_two_evictors_compete(world: EvictorWorld) -> None:
    highest, deadline = 0, time.monotonic() + 3.0

    async def fill(worker: int) -> None:
        number = 0
        while time.monotonic() < deadline:
            number += 1
            name = f"w{worker}-{number}"
            try:
                await world.store(name)
            except AssertionError:  # no space at this moment
                await world.state.request_space(ObjectId(name), SIZE, 1.0)
                await asyncio.sleep(0.02)

    async def measure() -> None:
        nonlocal highest
        while time.monotonic() < deadline:
            # In the loop, so that no worker stores anything while it counts: files that move would count twice
            highest = max(highest, world.volume.measure())
            await asyncio.sleep(0.02)

    async with world.evictor(), world.evictor():
        await eventually(world.reconciled)
        await asyncio.gather(measure(), *(fill(worker) for worker in range(3)))
        assert 0 < highest <= LIMIT
        await eventually(world.true_to_the_volume)
