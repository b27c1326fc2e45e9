"""The state store is out of reach while objects are fetched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.demo.generated import GeneratedContent
from services.demo.knobs import Behaviour, Match
from shared.adapters.state_memory import MemoryStateStore
from shared.domain.errors import StateStoreUnavailable
from shared.domain.jobs import Done, JobOutcome, TryLater
from shared.domain.objects import ObjectId
from shared.domain.space import footprint
from shared.ports.state_store import BeginResult, Lease
from tests.integration.fetcher_world import World, fetcher_world

SIZE = 2 * 1024 * 1024
DATA = GeneratedContent(7, SIZE).read(0, SIZE)


class FarStore(MemoryStateStore):
    """Verbs of fetches fail while it is out of reach."""

    reachable = True

    def _check(self) -> None:
        if not self.reachable:
            raise StateStoreUnavailable("out of reach")

    async def begin(self, object_id: ObjectId, size: int, worker: str) -> BeginResult:
        self._check()
        return await super().begin(object_id, size, worker)

    async def renew(self, lease: Lease, source: str | None = None) -> bool:
        self._check()
        return await super().renew(lease, source)

    async def commit(self, lease: Lease, stored_at: float) -> bool:
        self._check()
        return await super().commit(lease, stored_at)

    async def park(self, lease: Lease) -> None:
        self._check()
        await super().park(lease)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with fetcher_world(tmp_path, [DATA], lease=0.8, state_kind=FarStore) as ready:
        yield ready


def start(world: World) -> asyncio.Task[JobOutcome]:
    return asyncio.create_task(world.worker().handle(world.job(world.wanted(DATA))))


def reach(world: World, reachable: bool) -> None:
    assert isinstance(world.state, FarStore)
    world.state.reachable = reachable


async def test_before_the_beginning_the_job_waits(world: World) -> None:
    reach(world, False)
    assert await start(world) == TryLater("out of reach")
    assert len(world.nodes[0].requests) == 0


async def test_what_is_cached_is_done_without_it(world: World) -> None:
    await start(world)
    reach(world, False)
    assert await start(world) == Done("already cached")


async def test_for_a_moment_it_is_not_missed(world: World) -> None:
    world.nodes[0].knobs.add(Behaviour(bytes_per_second=2 * SIZE), Match(first=1))
    running = start(world)
    await world.until_partial(SIZE // 10)
    reach(world, False)
    await world.until_partial(SIZE // 2)
    reach(world, True)
    assert await running == Done("fetched")


async def test_for_longer_than_the_lease_the_writing_ends(world: World) -> None:
    world.nodes[0].knobs.add(Behaviour(bytes_per_second=SIZE // 4), Match(first=1))
    running = start(world)
    await world.until_partial(SIZE // 10)
    reach(world, False)
    outcome = await running
    assert isinstance(outcome, TryLater)
    assert "lease" in outcome.reason or "sign of life" in outcome.reason
    assert 0 < (world.partial_size() or 0) < SIZE
    reach(world, True)
    assert await start(world) == Done("fetched")
    assert world.stored() == DATA


async def test_at_the_end_the_object_is_stored_and_made_known_later(world: World) -> None:
    world.nodes[0].knobs.add(Behaviour(bytes_per_second=4 * SIZE), Match(first=1))
    running = start(world)
    await world.until_partial(SIZE // 2)
    reach(world, False)
    outcome = await running
    assert isinstance(outcome, TryLater)
    assert world.stored() == DATA
    reach(world, True)
    assert await start(world) == Done("already cached")
    await asyncio.sleep(1.0)  # the lease of the first attempt runs out
    assert await start(world) == Done("already cached")
    usage = await world.state.usage()
    assert (usage.used, usage.reserved) == (footprint(SIZE), 0)
