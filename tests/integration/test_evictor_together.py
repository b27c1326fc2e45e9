"""Several evictors: one leads, another takes over, a frozen former leader does no harm."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.services.evictor.leader_election import LeaderElection
from distributor_node.services.evictor.removal import ObjectRemover, RemovalOutcome
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.volume import RemovalState
from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.eviction import LruSp
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import HeldElsewhere, Term
from tests.integration.evictor_harness import (
    LEADERSHIP,
    LIMIT,
    RENEWAL,
    SIZE,
    EvictorHarness,
    evictor_harness,
)
from tests.servers.redis_server import RedisServer
from tests.volume_size import bytes_on_volume
from tests.waiting import eventually

ONE = ObjectId("one")


class Candidate:
    """A leadership and a record of the terms it had."""

    def __init__(self, harness: EvictorHarness, name: str) -> None:
        self.election = LeaderElection(harness.state, name, LEADERSHIP, RENEWAL)
        self.acting = asyncio.Event()
        self.terms: list[Term] = []
        self.stopped_at = 0.0

    async def work(self, term: Term) -> None:
        self.terms.append(term)
        self.acting.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.acting.clear()
            self.stopped_at = time.monotonic()


async def stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def test_one_leads_and_the_other_takes_over_at_once_when_it_resigns(harness: EvictorHarness) -> None:
    first, second = Candidate(harness, "first"), Candidate(harness, "second")
    leading = asyncio.create_task(first.election.serve(first.work))
    await eventually(first.acting.is_set)
    standing_by = asyncio.create_task(second.election.serve(second.work))
    await asyncio.sleep(LEADERSHIP * 1.2)
    assert first.acting.is_set()
    assert not second.acting.is_set()
    await stop(leading)
    resigned = time.monotonic()
    await eventually(second.acting.is_set)
    assert time.monotonic() - resigned < LEADERSHIP, "its term was not waited for"
    assert second.terms[0].token > first.terms[0].token
    await stop(standing_by)


async def test_a_leader_whose_term_the_store_lost_starts_a_new_one(harness: EvictorHarness) -> None:
    candidate = Candidate(harness, "first")
    leading = asyncio.create_task(candidate.election.serve(candidate.work))
    await eventually(candidate.acting.is_set)
    await harness.state.resign(candidate.terms[0])
    candidate.election.renew_now()
    await eventually(lambda: len(candidate.terms) == 2)
    assert candidate.terms[1].token > candidate.terms[0].token
    await stop(leading)


@pytest.mark.servers
async def test_a_leader_that_cannot_renew_stops_before_its_term_expires(
    tmp_path: Path, own_redis: RedisServer, redis_prefix: str
) -> None:
    async with evictor_harness(tmp_path, (own_redis.url, redis_prefix)) as harness:
        candidate = Candidate(harness, "first")
        leading = asyncio.create_task(candidate.election.serve(candidate.work))
        await eventually(candidate.acting.is_set)
        frozen = time.monotonic()
        own_redis.freeze()
        await eventually(lambda: not candidate.acting.is_set())
        assert candidate.stopped_at - frozen < LEADERSHIP
        own_redis.thaw()
        await eventually(candidate.acting.is_set)
        await stop(leading)


async def test_the_work_of_a_failing_leader_ends_with_its_error(harness: EvictorHarness) -> None:
    async def work(term: Term) -> None:
        raise ValueError("a fault of ours")

    with pytest.raises(ValueError, match="a fault of ours"):
        await LeaderElection(harness.state, "first", LEADERSHIP, RENEWAL).serve(work)
    assert await harness.state.lead("second", 1.0) is not None


async def test_a_paused_leader_that_resumes_removes_nothing_newer(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("one")
    old = await harness.state.lead("old", 0.3)
    assert old is not None
    removal = harness.volume.removal(ONE)
    assert removal.begin() is RemovalState.READY
    assert await harness.state.begin_eviction(old, ONE, 0.0)
    await asyncio.sleep(0.4)  # stopped here, for longer than its term
    async with harness.evictor():
        await eventually(harness.reconciled)
        await asyncio.sleep(0.3)
        # The new leader waits for the lock. Until then no new file can be stored under the name.
        assert (await harness.entries())["one"].evicting
        assert await harness.used() == footprint(SIZE)
        assert isinstance(await harness.state.begin(ONE, SIZE, "worker"), HeldElsewhere)
        removal.unlink()
        assert await harness.state.finish_eviction(old, ONE) == 0
        removal.close()

        async def finished() -> bool:
            return await harness.entries() == {}

        await eventually(finished)
        await harness.store("one")
        assert harness.has("one")
        await eventually(harness.matches_volume)


async def test_without_a_term_nothing_is_removed(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("one")
    remover = ObjectRemover(
        harness.state, harness.volume, EvictionIndex(harness.state, harness.volume, LruSp)
    )
    stranger = Term("stranger", 1)
    assert await remover.evict(stranger, ONE, 0.0, "purged") is RemovalOutcome.REFUSED
    assert await remover.purge(stranger, ONE, "operator") is RemovalOutcome.REFUSED
    assert harness.has("one")


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


async def test_a_removal_whose_reply_was_lost_is_finished_later(tmp_path: Path) -> None:
    async with evictor_harness(tmp_path) as harness:
        store = FlakyStore(LIMIT, StateTimeouts(), time.time)
        harness.state = store
        async with harness.evictor():
            await eventually(harness.reconciled)
            await harness.store(*[f"o{number}" for number in range(9)], age=3600)
            store.lost_answers = 2
            await harness.store("o9")

            async def nothing_half_done() -> bool:
                entries = await harness.entries()
                return len(entries) <= 5 and not any(entry.evicting for entry in entries.values())

            await eventually(nothing_half_done)
            await eventually(harness.matches_volume)


async def test_never_above_the_limit_while_workers_fill_and_two_evictors_compete(
    harness: EvictorHarness,
) -> None:
    highest, deadline = 0, time.monotonic() + 3.0

    async def fill(worker: int) -> None:
        number = 0
        while time.monotonic() < deadline:
            number += 1
            name = f"w{worker}-{number}"
            try:
                await harness.store(name)
            except AssertionError:  # no space at this moment
                await harness.state.request_space(ObjectId(name), SIZE, 1.0)
                await asyncio.sleep(0.02)

    async def measure() -> None:
        nonlocal highest
        while time.monotonic() < deadline:
            # In the loop, so that no worker stores anything while it counts: files that move would count twice
            highest = max(highest, bytes_on_volume(harness.volume.root))
            await asyncio.sleep(0.02)

    async with harness.evictor(), harness.evictor():
        await eventually(harness.reconciled)
        await asyncio.gather(measure(), *(fill(worker) for worker in range(3)))
        assert 0 < highest <= LIMIT
        await eventually(harness.matches_volume)
