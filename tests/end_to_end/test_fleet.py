"""A fleet of cells as real processes: each cell is an API, a fetcher and an evictor around a volume of its own.

The cells share one Redis and one RabbitMQ, and have prefixes of their own there.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import pytest

from distributor_node.services.demo.objects import MIB, DemoObject, generated_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.shared.domain.peers import Ring
from tests.end_to_end.client import get
from tests.end_to_end.stack import Stack, write_manifest
from tests.waiting import eventually

KIB = 1024


def report(figure: str) -> None:
    """Show a measured figure (`pytest -s`)."""
    sys.stderr.write(f"{figure}\n")


_SENT = re.compile(r'^distributor_sent_bytes_total\{source="\w+"\} (\S+)$', re.MULTILINE)


async def digest_of(url: str) -> tuple[int, bool, bytes]:
    """Status, whether the body was complete, and its SHA-256, without keeping it. Status 0: no answer."""
    host, _, port = url.removeprefix("http://").partition("/")[0].rpartition(":")
    path = "/" + url.removeprefix("http://").partition("/")[2]
    hasher, received, length, status = hashlib.sha256(), 0, -1, 0
    try:
        reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    except OSError:
        return 0, False, b""
    try:
        async with asyncio.timeout(300):
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            status, length = int(head.split()[1]), int(head.partition("content-length: ")[2].split()[0])
            while received < length and (piece := await reader.read(1 << 20)):
                hasher.update(piece)
                received += len(piece)
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.transport.abort()
    return status, received == length, hasher.digest()


@dataclass(slots=True)
class Fleet:
    folder: Path
    servers: tuple[str, str]  # URLs of Redis and RabbitMQ
    far: StorageNode
    cells: list[Stack] = field(default_factory=list)
    digests: dict[str, bytes] = field(default_factory=dict)
    objects: list[DemoObject] = field(default_factory=list)

    def publish(self, objects: Sequence[DemoObject]) -> None:
        self.objects += objects
        for item in objects:
            self.digests[item.object_id] = hashlib.sha256(item.content.read(0, item.size)).digest()
        self.far.objects.update({item.object_id: item for item in objects})
        write_manifest(self.folder / "manifest.json", self.objects, [f"{self.far.api_url}/files/"])

    def new_cell(self, limit: int, **settings: str) -> Stack:
        folder = self.folder / f"cell-{len(self.cells)}"
        folder.mkdir()
        cell = Stack(folder, *self.servers, f"fleet-{uuid.uuid4().hex[:8]}")
        cell.environment |= {
            "DISTRIBUTOR_CATALOG__MANIFEST": str(self.folder / "manifest.json"),
            "DISTRIBUTOR_STORAGE__LIMIT": str(limit),
            "DISTRIBUTOR_EVICTOR__MIN_IDLE": "1",
            "DISTRIBUTOR_LOG__LEVEL": "warning",
            **settings,
        }
        self.cells.append(cell)
        return cell

    @property
    def bases(self) -> list[str]:
        return [f"http://127.0.0.1:{cell.port}" for cell in self.cells]

    def join(self, cells: Sequence[Stack], **settings: str) -> None:
        """Tell these cells, which are to be started, of all cells."""
        for cell in cells:
            cell.environment |= {
                "DISTRIBUTOR_PEERS__URLS": json.dumps(self.bases),
                "DISTRIBUTOR_PEERS__OWN_URL": f"http://127.0.0.1:{cell.port}",
                "DISTRIBUTOR_PEERS__FIRST_BYTE_WAIT": "5",
                "DISTRIBUTOR_PEERS__KEEP_BELOW": "0",
                **settings,
            }

    async def up(self, number: int, limit: int = 1 << 30, **settings: str) -> None:
        cells = [self.new_cell(limit) for _ in range(number)]
        if number > 1:
            self.join(cells, **settings)
        await asyncio.gather(*(cell.up() for cell in cells))

    def home(self, object_id: str) -> int:
        bases = self.bases
        return bases.index(Ring(dict.fromkeys(bases, 1.0)).home(object_id))

    async def ask(self, number: int, object_id: str) -> bool:
        """Whether the whole object came. A wrong byte fails the test."""
        status, complete, digest = await digest_of(self.cells[number].url(object_id))
        assert not (status == 200 and complete) or digest == self.digests[object_id], "wrong bytes"
        return status == 200 and complete

    def far_bytes(self, since: int = 0) -> int:
        return sum(record.bytes_sent for record in list(self.far.requests)[since:] if record.method == "GET")

    async def sent(self) -> list[float]:
        """Bytes that each cell has sent, to clients and peers."""
        pages = [await get(f"{cell.of('api')[0].health_url}/metrics") for cell in self.cells]
        return [sum(map(float, _SENT.findall(page.body.decode()))) for page in pages]

    def stored(self, number: int) -> set[str]:
        return {
            path.name for path in self.cells[number].volume.glob("objects/*/*") if path.name in self.digests
        }


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
    fleet.publish([generated_object("1", 64 * MIB)])
    await fleet.up(3)
    answers = await asyncio.gather(*(fleet.ask(number, "1") for number in range(3) for _ in range(50)))
    assert answers == [True] * 150
    assert len(fleet.far.requests.of("1", "GET")) == 1


async def browse(fleet: Fleet, cells: int, ids: Sequence[str]) -> None:
    """Ask for the objects in this order, sixteen at a time, at cells by chance."""
    chance, waiting = random.Random(5), iter(ids)

    async def client() -> None:
        for object_id in waiting:
            assert await fleet.ask(chance.randrange(cells), object_id)

    await asyncio.gather(*(client() for _ in range(16)))


def zipf(ids: Sequence[str], count: int) -> list[str]:
    weights = list(accumulate(1 / (rank + 1) ** 0.9 for rank in range(len(ids))))
    return random.Random(3).choices(ids, cum_weights=weights, k=count)


async def test_a_fleet_needs_no_more_of_the_source_than_one_node_with_all_the_space(
    fleet: Fleet, tmp_path: Path
) -> None:
    objects = [generated_object(str(number), 60 * KIB + number % 7 * 40 * KIB) for number in range(1500)]
    fleet.publish(objects)
    ids, limit = zipf([item.object_id for item in objects], 10_000), 120 * MIB
    await fleet.up(3, limit // 3)
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
    assert together <= 1.05 * single


async def test_a_killed_cell_costs_nothing_but_the_connections_to_it(fleet: Fleet) -> None:
    objects = [generated_object(str(number), 300 * KIB) for number in range(120)]
    fleet.publish(objects)
    await fleet.up(3, DISTRIBUTOR_PEERS__PROBE_INTERVAL="0.5")
    ids = [item.object_id for item in objects]
    await browse(fleet, 3, ids)
    for number in range(3):
        await eventually(
            lambda number=number: fleet.stored(number) >= {one for one in ids if fleet.home(one) == number}  # type: ignore[misc]
        )
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
    for process in victim.processes:
        process.start()
    await victim.ready()
    back = len(fleet.far.requests)
    await asyncio.sleep(4)
    ended.set()
    await asyncio.gather(*clients)
    assert failed[0] > 0
    assert failed[1] == failed[2] == 0
    own = sum(item.size for item in objects if fleet.home(item.object_id) == 0)
    away, after = fleet.far_bytes(begun) - fleet.far_bytes(back), fleet.far_bytes(back)
    report(f"of {own} bytes homed at the killed cell, from the source: {away} while away, {after} after")
    assert after <= 0.05 * own
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
    assert fleet.stored(3) == moved
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
