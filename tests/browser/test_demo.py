"""The demo page in a real browser: badges of the media's own requests, and what each button makes happen."""

from __future__ import annotations

import asyncio
import base64
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distributor_node.services.demo.objects import MIB
from distributor_node.services.demo_run.story import CORRUPT_AT, CUT_AFTER, FEW, MANY
from tests.browser.chromium import Browser, find_chromium, running_browser
from tests.servers.redis_server import free_port
from tests.waiting import eventually

SHOTS = Path(__file__).parents[2] / "build" / "browser" / "demo"
SIZE = 40 * MIB


@dataclass(slots=True)
class Demo:
    """The demo, and its page in a browser."""

    browser: Browser
    page: str
    node: str

    async def press(self, scene: str) -> None:
        pressed = f"document.querySelector('[data-scene={scene}] button').click()"
        await self.browser.evaluate(pressed)
        await eventually(lambda: self.browser.evaluate(f"story.scene === '{scene}'"), pause=0.05)

    async def story(self) -> dict[str, Any]:
        told: dict[str, Any] = await self.browser.evaluate("story")
        return told

    async def ended(self, seconds: float = 90) -> dict[str, Any]:
        await eventually(lambda: self.browser.evaluate("!story.running"), seconds, pause=0.1)
        return await self.story()

    async def text(self, selector: str) -> str:
        return str(await self.browser.evaluate(f"document.querySelector('{selector}').innerText"))

    async def watched(self, scene: str) -> dict[str, Any]:
        """Press a button, and return what was seen at its end: every viewer has the right film."""
        await self.press(scene)
        told = await self.ended()
        assert told["note"] == "over"
        assert {viewer["state"] for viewer in told["viewers"]} == {"done"}
        assert f"{len(told['viewers'])} have the whole film, with the right hash" in await self.text("#sum")
        return told


def downloads(told: dict[str, Any]) -> list[dict[str, Any]]:
    """All downloads of the film, by their first byte."""
    return sorted(
        (one for source in told["sources"] for one in source["downloads"]), key=lambda one: int(one["first"])
    )


def cuts(told: dict[str, Any]) -> int:
    return sum(viewer["cuts"] for viewer in told["viewers"])


def is_problem(entry: dict[str, Any]) -> bool:
    """Whether the page did not mean it. It asks for two objects that are refused, to show that."""
    return entry["level"] == "error" and not entry.get("url", "").endswith(("/900", "/901"))


@pytest.fixture
async def demo(tmp_path: Path) -> AsyncIterator[Demo]:
    program = find_chromium()
    if program is None:
        pytest.skip("no browser is installed: `make test-browser` installs Chromium where apt is allowed")
    arguments = ["--data", str(tmp_path), "--port", str(free_port()), "--storage-node-port", str(free_port())]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "distributor_node.services.demo_run", *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        said = ""
        async with asyncio.timeout(60):
            while "Try:" not in said:
                line = await process.stdout.readline()
                assert line, said
                said += line.decode()
        (page,), (node,) = (
            re.findall(r"(http://\S+)\s+demo page", said),
            re.findall(r"The node is up: (\S+)", said),
        )
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            async with running_browser(program, Path(folder)) as browser:
                await browser.call("Runtime.enable")
                await browser.call("Log.enable")
                await browser.call("Page.navigate", url=page)
                ready = "document.querySelector('.facts .badge') !== null && story !== null"
                await eventually(lambda: browser.evaluate(ready), 30, pause=0.1, what="the page")
                yield Demo(browser, page, node)
                problems = [
                    event
                    for event in browser.events
                    if event[0] == "Runtime.exceptionThrown"
                    or (event[0] == "Log.entryAdded" and is_problem(event[1]["entry"]))
                ]
                assert problems == []
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(30):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_badges_are_those_of_the_media_s_own_requests(demo: Demo) -> None:
    pictures = "[...document.querySelectorAll('#pictures .badge')].map((one) => one.innerText)"
    await eventually(lambda: demo.browser.evaluate(f"{pictures}.length === 4"), 30, pause=0.1)
    assert await demo.browser.evaluate(pictures) == ["miss"] * 4
    await eventually(
        lambda: demo.browser.evaluate(
            f"fetch('{demo.node}/api/v1/status').then((one) => one.json()).then((one) => !one.downloadsInProgress)"
        ),
        30,
        pause=0.1,
    )
    await demo.browser.call("Page.reload", ignoreCache=True)
    await eventually(lambda: demo.browser.evaluate(f"{pictures}.length === 4"), 30, pause=0.1)
    await eventually(
        lambda: demo.browser.evaluate(f"{pictures}.every((one) => one === 'hit')"), 30, pause=0.1
    )


async def test_the_player_plays_the_film_while_it_is_fetched(demo: Demo) -> None:
    await demo.browser.evaluate("document.querySelector('#film-again').click()")
    await eventually(
        lambda: demo.browser.evaluate("document.querySelector('#film').currentTime > 0.5"), 60, pause=0.1
    )
    assert await demo.browser.evaluate("document.querySelector('#film').duration") == 60
    badges = "[...document.querySelectorAll('#film-requests .badge')].map((one) => one.innerText)"
    assert (await demo.browser.evaluate(badges))[0] == "miss"


async def test_twenty_viewers_make_one_download_and_then_none(demo: Demo) -> None:
    told = await demo.watched("viewers")
    assert (len(told["viewers"]), cuts(told), told["received"]) == (MANY, 0, MANY * SIZE)
    assert {viewer["cache"] for viewer in told["viewers"]} == {"miss", "pending"}
    (only,) = downloads(told)
    assert (only["first"], only["sent"], only["state"]) == (0, SIZE, "sent")
    assert "20 viewers received 800 MiB; the storage nodes sent 40.0 MiB in 1 download." in await demo.text(
        "#sum"
    )
    assert (await demo.text("#viewers")).count("pending") + (await demo.text("#viewers")).count(
        "miss"
    ) == MANY
    again = await demo.watched("viewers")
    assert {viewer["cache"] for viewer in again["viewers"]} == {"hit"}
    assert downloads(again) == []
    # Forgotten, it is a miss again.
    await demo.press("forget")
    await demo.ended()
    assert "the next request is a miss" in await demo.text("#sum")
    head = (
        f"fetch('{demo.node}/api/v1/assets/10', {{method: 'HEAD'}}).then((one) => one.headers.get('x-cache'))"
    )
    assert await demo.browser.evaluate(head) == "miss"


async def test_a_throttled_source_is_one_slow_download_for_all(demo: Demo) -> None:
    await demo.press("throttle")
    await eventually(
        lambda: demo.browser.evaluate(
            "story.viewers.length && story.viewers.every((one) => one.position > 3e6)"
        ),
        60,
        pause=0.1,
    )
    told = await demo.story()
    # The node may have tried the other storage node, which is as slow.
    assert [one["state"] for one in downloads(told)].count("sending") == 1
    assert sum(one["sent"] for one in downloads(told)) < SIZE / 2
    assert len(told["viewers"]) == FEW
    # The next scene ends this one, and does not wait for its slow download.
    assert len((await demo.watched("viewers"))["viewers"]) == MANY


async def test_a_cut_source_is_continued_at_the_same_byte(demo: Demo) -> None:
    told = await demo.watched("cut")
    first, second = downloads(told)
    assert (first["first"], first["sent"], first["state"]) == (0, CUT_AFTER, "cut")
    assert (second["first"], second["sent"], second["state"]) == (CUT_AFTER, SIZE - CUT_AFTER, "sent")
    assert cuts(told) == 0


async def test_a_corrupt_byte_never_arrives_as_a_whole_film(demo: Demo) -> None:
    told = await demo.watched("corrupt")
    by_source = [source["downloads"] for source in told["sources"]]
    assert [len(found) for found in by_source] == [1, 1]
    assert [found[0]["sent"] for found in by_source] == [SIZE, SIZE]
    assert cuts(told) >= FEW
    assert CORRUPT_AT < SIZE
    button = "document.querySelector('[data-scene=corrupt] button')"
    assert await demo.browser.evaluate(f"{button}.disabled")
    assert "the node remembers which storage node sent it" in await demo.browser.evaluate(
        f"{button}.innerText"
    )


async def test_a_killed_fetcher_is_followed_by_one_that_goes_on(demo: Demo) -> None:
    await demo.press("kill")
    await eventually(lambda: demo.browser.evaluate("story.fetcher === 'stopped'"), 60, pause=0.05)
    await eventually(
        lambda: demo.browser.evaluate(
            "document.querySelector('#sum').innerText.includes('The fetcher is stopped.')"
        ),
        pause=0.05,
    )
    told = await demo.ended()
    assert {viewer["state"] for viewer in told["viewers"]} == {"done"}
    first, *others = downloads(told)
    assert (first["first"], first["state"]) == (0, "cut")
    assert 0 < first["sent"] < SIZE
    assert others
    assert all(0 < one["first"] <= first["sent"] for one in others)
    assert cuts(told) == 0


async def test_a_full_cache_stays_below_its_limit(demo: Demo) -> None:
    await demo.press("fill")
    most = limit = 0
    while True:
        status = await demo.browser.evaluate(f"fetch('{demo.node}/api/v1/status').then((one) => one.json())")
        most, limit = max(most, status["storageUsed"]), status["storageLimit"]
        if not await demo.browser.evaluate("story.running"):
            break
        await asyncio.sleep(0.1)
    told = await demo.story()
    assert told["filled"] == 7 * 64 * MIB > limit
    assert limit / 2 < most <= limit
    assert "448 MiB of other objects have gone through the cache" in await demo.text("#sum")


async def test_the_page_fits_and_is_kept_as_pictures(demo: Demo) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    await demo.watched("cut")
    for width in (390, 1280):
        await demo.browser.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )  # fmt: skip
        for scheme in ("light", "dark"):
            preference = {"name": "prefers-color-scheme", "value": scheme}
            await demo.browser.call("Emulation.setEmulatedMedia", features=[preference])
            assert await demo.browser.evaluate("document.documentElement.scrollWidth") <= width
            size = (await demo.browser.call("Page.getLayoutMetrics"))["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}
            shot = await demo.browser.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
            (SHOTS / f"{width}-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
