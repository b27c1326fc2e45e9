"""The API on a real port: malformed requests, methods, time limits, shutdown."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from sanic import HTTPResponse, Request

from distributor_node.services.api.health import MIN_FREE_BYTES, HealthChecks
from distributor_node.services.api.operator.commands import OperatorQueries
from distributor_node.services.api.status import UsageReader
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.conditionals import parse_http_date
from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.operator_state import OperatorState
from distributor_node.shared.domain.space import DeviceSpace
from distributor_node.shared.observability.probe_server import Readiness
from distributor_node.shared.ports.state_store import Granted, WorkerReport
from distributor_node.shared.runtime.process import VERSION
from tests.servers.api_fixture import FakeAssets, running_api

ERROR_HEADERS = (b"Cache-Control: no-store", b"Access-Control-Allow-Origin: *", b"application/json")


def split(answer: bytes) -> tuple[int, bytes, bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head, body


@pytest.mark.parametrize(
    "odd",
    [
        "..%2f..%2fetc",
        "%00",
        "%2e%2e",
        "../../etc/passwd",
        "/",
        "",
        "9" * 10_000,
        "%c0%af",
        "%ff",
        "%zz",
        "5#a",
    ],
)
async def test_malformed_ids_are_answered_alike(tmp_path: Path, odd: str) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        status, head, body = split(await api.get(f"/api/v1/assets/{odd}"))
        head_status, _, head_body = split(await api.get(f"/api/v1/assets/{odd}", "HEAD"))
    assert (status, head_status, head_body) == (400, 400, b"")
    assert json.loads(body) == {"type": "malformed_id", "message": "Malformed object id"}
    assert all(part in head for part in (*ERROR_HEADERS, b"X-Content-Type-Options: nosniff"))


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_raw_bytes_in_the_path_are_refused(tmp_path: Path, method: str) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        status, head, body = split(
            await api.ask(f"{method} /api/v1/assets/é HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        )
    assert status == 400
    assert b"Content-Security-Policy" in head
    assert bool(body) == (method == "GET")


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (b"NONSENSE\r\n\r\n", 400),
        (b"GET /healthz HTTP/7\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length : 3\r\nConnection: close\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nA: b\x00c\r\nConnection: close\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 900000\r\n\r\n", 413),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nExpect: tea\r\nContent-Length: 1\r\n\r\nx", 417),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\nB: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (b"GET /nothing HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 404),
        (b"GET http://a/healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 200),
        (b"GET //api/v1/assets/5 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 404),
        (b"GET nothing HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 404),
    ],
)
async def test_odd_requests(
    tmp_path: Path, request_bytes: bytes, expected: int, capfd: pytest.CaptureFixture[str]
) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        status, head, body = split(await api.ask(request_bytes))
        assert status == expected
        if status != 200:
            assert all(part in head for part in ERROR_HEADERS)
            assert set(json.loads(body)) == {"type", "message"}
        assert split(await api.get("/healthz"))[0] == 200
    assert_nothing_failed(capfd)


def assert_nothing_failed(capfd: pytest.CaptureFixture[str]) -> None:
    """Unconfigured structlog writes to standard output, Sanic and Python to standard error."""
    for written in capfd.readouterr():
        assert "Traceback" not in written
        assert "request_failed" not in written


async def test_the_log_of_an_unexpected_error_is_seen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        assert split(await api.get("/api/v1/assets/broken"))[0] == 500
    with pytest.raises(AssertionError):
        assert_nothing_failed(capfd)


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        (b"/" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"/ HTTP/1.1\r\nHost: a\r\nB: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (b"/healthz HTTP/7\r\n\r\n", 400),
    ],
)
async def test_an_unreadable_head_request_gets_no_body(tmp_path: Path, rest: bytes, expected: int) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        status, _, body = split(await api.ask(b"HEAD " + rest))
    assert (status, body) == (expected, b"")


async def test_every_answer_is_dated(tmp_path: Path) -> None:
    """RFC 9110 section 6.6.1."""
    began = int(time.time())
    asked = [
        ("GET", "/api/v1/status"),
        ("HEAD", "/healthz"),
        ("OPTIONS", "/api/v1/assets/5"),
        ("GET", "/nothing"),
    ]
    async with running_api(tmp_path, FakeAssets()) as api:
        answers = [await api.get(path, method) for method, path in [*asked, ("GET", "/api/v1/assets/5")]]
        answers.append(await api.ask(b"NONSENSE\r\n\r\n"))
    for answer in answers:
        dates = [line[6:].decode() for line in split(answer)[1].split(b"\r\n") if line.startswith(b"Date: ")]
        assert len(dates) == 1
        assert began <= (parse_http_date(dates[0]) or 0) <= time.time()


async def test_methods(tmp_path: Path) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        for path in ("/api/v1/assets/5", "/api/v1/status", "/healthz"):
            status, head, _ = split(await api.get(path, "POST"))
            assert (status, b"Allow: GET, HEAD, OPTIONS" in head) == (405, True)
            status, head, body = split(await api.get(path, "OPTIONS"))
            assert (status, body) == (204, b"")
            assert b"Access-Control-Allow-Headers: Range" in head
            assert split(await api.get(path, "HEAD"))[::2] == (200, b"")


async def test_request_id(tmp_path: Path) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        assert b"X-Request-ID: abc-1\r\n" in await api.get("/healthz", more="X-Request-ID: abc-1\r\n")
        assert b"evil" not in await api.get("/healthz", more="X-Request-ID: evil value\r\n")


async def test_small_body_of_a_get_is_ignored(tmp_path: Path) -> None:
    first = b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
    async with running_api(tmp_path, FakeAssets()) as api:
        answer = await api.ask(first + b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert answer.count(b"200 OK") == 2


async def test_unexpected_error_shows_nothing_of_itself(tmp_path: Path) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        status, _, body = split(await api.get("/api/v1/assets/broken"))
        assert (status, json.loads(body)["type"]) == (500, "internal_error")
        status, _, body = split(await api.get("/api/v1/assets/broken-midway"))
    assert status == 200
    assert 0 < len(body) < 1_000_000
    assert b"secret" not in body


@pytest.mark.parametrize(
    "partial", [b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"]
)
async def test_request_that_never_arrives(tmp_path: Path, partial: bytes) -> None:
    async with running_api(tmp_path, FakeAssets(), public_api={"request_timeout": 0.2}) as api:
        status, head, _ = split(await api.ask(partial))
    assert status == 408
    assert b"connection: close" in head


async def test_trickling_request_head_times_out(tmp_path: Path) -> None:
    async with running_api(tmp_path, FakeAssets(), public_api={"request_timeout": 0.3}) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.server.port)
        answer = asyncio.create_task(reader.readline())
        async with asyncio.timeout(60):
            while not answer.done():
                writer.write(b"G")
                await asyncio.wait({answer}, timeout=0.05)
        writer.close()
    assert b" 408 " in answer.result()


async def test_idle_connection_is_closed(tmp_path: Path) -> None:
    async with running_api(tmp_path, FakeAssets(), public_api={"keep_alive_timeout": 0.2}) as api:
        answer = await api.ask(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
    assert b"200 OK" in answer


async def test_paused_client_is_kept_until_the_stall_limit(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    limits = {"send_stall_limit": 1.0, "keep_alive_timeout": 0.2, "request_timeout": 0.2}
    async with running_api(tmp_path, FakeAssets(), public_api=limits) as api:
        with socket.create_connection(("127.0.0.1", api.server.port)) as client:
            client.sendall(b"GET /api/v1/assets/endless HTTP/1.1\r\nHost: a\r\n\r\n")
            started = loop.time()
            assert await loop.run_in_executor(None, client.recv, 10)
            assert await api.server.wait_disconnected(30)
            assert loop.time() - started >= 0.9


class LargeAsset:
    """Its response is written at once, and fits into no socket."""

    async def handle(self, request: Request, object_id: str) -> None:
        await request.respond(HTTPResponse(bytes(32 * 1024 * 1024), 200, {}, "video/mp4"))


async def test_a_client_that_closes_its_side_and_takes_nothing_is_disconnected(tmp_path: Path) -> None:
    """Its response is complete, and the end of it waits in the process."""
    async with running_api(tmp_path, LargeAsset(), public_api={"send_stall_limit": 1.0}) as api:
        loop = asyncio.get_running_loop()
        with socket.create_connection(("127.0.0.1", api.server.port)) as client:
            client.setblocking(False)
            await loop.sock_sendall(client, b"GET /api/v1/assets/any HTTP/1.1\r\nHost: a\r\n\r\n")
            await loop.sock_recv(client, 100)
            client.shutdown(socket.SHUT_WR)
            assert await api.server.wait_disconnected(20)


async def test_close_lets_responses_complete_and_can_reopen(tmp_path: Path) -> None:
    fake_assets = FakeAssets()
    async with running_api(tmp_path, fake_assets) as api:
        idle_reader, idle_writer = await asyncio.open_connection("127.0.0.1", api.server.port)
        asked = asyncio.create_task(api.ask(b"GET /api/v1/assets/waiting HTTP/1.1\r\nHost: a\r\n\r\n"))
        await fake_assets.entered.wait()
        closing = asyncio.create_task(api.server.close(5))
        assert await idle_reader.read() == b""
        idle_writer.close()
        with pytest.raises(OSError):
            await api.ask(b"")
        fake_assets.release.set()
        await closing
        assert (await asked).endswith(b"hello")
        port = api.server.port
        await api.server.open()
        assert api.server.port == port
        assert split(await api.get("/healthz"))[0] == 200


@pytest.mark.parametrize(
    "incomplete", [b"GET /healthz HTT", b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx"]
)
async def test_an_incomplete_request_of_a_client_that_closes_its_side(
    tmp_path: Path, incomplete: bytes
) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.server.port)
        writer.write(incomplete)
        writer.write_eof()
        async with asyncio.timeout(10):
            answer = await reader.read()
        writer.close()
    assert split(answer)[0] in (400, 404)


@pytest.mark.parametrize("line", [b"0x5", b" 5 ", b"5 ", b"5\r", b"+5", b"5_0", b"", b"5;a\x00"])
async def test_invalid_chunk_sizes_are_refused(tmp_path: Path, line: bytes) -> None:
    head = b"POST /api/v1/status HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    following = b"GET /api/v1/status HTTP/1.1\r\nHost: a\r\n\r\n"
    async with running_api(tmp_path, FakeAssets()) as api:
        answer = await api.ask(head + line + b"\r\nhello\r\n0\r\n\r\n" + following)
    assert (
        answer.count(b"HTTP/1.1 ") == 1
    )  # the connection is closed: where the next request begins is unknown


async def test_a_request_body_in_tiny_chunks_is_refused(tmp_path: Path) -> None:
    head = b"POST /api/v1/status HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    following = b"GET /api/v1/status HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    async with running_api(tmp_path, FakeAssets()) as api:
        for chunks, answers in ((200, 2), (5_000, 1)):
            body = b"1\r\nx\r\n" * chunks + b"0\r\n\r\n"
            assert (await api.ask(head + body + following)).count(b"HTTP/1.1 ") == answers


@pytest.mark.parametrize(
    ("version", "connection", "persists"),
    [
        ("1.1", "keepalive", True),
        ("1.1", "keep-alive, TE", True),
        ("1.1", "Upgrade", True),
        ("1.1", "keep-alive, Close", False),
        ("1.0", "TE, Keep-Alive", True),
        ("1.0", "keepalive", False),
    ],
)
async def test_connection_tokens(tmp_path: Path, version: str, connection: str, persists: bool) -> None:
    first = f"GET /api/v1/status HTTP/{version}\r\nHost: a\r\nConnection: {connection}\r\n\r\n"
    second = "GET /api/v1/status HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    async with running_api(tmp_path, FakeAssets()) as api:
        answer = await api.ask((first + second).encode())
    assert answer.count(b"HTTP/1.1 200") == (2 if persists else 1)


async def test_close_aborts_what_does_not_end(tmp_path: Path) -> None:
    fake_assets = FakeAssets()
    async with running_api(tmp_path, fake_assets) as api:
        asked = asyncio.create_task(api.ask(b"GET /api/v1/assets/waiting HTTP/1.1\r\nHost: a\r\n\r\n"))
        await fake_assets.entered.wait()
        await api.server.close(0.1)
        await asyncio.wait({asked})
        assert asked.exception() is not None or asked.result() == b""


async def test_status_and_buckets(tmp_path: Path) -> None:
    async with running_api(tmp_path, FakeAssets(), worker_id=4) as api:
        fields = json.loads(split(await api.get("/api/v1/status"))[2])
        assert json.loads(split(await api.get("/api/v1/buckets"))[2]) == {"allByWorkerId": 4}
    assert (fields["id"], fields["workerId"], fields["objectsInCache"]) == ("test-node", 4, 0)
    assert (fields["downloadsQueued"], fields["workersAlive"]) == (0, 0)
    assert (fields["version"], fields["nodeEnv"]) == (VERSION, "production")
    assert set(fields["queryNodeStatus"]) == {
        "url", "chainHead", "blocksProcessed", "packageVersion", "age", "chainHeadAge",
    }  # fmt: skip
    async with running_api(tmp_path, FakeAssets()) as api:
        assert json.loads(split(await api.get("/api/v1/buckets"))[2]) == {"bucketIds": ["0:1"]}
        assert "workerId" not in json.loads(split(await api.get("/api/v1/status"))[2])


async def test_status_counts_partial_objects(tmp_path: Path) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        state = api.context.state
        term = await state.lead("test", 60.0)
        assert term is not None
        await state.set_reconciled(term)
        for object_id, held in (("1", 700), ("2", 50)):
            granted = await state.begin(ObjectId(object_id), 5000, "worker")
            assert isinstance(granted, Granted)
            await state.park(granted.lease, held)
        fields = json.loads(split(await api.get("/api/v1/status"))[2])
        listed = await OperatorQueries(state, api.context.volume).cache(10, "")
    assert (fields["partialObjects"], fields["partialBytes"]) == (2, 750)
    assert (listed["partialObjects"], listed["partialBytes"], listed["total"]) == (2, 750, 0)


async def test_status_without_the_state_store(tmp_path: Path) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        state: Any = api.context.state
        state.usage = state.ping = state.problems = _unavailable  # the far end is gone
        assert split(await api.get("/api/v1/status"))[0] == 200
        readiness = await HealthChecks(api.context, UsageReader(api.context), lambda: True).readiness()
    assert readiness.problems == ()
    assert "state store: unavailable" in readiness.degraded


async def test_readiness_and_status_name_the_workers(tmp_path: Path) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        checks = HealthChecks(api.context, UsageReader(api.context), lambda: True)
        await api.context.fetch_capacity.refresh()
        assert await checks.readiness() == Readiness(problems=(), degraded=("fetchers: none alive",))
        await api.context.state.report_worker(WorkerReport("worker-1", 8, 0, 0, 0.0), 60)
        await api.context.fetch_capacity.refresh()
        assert await checks.readiness() == Readiness(problems=(), degraded=())
        assert json.loads(split(await api.get("/api/v1/status"))[2])["workersAlive"] == 1


async def _unavailable() -> None:
    raise StateStoreUnavailable("gone")


async def test_not_ready_without_the_volume(tmp_path: Path) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        (tmp_path / "volume").rename(tmp_path / "elsewhere")
        readiness = await HealthChecks(api.context, UsageReader(api.context), lambda: True).readiness()
    assert len(readiness.problems) == 1
    assert str(tmp_path / "volume") in readiness.problems[0]


async def test_a_full_device_makes_the_node_degraded_and_not_unready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hits are served, and misses are proxied."""
    monkeypatch.setattr(Volume, "device_space", lambda _: DeviceSpace(free_bytes=4096))
    async with running_api(tmp_path, FakeAssets()) as api:
        checks = HealthChecks(api.context, UsageReader(api.context), lambda: True)
        readiness = await checks.readiness()
        assert readiness.problems == ()
        assert "volume: its device is full: 4096 bytes are free" in readiness.degraded
        assert (await checks.dependencies())["volume"] == "volume: its device is full: 4096 bytes are free"
        monkeypatch.setattr(Volume, "device_space", lambda _: DeviceSpace(free_bytes=MIN_FREE_BYTES))
        assert not any("volume" in words for words in (await checks.readiness()).degraded)


async def test_readiness_tells_why_the_public_port_is_closed(tmp_path: Path) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        health = HealthChecks(api.context, UsageReader(api.context), lambda: api.server.is_open)
        assert (await health.readiness()).problems == ()
        await api.server.close(0)
        assert (await health.readiness()).problems == ("the public port is closed",)
        api.context.operator_state._set_current(OperatorState(version=1, stopped=True))
        assert (await health.readiness()).problems == ("stopped by an operator",)


@pytest.mark.parametrize("path", ["/readyz", "/metrics"])
async def test_the_public_port_tells_nothing_about_the_inside(tmp_path: Path, path: str) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        assert split(await api.get(path))[0] == 404


@pytest.mark.parametrize(
    "accept", ["text/html", "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"]
)
async def test_a_browser_is_told_what_this_address_is_and_nothing_of_the_node_s_state(
    tmp_path: Path, accept: str
) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        request = f"GET / HTTP/1.1\r\nHost: a\r\nAccept: {accept}\r\nConnection: close\r\n\r\n"
        status, head, body = split(await api.ask(request.encode()))
        node_id = api.context.settings.id
    assert status == 200
    assert b"\r\ncontent-type: text/html; charset=utf-8" in head.lower()
    assert b"Content-Security-Policy: default-src 'none'" in head
    assert b"Vary: Accept" in head
    assert body.count(b"<p>") == 1
    assert b'href="api/v1/openapi.json"' in body
    assert node_id.encode() not in body
    assert VERSION.encode() not in body


@pytest.mark.parametrize(
    ("method", "accept"), [("GET", "*/*"), ("GET", "application/json"), ("GET", None), ("POST", "text/html")]
)
async def test_programs_find_nothing_at_the_root(tmp_path: Path, method: str, accept: str | None) -> None:
    accepted = "" if accept is None else f"Accept: {accept}\r\n"
    async with running_api(tmp_path, FakeAssets()) as api:
        request = f"{method} / HTTP/1.1\r\nHost: a\r\n{accepted}Connection: close\r\n\r\n"
        status, head, body = split(await api.ask(request.encode()))
        _, _, elsewhere = split(await api.get("/nowhere"))
    assert (status, body) == (404, elsewhere)
    assert b"\r\ncontent-type: application/json" in head.lower()
    assert b"Cache-Control: no-store" in head
