"""What is checked of the node's page in every test of it: its width, its screenshots, its accessibility."""

from __future__ import annotations

import json
from pathlib import Path

from tests.browser.chromium import Browser

BUILD = Path(__file__).parents[2] / "build"
AXE = BUILD / "browser" / "node_modules" / "axe-core" / "axe.min.js"


async def take_screenshots(browser: Browser, name: str = "") -> None:
    """Nothing is wider than the window, in any width. The pictures are kept below build/dashboard/."""
    for width in (390, 1280, 1600):
        for scheme in ("light", "dark"):
            await browser.screenshot(BUILD / "dashboard" / f"{name}{width}-{scheme}.png", width, scheme)
            overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert await browser.evaluate(overflow) <= 0, width
    await browser.set_window(1280)


async def serious_findings(browser: Browser) -> list[object]:
    """Of axe-core, in either colour scheme."""
    await browser.evaluate(AXE.read_text() + "; undefined")
    found: list[object] = []
    for scheme in ("light", "dark"):
        await browser.set_window(1280, scheme, reduced_motion=True)
        violations = await browser.evaluate("axe.run().then((results) => JSON.stringify(results.violations))")
        found += [
            (scheme, one["id"], one["help"], [node["html"][:200] for node in one["nodes"][:3]])
            for one in json.loads(violations)
            if one["impact"] in ("serious", "critical")
        ]
    await browser.set_window(1280)
    return found


async def reached_by_keyboard(browser: Browser, presses: int) -> list[str]:
    """The ids (or names) of the elements that the key Tab reaches, in order."""
    reached = []
    for _ in range(presses):
        for kind in ("keyDown", "keyUp"):
            await browser.call(
                "Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9
            )
        reached.append(await browser.evaluate("document.activeElement.id || document.activeElement.tagName"))
    return reached
