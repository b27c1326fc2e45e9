"""Jobs that nobody waits for: fetched where there is room, and nothing is evicted for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from services.fetcher.admission import Admission, AdmissionRules
from services.fetcher.download import Tools
from services.fetcher.postponement import Postponement
from services.fetcher.retrieval import Retrieval
from services.fetcher.worker import Worker
from shared.domain.jobs import Done, FetchJob
from shared.domain.objects import ObjectId
from shared.domain.space import footprint
from shared.ports.state_store import FetchPhase, Granted
from tests.integration.fetcher_world import OBJECT_ID, RETRIES, World, fetcher_world

DATA = b"warm" * 5000
LIMIT = 10 * footprint(len(DATA))


def worker(world: World, warm_below: int) -> Worker:
    rules = AdmissionRules(LIMIT, 0.3, 15.0, warm_below)
    return Worker(
        Admission(world.state, world.volume, world.disk, rules, "worker-1"),
        Retrieval(Tools(world.state, world.failover_reader, world.disk), world.volume, world.times),
        Postponement(world.state, RETRIES, failure_memory=60.0),
    )


def job(world: World) -> FetchJob:
    return replace(world.job(world.wanted(DATA)), low_priority=True)


async def occupied(world: World, size: int) -> None:
    assert isinstance(await world.state.begin(ObjectId("other"), size, "worker-2"), Granted)


async def test_with_room_it_is_fetched(tmp_path: Path) -> None:
    async with fetcher_world(tmp_path, [DATA], limit=LIMIT) as world:
        assert await worker(world, footprint(len(DATA))).handle(job(world)) == Done("fetched")
        assert world.stored() == DATA


async def test_above_the_mark_it_is_left_and_its_claim_ends(tmp_path: Path) -> None:
    async with fetcher_world(tmp_path, [DATA], limit=LIMIT) as world:
        await occupied(world, 100)
        await world.state.claim(OBJECT_ID, "api-1")
        await world.state.mark_queued(OBJECT_ID, "api-1")
        below = footprint(100) + footprint(len(DATA)) - 1
        assert await worker(world, below).handle(job(world)) == Done("no room to warm")
        assert (await world.state.find(OBJECT_ID)).fetch is None
        assert await world.state.space_requested() == 0
        # A job that a client waits for is fetched all the same.
        assert await worker(world, below).handle(replace(job(world), low_priority=False)) == Done("fetched")


async def test_without_space_nothing_is_evicted_for_it(tmp_path: Path) -> None:
    async with fetcher_world(tmp_path, [DATA], limit=LIMIT) as world:
        await occupied(world, LIMIT - footprint(0) - 100)
        assert await worker(world, 2 * LIMIT).handle(job(world)) == Done("no room to warm")
        assert await world.state.space_requested() == 0


async def test_a_fetch_of_somebody_else_is_let_be(tmp_path: Path) -> None:
    async with fetcher_world(tmp_path, [DATA], limit=LIMIT, lease=0.4) as world:
        await world.state.begin(OBJECT_ID, len(DATA), "worker-2")
        assert await worker(world, 0).handle(job(world)) == Done("no room to warm")
        fetch = (await world.state.find(OBJECT_ID)).fetch
        assert fetch is not None
        assert fetch.phase is FetchPhase.FETCHING
