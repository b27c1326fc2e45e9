"""Which objects are evicted and in which order, with real processes on real servers."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from distributor_node.services.demo.objects import MIB, generated_object
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.objects import ObjectId, StoredRecord, entity_tag
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import Access, Granted, IndexEntry
from tests.end_to_end.client import get
from tests.end_to_end.conftest import Harness
from tests.end_to_end.stack import ServiceProcess, Stack
from tests.waiting import eventually

LIMIT = 10 * MIB
AN_HOUR_AGO = 3600.0
PLAYERS_PAUSE = 3.5
"""Seconds: an API process keeps what it sends, and for one second what it has sent."""


@pytest.mark.parametrize(("min_idle", "outlives"), [("8", True), ("1", False)])
async def test_a_video_being_watched_outlives_a_flood_of_thumbnails(
    harness: Harness, min_idle: str, outlives: bool
) -> None:
    """The video has the lowest priority of all objects. Its player pauses between two ranges until no API process
    holds the file, so only `min_idle` protects it: the video is evicted if `min_idle` is shorter than the pause."""
    video = generated_object("1", 12 * MIB)
    thumbnails = [generated_object(str(number), MIB // 4) for number in range(2, 150 if outlives else 800)]
    harness.publish([video, *thumbnails])
    harness.stack.environment["DISTRIBUTOR_STORAGE__LIMIT"] = "40M"
    harness.stack.environment["DISTRIBUTOR_EVICTOR__MIN_IDLE"] = min_idle
    # One that follows the traffic begins with the video's own size, and keeps the first thumbnails for long
    harness.stack.environment["DISTRIBUTOR_EVICTOR__COST_PER_MISS"] = "64M"
    await harness.stack.up()
    await get(harness.stack.url("1"))
    await harness.stack.until_hit("1")
    over, seen = asyncio.Event(), list[str]()

    async def watch() -> None:
        while not over.is_set():
            first = len(seen) * MIB % (11 * MIB)
            answer = await get(harness.stack.url("1"), {"Range": f"bytes={first}-{first + MIB - 1}"})
            assert (answer.status, len(answer.body)) == (206, MIB)
            seen.append(answer.headers["x-cache"])
            await asyncio.sleep(PLAYERS_PAUSE)

    async def flood() -> None:
        for thumbnail in thumbnails:
            assert (await get(harness.stack.url(thumbnail.object_id))).complete
            await asyncio.sleep(0.15)
            if set(seen) - {"hit"}:
                break
        over.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(watch())
        group.create_task(flood())
    assert (set(seen) == {"hit"}) == outlives
    if outlives:
        assert len(seen) > 5
        heads = [await get(harness.stack.url(name), method="HEAD") for name in ("1", "2")]
        assert [head.headers["x-cache"] for head in heads] == ["hit", "miss"]


@dataclass
class Node:
    """An evictor process over a volume and a state store that the test fills as fetchers and API would."""

    stack: Stack
    volume: Volume
    state: RedisStateStore
    evictor: ServiceProcess

    async def store(self, sizes: Mapping[str, int], base: float) -> None:
        """Objects fetched a second after each other, from `base` (POSIX seconds) on."""
        for place, (name, size) in enumerate(sizes.items()):
            object_id, stored_at = ObjectId(name), base + place
            begun = await self.state.begin(object_id, size, "worker")
            assert isinstance(begun, Granted)
            tag = entity_tag(None)
            record = StoredRecord(object_id, size, tag, None, "image/png", int(stored_at))
            partial = self.volume.open_partial_for_writing(record)
            partial.write(0, bytes(size))
            partial.mark_verified()
            # Before it is there to be seen: the evictor notices an object by its file, too
            (path,) = self.stack.volume.glob(f"incoming/{name}.part")
            os.utime(path, (stored_at, stored_at))
            partial.publish(record)
            partial.close()
            assert await self.state.commit(begun.lease, stored_at)

    async def entries(self) -> dict[str, IndexEntry]:
        return {str(entry.object_id): entry async for batch in self.state.entries() for entry in batch}

    async def until_saved(self, views: Mapping[str, int]) -> None:
        """The evictor has written down what it knows; `views` of some objects, storing them included."""

        async def saved() -> bool:
            entries = await self.entries()
            counted = all(entries[name].frequency == count for name, count in views.items())
            return counted and all(entry.priority for entry in entries.values())

        await eventually(saved)

    async def make_room(self, wanted: int) -> list[str]:
        """Ask for so many free bytes, as a worker does; what went for it, in this order."""
        known, before = len(self.removed()), set(await self.entries())
        await self.state.request_space(ObjectId("wanted"), wanted - footprint(0), 60.0)

        async def there() -> bool:
            """And said so: the log comes after the bytes."""
            if (await self.state.usage()).free < wanted:
                return False
            return before - set(await self.entries()) <= set(self.removed()[known:])

        await eventually(there)
        await self.state.request_space(ObjectId("wanted"), 0, 0.001)
        return self.removed()[known:]

    def removed(self) -> list[str]:
        """All that has been evicted, in this order."""
        lines = [line for line in self.stack.logs().splitlines() if '"object_removed"' in line]
        return [json.loads(line)["object_id"] for line in lines]

    async def again(self, **settings: str) -> None:
        """`kill -9` the evictor, and start another one."""
        self.evictor.kill()
        await self.begin(**settings)

    async def begin(self, **settings: str) -> None:
        self.evictor = self.stack.add("evictor", **settings)
        await self.evictor.healthy()

        async def at_work() -> bool:
            return '"reconciliation_finished"' in self.evictor.tail()

        await eventually(at_work)


@asynccontextmanager
async def a_node(folder: Path, redis_url: str, **settings: str) -> AsyncIterator[Node]:
    folder.mkdir()
    prefix = f"e2e-{uuid.uuid4().hex[:8]}"
    stack = Stack(folder, redis_url, "amqp://127.0.0.1:9", prefix)
    stack.write_manifest([], [])
    stack.environment |= {
        "DISTRIBUTOR_STORAGE__LIMIT": str(LIMIT),
        "DISTRIBUTOR_STORAGE__HIGH_WATERMARK": "1",
        "DISTRIBUTOR_EVICTOR__LEADERSHIP": "8",
        "DISTRIBUTOR_EVICTOR__LEADERSHIP_RENEWAL": "1",
        "DISTRIBUTOR_STATE_STORE__OPERATION_TIMEOUT": "5",
        "DISTRIBUTOR_EVICTOR__ASSIGNMENT_INTERVAL": "9999",
        "DISTRIBUTOR_EVICTOR__SCRUB_RATE": "0",  # what it reads is in use, and passed over
        "DISTRIBUTOR_LOG__LEVEL": "debug",
        **settings,
    }
    state = RedisStateStore(redis_url, prefix + ":", LIMIT, StateTimeouts(operation_timeout=20.0))
    await state.open()
    volume = Volume(stack.volume)
    volume.prepare()
    node = Node(stack, volume, state, ServiceProcess("none", (), {}, folder / "none.log", ""))
    try:
        await node.begin()
        yield node
    finally:
        stack.kill_all()
        await state.close()
        volume.close()


@pytest.mark.parametrize("saved", [True, False])
async def test_an_evictor_killed_and_restarted_evicts_in_the_same_order(
    tmp_path: Path, redis_url: str, saved: bool
) -> None:
    """Also when it had applied accesses that it had not written down yet."""
    chance, base = random.Random(7), time.time() - 2 * AN_HOUR_AGO
    sizes = [chance.randint(10_000, 300_000) for _ in range(60)]
    early = {f"early{number}": size for number, size in enumerate(sizes[:40])}
    late = {f"late{number}": size for number, size in enumerate(sizes[40:])}
    watched = {name: chance.randint(2, 9) for name in [*early, *late] if chance.random() < 0.4}
    first_round = footprint(0) + LIMIT - sum(map(footprint, early.values())) // 2

    async def live(node: Node, *, restarted: bool) -> list[str]:
        await node.store(early, base)
        await node.until_saved(dict.fromkeys(early, 1))
        gone = await node.make_room(first_round)
        await node.store(late, base + 600)
        views = {name: count for name, count in watched.items() if name not in gone}
        accesses = [Access(ObjectId(name), count - 1, base + 1200) for name, count in views.items()]
        if saved:
            await node.state.record_accesses(accesses)
            await node.until_saved(views)
        else:
            # Just now: it will not write again for some seconds
            await node.until_saved(dict.fromkeys(late, 1))
            await node.state.record_accesses(accesses)
            gone += await node.make_room((await node.state.usage()).free + 100_000)  # by the accesses
        if restarted:
            node.evictor.kill()
            written = await node.entries()
            assert saved or {written[name].frequency for name in views if name in written} == {1}
            await node.again()
        return [*gone, *await node.make_room(LIMIT - 500_000)]

    async with a_node(tmp_path / "one", redis_url) as one, a_node(tmp_path / "two", redis_url) as two:
        steady, restarted = await asyncio.gather(live(one, restarted=False), live(two, restarted=True))
    assert len(steady) > 25
    assert restarted == steady
    assert steady != sorted(steady, key=[*early, *late].index)


async def test_another_policy_after_a_restart_keeps_the_cache(tmp_path: Path, redis_url: str) -> None:
    large = {f"large{number}": MIB for number in range(4)}
    small = {f"small{number}": 20_000 for number in range(20)}
    async with a_node(tmp_path / "node", redis_url, DISTRIBUTOR_EVICTOR__POLICY="lru") as node:
        await node.store(small, time.time() - 2 * AN_HOUR_AGO)
        await node.store(large, time.time() - AN_HOUR_AGO)
        await node.state.record_accesses([Access(ObjectId("small3"), 4, time.time() - AN_HOUR_AGO)])

        async def counted() -> bool:
            return (await node.entries())["small3"].frequency == 5

        await eventually(counted)
        assert await node.make_room(LIMIT - 4 * footprint(MIB) - 18 * footprint(20_000)) == [
            "small0", "small1",
        ]  # fmt: skip
        kept = await node.entries()
        node.evictor.send(signal.SIGTERM)
        await asyncio.to_thread(node.evictor.process.wait, 30)  # type: ignore[union-attr]
        await node.begin(DISTRIBUTOR_EVICTOR__POLICY="gdsf")
        after = await node.entries()
        assert {name: (entry.size, entry.frequency, entry.last_access) for name, entry in after.items()} == {
            name: (entry.size, entry.frequency, entry.last_access) for name, entry in kept.items()
        }
        assert await node.make_room(LIMIT - 2 * footprint(MIB) - 18 * footprint(20_000)) == [
            "large0", "large1",
        ]  # fmt: skip
        assert len(list(node.stack.volume.glob("objects/*/*"))) == 20
