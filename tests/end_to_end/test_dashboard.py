"""The node's page, as programs see it: its files, its stream of events and its search, on whole nodes."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from redis import asyncio as aioredis

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import MIB, generated_object
from distributor_node.services.demo.storage_node import StorageNode
from tests.end_to_end.client import get
from tests.end_to_end.conftest import Harness
from tests.end_to_end.stack import Stack
from tests.servers.redis_server import free_port
from tests.waiting import eventually

FILES = Match(endpoint="files", method="GET")
PASSWORD = "correct horse"


@dataclass(slots=True)
class Page:
    """A page that is open: the last event of each kind."""

    last: dict[str, Any] = field(default_factory=dict)
    received: int = 0

    async def until(self, condition: Callable[[dict[str, Any]], object], what: str) -> dict[str, Any]:
        """Return the first snapshot for which the condition holds."""
        await eventually(lambda: "snapshot" in self.last and condition(self.last["snapshot"]), 90, what=what)
        found: dict[str, Any] = self.last["snapshot"]
        return found


@asynccontextmanager
async def open_page(port: int, headers: Mapping[str, str] | None = None) -> AsyncIterator[Page]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=8 * MIB)
    lines = ["GET /events HTTP/1.1", "Host: localhost"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    page = Page()

    async def read() -> None:
        while True:
            event = (await reader.readuntil(b"\n\n")).decode()
            fields = dict(line.split(": ", 1) for line in event.strip().splitlines())
            if "event" in fields:
                page.last[fields["event"]] = json.loads(fields["data"])
                page.received += 1

    reading = asyncio.create_task(read())
    try:
        yield page
    finally:
        reading.cancel()
        writer.close()
        await asyncio.wait({reading})


@dataclass(slots=True)
class Standalone:
    stack: Stack
    source: StorageNode
    port: int  # of the page

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@asynccontextmanager
async def standalone(folder: Path, count: int, size: int, **settings: str) -> AsyncIterator[Standalone]:
    objects = [generated_object(str(number), size) for number in range(1, count + 1)]
    stack, port = Stack(folder, "memory://", "memory://", "unused"), free_port()
    async with StorageNode(objects).run() as source:
        stack.write_manifest(objects, [source.object_url("")])
        stack.add("standalone", DISTRIBUTOR_DASHBOARD__PORT=str(port), **settings)
        try:
            await stack.ready()
            await eventually(lambda: is_served(port), what="the page is served")
            yield Standalone(stack, source, port)
        finally:
            stack.kill_all()


async def is_served(port: int) -> bool:
    """A node may be ready before its page is."""
    try:
        await get(f"http://127.0.0.1:{port}/page.css")
    except ConnectionRefusedError:
        return False
    return True


async def follow(url: str) -> asyncio.Task[Any]:
    return asyncio.create_task(get(url, keep_body=False))


async def test_files_and_headers(tmp_path: Path) -> None:
    async with standalone(tmp_path, 1, 1000) as node:
        for path, media_type in (
            ("/", "text/html"),
            ("/page.js", "text/javascript"),
            ("/page.css", "text/css"),
        ):
            answer = await get(node.url(path))
            assert (answer.status, answer.complete) == (200, True)
            assert answer.headers["content-type"].startswith(media_type)
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert "unsafe" not in answer.headers["content-security-policy"]
        assert (await get(node.url("/other"))).status == 404
        assert (await get(node.url("/"), method="POST")).status == 405
        assert (await get(node.url("/explain.json?id="))).status == 400


async def test_a_site_that_makes_its_name_point_to_this_machine_reads_nothing(tmp_path: Path) -> None:
    async with standalone(tmp_path, 1, 1000) as node:
        for host, status in (
            ("evil.example", 421), ("localhost.evil.example:3336", 421), ("", 421), ("localhost:3336", 200),
            ("127.0.0.1:3336", 200), ("[::1]:3336", 200), ("192.0.2.7", 200), ("node.localhost", 200),
        ):  # fmt: skip
            reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
            writer.write(f"GET /snapshot.json HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert (await reader.readline()).split()[1] == str(status).encode(), host
            writer.close()


async def test_with_a_password_it_asks_for_it(tmp_path: Path) -> None:
    async with standalone(tmp_path, 1, 1000, DISTRIBUTOR_DASHBOARD__PASSWORD=PASSWORD) as node:
        answer = await get(node.url("/"))
        assert answer.status == 401
        assert answer.headers["www-authenticate"].startswith("Basic ")

        def signed(pair: str) -> dict[str, str]:
            return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}

        right = f"operator:{PASSWORD}"
        for pair, status in (("operator:wrong", 401), (f"root:{PASSWORD}", 401), (right, 200)):
            for path in ("/", "/snapshot.json", "/explain.json?id=1"):
                answer = await get(node.url(path), signed(pair))
                assert answer.status == status, (pair, path)
        async with open_page(node.port, signed(right)) as page:
            await page.until(lambda snapshot: snapshot["node"]["id"], "a snapshot")


async def test_a_viewer_who_jumps_ahead_makes_a_second_extent(tmp_path: Path) -> None:
    async with standalone(tmp_path, 1, 24 * MIB) as node, open_page(node.port) as page:
        node.source.faults.add(Fault(bytes_per_second=MIB), FILES)
        first = await follow(node.stack.url("1"))
        await page.until(lambda now: any(one["extents"] for one in now["downloads"]), "a download")
        ahead = asyncio.create_task(get(node.stack.url("1"), {"Range": f"bytes={16 * MIB}-{18 * MIB}"}))
        now = await page.until(
            lambda now: any(len(one["extents"]) > 1 for one in now["downloads"]), "two extents"
        )
        (_, end), (begin, _) = now["downloads"][0]["extents"][:2]
        assert end < begin <= 16 * MIB
        assert (await ahead).status == 206
        first.cancel()


async def test_a_throttled_download_with_its_viewers(tmp_path: Path) -> None:
    async with standalone(tmp_path, 1, 8 * MIB) as node, open_page(node.port) as page:
        node.source.faults.add(Fault(bytes_per_second=MIB), FILES)
        viewers = [await follow(node.stack.url("1")) for _ in range(3)]

        def is_watched(snapshot: dict[str, Any]) -> bool:
            return any(len(one["viewers"]) == 3 and one["extents"] for one in snapshot["downloads"])

        first = (await page.until(is_watched, "three viewers"))["downloads"][0]
        positions = {viewer["key"]: viewer["at"] for viewer in first["viewers"]}

        def all_moved(snapshot: dict[str, Any]) -> bool:
            now = {viewer["key"]: viewer["at"] for one in snapshot["downloads"] for viewer in one["viewers"]}
            return now.keys() == positions.keys() and all(now[key] > positions[key] for key in now)

        later = (await page.until(all_moved, "all viewers have moved on"))["downloads"][0]
        assert (later["id"], later["size"], later["phase"]) == ("1", 8 * MIB, "fetching")
        assert later["extents"][0][0] == 0
        assert later["extents"][0][1] > first["extents"][0][1]
        assert later["heldBack"] < later["size"]
        assert node.source.object_url("").split("/")[2] == later["source"]
        await asyncio.gather(*viewers)
        await page.until(lambda snapshot: not snapshot["downloads"], "the download has ended")
        assert page.last["snapshot"]["volume"]["objects"] == 1
        assert sum(objects for objects, _ in page.last["snapshot"]["volume"]["map"]["cells"]) <= 1


async def test_a_download_that_waits_for_its_viewer_is_paused(tmp_path: Path) -> None:
    # There is no room above the low watermark for what is not watched.
    settings = {
        "DISTRIBUTOR_FETCH__WINDOW": "2M",
        "DISTRIBUTOR_STORAGE__LOW_WATERMARK": "0.02",
        "DISTRIBUTOR_STORAGE__HIGH_WATERMARK": "0.9",
    }
    async with standalone(tmp_path, 1, 41 * MIB, **settings) as node, open_page(node.port) as page:
        _, writer = await asyncio.open_connection("127.0.0.1", node.stack.port, limit=64 * 1024)
        writer.write(b"GET /api/v1/assets/1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        now = await page.until(lambda now: now["queue"]["paused"], "a paused download")
        [download] = now["downloads"]
        assert (download["phase"], download["paused"], len(download["viewers"])) == ("fetching", True, 1)
        assert (now["queue"]["downloads"], now["queue"]["paused"]) == (0, 1)
        writer.transport.abort()


async def test_an_eviction_appears_with_its_reason(tmp_path: Path) -> None:
    settings = {"DISTRIBUTOR_STORAGE__LIMIT": "10M", "DISTRIBUTOR_EVICTOR__MIN_IDLE": "1"}
    async with standalone(tmp_path, 20, MIB, **settings) as node, open_page(node.port) as page:
        for number in range(1, 21):
            await get(node.stack.url(str(number)))
        snapshot = await page.until(lambda now: now["volume"]["removed"], "an eviction")
        removed = snapshot["volume"]["removed"][-1]
        assert (removed["size"], removed["views"]) == (MIB, 1)
        assert removed["words"] in (
            "the volume was above its high watermark", "a fetch was waiting for space"
        )  # fmt: skip
        explained = (await get(node.url(f"/explain.json?id={removed['id']}"))).json()
        assert explained["state"] == "absent"
        assert explained["words"][0] == "It is not here, and is not being fetched."
        assert removed["words"] in explained["words"][1]
        assert "The catalog knows it" in explained["words"][2]
        await node.stack.until_hit("20")

        async def is_kept() -> bool:
            """Once its fetch is committed: it is a hit a moment before that."""
            kept = (await get(node.url("/explain.json?id=20"))).json()
            return str(kept["words"][0]).startswith("It is on disk: 1.0 MiB, viewed once")

        await eventually(is_kept, what="the last one is on disk")
        unknown = (await get(node.url("/explain.json?id=999"))).json()
        assert unknown["words"][-1] == "The catalog says that it does not exist."


async def test_an_eviction_while_no_page_is_open_is_told_later(tmp_path: Path) -> None:
    settings = {"DISTRIBUTOR_STORAGE__LIMIT": "10M", "DISTRIBUTOR_EVICTOR__MIN_IDLE": "1"}
    async with standalone(tmp_path, 20, MIB, **settings) as node:
        for number in range(1, 21):
            await get(node.stack.url(str(number)))

        async def is_told() -> bool:
            answers = [(await get(node.url(f"/explain.json?id={number}"))).json() for number in range(1, 6)]
            return any("It was evicted" in sentence for answer in answers for sentence in answer["words"])

        await eventually(is_told, pause=0.5, what="an eviction in words")


async def test_served_and_fetched_are_counted(tmp_path: Path) -> None:
    async with standalone(tmp_path, 1, MIB) as node, open_page(node.port) as page:
        await get(node.stack.url("1"))
        await node.stack.until_hit("1")
        for _ in range(8):
            assert (await get(node.stack.url("1"))).headers["x-cache"] == "hit"
        snapshot = await page.until(lambda now: now["totals"]["hour"]["hit"] >= 8, "the hits")
        hour = snapshot["totals"]["hour"]
        assert (hour["hit"], hour["miss"], hour["fetched"]) == (8, 1, MIB)
        assert hour["local"] + hour["external"] == 9 * MIB
        await eventually(lambda: sum(page.last["history"]["hit"]) == 8, what="the history")


async def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run `distributor` to its end: exit code, standard output, standard error."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "distributor_node.services.command_line", *arguments,
        env={**os.environ, "COLUMNS": "120", **environment}, stdout=PIPE, stderr=PIPE,
    )  # fmt: skip
    async with asyncio.timeout(120):
        output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def test_the_terminal_shows_the_same(tmp_path: Path) -> None:
    async with standalone(tmp_path, 1, 16 * MIB, DISTRIBUTOR_ID="[node]-7") as node:
        node.source.faults.add(Fault(bytes_per_second=MIB // 4), FILES)
        viewer = await follow(node.stack.url("1"))
        code, output, _ = await run("top", "--once", "--json", "--url", node.url(""))
        snapshot = json.loads(output)
        assert (code, snapshot["complete"], snapshot["node"]["id"]) == (0, True, "[node]-7")
        [download] = snapshot["downloads"]
        assert (download["id"], len(download["viewers"])) == ("1", 1)
        code, output, _ = await run("top", "--once", DISTRIBUTOR_DASHBOARD__PORT=str(node.port))
        assert code == 0
        assert "[node]-7" in output
        assert "everything works" in output
        assert "Downloads: 1 running" in output
        assert "●" in output.partition("Downloads: 1")[2]
        viewer.cancel()


async def test_status_ends_with_what_is_wrong(tmp_path: Path) -> None:
    async with standalone(tmp_path, 1, 1000, DISTRIBUTOR_DASHBOARD__PASSWORD=PASSWORD) as node:
        known = {"DISTRIBUTOR_DASHBOARD__PASSWORD": PASSWORD, "DISTRIBUTOR_DASHBOARD__PORT": str(node.port)}

        async def is_ok() -> bool:
            return (await run("status", **known))[0] == 0

        await eventually(is_ok, pause=0.5, what="everything works")
        _, output, _ = await run("status", **known)
        assert "ok     Catalog (manifest): works" in output
        assert not any(line.startswith("WRONG") for line in output.splitlines())
        code, _, errors = await run("status", "--url", node.url(""))
        assert (code, "asks for a password" in errors) == (3, True)
        (tmp_path / "volume").rename(tmp_path / "elsewhere")

        async def is_wrong() -> bool:
            code, output, _ = await run("status", "--json", **known)
            components = json.loads(output)["components"]
            return code == 1 and not next(one["ok"] for one in components if one["name"] == "Volume")

        await eventually(is_wrong, pause=0.5, what="the volume is gone")
    code, _, errors = await run("status", **known)
    assert (code, "cannot be read" in errors) == (3, True)


async def test_an_origin_that_is_down_is_told_until_a_lookup_succeeds(tmp_path: Path) -> None:
    port = free_port()
    origin = {
        "DISTRIBUTOR_CATALOG__KIND": "origin",
        "DISTRIBUTOR_CATALOG__ORIGIN": f"http://127.0.0.1:{port}/api/v1/files/{{id}}",
    }
    async with standalone(tmp_path, 1, 1000, **origin) as node:
        page = {"DISTRIBUTOR_DASHBOARD__PORT": str(node.port)}

        async def ready() -> Any:
            [service] = node.stack.running()
            answer = await get(f"{service.health_url}/readyz")
            assert answer.status == 200, "hits are served"
            return answer.json()["degraded"]

        async def told() -> tuple[int, str]:
            code, output, _ = await run("status", **page)
            return code, next(line for line in output.splitlines() if "Catalog (origin)" in line)

        async def is_told(code: int, words: str) -> bool:
            found = await told()
            return found[0] == code and words in found[1]

        await eventually(lambda: is_told(0, "works"), pause=0.5, what="everything works")
        for number in range(3):
            answer = await get(node.stack.url(f"{number}"))
            assert (answer.status, answer.json()["type"]) == (503, "catalog_unavailable")
        assert await ready() == ["catalog: the last look-ups failed"]
        await eventually(lambda: is_told(1, "the last look-ups failed"), pause=0.5, what="status tells it")
        code, output, _ = await run("top", "--once", **page)
        assert (code, "everything works" in output, "the last look-ups failed" in output) == (0, False, True)
        async with StorageNode([generated_object("1", 1000)]).run(port=port):
            assert (await get(node.stack.url("1"))).status == 200
            assert await ready() == []
            await eventually(lambda: is_told(0, "works"), pause=0.5, what="status tells the end of it")


@pytest.mark.servers
async def test_processes_of_two_machines_add_up_and_a_killed_fetcher_is_told(harness: Harness) -> None:
    """Each API has its own port and could be on another machine: they meet in Redis alone."""
    stack, film = harness.stack, generated_object("1", 12 * MIB)
    harness.publish([film, generated_object("2", 1000)])
    first, second, other = free_port(), free_port(), free_port()
    stack.add("evictor")
    fetcher = stack.add("fetcher")
    stack.add("fetcher")
    stack.add("api", DISTRIBUTOR_DASHBOARD__PORT=str(first), DISTRIBUTOR_PUBLIC_API__WORKERS="2")
    stack.add("api", DISTRIBUTOR_DASHBOARD__PORT=str(second), DISTRIBUTOR_PUBLIC_API__PORT=str(other))
    await stack.ready()
    urls = [stack.url("1"), f"http://127.0.0.1:{other}/api/v1/assets/1"]
    await get(stack.url("2"))
    await stack.until_hit("2")
    async with open_page(first) as page, open_page(second) as another:
        for shown in (page, another):
            kinds = await shown.until(lambda now: len(now["processes"]) == 6, "all processes")
            assert sorted(one["kind"] for one in kinds["processes"]) == [
                "api", "api", "api", "evictor", "fetcher", "fetcher",
            ]  # fmt: skip
        for shown in (page, another):

            async def has_hits_of_both(shown: Page = shown) -> bool:
                """More requests each time: what came before a history's first reading is not in it."""
                for url in urls:
                    await get(url.replace("assets/1", "assets/2"))
                return bool(shown.last["snapshot"]["totals"]["hour"]["hit"] >= 20)

            await eventually(has_hits_of_both, 90, pause=0.2, what="hits of both")
        harness.first.faults.add(Fault(bytes_per_second=MIB), FILES)
        viewers = [await follow(url) for url in urls]
        for shown in (page, another):
            await shown.until(
                lambda now: any(len(one["viewers"]) == 2 for one in now["downloads"]), "viewers of both"
            )
        fetcher.kill()
        wrong = await page.until(lambda now: not all(one["ok"] for one in now["processes"]), "a red line")
        [dead] = [one for one in wrong["processes"] if not one["ok"]]
        assert dead["kind"] == "fetcher"
        assert fetcher.process is not None
        assert dead["name"].endswith(f":{fetcher.process.pid}")
        assert wrong["at"] - dead["since"] < 10
        assert "not heard of" in next(
            one["words"] for one in wrong["components"] if one["name"] == "Fetchers"
        )
        stack.processes.remove(fetcher)
        stack.add("fetcher")
        await page.until(lambda now: all(one["ok"] for one in now["processes"]), "green again")
        await asyncio.gather(*viewers)


@pytest.mark.servers
async def test_another_worker_serves_the_page_when_that_one_dies(harness: Harness) -> None:
    port = free_port()
    harness.publish([generated_object("1", 1000)])
    harness.stack.environment["DISTRIBUTOR_DASHBOARD__PORT"] = str(port)
    await harness.stack.up(workers=2)
    async with open_page(port) as page:
        snapshot = await page.until(lambda now: len(now["processes"]) == 4, "all processes")
    workers = {int(one["name"].split(":")[1]) for one in snapshot["processes"] if one["kind"] == "api"}
    log = harness.stack.of("api")[0].log
    opened = [line for line in log.read_text().splitlines() if '"dashboard_opened"' in line]
    assert len(opened) == 1
    for worker in workers:
        # The one that holds the port is among them; each is replaced by the supervisor.
        os.kill(worker, signal.SIGKILL)
        await eventually(lambda: log.read_text().count('"dashboard_opened"') >= 1)
        async with reopened(port) as page:
            await page.until(lambda now: now["node"]["id"], "a snapshot of another worker")
    assert log.read_text().count('"dashboard_opened"') >= 2


@asynccontextmanager
async def reopened(port: int) -> AsyncIterator[Page]:
    """The page as a browser gets it: it tries again until a process listens."""

    async def listens() -> bool:
        try:
            return (await get(f"http://127.0.0.1:{port}/snapshot.json")).status == 200
        except OSError:
            return False

    await eventually(listens, what="another worker listens")
    async with open_page(port) as page:
        yield page


@pytest.mark.servers
async def test_without_the_page_nothing_listens_and_nothing_is_reported(harness: Harness) -> None:
    port = free_port()
    harness.publish([generated_object("1", 1000)])
    environment = harness.stack.environment
    environment |= {"DISTRIBUTOR_DASHBOARD__ENABLED": "false", "DISTRIBUTOR_DASHBOARD__PORT": str(port)}
    await harness.stack.up()
    await get(harness.stack.url("1"))
    await harness.stack.until_hit("1")
    with pytest.raises(ConnectionRefusedError):
        await get(f"http://127.0.0.1:{port}/")
    client = aioredis.Redis.from_url(environment["DISTRIBUTOR_STATE_STORE__URL"], protocol=2)
    try:
        assert await client.exists(f"{environment['DISTRIBUTOR_STATE_STORE__PREFIX']}reports") == 0
        assert await client.exists(f"{environment['DISTRIBUTOR_STATE_STORE__PREFIX']}objects") == 1
    finally:
        await client.aclose()


async def test_a_taken_port_does_not_keep_the_node_from_running(tmp_path: Path) -> None:
    taken = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    objects = [generated_object("1", 1000)]
    stack = Stack(tmp_path, "memory://", "memory://", "unused")
    async with StorageNode(objects).run() as source:
        stack.write_manifest(objects, [source.object_url("")])
        stack.add("standalone", DISTRIBUTOR_DASHBOARD__PORT=str(port))
        try:
            await stack.ready()
            assert (await get(stack.url("1"))).status == 200
            taken.close()
            async with reopened(port) as page:
                await page.until(lambda now: now["node"]["id"], "a snapshot")
        finally:
            taken.close()
            stack.kill_all()
