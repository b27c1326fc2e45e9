"""Ids that are paths: a site behind the node, and a manifest that lists paths."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.end_to_end.client import Answer, get
from tests.end_to_end.stack import Stack

pytestmark = pytest.mark.timeout(120)

PATHS = [
    "a/b.mp4", "my%20video.mp4", "caf%C3%A9.jpg", "_x.png", "x@2x.png", "(1).jpg", "a" * 129, "deep/er/and/deeper.bin",
    "a%3Fb", "100%25.txt", "x" * 1024, "%E2%98%80" * 341, "plain",
]  # fmt: skip


@dataclass(slots=True)
class Origin:
    """Serves any path: its content is its own target, and the version. `asked`: all targets, in order."""

    url: str = ""
    version: str = ""
    max_age: int = 600
    asked: list[str] = field(default_factory=list)
    serving: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.serving.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                method, target, _ = head.split(" ", 2)
                self.asked.append(target)
                body = (target + self.version).encode()
                control, tag = f"Cache-Control: max-age={self.max_age}", f'ETag: "1{self.version}"'
                lines = f"Content-Type: text/plain\r\n{control}\r\n{tag}\r\n"
                writer.write(f"HTTP/1.1 200 OK\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode())
                if method == "GET":
                    writer.write(body)
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            return
        finally:
            writer.close()


@asynccontextmanager
async def running_origin() -> AsyncIterator[Origin]:
    origin = Origin()
    server = await asyncio.start_server(origin.serve, "127.0.0.1", 0)
    async with server:
        origin.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/site/"
        yield origin
        for task in origin.serving:
            task.cancel()
        await asyncio.gather(*origin.serving, return_exceptions=True)


@asynccontextmanager
async def running_node(folder: Path, **environment: str) -> AsyncIterator[Stack]:
    stack = Stack(folder, "memory://", "memory://", "alone")
    stack.environment |= {f"DISTRIBUTOR_{name}": value for name, value in environment.items()}
    try:
        await stack.add("standalone").healthy()
        yield stack
    finally:
        stack.kill_all()


async def until_hit(stack: Stack, target: str) -> Answer:
    async with asyncio.timeout(60):
        while True:
            answer = await get(stack.url(target))
            assert answer.status == 200, (target[:60], answer.status, answer.body)
            if answer.headers["x-cache"] == "hit":
                return answer
            await asyncio.sleep(0.02)


def names_on_volume(stack: Stack) -> set[str]:
    return {path.name for path in (stack.volume / "objects").glob("*/*")}


async def test_any_path_of_a_site(tmp_path: Path) -> None:
    async with (
        running_origin() as origin,
        running_node(tmp_path, CATALOG__KIND="origin", CATALOG__ORIGIN=origin.url + "{id}") as stack,
    ):
        for path in PATHS:
            hit = await until_hit(stack, path)
            assert hit.body.decode() == f"/site/{path}"
        assert {target.removeprefix("/site/") for target in origin.asked} == set(PATHS)
        asked = len(origin.asked)
        same = await get(stack.url("a%2Db.mp4".replace("%2D", "/").replace("a", "%61")))
        assert (same.headers["x-cache"], same.body) == ("hit", b"/site/a/b.mp4"), "another spelling"
        assert same.headers["content-disposition"] == 'inline; filename="b.mp4"'
        for refused in (
            "../x",
            "a/../b",
            "a/%2e%2e/b",
            "a%2Fb",
            "a%00",
            "a%0D%0Ab",
            "x" * 1025,
            "%ff",
            "a b",
        ):
            assert (await get(stack.url(refused.replace(" ", "%7F")))).status == 400, refused
        assert len(origin.asked) == asked
        digests = {f"sha256-{hashlib.sha256(path.encode()).hexdigest()}" for path in PATHS if path != "plain"}
        assert names_on_volume(stack) == digests | {"plain"}
        assert (await get(stack.url(min(digests)))).status == 400, "a digest is no path"
        record = next((stack.volume / "records").glob(f"*/sha256-{hashlib.sha256(b'a/b.mp4').hexdigest()}"))
        assert json.loads(record.read_bytes())["name"] == "a/b.mp4"


async def test_a_path_that_the_origin_replaces(tmp_path: Path) -> None:
    """The id is a digest. A record that is read back does not tell where the origin has it, but for the name in it."""
    paths = ["a/b.mp4", "my%20video.mp4", "caf%C3%A9.jpg?v=1", "x" * 1024, "plain"]
    async with (
        running_origin() as origin,
        running_node(
            tmp_path,
            CATALOG__KIND="origin",
            CATALOG__ORIGIN=origin.url + "{id}",
            ORIGIN__QUERY="include",
            ORIGIN__STALE_WHILE_REVALIDATE="0",
        ) as stack,
    ):
        origin.max_age = 1
        for path in paths:
            await until_hit(stack, path)
        origin.version = "-new"
        for path in paths:
            async with asyncio.timeout(30):
                while not (answer := await get(stack.url(path))).body.endswith(b"-new"):
                    assert answer.status == 200
                    await asyncio.sleep(0.1)


@pytest.mark.parametrize("query", ["include", "ignore"])
async def test_queries(tmp_path: Path, query: str) -> None:
    async with (
        running_origin() as origin,
        running_node(
            tmp_path, CATALOG__KIND="origin", CATALOG__ORIGIN=origin.url + "{id}", ORIGIN__QUERY=query
        ) as stack,
    ):
        targets = ["a.png", "a.png?v=2", "a.png?v=3", "a.png?x=1&y=2", "a.png?y=2&x=1"]
        for target in targets:
            expected = target if query == "include" else "a.png"
            assert (await until_hit(stack, target)).body.decode() == f"/site/{expected}"
        saved = await get(stack.url("a.png?v=2&download=mine.png"))
        assert saved.headers["x-cache"] == "hit"
        assert saved.headers["content-disposition"] == 'attachment; filename="mine.png"'
        assert len(names_on_volume(stack)) == (len(targets) if query == "include" else 1)


async def test_a_manifest_that_lists_paths(tmp_path: Path) -> None:
    async with running_origin() as origin:
        listed = ["films/my film.mp4", "café/☀.jpg", "7"]
        encoded = ["films/my%20film.mp4", "caf%C3%A9/%E2%98%80.jpg", "7"]
        objects = [
            {"id": name, "size": len(f"/site/{path}")} for name, path in zip(listed, encoded, strict=True)
        ]
        manifest = tmp_path / "manifest.json"
        manifest.write_text(json.dumps({"version": 1, "base_urls": [origin.url], "objects": objects}))
        async with running_node(tmp_path, CATALOG__KIND="manifest") as stack:
            for path in encoded:
                assert (await until_hit(stack, path)).body.decode() == f"/site/{path}"
            assert (await get(stack.url("films/other.mp4"))).status == 404
            assert (await get(stack.url("films/../7"))).status == 400
