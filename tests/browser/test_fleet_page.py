"""The part of the node's page that shows a fleet, in a real browser: the ring, the nodes, and what came from each.

Three standalone nodes. Screenshots are kept below build/dashboard/, to be looked at.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distributor_node.services.demo.objects import MIB, DemoObject, generated_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.shared.domain.peers import Ring
from tests.browser.chromium import Browser, find_chromium, running_browser
from tests.browser.page import AXE, reached_by_keyboard, serious_findings, take_screenshots
from tests.end_to_end.fleet import Fleet
from tests.servers.redis_server import free_port
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(300)

ROWS = """[...document.querySelectorAll("#fleet tbody tr")].map(
  (row) => [...row.cells].map((cell) => cell.innerText))"""
ARCS = """[...document.querySelectorAll("#fleet .ring .arc")].map(
  (arc) => [getComputedStyle(arc).stroke, parseFloat(arc.getAttribute("stroke-dasharray"))])"""
SWATCHES = """[...document.querySelectorAll("#fleet tbody tr")].map((row) => {
  const swatch = row.querySelector(".swatch");
  return swatch && getComputedStyle(swatch).backgroundColor;
})"""


@dataclass(slots=True)
class World:
    """Cells 0 and 1 with weight 1, cell 2 with weight 2. The page is that of cell 0."""

    fleet: Fleet
    browser: Browser
    address: str

    async def until(self, script: str, what: str) -> None:
        """The script's value is true."""
        await eventually(lambda: self.browser.evaluate(f"Boolean({script})"), 90, pause=0.1, what=what)

    async def row(self, cell: int) -> list[str]:
        """What the page says of a cell: name, state, share, bytes received, weight."""
        rows: list[list[str]] = await self.browser.evaluate(ROWS)
        (found,) = [row for row in rows if row[0] == self.name(cell)]
        return found

    def name(self, cell: int) -> str:
        return self.fleet.bases[cell].removeprefix("http://")

    async def words(self) -> str:
        found: str = await self.browser.evaluate("document.querySelector('#fleet-words').innerText")
        return found


def homed_at(fleet: Fleet, cell: int, size: int) -> DemoObject:
    """An object whose home this cell is, with the weights of `World`."""
    ring = Ring(dict(zip(fleet.bases, (1.0, 1.0, 2.0), strict=True)))
    return next(
        generated_object(str(number), size)
        for number in range(1, 1000)
        if ring.home(str(number)) == fleet.bases[cell]
    )


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    program = find_chromium()
    if program is None:
        pytest.skip("no browser is installed: `make test-browser` installs Chromium where apt is allowed")
    async with AsyncExitStack() as resources:
        far = await resources.enter_async_context(StorageNode([]).run())
        fleet, port = Fleet(tmp_path, ("memory://", "memory://"), far), free_port()
        cells = [fleet.new_cell(1 << 30, DISTRIBUTOR_ID=f"cell-{number}.example.org") for number in range(3)]
        cells[0].environment["DISTRIBUTOR_DASHBOARD__PORT"] = str(port)
        fleet.join(
            cells,
            DISTRIBUTOR_PEERS__WEIGHTS=f'{{"{fleet.bases[2]}": 2}}',
            DISTRIBUTOR_PEERS__PROBE_INTERVAL="0.3",
            DISTRIBUTOR_PEERS__HOT_VIEWS="1000",
        )
        fleet.publish([homed_at(fleet, 1, 3 * MIB), homed_at(fleet, 2, 5 * MIB)])
        for cell in cells:
            resources.callback(cell.kill_all)
            cell.add("standalone")
        for cell in cells:
            await cell.ready()
        folder = resources.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        browser = await resources.enter_async_context(running_browser(program, Path(folder)))
        await browser.watch_page()
        made = World(fleet, browser, f"http://127.0.0.1:{port}/")
        await browser.call("Page.navigate", url=made.address)
        await made.until("document.querySelector('#fleet .ring')", "the fleet")
        yield made
        assert browser.console_errors() == []


async def test_the_page_shows_the_ring_the_traffic_and_a_node_that_is_lost(world: World) -> None:
    fleet = world.fleet
    await world.until(f"{ARCS}.length === 3", "an arc for each node")
    assert await world.words() == "3 of 3 nodes alive; 1 copy of a large object"
    assert [(await world.row(cell))[1:] for cell in range(3)] == [
        ["this node", "25 %", "", "1"],
        ["alive", "25 %", "0 B", "1"],
        ["alive", "50 %", "0 B", "2"],
    ]
    # The arcs are as long as the shares, but for the gaps between them, and the table says which is whose.
    arcs: list[list[Any]] = await world.browser.evaluate(ARCS)
    around = 2 * 3.14159 * 44
    assert sorted(round((length + 2) / around, 2) for _, length in arcs) == [0.25, 0.25, 0.5]
    assert len({colour for colour, _ in arcs}) == 3
    assert sorted(await world.browser.evaluate(SWATCHES)) == sorted(colour for colour, _ in arcs)
    label = await world.browser.evaluate("document.querySelector('#fleet .ring').getAttribute('aria-label')")
    assert all(f"{world.name(cell)} {share} %" in label for cell, share in enumerate((25, 25, 50)))

    # The traffic between nodes: each object comes from its home, and this node keeps neither.
    assert await fleet.ask(0, fleet.objects[0].object_id)
    assert await fleet.ask(0, fleet.objects[1].object_id)

    async def shown() -> bool:
        received = [(await world.row(cell))[3] for cell in range(3)]
        return [text.partition(" at ")[0] for text in received] == ["", "3.0 MiB", "5.0 MiB"]

    await eventually(shown, 90, pause=0.2, what="what came from each node")
    assert fleet.stored(0) == set()
    sources = await world.browser.evaluate("document.querySelector('#sources').innerText")
    assert not any(world.name(cell) in sources for cell in range(3))  # peers are no sources
    await take_screenshots(world.browser, "fleet-")

    # A node is lost: its arc goes, the others grow, and its line says so. It comes back.
    fleet.cells[2].kill_all()
    await world.until(f"{ARCS}.length === 2", "the arc goes")
    assert await world.words() == "2 of 3 nodes alive; 1 copy of a large object"
    gone = await world.row(2)
    assert (gone[1], gone[2]) == ("not alive", "nothing")
    assert [(await world.row(cell))[2] for cell in (0, 1)] == ["50 %", "50 %"]
    await take_screenshots(world.browser, "fleet-lost-")
    findings = await serious_findings(world.browser) if AXE.exists() else []
    fleet.cells[2].processes[0].start()
    await world.until(f"{ARCS}.length === 3", "the arc comes back")
    assert (await world.row(2))[1:3] == ["alive", "50 %"]

    if not AXE.exists():
        pytest.skip("axe-core is not installed: `make test-browser` installs it")
    assert findings == []
    assert await serious_findings(world.browser) == []
    assert "fleet" in await reached_by_keyboard(world.browser, 8)
