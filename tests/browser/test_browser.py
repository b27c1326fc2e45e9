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
        ("12", "12.svg"),  # a document, which is never opened in the node's origin
    ],
)
async def test_the_name_that_a_browser_suggests(
    node: AssetsHarness, browser: Browser, tmp_path: Path, path: str, name: str
) -> None:
    put(node, "10", b"\0" * 5000, "video/mp4")
    put(node, "11", b"\0" * 5000, "video/mp4", name="Sunrise ☀")
    put(node, "12", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml")
    url = f"http://127.0.0.1:{node.port}/api/v1/assets/{path}"
    assert (await get(url)).status == 200
    assert await browser.suggested_name(url, tmp_path) == name
