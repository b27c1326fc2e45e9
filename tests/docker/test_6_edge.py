"""nginx in front: what it forwards, what it keeps, and that its responses equal those of the API."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import ssl

import pytest

from tests.docker.conftest import CONNECTIONS_PER_ADDRESS
from tests.docker.edge import NAMES, REQUESTS, assert_same, told
from tests.docker.harness import ENDLESS, GROWING, RELOADED, Harness
from tests.end_to_end.client import Answer, get

pytestmark = pytest.mark.docker

MIB = 1024**2


async def test_the_prefix_is_stripped_and_only_the_api_is_there(harness: Harness) -> None:
    assert (await get(harness.stack.edge_url("/api/v1/status"))).json()["id"] == "distributor-node"
    outside = harness.stack.edge_url("").removesuffix(harness.stack.settings["EDGE_PREFIX"])
    prefix = harness.stack.settings["EDGE_PREFIX"]
    for path in (
        "/api/v1/status",
        "/metrics",
        f"{prefix}/metrics",
        f"{prefix}/healthz",
        f"{prefix}/readyz",
        f"{prefix}/api/v1/../../metrics",
        f"{prefix}/api/v1/..%2f..%2fmetrics",
        "/_objects/00/1",
        f"{prefix}/_objects/00/1",
    ):
        answer = await get(outside + path)
        assert answer.status == 404, path
        assert answer.headers["content-type"] == "application/json", path
        assert b"distributor_" not in answer.body


@pytest.mark.parametrize("headers", REQUESTS, ids=NAMES)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_hit_through_the_edge_is_identical(
    harness: Harness, method: str, headers: dict[str, str]
) -> None:
    await assert_same(harness, method, headers)


@pytest.mark.parametrize("object_id", ["901", "nothing", "no%20id", "5/6"])
async def test_errors_through_the_edge_are_the_same(harness: Harness, object_id: str) -> None:
    direct = await get(harness.stack.url(object_id))
    through = await get(harness.stack.edge_url(f"/api/v1/assets/{object_id}"))
    assert (through.status, through.body) == (direct.status, direct.body)
    assert told(through) == told(direct)


async def test_a_growing_file_is_streamed_as_it_grows(harness: Harness) -> None:
    harness.slow_down(2 * MIB, GROWING)
    assert await harness.cache_result(GROWING) == "miss"
    answer = await get(harness.stack.edge_url(f"/api/v1/assets/{GROWING}"), timeout=90)
    assert harness.right(answer, GROWING)
    assert answer.headers["x-cache"] == "miss"
    assert answer.took > 10
    assert answer.first_byte_after < answer.took / 4
    halfway = next(at for at, received in _sums(answer) if received > len(answer.body) / 2)
    assert 0.3 < halfway / answer.took < 0.7


async def test_a_reload_cuts_no_answer(harness: Harness) -> None:
    """As after each renewal of a certificate."""
    harness.slow_down(4 * MIB, RELOADED)
    growing = asyncio.create_task(get(harness.stack.edge_url(f"/api/v1/assets/{RELOADED}"), timeout=90))
    await asyncio.sleep(2)
    await asyncio.to_thread(harness.stack.exec, "edge", "nginx", "-s", "reload")
    assert (await get(harness.stack.edge_url("/api/v1/status"))).status == 200
    assert not growing.done()
    assert harness.right(await growing, RELOADED)


def _sums(answer: Answer) -> list[tuple[float, int]]:
    received, sums = 0, []
    for at, size in answer.pieces:
        received += size
        sums.append((at, received))
    return sums


async def test_one_address_gets_so_many_answers_at_once(harness: Harness) -> None:
    harness.slow_down(200_000, ENDLESS)
    url = harness.stack.edge_url(f"/api/v1/assets/{ENDLESS}")
    host, _, path = url.removeprefix("http://").partition("/")
    async with contextlib.AsyncExitStack() as stack:

        async def begin() -> bytes:
            reader, writer = await asyncio.open_connection(*host.split(":"), limit=64 * 1024)
            stack.callback(_end, writer)
            writer.write(f"GET /{path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            return (await reader.readuntil(b"\r\n")).split()[1]

        statuses = [await begin() for _ in range(CONNECTIONS_PER_ADDRESS + 6)]
        assert statuses.count(b"200") == CONNECTIONS_PER_ADDRESS
        refused = await get(url)
        assert refused.status == 429
        assert refused.json()["type"] == "too_many_connections"
        assert refused.headers["cache-control"] == "no-store"
    await harness.until_answered(url, 206, {"Range": "bytes=0-9"})


def _end(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def test_tls(harness: Harness) -> None:
    await harness.cached(["5"])

    def ask() -> tuple[int, list[str | None], bytes]:
        context = ssl.create_default_context(
            cafile=harness.stack.settings["EDGE_TLS_DIRECTORY"] + "/certificate.pem"
        )
        context.check_hostname = False  # the certificate is for an address
        connection = http.client.HTTPSConnection(
            "127.0.0.1", harness.stack.ports["EDGE_TLS_PORT"], context=context, timeout=20
        )
        with contextlib.closing(connection):
            connection.request("GET", harness.stack.settings["EDGE_PREFIX"] + "/api/v1/assets/5")
            answer = connection.getresponse()
            names = ("X-Cache", "Strict-Transport-Security", "Alt-Svc")
            return answer.status, [answer.getheader(name) for name in names], answer.read()

    told = ["hit", "max-age=31536000", f'h3=":{harness.stack.ports["EDGE_TLS_PORT"]}"; ma=86400']
    assert await asyncio.to_thread(ask) == (200, told, harness.body_of("5"))
