"""A real browser: hls.js with CMCD headers through a page on another origin, and the names of saved files.

`make test-browser` installs Chromium (where apt is allowed) and hls.js (below build/).
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from distributor_node.services.api import headers, sanic_app
from tests.browser.chromium import Browser, find_chromium, running_browser
from tests.end_to_end.client import get
from tests.integration.assets_harness import AssetsHarness, assets_harness
from tests.waiting import eventually

HLS = Path(__file__).parents[2] / "build" / "browser" / "node_modules" / "hls.js" / "dist" / "hls.min.js"
SEGMENTS, SEGMENT_FRAMES = 3, 77
FRAME_SECONDS = 1152 / 44100
PAGE = """<!doctype html><meta charset="utf-8"><title>player</title><script src="/hls.js"></script>
<audio id="player"></audio><script>
window.told = {loaded: 0, errors: [], buffered: 0, ended: false};
function play(url, cmcd) {
  const hls = new Hls({cmcd: cmcd ? {sessionId: "s", contentId: "c", useHeaders: true} : undefined,
                       enableWorker: false});
  hls.on(Hls.Events.FRAG_LOADED, () => told.loaded++);
  hls.on(Hls.Events.FRAG_BUFFERED, () => told.buffered++);
  hls.on(Hls.Events.ERROR, (_, error) => told.errors.push(`${error.type} ${error.details} ${error.fatal}`));
  hls.loadSource(url);
  hls.attachMedia(player);
  player.onended = () => told.ended = true;
  player.play();
}
</script>"""


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no browser is installed: `make test-browser` installs Chromium where apt is allowed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        async with running_browser(program, Path(folder)) as running:
            yield running


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[AssetsHarness]:
    async with assets_harness(tmp_path) as running:
        yield running


def put(node: AssetsHarness, object_id: str, data: bytes, media_type: str, **changes: Any) -> None:
    node.add_bytes(object_id, data, media_type=media_type, **changes)
    node.store(object_id)


@asynccontextmanager
async def site() -> AsyncIterator[str]:
    """A web site with the player. Yields its origin, which is not the node's."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            script = request.startswith(b"GET /hls.js ")
            body = HLS.read_bytes() if script else PAGE.encode()
            kind = b"text/javascript" if script else b"text/html"
            head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
            writer.write(head % (kind, len(body)) + body)
            await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            return
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://localhost:{server.sockets[0].getsockname()[1]}"


def silent_mp3() -> bytes:
    """Frames of silence: MPEG-1 layer 3, 128 kbit/s, 44.1 kHz, joint stereo; 417 bytes each."""
    return (bytes((0xFF, 0xFB, 0x90, 0x64)) + bytes(413)) * SEGMENT_FRAMES


async def watch(node: AssetsHarness, browser: Browser, *, cmcd: bool) -> dict[str, Any]:
    """Play a stream from the node in a page of another origin, to its end or to a fatal error."""
    if not HLS.exists():
        pytest.skip("hls.js is not installed: `make test-browser` installs it")
    seconds = SEGMENT_FRAMES * FRAME_SECONDS
    lines = ["#EXTM3U", "#EXT-X-VERSION:3", "#EXT-X-TARGETDURATION:3", "#EXT-X-MEDIA-SEQUENCE:0"]
    for number in range(1, SEGMENTS + 1):
        put(node, str(number), silent_mp3(), "audio/mpeg")
        lines += [f"#EXTINF:{seconds:.3f},", str(number)]
    put(node, "100", "\n".join([*lines, "#EXT-X-ENDLIST", ""]).encode(), "application/vnd.apple.mpegurl")
    async with site() as origin:
        await browser.call("Page.navigate", url=f"{origin}/")
        url = f"http://127.0.0.1:{node.port}/api/v1/assets/100"
        started = f"play({url!r}, {str(cmcd).lower()})"
        ended = "told.ended || told.errors.some(error => error.endsWith('true'))"
        ready = "typeof Hls === 'function' && typeof play === 'function'"
        await eventually(lambda: browser.evaluate(ready), pause=0.1, what="the page")
        await browser.evaluate(started)
        await eventually(lambda: browser.evaluate(ended), 120, pause=0.1, what="the end of the stream")
        told: dict[str, Any] = await browser.evaluate("told")
        return told


@pytest.mark.parametrize("cmcd", [True, False])
async def test_a_player_with_cmcd_headers_on_another_origin(
    node: AssetsHarness, browser: Browser, cmcd: bool
) -> None:
    assert await watch(node, browser, cmcd=cmcd) == {
        "loaded": SEGMENTS, "buffered": SEGMENTS, "errors": [], "ended": True,
    }  # fmt: skip


async def test_a_fixed_list_of_headers_would_stop_that_player(
    node: AssetsHarness, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above asks for headers that no fixed list has."""
    monkeypatch.setattr(sanic_app, "preflight_headers", lambda _asked: dict(headers.PREFLIGHT))
    told = await watch(node, browser, cmcd=True)
    assert (told["loaded"], told["ended"]) == (0, False)
    assert any("manifestLoadError" in error for error in told["errors"])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("10?download", "10.mp4"),
        ("10?download=holiday.mp4", "holiday.mp4"),
        ("10?download=caf%C3%A9%20%E2%98%80.mp4", "café ☀.mp4"),
        ("10?download=..%2F..%2Fevil.mp4", "_.._evil.mp4"),
        ("11?download", "Sunrise ☀.mp4"),
        # Documents, which are never opened in the node's origin
        ("12", "12.svg"),
        ("13", "13.html"),
        ("14", "14.pdf"),
    ],
)
async def test_the_name_that_a_browser_suggests(
    node: AssetsHarness, browser: Browser, tmp_path: Path, path: str, name: str
) -> None:
    put(node, "10", b"\0" * 5000, "video/mp4")
    put(node, "11", b"\0" * 5000, "video/mp4", name="Sunrise ☀")
    put(node, "12", SVG, "image/svg+xml")
    put(node, "13", ACTIVE_PAGE, "text/html")
    put(node, "14", b"%PDF-1.4\n%%EOF\n", "application/pdf")
    url = f"http://127.0.0.1:{node.port}/api/v1/assets/{path}"
    assert (await get(url)).status == 200
    assert await browser.suggested_name(url, tmp_path) == name


MEDIA = Path(__file__).parents[2] / "deploy" / "demo" / "media"
TELL = b"parent.postMessage('ran', '*')"
SVG = b"<svg xmlns='http://www.w3.org/2000/svg' width='40' height='30'><script>" + TELL + b"</script></svg>"
ACTIVE_PAGE = b"<!doctype html><title>active</title><script>" + TELL + b"</script>"
LOADED = """(async () => {
  const element = document.createElement(%(tag)r);
  const loaded = new Promise(resolve => {
    for (const name of ["load", "loadedmetadata", "error"]) element.addEventListener(name, () => resolve(name));
  });
  element.src = %(url)r;
  document.body.append(element);
  return [await loaded, (element.naturalWidth ?? element.videoWidth ?? element.duration) > 0];
})()"""


async def open_site(browser: Browser, origin: str) -> None:
    await browser.call("Page.navigate", url=f"{origin}/")
    ready = f"location.origin === {origin!r} && document.readyState === 'complete'"
    await eventually(lambda: browser.evaluate(ready), pause=0.1, what="the page")


@pytest.mark.parametrize(
    ("tag", "name", "media_type", "event"),
    [
        ("img", "4-lighthouse.svg", "image/svg+xml", "load"),
        ("img", "1-sunrise.png", "image/png", "load"),
        ("video", "7-dive.webm", "video/webm", "loadedmetadata"),
        ("audio", "8-arpeggio.ogg", "audio/ogg", "loadedmetadata"),
    ],
)
async def test_objects_are_parts_of_a_page_although_they_are_attachments(
    node: AssetsHarness, browser: Browser, tag: str, name: str, media_type: str, event: str
) -> None:
    """A browser ignores Content-Disposition for what a page shows in such an element."""
    put(node, "20", (MEDIA / name).read_bytes(), media_type)
    url = f"http://127.0.0.1:{node.port}/api/v1/assets/20?download"
    assert (await get(url)).headers["content-disposition"].startswith("attachment")
    async with site() as origin:
        await open_site(browser, origin)
        assert await browser.evaluate(LOADED % {"tag": tag, "url": url}) == [event, True]


FRAMED = """(() => {
  window.ran = [];
  addEventListener("message", event => ran.push(event.data));
  for (const url of %(urls)r) {
    for (const [tag, property] of [["iframe", "src"], ["object", "data"], ["embed", "src"]]) {
      const element = document.createElement(tag);
      element[property] = url;
      document.body.append(element);
    }
  }
  const control = document.createElement("iframe");
  control.srcdoc = "<script>parent.postMessage('control', '*')</script>";
  document.body.append(control);
})()"""


@pytest.mark.parametrize("sandboxed", [True, False])
async def test_a_page_cannot_frame_an_active_document_of_the_node(
    node: AssetsHarness, browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sandboxed: bool
) -> None:
    """Each is saved or dropped, and no script runs: by the attachment alone, even without the sandbox."""
    if not sandboxed:
        unprotected = {
            name: value for name, value in headers.ASSET_CONTENT.items() if name != "Content-Security-Policy"
        }
        monkeypatch.setattr(headers, "ASSET_CONTENT", unprotected)
    put(node, "21", ACTIVE_PAGE, "text/html")
    put(node, "22", SVG, "image/svg+xml")
    urls = [f"http://127.0.0.1:{node.port}/api/v1/assets/{name}" for name in ("21", "22")]
    policies = [(await get(url)).headers.get("content-security-policy") for url in urls]
    assert [policy is not None for policy in policies] == [sandboxed, sandboxed]
    await browser.call(
        "Browser.setDownloadBehavior", of_page=False, behavior="allow", downloadPath=str(tmp_path), eventsEnabled=True
    )  # fmt: skip
    async with site() as origin:
        await open_site(browser, origin)
        browser.events.clear()
        await browser.evaluate(FRAMED % {"urls": urls})

        def saved() -> set[str]:
            begun = [told for method, told in browser.events if method == "Browser.downloadWillBegin"]
            return {told["suggestedFilename"] for told in begun}

        await eventually(lambda: saved() >= {"21.html", "22.svg"}, what="the downloads")
        await eventually(lambda: browser.evaluate("ran.length > 0"), pause=0.1, what="the control")
        await asyncio.sleep(0.5)
        assert await browser.evaluate("ran") == ["control"]
