"""Hits: answered from the volume alone, byte for byte."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from email.utils import formatdate
from pathlib import Path

import pytest

from distributor_node.shared.adapters.volume import RemovalState
from distributor_node.shared.domain.objects import ObjectId
from tests.end_to_end.client import Answer, read_answer
from tests.integration.assets_harness import MIB, STORED_AT, AssetsHarness, assets_harness
from tests.waiting import eventually

SMALL, LARGE = 10_000, 3 * MIB + 17


@pytest.fixture(params=[True, False], ids=["fast path", "framework"])
async def harness(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[AssetsHarness]:
    async with assets_harness(tmp_path, fast_lane=request.param) as running:
        for object_id, size in (("1", SMALL), ("2", LARGE)):
            running.add(object_id, size)
            running.store(object_id)
        yield running


@pytest.mark.parametrize("object_id", ["1", "2"])
async def test_a_hit_is_the_object_with_the_contracts_headers(harness: AssetsHarness, object_id: str) -> None:
    answer = await harness.get(object_id)
    assert (answer.status, answer.body, answer.complete) == (200, harness.data[object_id], True)
    expected = {
        "x-cache": "hit",
        "x-data-source": "local",
        "cache-control": "public, max-age=31536000, immutable",
        "content-type": "image/png",
        "content-length": str(len(harness.data[object_id])),
        "etag": harness.catalog.objects[object_id].etag,
        "last-modified": formatdate(STORED_AT, usegmt=True),
        "accept-ranges": "bytes",
        "content-disposition": f'inline; filename="{object_id}.png"',
        "access-control-allow-origin": "*",
        "timing-allow-origin": "*",
        "x-content-type-options": "nosniff",
        "cache-status": "distributor; hit",
    }
    assert {name: answer.headers.get(name) for name in expected} == expected
    assert "transfer-encoding" not in answer.headers


async def test_a_hit_needs_only_the_volume(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, state_down=True, queue_down=True) as harness:
        data = harness.add("1", LARGE)
        harness.store("1")
        harness.catalog.down = True
        await harness.node.drop_connections()
        answer = await harness.get("1")
        assert (answer.status, answer.body) == (200, data)
        assert harness.catalog.asked == 0


@pytest.mark.parametrize(
    ("header", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=5-104", 5, 104),
        ("bytes=100-", 100, LARGE - 1),
        ("bytes=-70000", LARGE - 70_000, LARGE - 1),
        ("bytes=-99999999", 0, LARGE - 1),
        (f"bytes=1000-{LARGE + 5}", 1000, LARGE - 1),
    ],
)
async def test_ranges(harness: AssetsHarness, header: str, first: int, last: int) -> None:
    answer = await harness.get("2", {"Range": header})
    assert answer.status == 206
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{LARGE}"
    assert answer.headers["content-length"] == str(last - first + 1)
    assert answer.body == harness.data["2"][first : last + 1]


@pytest.mark.parametrize("header", ["bytes=100-50", "bytes=a-b", "lines=0-1", "bytes=0-1,5-6", "bytes="])
async def test_ranges_that_are_ignored(harness: AssetsHarness, header: str) -> None:
    answer = await harness.get("1", {"Range": header})
    assert (answer.status, answer.body) == (200, harness.data["1"])


async def test_an_unsatisfiable_range(harness: AssetsHarness) -> None:
    answer = await harness.get("1", {"Range": f"bytes={SMALL}-"})
    assert answer.status == 416
    assert answer.headers["content-range"] == f"bytes */{SMALL}"
    assert answer.headers["cache-control"] == "no-store"
    assert set(answer.json()) == {"type", "message"}


async def test_conditions(harness: AssetsHarness) -> None:
    etag, date = harness.catalog.objects["1"].etag or "", formatdate(STORED_AT, usegmt=True)
    for headers, status in (
        ({"If-None-Match": etag}, 304),
        ({"If-None-Match": f'"other", W/{etag}'}, 304),
        ({"If-None-Match": '"other"'}, 200),
        ({"If-Modified-Since": date}, 304),
        ({"If-Match": '"other"'}, 412),
        ({"If-Match": "*"}, 200),
        ({"If-Unmodified-Since": formatdate(STORED_AT - 9, usegmt=True)}, 412),
        ({"Range": "bytes=0-1", "If-Range": etag}, 206),
        ({"Range": "bytes=0-1", "If-Range": f"W/{etag}"}, 200),
        ({"Range": "bytes=0-1", "If-Range": date}, 206),
        ({"Range": "bytes=0-1", "If-Range": '"other"'}, 200),
        ({"Range": "bytes=99999-", "If-None-Match": etag}, 304),
    ):
        answer = await harness.get("1", headers)
        assert (headers, answer.status) == (headers, status)
        if status == 304:
            assert "content-length" not in answer.headers
            assert "content-type" not in answer.headers
            assert answer.headers["etag"] == etag


async def test_no_stray_bytes_on_a_connection_that_is_kept(harness: AssetsHarness) -> None:
    """HEAD, 304, 416, 412, ranges, small and large bodies, one after the other on one connection."""
    etag = harness.catalog.objects["1"].etag
    steps = [
        ("HEAD", "1", "", 200, b""),
        ("GET", "1", "", 200, harness.data["1"]),
        ("GET", "1", f"If-None-Match: {etag}\r\n", 304, b""),
        ("HEAD", "2", f"If-None-Match: {etag}\r\n", 200, b""),
        ("GET", "2", "Range: bytes=1000000-2000000\r\n", 206, harness.data["2"][1_000_000:2_000_001]),
        ("HEAD", "2", "Range: bytes=1-2\r\n", 200, b""),
        ("GET", "2", "", 200, harness.data["2"]),
        ("HEAD", "1", 'If-Match: "x"\r\n', 412, b""),
        ("GET", "1", "Range: bytes=-1\r\n", 206, harness.data["1"][-1:]),
    ]
    reader, writer = await harness.connect()
    async with asyncio.timeout(60):
        for method, object_id, extra, status, body in steps:
            writer.write(f"{method} /api/v1/assets/{object_id} HTTP/1.1\r\nHost: a\r\n{extra}\r\n".encode())
            answer = await read_answer(reader, time.monotonic(), head_only=method == "HEAD")
            assert (method, extra, answer.status) == (method, extra, status)
            assert answer.body == body
            assert answer.complete
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert (await read_answer(reader, time.monotonic())).status == 200
        assert await reader.read() == b""


async def test_a_truncated_file_is_not_a_hit(harness: AssetsHarness) -> None:
    path = harness.store("2")
    with path.open("r+b") as file:
        file.truncate(LARGE - 1)
    answer = await harness.get("2")
    assert (answer.status, answer.body) == (200, harness.data["2"])
    assert answer.headers["x-cache"] == "miss"
    assert await harness.jobs() == 1


async def test_a_file_truncated_while_it_is_sent_is_never_padded(tmp_path: Path) -> None:
    async with assets_harness(tmp_path) as harness:
        harness.add("5", 40 * MIB)
        path = harness.store("5")
        reader, writer = await harness.connect()
        writer.write(b"GET /api/v1/assets/5 HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        with path.open("r+b") as file:
            file.truncate(20 * MIB)
        async with asyncio.timeout(60):
            answer = b"".join([piece async for piece in _pieces(reader)])
        assert len(answer) < 40 * MIB
        assert harness.data["5"].startswith(answer)


@pytest.mark.parametrize("object_id", ["1", "2"])
async def test_a_response_without_body_records_no_access(harness: AssetsHarness, object_id: str) -> None:
    """HEAD and 304: no access is counted, and the object is not in use, nor kept in use."""
    etag = harness.catalog.objects[object_id].etag
    reader, writer = await harness.connect()

    async def ask(method: str, more: str = "") -> Answer:
        writer.write(f"{method} /api/v1/assets/{object_id} HTTP/1.1\r\nHost: a\r\n{more}\r\n".encode())
        return await read_answer(reader, time.monotonic(), head_only=method == "HEAD")

    async def ask_for_nothing() -> None:
        answer = await ask("HEAD")
        assert (answer.status, answer.headers["content-length"]) == (200, str(len(harness.data[object_id])))
        assert "x-data-source" not in answer.headers
        assert (await ask("GET", f"If-None-Match: {etag}\r\n")).status == 304

    await ask_for_nothing()
    assert _is_free(harness, object_id)
    await harness.context.accesses.flush()
    assert (await harness.context.state.read_accesses("", 10))[1] == []
    assert (await ask("GET")).body == harness.data[object_id]

    async def is_free() -> bool:
        await ask_for_nothing()
        return _is_free(harness, object_id)

    await eventually(is_free, pause=0.1)
    await harness.context.accesses.flush()
    counted = (await harness.context.state.read_accesses("", 10))[1]
    assert [(access.object_id, access.views) for access in counted] == [(object_id, 1)]


async def test_a_client_that_leaves_leaves_nothing_open(tmp_path: Path) -> None:
    async with assets_harness(tmp_path) as harness:
        harness.add("5", 40 * MIB)
        harness.store("5")
        before = harness.open_files()
        for _ in range(5):
            reader, writer = await harness.connect()
            writer.write(b"GET /api/v1/assets/5 HTTP/1.1\r\nHost: a\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            assert harness.open_files() > before
            writer.transport.abort()
        await eventually(lambda: harness.open_files() <= before)


async def test_a_paused_client_is_kept_until_the_stall_limit(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, send_stall_limit=4.0) as harness:
        data = harness.add("5", 40 * MIB)
        harness.store("5")
        reader, writer = await harness.connect()
        writer.write(b"GET /api/v1/assets/5 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        received = bytearray()
        for _ in range(3):
            await asyncio.sleep(1.5)
            received += await reader.readexactly(4 * MIB)
        received += await reader.read(-1)
        assert received == data


async def test_an_object_that_is_being_removed_is_not_begun(harness: AssetsHarness) -> None:
    removal = harness.volume.removal(ObjectId("2"))
    assert removal.begin() is RemovalState.READY
    try:
        answer = await harness.get("2")
    finally:
        removal.close()
    assert (answer.status, answer.complete, answer.body) == (200, True, harness.data["2"])
    assert answer.headers["x-data-source"] == "external"
    assert (await harness.get("2")).headers["x-cache"] == "hit"


def _is_free(harness: AssetsHarness, object_id: str) -> bool:
    removal = harness.volume.removal(ObjectId(object_id))
    try:
        return removal.begin() is RemovalState.READY
    finally:
        removal.close()


async def _pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(MIB):
        yield piece


@pytest.mark.parametrize("fast_lane", [True, False])
async def test_a_request_on_an_idle_connection_at_a_stop_is_answered(
    tmp_path: Path, *, fast_lane: bool
) -> None:
    asks = b"GET /api/v1/assets/1 HTTP/1.1\r\nHost: a\r\n\r\n"
    async with assets_harness(tmp_path, fast_lane=fast_lane) as harness:
        harness.add("1", 10_000)
        harness.store("1")
        (silent, _), (reader, writer), *both_used = [await harness.connect() for _ in range(4)]
        for used, used_writer in both_used:
            used_writer.write(asks)
            await used.readuntil(b"\r\n\r\n")
            assert await used.readexactly(10_000) == harness.data["1"]
        (used, used_writer), (used_and_silent, _) = both_used
        harness.stop.set()
        await asyncio.sleep(0.2)  # the stop has begun: what is asked now may have been on its way
        for asking, answers in ((writer, reader), (used_writer, used)):
            asking.write(asks)
            answer = await answers.read()
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"connection: close" in answer.lower()
            assert answer.endswith(harness.data["1"])
        assert await silent.read() == b""
        assert await used_and_silent.read() == b""
