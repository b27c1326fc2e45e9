"""`kill -9` of each service at random points under load: no wrong byte, no byte too many, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.demo.knobs import Behaviour
from services.demo.objects import MIB
from tests.fire.crew import Crew
from tests.fire.figures import note
from tests.fire.inspection import settled
from tests.fire.watchers import family
from tests.fire.world import FireWorld, mixed_objects

LIMIT = 14 * MIB
OBJECTS = mixed_objects(56)
SEED = int(os.environ.get("FIRE_SEED", "1"))
KILLS = int(os.environ.get("FIRE_KILLS", "100"))


@asynccontextmanager
async def under_load(fire: FireWorld, *, fetchers: int = 1, workers: int = 1) -> AsyncIterator[Crew]:
    """Objects of twice the limit, sources slow enough for kills to meet downloads, a watch over the volume."""
    for node in (fire.first, fire.second):
        node.knobs.add(Behaviour(bytes_per_second=8 * MIB))
    crew = await fire.up(OBJECTS, LIMIT, fetchers=fetchers, workers=workers)
    crew.seed = SEED
    watch = fire.watch()
    async with watch.watching(), crew.at_work(10):
        yield crew
    assert watch.samples > 5
    assert LIMIT // 3 < watch.highest <= LIMIT


async def kill_again_and_again(fire: FireWorld, kind: str, kills: int) -> list[float]:
    """Kill, start at once, at random times of its new life, readiness or not; seconds from a kill to readiness."""
    chance = random.Random(SEED)
    process = fire.only(kind)
    recoveries = []
    for number in range(kills):
        await asyncio.sleep(chance.uniform(0, 1.5))
        process.kill()
        killed = time.monotonic()
        process.start()
        if number % 4 != 3:  # one in four is killed again before it is ready
            await process.healthy()
            recoveries.append(time.monotonic() - killed)
    await process.healthy()
    return recoveries


async def killed(fire: FireWorld, kind: str, kills: int) -> None:
    async with under_load(fire) as crew:
        if kind == "api":
            with crew.fault():
                recoveries = await kill_again_and_again(fire, kind, kills)
        else:
            recoveries = await kill_again_and_again(fire, kind, kills)
        await asyncio.sleep(1)
    crew.check()
    rest = await settled(fire, OBJECTS)
    recoveries.sort()
    note(
        f"kill_{kind}", crew, kills=kills, seed=SEED, ready_again_median=recoveries[len(recoveries) // 2],
        ready_again_longest=recoveries[-1], at_rest_after=rest,
    )  # fmt: skip


@pytest.mark.timeout(120)
async def test_each_killed_in_turn_under_load(fire: FireWorld) -> None:
    async with under_load(fire) as crew:
        for kind in ("fetcher", "evictor"):
            await kill_again_and_again(fire, kind, 1)
        crew.check()
        with crew.fault():
            await kill_again_and_again(fire, "api", 1)
    crew.check()
    await settled(fire, OBJECTS)


@pytest.mark.fire
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["api", "fetcher", "evictor"])
async def test_killed_a_hundred_times_under_load(fire: FireWorld, kind: str) -> None:
    await killed(fire, kind, KILLS)


@pytest.mark.fire
@pytest.mark.timeout(600)
async def test_killed_api_workers_are_replaced_by_their_supervisor(fire: FireWorld) -> None:
    async with under_load(fire, workers=2) as crew:
        chance = random.Random(SEED)
        supervisor = fire.only("api")
        assert supervisor.process is not None
        with crew.fault():
            for _ in range(6):
                workers = family(supervisor.process.pid)[1:]
                os.kill(chance.choice(workers), signal.SIGKILL)
                async with asyncio.timeout(30):
                    while len(family(supervisor.process.pid)) < 3:  # noqa: ASYNC110 - another process
                        await asyncio.sleep(0.05)
                await supervisor.healthy()
                await asyncio.sleep(chance.uniform(0, 1))
    crew.check()
    await settled(fire, OBJECTS)


@pytest.mark.fire
@pytest.mark.timeout(900)
async def test_all_killed_at_once_again_and_again(fire: FireWorld) -> None:
    """As by a power cut of the whole host but the servers."""
    async with under_load(fire, fetchers=2) as crew:
        chance = random.Random(SEED)
        with crew.fault():
            for _ in range(10):
                await asyncio.sleep(chance.uniform(0.2, 3))
                for process in fire.stack.processes:
                    process.kill()
                for process in fire.stack.processes:
                    process.start()
                await fire.stack.ready()
        await asyncio.sleep(2)
    crew.check()
    note("kill_all", crew, kills=10, at_rest_after=await settled(fire, OBJECTS))
