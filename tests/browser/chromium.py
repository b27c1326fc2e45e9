"""Headless Chromium, driven by the Chrome DevTools Protocol over a websocket."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from websockets.asyncio.client import ClientConnection, connect

from tests.waiting import eventually

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio",
    "--autoplay-policy=no-user-gesture-required", "--remote-debugging-port=0",
)  # fmt: skip
_START_SECONDS = 60.0
_CALL_SECONDS = 60.0


def find_chromium() -> str | None:
    return next((found for found in map(shutil.which, _NAMES) if found is not None), None)


class Browser:
    """A connection to the browser, attached to one empty page."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._session: str | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []  # all that came, by method

    async def read(self) -> None:
        """Read responses and events until cancelled."""
        async for message in self._connection:
            document = json.loads(message)
            if "id" not in document:
                self.events.append((document["method"], document["params"]))
            elif (call := self._calls.pop(document["id"], None)) is not None and not call.done():
                call.set_result(document)

    async def call(self, method: str, *, of_page: bool = True, **parameters: Any) -> dict[str, Any]:
        """Send a command. Raises AssertionError if the browser refuses it."""
        number = next(self._numbers)
        call = self._calls[number] = asyncio.get_running_loop().create_future()
        session = {"sessionId": self._session} if of_page and self._session is not None else {}
        command = {"id": number, "method": method, "params": parameters, **session}
        await self._connection.send(json.dumps(command))
        async with asyncio.timeout(_CALL_SECONDS):
            document = await call
        assert "error" not in document, f"{method}: {document.get('error')}"
        result: dict[str, Any] = document["result"]
        return result

    async def open_page(self) -> Self:
        target = (await self.call("Target.createTarget", url="about:blank"))["targetId"]
        attached = await self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        await self.call("Page.enable")
        return self

    async def watch_page(self) -> None:
        """From now on `console_errors` and `requested_urls` tell what the page does."""
        for domain in ("Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")

    def console_errors(self) -> list[str]:
        """Errors and warnings on the page's console, uncaught exceptions, and blocked requests."""
        return [
            json.dumps(parameters)
            for method, parameters in self.events
            if method == "Runtime.exceptionThrown"
            or (method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"))
            or (method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"))
        ]

    def requested_urls(self) -> list[str]:
        return [
            parameters["request"]["url"]
            for method, parameters in self.events
            if method == "Network.requestWillBeSent"
        ]

    async def screenshot(self, path: Path, width: int, scheme: str) -> None:
        """Save the whole page as PNG. `width`: of the window, in pixels. `scheme`: light or dark."""
        await self.set_window(width, scheme)
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}
        shot = await self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    async def set_window(self, width: int, scheme: str = "light", *, reduced_motion: bool = False) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )  # fmt: skip
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce" if reduced_motion else "no-preference"},
        ]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def evaluate(self, script: str) -> Any:
        """Return the value of an expression in the page, awaited if it is a promise."""
        answer = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def suggested_name(self, url: str, folder: Path) -> str:
        """Open a URL that is a download. Returns the name under which the browser saves it."""
        await self.call(
            "Browser.setDownloadBehavior", of_page=False, behavior="allow", downloadPath=str(folder), eventsEnabled=True
        )  # fmt: skip
        self.events.clear()
        await self.call("Page.navigate", url=url)
        found: list[str] = []

        def begun() -> bool:
            found.extend(
                parameters["suggestedFilename"]
                for method, parameters in self.events
                if method == "Browser.downloadWillBegin"
            )
            return bool(found)

        await eventually(begun, what=f"download of {url}")
        return found[0]


@asynccontextmanager
async def running_browser(program: str, folder: Path) -> AsyncIterator[Browser]:
    """`folder`: new and empty, for the browser's profile."""
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program, *_OPTIONS, f"--user-data-dir={folder / 'profile'}", "about:blank",
            stdout=log, stderr=log, start_new_session=True, env=os.environ | {"HOME": str(folder)},
        )  # fmt: skip
    try:
        told = folder / "profile" / "DevToolsActivePort"
        await eventually(lambda: told.exists() and told.read_text().count("\n") >= 1, _START_SECONDS)
        port, path = told.read_text().split()
        async with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None) as connection:
            browser = Browser(connection)
            reading = asyncio.create_task(browser.read())
            try:
                yield await browser.open_page()
            finally:
                reading.cancel()
                await asyncio.wait({reading})
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
