"""What a viewer sees while slots are full or the fetcher dies: media elements of a real browser, and a whole node."""

from __future__ import annotations

import asyncio
import random
import struct
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import DemoObject, bytes_object
from distributor_node.services.demo.storage_node import StorageNode
from tests.browser.chromium import Browser, find_chromium, running_browser
from tests.end_to_end.client import get
from tests.end_to_end.stack import Stack
from tests.waiting import eventually

pytestmark = [pytest.mark.servers, pytest.mark.timeout(240)]

RATE = 44_100 * 2  # bytes a second of playback
SECONDS = 30
VIEWERS = ("1", "2", "3")
FILMS = tuple(str(number) for number in range(10, 18))
FREE, NINTH = "8", "9"
FILES = Match(endpoint="files", method="GET")
PLAYER = """
window.play = (url) => {
  const element = document.createElement("audio"), told = {played: 0, waits: 0, longest: 0, data: null, error: null};
  const began = performance.now();
  let waiting = null, playing = false;
  element.muted = true;
  element.onloadeddata = () => told.data = (performance.now() - began) / 1000;
  element.onerror = () => told.error = element.error.message;
  element.onplaying = () => {
    playing = true;
    if (waiting === null) return;
    told.longest = Math.max(told.longest, (performance.now() - waiting) / 1000);
    waiting = null;
  };
  element.onwaiting = () => { if (playing) { told.waits++; waiting = performance.now(); } };
  element.ontimeupdate = () => told.played = element.currentTime;
  element.src = url;
  element.play();
  document.body.append(element);
  return told;
};
window.told = {};
"""


def sound(seed: int, seconds: int = SECONDS) -> bytes:
    """A WAV of noise, 44.1 kHz, mono, 16 bits. Its end is not needed to begin."""
    size = RATE * seconds
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF",
        36 + size,
        b"WAVE",
        b"fmt ",
        16,
        1,
        1,
        44_100,
        RATE,
        2,
        16,
        b"data",
        size,
    )
    return head + random.Random(seed).randbytes(size)


@dataclass(slots=True)
class World:
    stack: Stack
    source: StorageNode
    browser: Browser

    async def play(self, object_id: str) -> None:
        await self.browser.evaluate(f"(told[{object_id!r}] = play({self.stack.url(object_id)!r}), undefined)")

    async def told(self, object_id: str) -> dict[str, Any]:
        found: dict[str, Any] = await self.browser.evaluate(f"told[{object_id!r}]")
        assert found["error"] is None, found
        return found

    async def first_data_after(self, object_id: str) -> float:
        """Seconds until the element could show the first frame."""
        await self.play(object_id)
        await eventually(lambda: self._has_data(object_id), pause=0.05)
        return float((await self.told(object_id))["data"])

    async def _has_data(self, object_id: str) -> bool:
        return (await self.told(object_id))["data"] is not None

    async def has_played(self, seconds: float, *object_ids: str) -> bool:
        return all([(await self.told(object_id))["played"] >= seconds for object_id in object_ids])


@pytest.fixture
async def world(tmp_path: Path, redis_url: str, amqp_url: str) -> AsyncIterator[World]:
    program = find_chromium()
    if program is None:
        pytest.skip("no browser is installed: `make test-browser` installs Chromium where apt is allowed")
    objects: list[DemoObject] = [
        bytes_object(object_id, sound(int(object_id)), "audio/wav")
        for object_id in (*VIEWERS, FREE, NINTH, *FILMS)
    ]
    async with AsyncExitStack() as resources:
        source = await resources.enter_async_context(StorageNode(objects).run())
        stack = Stack(tmp_path, redis_url, amqp_url, f"browser-{uuid.uuid4().hex[:8]}")
        resources.callback(stack.kill_all)
        stack.write_manifest(objects, [source.object_url("")])
        await stack.up()
        folder = resources.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        browser = await resources.enter_async_context(running_browser(program, Path(folder)))
        await browser.evaluate(PLAYER)
        yield World(stack, source, browser)


async def test_viewers_of_a_killed_fetcher_hardly_wait(world: World) -> None:
    world.source.faults.add(Fault(bytes_per_second=RATE * 3 // 2), FILES)
    for viewer in VIEWERS:
        await world.play(viewer)
    await eventually(lambda: world.has_played(3, *VIEWERS), pause=0.1, what="playback begins")
    (fetcher,) = world.stack.of("fetcher")
    fetcher.kill()
    await eventually(lambda: world.has_played(SECONDS - 2, *VIEWERS), 120, pause=0.2, what="playback goes on")
    for viewer in VIEWERS:
        told = await world.told(viewer)
        assert told["waits"] <= 1, told
        assert told["longest"] <= 3, told


async def test_a_film_begins_while_others_hold_every_slot_of_its_source(world: World) -> None:
    world.source.faults.add(Fault(bytes_per_second=RATE * 2), FILES)
    free = await world.first_data_after(FREE)
    await asyncio.gather(*(get(world.stack.url(film), {"Range": "bytes=0-999"}) for film in FILMS))

    async def full() -> bool:
        return int((await world.stack.status())["downloadsInProgress"]) >= len(FILMS)

    await eventually(full)
    assert await world.first_data_after(NINTH) <= max(2 * free, 1.0)
