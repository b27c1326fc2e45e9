"""Three standalone nodes as a fleet: processes are killed and frozen at random under load, or one has another clock.

They keep second copies and sign their requests.

FLEET_SOAK_SECONDS (default 20) and CHAOS_SEED change the length and the order.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from distributor_node.services.demo.objects import generated_object
from distributor_node.services.demo.storage_node import StorageNode
from tests.end_to_end.fleet import KIB, Fleet, report
from tests.end_to_end.stack import ServiceProcess

pytestmark = pytest.mark.chaos

SECONDS = float(os.environ.get("FLEET_SOAK_SECONDS", "20"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
LONGEST = 20.0
"""Seconds for an answer of a node that runs, whatever becomes of its peers: players give up after that."""


async def disturb(process: ServiceProcess, chance: random.Random) -> None:
    """Kill it and start it again, or freeze it for a while."""
    if chance.random() < 0.5:
        process.kill()
        await asyncio.sleep(chance.uniform(0.0, 2.0))
        process.start()
        await process.healthy()
    else:
        process.send(signal.SIGSTOP)
        await asyncio.sleep(chance.uniform(0.2, 3.0))
        process.send(signal.SIGCONT)


def secret_of(folder: Path) -> Path:
    file = folder / "secret"
    file.write_text("the-secret-of-the-fleet\n")
    return file


async def test_killed_and_frozen_nodes_cost_their_own_clients_alone(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    async with StorageNode([]).run() as far:
        fleet = Fleet(tmp_path, ("memory://", "memory://"), far)
        fleet.publish(
            [generated_object(str(number), (20 + number * 17 % 900) * KIB) for number in range(150)]
        )
        cells = [fleet.new_cell(40 * 1024 * KIB) for _ in range(3)]
        fleet.join(
            cells,
            DISTRIBUTOR_PEERS__FIRST_BYTE_WAIT="1",
            DISTRIBUTOR_PEERS__KEEP_BELOW="100K",
            DISTRIBUTOR_PEERS__SECRET_FILE=str(secret_of(tmp_path)),
            DISTRIBUTOR_PEERS__COPIES="2",
            DISTRIBUTOR_PEERS__COPY_AFTER="1",
        )
        for cell in cells:
            cell.add("standalone")
        disturbed = [0.0, 0.0, 0.0]  # until when, on the monotonic clock; inf: now
        slowest, answers, lost = 0.0, 0, 0
        ended = asyncio.Event()

        async def client(number: int, seed: int) -> None:
            nonlocal slowest, answers, lost
            pick = random.Random(seed)
            while not ended.is_set():
                began = time.monotonic()
                whole = await fleet.ask(number, str(pick.randrange(150)))
                if disturbed[number] < began:
                    assert whole, f"node {number} failed a request, undisturbed"
                    slowest = max(slowest, time.monotonic() - began)
                answers += whole
                lost += not whole
                if not whole:
                    await asyncio.sleep(0.05)

        try:
            await asyncio.gather(*(cell.ready() for cell in cells))
            clients = [asyncio.create_task(client(number, SEED + number)) for number in (0, 0, 1, 1, 2, 2)]
            deadline = time.monotonic() + SECONDS
            while time.monotonic() < deadline and not any(task.done() for task in clients):
                await asyncio.sleep(chance.uniform(0.5, 2.0))
                number = chance.randrange(3)
                disturbed[number] = float("inf")
                await disturb(cells[number].processes[0], chance)
                disturbed[number] = time.monotonic() + 1.0
            ended.set()
            await asyncio.gather(*clients)
            report(f"{answers} answers, {lost} lost at killed nodes, slowest of the others {slowest:.1f} s")
            assert answers > 100
            assert slowest < LONGEST
            for number in range(3):
                for object_id in fleet.digests:
                    assert await fleet.ask(number, object_id)
        finally:
            for cell in cells:
                for process in cell.processes:
                    with suppress(ProcessLookupError):
                        process.send(signal.SIGCONT)
                cell.kill_all()


async def test_a_node_whose_clock_is_an_hour_ahead_serves_and_is_served(
    tmp_path: Path, faketime_library: str
) -> None:
    """Its signatures are not believed, and it believes none: it is a stranger to the others, and they to it."""
    async with StorageNode([]).run() as far:
        fleet = Fleet(tmp_path, ("memory://", "memory://"), far)
        fleet.publish([generated_object(str(number), 300 * KIB) for number in range(60)])
        cells = [fleet.new_cell(40 * 1024 * KIB) for _ in range(3)]
        fleet.join(cells, DISTRIBUTOR_PEERS__SECRET_FILE=str(secret_of(tmp_path)))
        ahead = {
            "LD_PRELOAD": faketime_library,
            "FAKETIME": "+1h",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }
        for cell, environment in zip(cells, (ahead, {}, {}), strict=True):
            cell.add("standalone", **environment)
        try:
            await asyncio.gather(*(cell.ready() for cell in cells))
            for object_id in fleet.digests:
                answers = await asyncio.gather(*(fleet.ask(number, object_id) for number in range(3)))
                assert answers == [True] * 3
            # Each node goes to the source at most once: a stranger's request is not forwarded, and not refused either.
            gets = [len(far.requests.of(object_id, "GET")) for object_id in fleet.digests]
            report(f"downloads of each object: {sum(gets) / len(gets):.2f}")
            assert max(gets) <= 3
        finally:
            for cell in cells:
                cell.kill_all()
