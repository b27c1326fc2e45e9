"""Downloads under load: full slots, a slow first source, a killed fetcher, no fetcher. Part of `make bench-fair`.

One API worker and one fetcher, Redis and RabbitMQ as real processes. The storage nodes run in this process: their
scripted rates are far below what it can send.
"""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from benchmarks.dataset import KIB, MIB
from benchmarks.figures import GoalRow
from benchmarks.node import Node, RunningService
from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.manifest import content_hash
from distributor_node.services.demo.objects import DemoObject, generated_object
from distributor_node.services.demo.storage_node import StorageNode
from tests.end_to_end.client import Answer, get

FILES = Match(endpoint="files", method="GET")
FILMS, FILM = 10, 12 * MIB
SLOTS = 8  # of one source, by default
FILM_RATE = 128 * KIB  # of each response: eight are a source of 1 MiB/s
SLOW_FIRST, OTHERS, OBJECT = 20, 20, 2 * MIB
VIEWERS, BITRATE, BUFFER = 3, 96 * KIB, 3.0  # films, bytes a second of playback, seconds before it begins
IMAGES, IMAGE = 101, 32 * KIB
_CLIENT_TIMEOUT = 100.0  # seconds of a client


@dataclass(slots=True)
class World:
    """A node and its two sources."""

    node: Node
    api: RunningService
    first: StorageNode
    second: StorageNode
    fetcher: RunningService | None = None

    async def add_fetcher(self) -> None:
        self.fetcher = await asyncio.to_thread(self.node.start, "fetcher")

    async def kill_fetcher(self) -> None:
        """As `kill -9`."""
        if self.fetcher is not None:
            await asyncio.to_thread(self.fetcher.process.kill)
            self.fetcher = None

    async def get(self, object_id: str, first: int | None = None, last: int | None = None) -> Answer:
        headers = {} if first is None else {"Range": f"bytes={first}-{'' if last is None else last}"}
        try:
            return await get(
                self.api.assets_url + object_id, headers, timeout=_CLIENT_TIMEOUT, keep_body=False
            )
        except TimeoutError:
            return Answer(0, {}, b"", complete=False, first_byte_after=_CLIENT_TIMEOUT, took=_CLIENT_TIMEOUT)

    async def is_hit(self, object_id: str) -> bool:
        answer = await get(self.api.assets_url + object_id, method="HEAD")
        return answer.headers.get("x-cache") == "hit"

    async def status(self) -> Any:
        return (await get(self.api.status_url)).json()

    async def degraded(self) -> list[str]:
        answer = await get(f"http://127.0.0.1:{self.api.metrics_port}/readyz", timeout=10)
        return list(answer.json().get("degraded", ()))


def films() -> list[str]:
    return [str(1000 + number) for number in range(FILMS)]


def ids(start: int, count: int) -> list[str]:
    return [str(start + number) for number in range(count)]


async def until(seconds: float, wanted: Any) -> float | None:
    """Seconds until `wanted` returns true; None: it did not in time."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if await wanted():
            return time.monotonic() - began
        await asyncio.sleep(0.1)
    return None


async def full_slots(world: World) -> GoalRow:
    world.first.faults.add(Fault(bytes_per_second=FILM_RATE), FILES)
    free, *probed, watched = films()
    alone = (await world.get(free, 0, 65_535)).first_byte_after
    await asyncio.gather(*(world.get(film, 0, 65_535) for film in probed[:SLOTS]))

    async def full() -> bool:
        return int((await world.status())["downloadsInProgress"]) >= SLOTS

    await until(30, full)
    times = [
        (await world.get(watched, number * 65_536, number * 65_536 + 65_535)).first_byte_after
        for number in range(8)
    ]
    first, later = times[0], max(times[1:])
    return GoalRow(
        f"{SLOTS} probed films fill a source of 1 MiB/s, then another film",
        f"first byte {first:.2f} s ({alone:.2f} s with free slots), later requests at most {later:.2f} s",
        "later requests at most 0.3 s; the first at most twice that with free slots, or 0.3 s",
        later <= 0.3 and first <= max(0.3, 2 * alone),
    )


async def slow_first_source(world: World) -> GoalRow:
    slow, others = ids(2000, SLOW_FIRST), ids(3000, OTHERS)
    # Half of these are at the one source and half at the other, so that both have the same history.
    quiet = [(await world.get(object_id)).first_byte_after for object_id in others[: OTHERS // 2]]
    world.first.faults.add(Fault(bytes_per_second=9_000), FILES)
    began = time.monotonic()
    asking = [asyncio.create_task(world.get(object_id)) for object_id in slow]
    await asyncio.sleep(2)
    busy = [(await world.get(object_id)).first_byte_after for object_id in others[OTHERS // 2 :]]

    async def all_cached() -> bool:
        return all([await world.is_hit(object_id) for object_id in slow])

    cached = await until(90, all_cached)
    took = None if cached is None else time.monotonic() - began
    whole = sum(answer.complete for answer in await asyncio.gather(*asking))
    begun = sum(len(world.first.requests.of(object_id, "GET")) for object_id in slow)
    return GoalRow(
        f"{SLOW_FIRST} objects, first source 9 KB/s, second good",
        f"{'not all' if took is None else 'all'} cached after {took or 90:.0f} s, {whole} responses complete,"
        f" {begun} downloads began at the slow source;"
        f" first byte of other misses {max(busy):.2f} s ({max(quiet):.2f} s before)",
        "all cached within 60 s, other misses at most 0.3 s or twice as long as before",
        took is not None and took <= 60 and begun > 0 and max(busy) <= max(0.3, 2 * max(quiet)),
    )


def stalls(pieces: Sequence[tuple[float, int]]) -> list[float]:
    """How long playback at BITRATE has waited, each time, once BUFFER seconds of it had arrived."""
    received = 0
    ends: float | None = None  # when the buffer is empty; None: playback has not begun
    found = []
    for arrived, size in pieces:
        received += size
        if ends is None:
            if received >= BUFFER * BITRATE:
                ends = arrived + received / BITRATE
            continue
        if arrived > ends:
            found.append(arrived - ends)
            ends = arrived
        ends += size / BITRATE
    return found


async def killed_fetcher(world: World) -> GoalRow:
    world.first.faults.add(Fault(bytes_per_second=BITRATE * 5 // 4), FILES)
    world.second.faults.add(Fault(bytes_per_second=BITRATE * 5 // 4), FILES)
    watched = ids(4000, VIEWERS)
    watching = [asyncio.create_task(world.get(film)) for film in watched]
    await asyncio.sleep(2 * BUFFER)
    await world.kill_fetcher()
    answers = await asyncio.gather(*watching)
    waits = [stalls(answer.pieces) for answer in answers]
    most, longest = max(map(len, waits)), max([0.0, *(wait for viewer in waits for wait in viewer)])
    whole = all(answer.complete for answer in answers)
    return GoalRow(
        f"the fetcher is killed while {VIEWERS} clients watch",
        f"{'all' if whole else 'not all'} complete; playback waits {most} times at most, {longest:.2f} s the longest",
        "all complete, at most 1 wait each, none above 3 s",
        whole and most <= 1 and longest <= 3,
    )


async def no_worker(world: World) -> GoalRow:
    await world.get(ids(5000, 1)[0])
    await asyncio.sleep(6)  # the API has seen heartbeats, and is past its start
    await world.kill_fetcher()

    async def named() -> bool:
        return "fetchers: none alive" in await world.degraded()

    naming = asyncio.create_task(until(20, named))
    first, *others = [await world.get(object_id) for object_id in ids(5001, IMAGES)]
    shown, served = await naming, sum(answer.status == 200 for answer in (first, *others))
    slowest = max(answer.first_byte_after for answer in others)
    return GoalRow(
        "no fetcher is alive, 101 misses",
        f"{served} x 200; the first {first.first_byte_after:.2f} s, the others at most {slowest:.2f} s;"
        f" /readyz names it after {'never' if shown is None else f'{shown:.1f} s'}",
        "the first at most 3 s, the others 0.3 s; /readyz within 5 s",
        served == IMAGES and first.first_byte_after <= 3 and slowest <= 0.3 and (shown or 99) <= 5,
    )


CASES = (full_slots, slow_first_source, killed_fetcher, no_worker)


def _objects() -> Iterable[tuple[DemoObject, bool]]:
    """Each object, and whether the second source has it too."""
    for object_id in films():
        yield generated_object(object_id, FILM), False
    for object_id in ids(2000, SLOW_FIRST):
        yield generated_object(object_id, OBJECT), True
    for object_id in ids(3000, OTHERS):
        yield generated_object(object_id, OBJECT), True
    for object_id in ids(4000, VIEWERS):
        yield generated_object(object_id, BITRATE * 25), True
    for object_id in ids(5000, IMAGES + 1):
        yield generated_object(object_id, IMAGE), True


def _write_manifest(path: Path, first: StorageNode, second: StorageNode) -> None:
    entries = []
    for item, both in _objects():
        nodes = [first, second] if both else [first]
        if item.object_id in ids(3000, OTHERS):
            quiet_one = item.object_id in ids(3000, OTHERS // 2)
            nodes = [first if quiet_one and int(item.object_id) % 2 else second]
        for node in nodes:
            node.objects[item.object_id] = item
        urls = [node.object_url(item.object_id) for node in nodes]
        entries.append(
            {"id": item.object_id, "size": item.size, "hash": content_hash(item.content), "urls": urls}
        )
    path.write_text(json.dumps({"version": 1, "objects": entries}))


@asynccontextmanager
async def _world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fair-")))
        first = await stack.enter_async_context(StorageNode([]).run())
        second = await stack.enter_async_context(StorageNode([]).run())
        manifest = folder / "manifest.json"
        _write_manifest(manifest, first, second)
        node = Node(folder, manifest, DISTRIBUTOR_LOG__LEVEL="error")
        stack.push_async_callback(asyncio.to_thread, node.close)
        await asyncio.to_thread(node.start_servers)
        await asyncio.to_thread(node.start, "evictor")
        world = World(node, await asyncio.to_thread(node.start, "api"), first, second)
        await world.add_fetcher()
        yield world


async def measure() -> list[GoalRow]:
    """Each case on a node of its own."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    rows = []
    for case in CASES:
        async with _world() as world:
            rows.append(await case(world))
    return rows
