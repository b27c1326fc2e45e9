"""`kill -9` of each service at random points under load: no corrupt byte, limit kept, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from distributor_node.services.demo.faults import Fault
from distributor_node.services.demo.objects import MIB
from tests.chaos.clients import ClientPool
from tests.chaos.figures import record_result
from tests.chaos.harness import ChaosHarness, mixed_objects
from tests.chaos.invariants import wait_until_settled
from tests.chaos.watchers import process_tree
from tests.waiting import eventually

LIMIT = 14 * MIB
OBJECTS = mixed_objects(56)
SEED = int(os.environ.get("CHAOS_SEED", "1"))
KILLS = int(os.environ.get("CHAOS_KILLS", "100"))


@asynccontextmanager
async def under_load(
    chaos: ChaosHarness, *, fetchers: int = 1, workers: int = 1
) -> AsyncIterator[ClientPool]:
    """Objects of twice the limit, sources slow enough for kills to meet downloads, a watch over the volume."""
    for node in (chaos.first, chaos.second):
        node.faults.add(Fault(bytes_per_second=8 * MIB))
    clients = await chaos.up(OBJECTS, LIMIT, fetchers=fetchers, workers=workers)
    clients.seed = SEED
    monitor = chaos.monitor_volume()
    async with monitor.running(), clients.running(10):
        yield clients
    assert monitor.samples > 5
    assert LIMIT // 3 < monitor.peak <= LIMIT


async def kill_repeatedly(chaos: ChaosHarness, kind: str, kills: int) -> list[float]:
    """Kill, start at once, at random times of its new life, readiness or not; seconds from a kill to readiness."""
    rng = random.Random(SEED)
    process = chaos.only(kind)
    recoveries = []
    for number in range(kills):
        await asyncio.sleep(rng.uniform(0, 1.5))
        process.kill()
        killed = time.monotonic()
        process.start()
        if number % 4 != 3:  # one in four is killed again before it is ready
            await process.healthy()
            recoveries.append(time.monotonic() - killed)
    await process.healthy()
    return recoveries


async def killed(chaos: ChaosHarness, kind: str, kills: int) -> None:
    async with under_load(chaos) as clients:
        if kind == "api":
            with clients.fault():
                recoveries = await kill_repeatedly(chaos, kind, kills)
        else:
            recoveries = await kill_repeatedly(chaos, kind, kills)
        await asyncio.sleep(1)
    clients.check()
    rest = await wait_until_settled(chaos, OBJECTS)
    recoveries.sort()
    record_result(
        f"kill_{kind}", clients, kills=kills, seed=SEED, ready_again_median=recoveries[len(recoveries) // 2],
        ready_again_longest=recoveries[-1], at_rest_after=rest,
    )  # fmt: skip


@pytest.mark.timeout(120)
async def test_each_killed_in_turn_under_load(chaos: ChaosHarness) -> None:
    async with under_load(chaos) as clients:
        for kind in ("fetcher", "evictor"):
            await kill_repeatedly(chaos, kind, 1)
        clients.check()
        with clients.fault():
            await kill_repeatedly(chaos, "api", 1)
    clients.check()
    await wait_until_settled(chaos, OBJECTS)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["api", "fetcher", "evictor"])
async def test_killed_a_hundred_times_under_load(chaos: ChaosHarness, kind: str) -> None:
    await killed(chaos, kind, KILLS)


@pytest.mark.chaos
@pytest.mark.timeout(600)
async def test_killed_api_workers_are_replaced_by_their_supervisor(chaos: ChaosHarness) -> None:
    async with under_load(chaos, workers=2) as clients:
        rng = random.Random(SEED)
        supervisor = chaos.only("api")
        assert supervisor.process is not None
        parent = supervisor.process.pid
        with clients.fault():
            for _ in range(6):
                workers = process_tree(parent)[1:]
                os.kill(rng.choice(workers), signal.SIGKILL)
                await eventually(lambda: len(process_tree(parent)) >= 3, 30, pause=0.05)
                await supervisor.healthy()
                await asyncio.sleep(rng.uniform(0, 1))
    clients.check()
    await wait_until_settled(chaos, OBJECTS)


@pytest.mark.chaos
@pytest.mark.timeout(900)
async def test_all_killed_together_repeatedly(chaos: ChaosHarness) -> None:
    """As by a power cut of the whole host but the servers."""
    async with under_load(chaos, fetchers=2) as clients:
        rng = random.Random(SEED)
        with clients.fault():
            for _ in range(10):
                await asyncio.sleep(rng.uniform(0.2, 3))
                for process in chaos.stack.processes:
                    process.kill()
                for process in chaos.stack.processes:
                    process.start()
                await chaos.stack.ready()
        await asyncio.sleep(2)
    clients.check()
    record_result("kill_all", clients, kills=10, at_rest_after=await wait_until_settled(chaos, OBJECTS))
