"""A fleet of cells as real processes: each cell is an API, a fetcher and an evictor around a volume of its own.

The cells share one Redis and one RabbitMQ, and have prefixes of their own there.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate, count
from pathlib import Path

import pytest

from distributor_node.services.demo.faults import Fault
from distributor_node.services.demo.objects import MIB, generated_object
from distributor_node.services.demo.storage_node import StorageNode
from tests.end_to_end.fleet import KIB, Fleet, report
from tests.waiting import eventually


@pytest.fixture
async def fleet(tmp_path: Path, redis_url: str, amqp_url: str) -> AsyncIterator[Fleet]:
    async with StorageNode([]).run() as far:
        made = Fleet(tmp_path, (redis_url, amqp_url), far)
        try:
            yield made
        finally:
            for cell in made.cells:
                cell.kill_all()


async def test_150_first_requests_at_three_cells_are_one_download(fleet: Fleet) -> None:
    fleet.publish([generated_object("1", 16 * MIB)])
    # However busy the machine, the requests come while it is fetched.
    fleet.far.faults.add(Fault(bytes_per_second=4 * MIB))
    await fleet.up(3)
    answers = await asyncio.gather(*(fleet.ask(number, "1") for number in range(3) for _ in range(50)))
    assert answers == [True] * 150
    assert len(fleet.far.requests.of("1", "GET")) == 1


async def browse(fleet: Fleet, cells: int, ids: Sequence[str], seed: int = 5) -> None:
    """Ask for the objects in this order, sixteen at a time, at cells by chance."""
    chance, waiting = random.Random(seed), iter(ids)

    async def client() -> None:
        for object_id in waiting:
            assert await fleet.ask(chance.randrange(cells), object_id)

    await asyncio.gather(*(client() for _ in range(16)))


def zipf(ids: Sequence[str], number: int) -> list[str]:
    weights = list(accumulate(1 / (rank + 1) ** 0.9 for rank in range(len(ids))))
    return random.Random(3).choices(ids, cum_weights=weights, k=number)


@pytest.mark.timeout(900)
async def test_a_fleet_needs_no_more_of_the_source_than_one_node_with_all_the_space(
    fleet: Fleet, tmp_path: Path
) -> None:
    objects = [generated_object(str(number), 60 * KIB + number % 7 * 40 * KIB) for number in range(1500)]
    fleet.publish(objects)
    ids, limit = zipf([item.object_id for item in objects], 10_000), 120 * MIB
    await fleet.up(3, limit // 3, most=1.01)
    await browse(fleet, 3, ids)
    together = fleet.far_bytes()
    for cell in fleet.cells:
        cell.kill_all()
    begun = len(fleet.far.requests)
    (tmp_path / "alone").mkdir()
    alone = Fleet(tmp_path / "alone", fleet.servers, fleet.far)
    try:
        alone.publish(objects)
        await alone.up(1, limit)
        await browse(alone, 1, ids)
    finally:
        for cell in alone.cells:
            cell.kill_all()
    single = fleet.far_bytes(begun)
    report(f"far bytes: {together} by three cells, {single} by one node, {together / single:.3f}")
    # 0.95 to 1.00 on a quiet machine. Where cells answer late, some ask the source themselves: 1.05 at a load of 8.
    # Nodes that know nothing of each other need 1.3 times as much.
    assert together <= 1.10 * single


TWO_COPIES = {
    "DISTRIBUTOR_PEERS__COPIES": "2",
    "DISTRIBUTOR_PEERS__COPY_AFTER": "0",
    "DISTRIBUTOR_PEERS__COPY_RATE": "1G",
}
SMALL = {"DISTRIBUTOR_PEERS__KEEP_BELOW": "1M"}
"""The default, with which all objects of this test are small: nodes keep what they serve."""


@pytest.mark.parametrize("settings", [TWO_COPIES, SMALL], ids=["large, two copies", "small, one copy"])
async def test_a_killed_cell_costs_nothing_but_the_connections_to_it(
    fleet: Fleet, settings: dict[str, str]
) -> None:
    """The conditions: there is room for both copies, and each object was asked for before at two nodes (small) or twice
    (large). Then the source is not asked again for what the cell had while it is away. Once it is back, what the others
    fetched in that time comes from them, and what it had is at its home again. With one copy, a large object that is
    asked for while its home is away comes from the source."""
    objects = [generated_object(str(number), 300 * KIB) for number in range(120)]
    fleet.publish(objects)
    await fleet.up(3, 1 << 30, None, DISTRIBUTOR_PEERS__PROBE_INTERVAL="0.5", **settings)
    ids, seeds = [item.object_id for item in objects], count(1)

    def twice_stored() -> list[str]:
        stored = [fleet.stored(number) for number in range(3)]
        return [one for one in ids if all(one in stored[number] for number in fleet.homes(one)[:2])]

    async def nearly_all() -> bool:
        """A copy that failed, since a probe was late on a busy machine, is offered again after ten minutes."""
        await browse(fleet, 3, ids, next(seeds))
        return len(twice_stored()) >= 0.9 * len(ids)

    await eventually(nearly_all)
    ids = twice_stored()
    victim, begun = fleet.cells[0], len(fleet.far.requests)
    failed: Counter[int] = Counter()
    ended = asyncio.Event()

    async def client(number: int) -> None:
        chance = random.Random(number)
        while not ended.is_set():
            if not await fleet.ask(number, chance.choice(ids)):
                failed[number] += 1
                await asyncio.sleep(0.02)

    clients = [asyncio.create_task(client(number)) for number in (0, 1, 1, 2, 2)]
    await asyncio.sleep(1)
    for process in victim.processes:
        process.kill()
    await asyncio.sleep(2)
    away = fleet.far_bytes(begun)
    new = [generated_object(str(number), 300 * KIB) for number in range(120, 180)]
    fleet.publish(new)
    missed = [item.object_id for item in new if fleet.home(item.object_id) == 0]
    await fleet.knows(new[-1].object_id, (1, 2))

    async def taken_over() -> bool:
        for object_id in missed:
            assert await fleet.ask(1, object_id)
        return all(one in fleet.stored(fleet.homes(one)[1]) for one in missed)

    await eventually(taken_over)
    for process in victim.processes:
        process.start()
    await victim.ready()
    back = len(fleet.far.requests)
    for object_id in missed:
        assert await fleet.ask(0, object_id)
    await eventually(lambda: fleet.knows_all(range(3)), what="all cells see each other")
    for object_id in ids:
        assert await fleet.ask(0, object_id)
    ended.set()
    await asyncio.gather(*clients)
    assert failed[0] > 0
    assert failed[1] == failed[2] == 0
    own = sum(item.size for item in objects if item.object_id in ids and fleet.home(item.object_id) == 0)
    after, fetched = fleet.far_bytes(back), sum(item.size for item in new if item.object_id in missed)
    report(
        f"from the source: {away} of {own} bytes homed at the killed cell while it was away,"
        f" {after} after it was back, of {fetched} that it had missed"
    )
    assert away <= 0.05 * own
    assert after <= 0.05 * fetched
    await eventually(lambda: fleet.ask(0, ids[0]))


async def test_a_fourth_cell_moves_its_share_and_takes_it_from_the_others(fleet: Fleet) -> None:
    objects = [generated_object(str(number), 100 * KIB) for number in range(300)]
    fleet.publish(objects)
    await fleet.up(3, DISTRIBUTOR_PEERS__HOT_VIEWS="1000")
    ids = [item.object_id for item in objects]
    await browse(fleet, 3, ids)
    for number in range(3):
        await eventually(
            lambda number=number: fleet.stored(number) == {one for one in ids if fleet.home(one) == number}  # type: ignore[misc]
        )
    fourth, begun = fleet.new_cell(1 << 30), len(fleet.far.requests)
    fleet.join(fleet.cells, DISTRIBUTOR_PEERS__HOT_VIEWS="1000")
    await fourth.up()
    for cell in fleet.cells[:3]:  # one after the other, as a rolling restart does
        for process in cell.processes:
            process.environment = {**process.environment, **cell.environment}
            await process.stop()
            process.start()
        await cell.ready()
    # One that needs more than three probes to restart leaves, and returns once it has answered three.
    await eventually(lambda: fleet.knows_all(range(4)), what="all cells see each other")
    for object_id in ids:  # of cells that have an object still, nothing moves
        assert await fleet.ask(3, object_id)
    await browse(fleet, 4, ids)
    moved = {one for one in ids if fleet.home(one) == 3}
    await eventually(lambda: fleet.stored(3) >= moved)
    from_far = fleet.far_bytes(begun)
    total = sum(item.size for item in objects)
    moved_bytes = sum(item.size for item in objects if item.object_id in moved)
    report(
        f"moved: {moved_bytes / total:.3f} of all bytes, of which from the source: {from_far / moved_bytes:.3f}"
    )
    assert moved_bytes <= 0.3 * total
    assert (
        len(fleet.stored(3) - moved) <= len(ids) / 20
    )  # while a probe is late, it takes itself for another's home
    assert from_far <= 0.05 * moved_bytes


async def test_a_hot_object_does_not_make_its_home_busier_than_the_others(fleet: Fleet) -> None:
    objects = [generated_object(str(number), 200 * KIB) for number in range(200)]
    fleet.publish(objects)
    await fleet.up(3)
    ids = [item.object_id for item in objects]
    await browse(fleet, 3, ids)
    before = await fleet.sent()
    chance = random.Random(9)
    await browse(fleet, 3, [ids[0] if chance.random() < 10 / 11 else chance.choice(ids) for _ in range(3000)])
    sent = [after - earlier for after, earlier in zip(await fleet.sent(), before, strict=True)]
    report(f"busiest: {max(sent) * 3 / sum(sent):.2f} of the mean")
    assert max(sent) * 3 <= 1.4 * sum(sent)
