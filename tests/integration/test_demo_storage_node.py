"""The demo storage node follows the storage node API, and every fault does what it says."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.manifest import DEMO_DIRECTORY
from distributor_node.services.demo.objects import (
    GeneratedContent,
    bytes_object,
    demo_objects,
    generated_object,
)
from distributor_node.services.demo.storage_node import Site, StorageNode

DATA = GeneratedContent(7, 100_000).read(0, 100_000)


@pytest.fixture
async def node() -> AsyncIterator[StorageNode]:
    objects = [bytes_object("7", DATA, "image/png"), generated_object("64", 64 * 1024 * 1024)]
    async with StorageNode(objects).run() as running:
        yield running


@pytest.fixture
async def client(node: StorageNode) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Accept-Encoding": "identity"}
    async with httpx.AsyncClient(base_url=node.api_url, headers=headers, timeout=20) as opened:
        yield opened


async def raw(node: StorageNode, request: str) -> bytes:
    """Everything the node sends until it closes the connection."""
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
        writer.write(request.encode())
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    return answer


GET = "GET /api/v1/files/7 HTTP/1.1\r\nHost: a\r\n\r\n"


async def collect(client: httpx.AsyncClient, received: bytearray, timeout: float = 60) -> None:
    """Add the body of object 7 to `received` as it arrives."""
    async with client.stream("GET", "/files/7", timeout=timeout) as answer:
        async for piece in answer.aiter_raw():
            received += piece


def body_of(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


async def test_version(client: httpx.AsyncClient) -> None:
    answer = await client.get("/version")
    assert answer.status_code == 200
    assert set(answer.json()) == {"version", "userAgent"}


async def test_head_tells_type_and_length_only(client: httpx.AsyncClient) -> None:
    answer = await client.head("/files/7")
    assert (answer.status_code, answer.content) == (200, b"")
    assert set(answer.headers) == {"date", "connection", "content-type", "content-length"}
    assert (answer.headers["content-type"], answer.headers["content-length"]) == ("image/png", "100000")


async def test_get_answers_the_whole_object_with_a_weak_etag(client: httpx.AsyncClient) -> None:
    answer = await client.get("/files/7")
    assert (answer.status_code, answer.content) == (200, DATA)
    assert answer.headers["etag"].startswith('W/"')
    assert answer.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize(
    ("wanted", "start", "end"),
    [("bytes=5-9", 5, 10), ("bytes=99990-", 99_990, 100_000), ("bytes=-3", 99_997, 100_000),
     ("bytes=0-999999", 0, 100_000), ("bytes=-999999", 0, 100_000)],
)  # fmt: skip
async def test_one_range_is_206(client: httpx.AsyncClient, wanted: str, start: int, end: int) -> None:
    answer = await client.get("/files/7", headers={"Range": wanted})
    assert (answer.status_code, answer.content) == (206, DATA[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/100000"


@pytest.mark.parametrize("wanted", ["bytes=0-1,4-5", "bytes=-", "bytes=a-b", "lines=1-2"])
async def test_many_ranges_or_a_senseless_one_give_the_whole(client: httpx.AsyncClient, wanted: str) -> None:
    answer = await client.get("/files/7", headers={"Range": wanted})
    assert (answer.status_code, answer.content) == (200, DATA)


@pytest.mark.parametrize(
    "headers",
    [{"Range": "bytes=100000-"}, {"Range": "bytes=9-5"}, {"Range": "bytes=-0"}, {"If-Match": '"other"'},
     {"If-Unmodified-Since": "Sun, 06 Nov 1994 08:49:37 GMT"}],
)  # fmt: skip
async def test_unsatisfiable_range_and_failed_precondition_are_500(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    assert (await client.get("/files/7", headers=headers)).status_code == 500


async def test_validators_are_compared(client: httpx.AsyncClient) -> None:
    known = (await client.get("/files/7")).headers
    seen = {"If-None-Match": known["etag"]}
    assert (await client.get("/files/7", headers=seen)).status_code == 304
    since = {"If-Modified-Since": known["last-modified"]}
    assert (await client.get("/files/7", headers=since)).status_code == 304
    fresh = {"Range": "bytes=0-0", "If-Range": known["etag"]}
    assert (await client.get("/files/7", headers=fresh)).status_code == 206
    stale = {"Range": "bytes=0-0", "If-Range": 'W/"other"'}
    assert (await client.get("/files/7", headers=stale)).status_code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_unknown_and_malformed_ids(client: httpx.AsyncClient, method: str) -> None:
    missing = await client.request(method, "/files/12345")
    assert (missing.status_code, missing.content) == (404, b"")
    assert (await client.request(method, "/files/7a")).status_code == 400
    assert (await client.request(method, "/files/")).status_code == 400
    assert (await client.request(method, "/other")).status_code == 404


async def test_a_malformed_request_is_400(node: StorageNode) -> None:
    assert (await raw(node, "what?\r\n\r\n")).startswith(b"HTTP/1.1 400 ")


async def test_an_idle_connection_is_closed() -> None:
    async with StorageNode([bytes_object("7", b"abc")], keep_alive_seconds=0.1).run() as node:
        started = time.monotonic()
        answer = await raw(node, GET)
        assert body_of(answer) == b"abc"
        assert time.monotonic() - started >= 0.1


async def test_the_log_records_requests_and_sent_bytes(node: StorageNode, client: httpx.AsyncClient) -> None:
    await client.get("/files/7", headers={"Range": "bytes=10-19", "X-Request-Id": "r1"})
    await client.head("/files/7")
    await node.requests.wait_for(lambda log: len(log) == 2 and all(record.finished for record in log))
    first, second = node.requests
    assert (first.method, first.path, first.range, first.status) == (
        "GET",
        "/api/v1/files/7",
        "bytes=10-19",
        206,
    )
    assert first.headers["x-request-id"] == "r1"
    assert (first.bytes_sent, first.aborted) == (10, False)
    assert first.first_byte_at is not None
    assert first.finished_at is not None
    assert first.started_at <= first.first_byte_at <= first.finished_at
    assert (second.method, second.bytes_sent, second.connection) == ("HEAD", 0, first.connection)
    assert [record.method for record in node.requests.of("7", "GET")] == ["GET"]


async def test_a_client_that_leaves_is_logged_as_aborted(
    node: StorageNode, client: httpx.AsyncClient
) -> None:
    async with client.stream("GET", "/files/64") as answer:
        await anext(answer.aiter_raw())
    await node.requests.wait_for(lambda log: log[0].finished)
    assert node.requests[0].aborted
    assert node.requests[0].bytes_sent < 64 * 1024 * 1024


async def test_latency_before_headers_and_body(node: StorageNode, client: httpx.AsyncClient) -> None:
    node.faults.add(Fault(latency_before_headers=0.15, latency_before_body=1.0))
    started = time.monotonic()
    async with client.stream("GET", "/files/7") as answer:
        headers_at = time.monotonic() - started
        body = b"".join([piece async for piece in answer.aiter_raw()])
    assert body == DATA
    assert headers_at >= 0.15
    assert time.monotonic() - started - headers_at >= 0.5


async def test_a_rate_limit_is_smooth(node: StorageNode, client: httpx.AsyncClient) -> None:
    node.faults.add(Fault(bytes_per_second=200_000))
    started = time.monotonic()
    pieces = []
    async with client.stream("GET", "/files/7") as answer:
        async for piece in answer.aiter_raw():
            pieces.append(piece)  # noqa: PERF401  (each piece's size is the point)
    assert b"".join(pieces) == DATA
    assert time.monotonic() - started >= 0.4
    assert max(len(piece) for piece in pieces) <= 40_000


async def test_a_drip_begins_after_a_fast_start(node: StorageNode, client: httpx.AsyncClient) -> None:
    node.faults.add(Fault(drip_bytes_per_second=20, drip_after=90_000))
    received, started = bytearray(), time.monotonic()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(collect(client, received), 2)
    assert 90_001 <= len(received) <= 90_001 + 20 * (time.monotonic() - started)
    assert received == DATA[: len(received)]


@pytest.mark.parametrize("after", [0, 1, 50_000, 99_999])
async def test_an_abort_comes_after_the_exact_byte_count(node: StorageNode, after: int) -> None:
    node.faults.add(Fault(cut_after=after))
    answer = await raw(node, GET)
    assert b"Content-Length: 100000\r\n" in answer
    assert body_of(answer) == DATA[:after]
    assert node.requests[0].aborted


async def test_an_abort_can_be_a_reset(node: StorageNode) -> None:
    node.faults.add(Fault(cut_after=1000, cut_by_reset=True))
    with pytest.raises(ConnectionResetError):
        await raw(node, GET)


async def test_a_flipped_byte_is_wrong_in_whole_and_ranged_answers(
    node: StorageNode, client: httpx.AsyncClient
) -> None:
    node.faults.add(Fault(flip_byte_at=500))
    wrong = DATA[:500] + bytes([DATA[500] ^ 0xFF]) + DATA[501:]
    assert (await client.get("/files/7")).content == wrong
    assert (await client.get("/files/7", headers={"Range": "bytes=490-509"})).content == wrong[490:510]
    assert (await client.get("/files/7", headers={"Range": "bytes=501-"})).content == DATA[501:]


async def test_bytes_flipped_from_an_offset(node: StorageNode, client: httpx.AsyncClient) -> None:
    node.faults.add(Fault(flip_bytes_from=99_990))
    wrong = DATA[:99_990] + bytes(value ^ 0xFF for value in DATA[99_990:])
    assert (await client.get("/files/7")).content == wrong


@pytest.mark.parametrize("delta", [-10, 10])
async def test_a_wrong_content_length(node: StorageNode, client: httpx.AsyncClient, delta: int) -> None:
    node.faults.add(Fault(content_length_delta=delta))
    answer = await raw(node, GET)
    assert f"Content-Length: {100_000 + delta}\r\n".encode() in answer
    assert body_of(answer) == DATA
    assert (await client.head("/files/7")).headers["content-length"] == str(100_000 + delta)


@pytest.mark.parametrize("delta", [-10, 10])
async def test_a_wrong_body_length(node: StorageNode, delta: int) -> None:
    node.faults.add(Fault(body_delta=delta))
    answer = await raw(node, GET)
    assert b"Content-Length: 100000\r\n" in answer
    assert body_of(answer) == (DATA + bytes(10))[: 100_000 + delta]


async def test_a_consistent_wrong_size_is_valid_http(node: StorageNode, client: httpx.AsyncClient) -> None:
    node.faults.add(Fault(body_delta=5, content_length_delta=5))
    assert (await client.get("/files/7")).content == DATA + bytes(5)


async def test_an_endless_body(node: StorageNode, client: httpx.AsyncClient) -> None:
    node.faults.add(Fault(endless_body=True))
    received = 0
    async with client.stream("GET", "/files/7") as answer:
        assert "content-length" not in answer.headers
        async for piece in answer.aiter_raw():
            received += len(piece)
            if received > 5_000_000:
                break
    await node.requests.wait_for(lambda log: log[0].finished)
    assert node.requests[0].aborted


async def test_hanging_before_headers_ends_when_the_client_leaves(
    node: StorageNode, client: httpx.AsyncClient
) -> None:
    node.faults.add(Fault(hang_before_headers=True))
    with pytest.raises(httpx.ReadTimeout):
        await client.get("/files/7", timeout=0.5)
    await node.requests.wait_for(lambda log: log[0].finished)
    assert (node.requests[0].status, node.requests[0].aborted) == (None, True)


async def test_hanging_after_some_bytes(node: StorageNode, client: httpx.AsyncClient) -> None:
    node.faults.add(Fault(hang_after=1234))
    received = bytearray()
    with pytest.raises(httpx.ReadTimeout):
        await collect(client, received, timeout=1)
    assert received == DATA[:1234]


@pytest.mark.parametrize("status", [403, 404, 500, 503])
async def test_an_error_status(node: StorageNode, client: httpx.AsyncClient, status: int) -> None:
    node.faults.add(Fault(status=status))
    answer = await client.get("/files/7")
    assert (answer.status_code, answer.json()["type"]) == (status, "scripted")


async def test_a_redirect(node: StorageNode, client: httpx.AsyncClient) -> None:
    node.faults.add(Fault(redirect_to="http://127.0.0.1:9/x"))
    answer = await client.get("/files/7")
    assert (answer.status_code, answer.headers["location"]) == (302, "http://127.0.0.1:9/x")


async def test_gzip_whatever_the_client_accepts(node: StorageNode, client: httpx.AsyncClient) -> None:
    node.faults.add(Fault(gzip=True))
    async with client.stream("GET", "/files/7") as answer:
        packed = b"".join([piece async for piece in answer.aiter_raw()])
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.headers["content-length"] == str(len(packed))
    assert gzip.decompress(packed) == DATA


async def test_no_content_length(node: StorageNode) -> None:
    node.faults.add(Fault(omit_content_length=True))
    answer = await raw(node, GET)
    assert b"content-length" not in answer.partition(b"\r\n\r\n")[0].lower()
    assert body_of(answer) == DATA


async def test_a_range_ignored(node: StorageNode, client: httpx.AsyncClient) -> None:
    node.faults.add(Fault(ignore_range=True))
    answer = await client.get("/files/7", headers={"Range": "bytes=5-9"})
    assert (answer.status_code, answer.content) == (200, DATA)
    assert "content-range" not in answer.headers


async def test_a_reused_connection_is_closed_without_an_answer(
    node: StorageNode, client: httpx.AsyncClient
) -> None:
    node.faults.add(Fault(close_reused_connection=True))
    assert (await client.get("/files/7")).status_code == 200
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        await client.get("/files/7")
    assert (await client.get("/files/7")).status_code == 200
    assert [record.connection for record in node.requests] == [1, 1, 2]


async def test_headers_set_and_dropped(node: StorageNode, client: httpx.AsyncClient) -> None:
    node.faults.add(Fault(headers=(("etag", '"strong"'), ("Content-Type", None))))
    answer = await client.get("/files/7")
    assert answer.headers.get_list("etag") == ['"strong"']
    assert "content-type" not in answer.headers


async def test_rules_select_by_object_endpoint_and_count(
    node: StorageNode, client: httpx.AsyncClient
) -> None:
    node.faults.add(Fault(status=500), Match(object_id="7", first=1))
    node.faults.add(Fault(status=503), Match(endpoint="version"))
    node.faults.add(Fault(status=403), Match(ranged=True))
    statuses = [
        (await client.get("/files/7")).status_code,
        (await client.get("/files/7")).status_code,
        (await client.get("/version")).status_code,
        (await client.get("/files/7", headers={"Range": "bytes=0-0"})).status_code,
    ]
    assert statuses == [500, 200, 503, 403]


async def test_faults_and_log_over_http(node: StorageNode, client: httpx.AsyncClient) -> None:
    rules = {"rules": [{"match": {"object_id": "7"}, "fault": {"status": 503}}]}
    changed = await client.put(f"{node.url}/faults", json=rules)
    assert changed.json() == {"rules": [rules["rules"][0] | {"seen": 0}]}
    assert (await client.get("/files/7")).status_code == 503
    log = (await client.get(f"{node.url}/requests")).json()["requests"]
    assert [(record["path"], record["status"]) for record in log] == [("/api/v1/files/7", 503)]
    refused = await client.put(f"{node.url}/faults", json={"rules": [{"fault": {"x": 1}}]})
    assert (refused.status_code, refused.json()["message"]) == (400, "fault has no x")
    assert (await client.get(f"{node.url}/faults")).json()["rules"][0]["seen"] == 1
    assert (await client.delete(f"{node.url}/requests")).json() == {"requests": []}


async def test_stopping_aborts_open_connections() -> None:
    async with StorageNode([bytes_object("7", DATA)]).run() as node:
        node.faults.add(Fault(hang_after=10))
        asked = asyncio.create_task(raw(node, GET))
        await node.requests.wait_for(lambda log: len(log) == 1 and log[0].bytes_sent == 10)
        assert node.open_connections == 1
    assert body_of(await asked) in (b"", DATA[:10])


async def test_the_page_and_its_description() -> None:
    objects = demo_objects(DEMO_DIRECTORY / "media")
    site = Site(DEMO_DIRECTORY / "page" / "index.html", "http://127.0.0.1:1234/", tuple(objects))
    async with StorageNode(objects, site=site).run() as node, httpx.AsyncClient(base_url=node.url) as client:
        page = await client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "<!doctype html>" in page.text
        described = (await client.get("/demo.json")).json()
        assert described["node_url"] == "http://127.0.0.1:1234"
        listed = {item["id"]: item for item in described["objects"]}
        assert listed["5"]["subtitles"] == "6"
        assert not listed["901"]["accepted"]
        assert (await client.get("/api/v1/files/901")).status_code == 404
        film = (await client.get("/api/v1/files/5")).content
        assert film == (DEMO_DIRECTORY / "media" / "5-day.mp4").read_bytes()


class OneScene:
    """A story with one scene."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def document(self) -> dict[str, Any]:
        return {"begun": self.begun}

    def begin(self, scene: str) -> bool:
        if scene == "cut":
            self.begun.append(scene)
        return scene == "cut"


async def test_the_page_s_files_and_its_story() -> None:
    story = OneScene()
    page = DEMO_DIRECTORY / "page" / "index.html"
    told = Site(page, "http://127.0.0.1:1", (), "http://127.0.0.1:2/", story)
    async with StorageNode([], site=told).run() as node, httpx.AsyncClient(base_url=node.url) as client:
        worker = await client.get("/worker.js")
        assert worker.headers["content-type"] == "text/javascript; charset=utf-8"
        assert worker.content == page.with_name("worker.js").read_bytes()
        described = (await client.get("/demo.json")).json()
        assert (described["has_story"], described["dashboard_url"]) == (True, "http://127.0.0.1:2/")
        # A page of another origin can POST, but not PUT.
        answers = [
            await client.post("/story/cut"),
            await client.put("/story/none"),
            await client.get("/story/cut"),
        ]
        assert [answer.status_code for answer in answers] == [405, 404, 405]
        assert story.begun == []
        assert (await client.put("/story/cut")).json() == {"begun": ["cut"]}
        assert (await client.get("/story.json")).json() == {"begun": ["cut"]}
    untold = Site(page, "http://127.0.0.1:1", ())
    async with StorageNode([], site=untold).run() as node, httpx.AsyncClient(base_url=node.url) as client:
        assert not (await client.get("/demo.json")).json()["has_story"]
        assert (await client.get("/story.json")).status_code == 404
        assert (await client.put("/story/cut")).status_code in (404, 405)
