"""The node's page in a real browser: each part shows what the test makes happen, in every width and colour scheme.

Screenshots are kept below build/dashboard/, to be looked at.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import MIB, generated_object
from distributor_node.services.demo.storage_node import StorageNode
from tests.browser.chromium import Browser, find_chromium, running_browser
from tests.browser.page import AXE, reached_by_keyboard, serious_findings, take_screenshots
from tests.end_to_end.client import get
from tests.end_to_end.operator_client import OperatorClient
from tests.end_to_end.stack import Stack
from tests.servers.redis_server import free_port
from tests.waiting import eventually

pytestmark = [pytest.mark.servers, pytest.mark.timeout(300)]

FILES = Match(endpoint="files", method="GET")
FILM = "7001"
PICTURES = [generated_object(str(number), MIB // 2) for number in range(1, 120)]
DOTS = """[...document.querySelectorAll("#downloads .viewer")].map((dot) => parseFloat(dot.style.left))"""


@dataclass(slots=True)
class World:
    stack: Stack
    sources: list[StorageNode]
    browser: Browser
    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    async def open(self) -> None:
        await self.browser.call("Page.navigate", url=self.address)
        await self.until("document.querySelectorAll('#components li').length === 7", "the page")

    async def until(self, script: str, what: str) -> None:
        """The script's value is true; an element is."""
        await eventually(lambda: self.browser.evaluate(f"Boolean({script})"), 90, pause=0.1, what=what)

    async def text(self, selector: str) -> str:
        found: str = await self.browser.evaluate(f"document.querySelector({selector!r}).innerText")
        return found

    def throttle(self, bytes_per_second: int) -> None:
        for source in self.sources:
            source.faults.add(Fault(bytes_per_second=bytes_per_second), FILES)

    def watch(self, object_id: str, viewers: int) -> list[asyncio.Task[Any]]:
        url = self.stack.url(object_id)
        return [asyncio.create_task(get(url, keep_body=False, timeout=200)) for _ in range(viewers)]


@pytest.fixture
async def world(tmp_path: Path, redis_url: str, amqp_url: str) -> AsyncIterator[World]:
    program = find_chromium()
    if program is None:
        pytest.skip("no browser is installed: `make test-browser` installs Chromium where apt is allowed")
    objects = [*PICTURES, generated_object(FILM, 24 * MIB)]
    async with AsyncExitStack() as resources:
        sources = [await resources.enter_async_context(StorageNode(objects).run()) for _ in range(2)]
        stack, port = Stack(tmp_path, redis_url, amqp_url, f"page-{uuid.uuid4().hex[:8]}"), free_port()
        resources.callback(stack.kill_all)
        stack.environment |= {
            "DISTRIBUTOR_STORAGE__LIMIT": "60M", "DISTRIBUTOR_EVICTOR__MIN_IDLE": "1",
            "DISTRIBUTOR_ID": "node-1.example.org", "DISTRIBUTOR_DASHBOARD__PORT": str(port),
            **OperatorClient(free_port()).environment,
        }  # fmt: skip
        stack.write_manifest(objects, [source.object_url("") for source in sources])
        await stack.up(fetchers=2, workers=2)
        folder = resources.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        browser = await resources.enter_async_context(running_browser(program, Path(folder)))
        await browser.watch_page()
        yield World(stack, sources, browser, port)
        assert browser.console_errors() == []
        assert {urlsplit(url).netloc for url in browser.requested_urls()} == {f"127.0.0.1:{port}"}


async def test_three_viewers_of_a_throttled_film_are_three_dots_that_move(world: World) -> None:
    await world.open()
    world.throttle(MIB)
    viewers = world.watch(FILM, 3)
    await world.until(f"{DOTS}.length === 3", "three dots")
    before = await world.browser.evaluate(DOTS)
    await world.until(
        f"{DOTS}.length === 3 && {DOTS}.every((left) => left > {max(before)})", "all have moved"
    )
    assert await world.text("#downloads .id") == FILM
    assert "3 viewers" in await world.text("#downloads .watching")
    shown = await world.text("#downloads .source")
    assert any(urlsplit(source.api_url).netloc in shown for source in world.sources)
    bar = "document.querySelector('#downloads .extent').getBoundingClientRect().width"
    width = await world.browser.evaluate(bar)
    await world.until(f"{bar} > {width}", "the bar grows")
    await screenshots(world)
    await asyncio.gather(*viewers)
    await world.until(f"{DOTS}.length === 0", "the film is on disk")
    await check_accessibility(world)


async def test_an_eviction_appears_with_its_reason_and_the_search_tells_it(world: World) -> None:
    await world.open()
    for item in PICTURES:
        await get(world.stack.url(item.object_id), keep_body=False)
    await world.until("document.querySelector('#removed li')", "an eviction")
    await world.until("document.querySelector('#map .victim')", "a block that fades")
    shown = await world.text("#removed li")
    assert "the volume was above its high watermark" in shown or "a fetch was waiting for space" in shown
    victim = await world.text("#removed .id")
    await world.browser.evaluate(
        f"document.querySelector('#object').value = {victim!r}; document.querySelector('#search button').click()"
    )
    await world.until("document.querySelectorAll('#answer li').length > 1", "the answer")
    answer = await world.text("#answer")
    assert "It was evicted" in answer
    assert "It is not here" in answer
    await world.until("document.querySelectorAll('#map .blocks i').length > 5", "blocks of the objects")
    await world.until(
        "document.querySelector('#total-hour').innerText.includes('requests from disk')", "a sentence"
    )
    await world.until("document.querySelectorAll('#charts .plot').length === 4", "charts")


async def test_the_line_of_a_killed_fetcher_is_red_within_ten_seconds_and_green_again(world: World) -> None:
    await world.open()
    await world.until("document.querySelectorAll('#processes li').length === 5", "all processes")
    await world.until("!document.querySelector('.wrong')", "all green")
    await world.until("document.querySelector('#connection').innerText === 'everything works'", "the badge")
    [fetcher, _] = world.stack.of("fetcher")
    fetcher.kill()
    assert fetcher.process is not None
    pid = fetcher.process.pid
    red = f"[...document.querySelectorAll('#processes .wrong')].some((line) => line.innerText.includes(':{pid}'))"
    await world.until(red, "a red line")
    line = await world.text("#processes .wrong")
    assert "was killed" in line
    silent = int(line.rpartition("(")[2].partition(" s)")[0])
    assert silent <= 10, line
    assert "wrong" in await world.browser.evaluate("document.querySelector('#components .wrong').className")
    findings = await serious_findings(world.browser) if AXE.exists() else []
    world.stack.processes.remove(fetcher)
    world.stack.add("fetcher")
    await world.until("!document.querySelector('.wrong')", "green again")
    assert await world.browser.evaluate("document.querySelectorAll('#processes li').length") == 5
    assert findings == []


async def test_the_page_says_that_the_node_drains(world: World) -> None:
    await world.open()
    badge = "document.querySelector('#connection').innerText"
    await world.until(f"{badge} === 'everything works'", "the badge")
    operator = OperatorClient(int(world.stack.environment["DISTRIBUTOR_OPERATOR_API__PORT"]))
    await operator.command("drain", {"on": True})
    await world.until(f"{badge} === 'draining'", "the badge tells it")
    assert "starts no fetch" in await world.text("#components .noted")
    findings = await serious_findings(world.browser) if AXE.exists() else []
    await operator.command("drain", {"on": False})
    await world.until(f"{badge} === 'everything works'", "the badge again")
    assert not await world.browser.evaluate("Boolean(document.querySelector('.noted'))")
    assert findings == []


async def test_the_page_says_so_when_the_node_is_gone_and_comes_back(world: World) -> None:
    await world.open()
    [api] = world.stack.of("api")
    api.kill()
    gone = "document.querySelector('#connection').innerText === 'not connected, trying again'"
    await world.until(gone, "not connected")
    world.stack.processes.remove(api)
    world.stack.add("api", DISTRIBUTOR_PUBLIC_API__WORKERS="2")
    await world.until("!document.body.classList.contains('stale')", "connected again")
    # The browser logs each attempt that failed.
    errors = [json.loads(error) for error in world.browser.console_errors()]
    assert all("ERR_" in error["entry"]["text"] for error in errors)
    world.browser.events.clear()
    await world.open()


async def screenshots(world: World) -> None:
    await take_screenshots(world.browser)
    await world.browser.set_window(1280, reduced_motion=True)
    moving = "getComputedStyle(document.querySelector('#downloads .viewer')).transitionDuration"
    assert await world.browser.evaluate(moving) == "0s"
    await world.browser.set_window(1280)


async def check_accessibility(world: World) -> None:
    """No serious finding of axe-core, and the keyboard reaches what can be used."""
    if not AXE.exists():
        pytest.skip("axe-core is not installed: `make test-browser` installs it")
    assert await serious_findings(world.browser) == []
    assert {"object", "BUTTON", "sources"} <= set(await reached_by_keyboard(world.browser, 8))
