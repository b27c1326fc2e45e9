"""Long bodies on the fast path: pipelined requests, disconnects, shutdown, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import distributor_node.services.api.fast_path.handler as building
from distributor_node.services.api.assets.decision import select_range
from distributor_node.services.api.fast_path.protocol import Connection, FileSender
from distributor_node.shared.adapters.volume import RemovalState
from distributor_node.shared.domain.conditionals import parse_http_date
from distributor_node.shared.domain.objects import ObjectId
from tests.compiled import needs_source
from tests.counters import counted
from tests.integration.assets_harness import KIB, MIB, AssetsHarness, assets_harness
from tests.waiting import eventually

LARGE = 12 * MIB + 5


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[AssetsHarness]:
    async with assets_harness(tmp_path) as running:
        for object_id, size in (("1", 10 * KIB), ("2", LARGE)):
            running.add(object_id, size)
            running.store(object_id)
        yield running


class ColdDisk:
    """The system's word for it that nothing lies in the page cache; reads wait for `free`, and the next `failing` of
    them fail."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()
        self.failing = self.reads = 0
        self._preadv = os.preadv

    def preadv(self, descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.reads += 1
        self.free.wait(10)
        if self.failing:
            self.failing -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._preadv(descriptor, buffers, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> ColdDisk:
    cold = ColdDisk()
    monkeypatch.setattr(os, "preadv", cold.preadv)
    return cold


def ask(object_id: str, more: str = "") -> bytes:
    return f"GET /api/v1/assets/{object_id} HTTP/1.1\r\nHost: a\r\n{more}\r\n".encode()


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head, await reader.readexactly(length)


@pytest.mark.parametrize("object_id", ["1", "2"])
@pytest.mark.parametrize("more", ["", "X-Sendfile-Type: none\r\n"])  # the fast path, Sanic's
async def test_a_client_that_closes_its_side_gets_all_answers(
    harness: AssetsHarness, object_id: str, more: str
) -> None:
    reader, writer = await harness.connect()
    writer.write(ask("2", more) + ask(object_id, more))
    writer.write_eof()
    async with asyncio.timeout(60):
        for answered in ("2", object_id):
            assert (await read_answer(reader))[1] == harness.data[answered]
        assert await reader.read() == b""
    writer.close()


async def test_a_miss_of_a_client_that_closes_its_side(harness: AssetsHarness) -> None:
    harness.add("3", 3 * MIB)
    reader, writer = await harness.connect()
    writer.write(ask("3"))
    writer.write_eof()
    async with asyncio.timeout(60):
        assert (await read_answer(reader))[1] == harness.data["3"]
        assert await reader.read() == b""
    writer.close()


async def test_a_reset_right_after_the_request_is_no_error(
    harness: AssetsHarness, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("sanic.error"), "handlers", [caplog.handler])
    for _ in range(10):  # without a turn of the loop between connect and reset
        with socket.create_connection(("127.0.0.1", harness.port)) as connection:
            connection.sendall(ask("1"))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert (await harness.get("1")).status == 200
    await asyncio.sleep(0)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_requests_sent_ahead_are_answered_after_a_long_body(harness: AssetsHarness) -> None:
    reader, writer = await harness.connect()
    writer.write(ask("2"))
    await reader.readuntil(b"\r\n\r\n")
    for more in (ask("1") + ask("1", "Range: bytes=5-9\r\n"), b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"):
        writer.write(more)
        await asyncio.sleep(0.01)
    assert await reader.readexactly(LARGE) == harness.data["2"]
    assert (await read_answer(reader))[1] == harness.data["1"]
    assert (await read_answer(reader))[1] == harness.data["1"][5:10]
    assert b"ok" in (await read_answer(reader))[1]
    writer.write(ask("1"))
    assert (await read_answer(reader))[1] == harness.data["1"]


@needs_source
async def test_a_repeated_condition_is_evaluated_once_for_each_object(
    harness: AssetsHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    etag = (await harness.get("1")).headers["etag"]
    evaluated: list[object] = []

    def select(*arguments: Any) -> Any:
        evaluated.append(arguments)
        return select_range(*arguments)

    monkeypatch.setattr(building, "select_range", select)
    for _ in range(5):
        assert (await harness.get("1", {"If-None-Match": etag})).status == 304
    assert len(evaluated) == 1
    for more in ({"Range": "bytes=5-9"}, {"Range": "bytes=90000-"}):
        assert (await harness.get("1", {"If-None-Match": etag, **more})).status == 304
    assert len(evaluated) == 1, "preconditions come first"
    for _ in range(2):
        assert (await harness.get("2", {"If-None-Match": etag})).status == 200
    assert len(evaluated) == 3, "another object's answer is its own"


@pytest.mark.parametrize("cold", [False, True])
async def test_a_slow_client_is_not_buffered_for(
    harness: AssetsHarness, request: pytest.FixtureRequest, cold: bool
) -> None:
    """The process holds at most one piece of the body per client, and serves other clients."""
    if cold:
        request.getfixturevalue("disk")
    first_reader, first_writer = await harness.connect()
    first_writer.write(ask("1"))
    assert (await read_answer(first_reader))[1] == harness.data["1"]
    tracemalloc.start()
    try:
        clients = [_idle_client(harness.port) for _ in range(5)]
        for client in clients:
            await asyncio.get_running_loop().sock_sendall(client, ask("2"))
        await eventually(lambda: _in_progress() >= len(clients))
        first_writer.write(ask("1"))
        assert (await read_answer(first_reader))[1] == harness.data["1"]
        assert tracemalloc.get_traced_memory()[1] < len(clients) * 2 * MIB
    finally:
        tracemalloc.stop()
    for client in clients:
        reader, writer = await asyncio.open_connection(sock=client)
        harness.writers.append(writer)
        assert (await read_answer(reader))[1] == harness.data["2"]


def _idle_client(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.setblocking(False)
    return client


def _in_progress() -> float:
    return counted("distributor_requests_in_progress")


async def test_a_client_of_hits_alone_has_no_task_of_the_framework(harness: AssetsHarness) -> None:
    def tasks() -> list[Any]:
        return [
            one for one in asyncio.all_tasks() if getattr(one.get_coro(), "__name__", "") == "connection_task"
        ]

    reader, writer = await harness.connect()
    for more, expected in (
        ("", 0),
        ("X-Sendfile-Type: none\r\n", 1),
        ("", 1),
    ):  # the fast path, Sanic's, the fast path
        writer.write(ask("1", more))
        assert (await read_answer(reader))[1] == harness.data["1"]
        assert len(tasks()) == expected
    writer.close()
    await eventually(lambda: not tasks())


async def test_a_connection_without_a_request_is_closed(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, keep_alive_timeout=0.2) as harness:
        reader, _ = await harness.connect()
        async with asyncio.timeout(10):
            assert not await reader.read()


async def test_an_idle_connection_is_closed_after_fast_answers(tmp_path: Path) -> None:
    """Neither while a client asks in time, nor while a body is sent, however long that takes."""
    async with assets_harness(tmp_path, keep_alive_timeout=1.5) as harness:
        for object_id, size in (("1", 10 * KIB), ("2", LARGE)):
            harness.add(object_id, size)
            harness.store(object_id)
        reader, writer = await harness.connect()
        for _ in range(4):
            writer.write(ask("1"))
            assert (await read_answer(reader))[1] == harness.data["1"]
            await asyncio.sleep(0.5)
        writer.write(ask("2"))
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(2.0)
        assert await reader.readexactly(LARGE) == harness.data["2"]
        writer.write(ask("1"))
        assert (await read_answer(reader))[1] == harness.data["1"]
        began = time.monotonic()
        assert await reader.read() == b""
        assert time.monotonic() - began > 1.4


async def test_a_stalled_client_is_disconnected_at_the_stall_limit(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, send_stall_limit=1.0, keep_alive_timeout=0.5) as harness:
        harness.add("2", LARGE)
        harness.store("2")
        before = counted("distributor_aborted_responses_total", reason="client_stalled")
        with _idle_client(harness.port) as client:
            began = time.monotonic()
            await asyncio.get_running_loop().sock_sendall(client, ask("2"))
            await eventually(
                lambda: counted("distributor_aborted_responses_total", reason="client_stalled") == before + 1
            )
            assert time.monotonic() - began >= 0.9
            await eventually(lambda: harness.open_files() == 0)


@pytest.mark.parametrize("fast_lane", [True, False])
async def test_a_stopped_api_lets_a_long_body_end(tmp_path: Path, *, fast_lane: bool) -> None:
    """As `stop-api` does it: the process goes on. The head of the answer had said that the connection stays."""
    async with assets_harness(tmp_path, fast_lane=fast_lane) as harness:
        for object_id, size in (("1", 10 * KIB), ("2", LARGE)):
            harness.add(object_id, size)
            harness.store(object_id)
        reader, writer = await harness.connect()
        writer.write(ask("2"))
        await reader.readuntil(b"\r\n\r\n")
        state, operator_state = harness.context.state, harness.context.operator_state
        assert await state.change_operator_state(
            operator_state.current.version, replace(operator_state.current, stopped=True)
        )
        async with asyncio.timeout(60):
            await operator_state.wait_until(lambda now: now.stopped)
        assert await reader.readexactly(LARGE) == harness.data["2"]
        writer.write(ask("1"))
        head, body = await read_answer(reader)
        assert b"connection: close" in head
        assert body == harness.data["1"]
        assert await reader.read() == b""


async def test_a_stop_answers_requests_sent_during_a_long_body(harness: AssetsHarness) -> None:
    reader, writer = await harness.connect()
    writer.write(ask("2"))
    await reader.readuntil(b"\r\n\r\n")
    writer.write(ask("1"))
    harness.stop.set()
    assert await reader.readexactly(LARGE) == harness.data["2"]
    head, body = await read_answer(reader)
    assert b"connection: close" in head
    assert body == harness.data["1"]
    assert await reader.read() == b""


async def test_a_stop_lets_a_long_body_end(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        harness = await stack.enter_async_context(assets_harness(tmp_path))
        data = harness.add("2", LARGE)
        harness.store("2")
        reader, writer = await asyncio.open_connection("127.0.0.1", harness.port)
        writer.write(ask("2"))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"200 OK" in head
        closing = asyncio.create_task(stack.aclose())
        await asyncio.sleep(0.1)
        body = bytearray()
        while piece := await reader.read(MIB):
            body += piece
        assert bytes(body) == data
        await closing
        writer.close()


async def test_a_client_disconnect_is_noticed_and_releases_the_object(harness: AssetsHarness) -> None:
    before = counted("distributor_aborted_responses_total", reason="client_disconnected")
    reader, writer = await harness.connect()
    writer.write(ask("2"))
    await reader.readexactly(1000)
    writer.transport.abort()
    await eventually(
        lambda: counted("distributor_aborted_responses_total", reason="client_disconnected") == before + 1
    )
    await eventually(lambda: harness.open_files() == 0)


async def test_a_client_that_leaves_with_all_bytes_has_not_disconnected_early(
    harness: AssetsHarness, disk: ColdDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may reset the connection before the task that sends the body has ended."""

    async def write(_: FileSender, connection: Connection, chunk: bytes) -> None:
        connection.transport.write(chunk)
        await asyncio.Event().wait()

    monkeypatch.setattr(FileSender, "_write", write)
    before = counted("distributor_aborted_responses_total", reason="client_disconnected")
    reader, writer = await harness.connect()
    writer.write(ask("1"))
    assert (await read_answer(reader))[1] == harness.data["1"]
    reset = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    writer.transport.abort()
    await eventually(lambda: counted("distributor_requests_in_progress") == 0)
    assert counted("distributor_aborted_responses_total", reason="client_disconnected") == before
    reader, writer = await harness.connect()
    writer.write(ask("2"))
    await reader.readuntil(b"\r\n\r\n")
    writer.transport.abort()
    await eventually(
        lambda: counted("distributor_aborted_responses_total", reason="client_disconnected") == before + 1
    )


async def test_a_file_truncated_while_it_is_sent_closes_the_connection(harness: AssetsHarness) -> None:
    before = counted("distributor_aborted_responses_total", reason="object_unreadable")
    reader, writer = await harness.connect()
    writer.write(ask("2"))
    await reader.readuntil(b"\r\n\r\n")
    os.truncate(next((harness.volume.root / "objects").glob("*/2")), MIB)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await reader.readexactly(LARGE)
    assert counted("distributor_aborted_responses_total", reason="object_unreadable") == before + 1


async def test_a_failing_disk_closes_the_connection(
    harness: AssetsHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what had been sent ahead, nor the rest of the body from elsewhere."""
    sendfile, calls = os.sendfile, 0

    def failing(*arguments: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sendfile(*arguments)

    before = [
        counted("distributor_aborted_responses_total", reason=why)
        for why in ("object_unreadable", "client_disconnected")
    ]
    monkeypatch.setattr(os, "sendfile", failing)
    reader, writer = await harness.connect()
    writer.write(ask("2"))
    await reader.readuntil(b"\r\n\r\n")
    writer.write(ask("1"))
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(MIB):
            received += piece
    assert len(received) < LARGE
    assert harness.data["2"].startswith(received)
    after = [
        counted("distributor_aborted_responses_total", reason=why)
        for why in ("object_unreadable", "client_disconnected")
    ]
    assert after == [before[0] + 1, before[1]]


@needs_source
async def test_an_unexpected_error_ends_the_connection(
    harness: AssetsHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: int) -> None:
        raise RuntimeError("secret details")

    before = counted("distributor_aborted_responses_total", reason="unexpected_error")
    monkeypatch.setattr(harness.context.accesses, "touch", failing)
    monkeypatch.setattr("distributor_node.services.api.accesses.ACCESS_RENEWAL_INTERVAL", 0.0)
    reader, writer = await harness.connect()
    writer.write(ask("2"))
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await read_answer(reader)
    assert counted("distributor_aborted_responses_total", reason="unexpected_error") == before + 1


async def test_each_client_gets_its_object_while_others_evict_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All requests arrive at once, so that each of them closes the object of the one before, whose descriptor the
    next one gets."""
    monkeypatch.setattr(building, "MAX_OPEN_FILES", 1)
    async with assets_harness(tmp_path) as harness:
        ids = [str(number) for number in range(1, 7)]
        for object_id in ids:
            harness.add(object_id, 3 * MIB)
            harness.store(object_id)
        connections = [await harness.connect() for _ in ids]
        for object_id, (_, writer) in zip(ids, connections, strict=True):
            connected: socket.socket = writer.get_extra_info("socket")
            os.write(connected.fileno(), ask(object_id))
        answers = await asyncio.gather(*(read_answer(reader) for reader, _ in connections))
        assert [
            body == harness.data[object_id] for object_id, (_, body) in zip(ids, answers, strict=True)
        ] == [True for _ in ids]
        await eventually(lambda: harness.open_files() <= 1)


async def test_short_ranges_are_whole_however_little_the_sockets_take(harness: AssetsHarness) -> None:
    """They pass through one buffer of the process; what a socket does not take then must not come from there."""
    clients = [_idle_client(harness.port) for _ in range(3)]
    length, asked = 64 * KIB, 100
    for number in range(asked):
        for place, client in enumerate(clients):
            first = (number * len(clients) + place) * 4099 + 1
            more = f"Range: bytes={first}-{first + length - 1}\r\n"
            await asyncio.get_running_loop().sock_sendall(client, ask("2", more))
            await asyncio.sleep(0.001)
    await eventually(lambda: _in_progress() >= len(clients))
    for place, client in enumerate(clients):
        reader, writer = await asyncio.open_connection(sock=client)
        harness.writers.append(writer)
        for number in range(asked):
            first = (number * len(clients) + place) * 4099 + 1
            head, body = await read_answer(reader)
            assert head.startswith(b"HTTP/1.1 206")
            assert body == harness.data["2"][first : first + length]


async def test_a_cold_object_is_read_and_sent(harness: AssetsHarness, disk: ColdDisk) -> None:
    reader, writer = await harness.connect()
    for object_id, more, first, end in (
        ("2", "", 0, LARGE),
        ("2", "Range: bytes=1000001-3000000\r\n", 1_000_001, 3_000_001),
        ("1", "", 0, 10 * KIB),
    ):
        writer.write(ask(object_id, more) + ask("1"))
        assert (await read_answer(reader))[1] == harness.data[object_id][first:end]
        assert (await read_answer(reader))[1] == harness.data["1"]
    assert disk.reads > LARGE // MIB


async def test_most_of_a_cold_object_is_sent_without_a_copy(
    harness: AssetsHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, preadv = 0, os.preadv

    def count(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        nonlocal copied
        got = preadv(descriptor, buffers, offset, flags)
        copied += 0 if flags & os.RWF_NOWAIT else got
        return got

    file = harness.store("2")
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    monkeypatch.setattr(os, "preadv", count)
    reader, writer = await harness.connect()
    writer.write(ask("2"))
    assert (await read_answer(reader))[1] == harness.data["2"]
    assert copied <= MIB < LARGE // 2


async def test_a_cold_read_does_not_wait_for_other_threads(harness: AssetsHarness, disk: ColdDisk) -> None:
    """Those of the loop hash and scan for seconds."""
    hashed = threading.Event()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))
    hashing = loop.run_in_executor(None, hashed.wait)
    try:
        reader, writer = await harness.connect()
        writer.write(ask("2"))
        assert (await read_answer(reader))[1] == harness.data["2"]
        assert disk.reads
    finally:
        hashed.set()
        await hashing


async def test_a_disk_failure_at_the_start_costs_no_response(harness: AssetsHarness, disk: ColdDisk) -> None:
    """The framework's path finds a source; what was sent ahead is answered after that."""
    disk.failing = 2
    reader, writer = await harness.connect()
    writer.write(ask("2"))
    await eventually(lambda: disk.reads > 0)
    writer.write(ask("1"))
    head, body = await read_answer(reader)
    assert b"X-Data-Source: external" in head
    assert body == harness.data["2"]
    head, body = await read_answer(reader)
    assert b"X-Cache: hit" in head
    assert body == harness.data["1"]


async def test_a_disk_that_fails_midway_ends_the_connection(harness: AssetsHarness, disk: ColdDisk) -> None:
    before = counted("distributor_aborted_responses_total", reason="object_unreadable")
    reader, writer = await harness.connect()
    writer.write(ask("2"))
    await reader.readuntil(b"\r\n\r\n")
    disk.failing = 1
    writer.write(ask("1"))
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await reader.readexactly(LARGE)
    assert counted("distributor_aborted_responses_total", reason="object_unreadable") == before + 1


async def test_a_response_by_the_framework_at_a_stop_is_the_last(tmp_path: Path, disk: ColdDisk) -> None:
    async with AsyncExitStack() as stack:
        harness = await stack.enter_async_context(assets_harness(tmp_path))
        data = harness.add("2", LARGE)
        harness.store("2")
        disk.failing = 1
        disk.free.clear()
        reader, writer = await asyncio.open_connection("127.0.0.1", harness.port, limit=64 * KIB)
        writer.write(ask("2"))
        await eventually(lambda: disk.reads > 0)
        closing = asyncio.create_task(stack.aclose())
        with contextlib.suppress(ConnectionError):
            while True:
                _, refused = await asyncio.open_connection("127.0.0.1", harness.port)
                refused.close()
        disk.free.set()
        head, body = await read_answer(reader)
        assert b"connection: close" in head
        assert body == data
        assert await reader.read() == b""
        await closing
        writer.close()


async def test_an_object_being_sent_is_in_use(harness: AssetsHarness) -> None:
    reader, writer = await harness.connect()
    writer.write(ask("2"))
    await reader.readuntil(b"\r\n\r\n")
    await asyncio.sleep(1.6)  # longer than an idle object is kept open
    removal = harness.volume.removal(ObjectId("2"))
    assert removal.begin() is RemovalState.IN_USE
    removal.rename_to_trash()
    assert await reader.readexactly(LARGE) == harness.data["2"]
    await eventually(lambda: harness.open_files() == 0)
    assert removal.begin() is RemovalState.READY
    removal.close()


async def test_responses_carry_the_date_of_their_second(harness: AssetsHarness) -> None:
    reader, writer = await harness.connect()
    seen: set[int] = set()
    while len(seen) < 3:
        before = int(time.time())
        writer.write(ask("1"))
        head, _ = await read_answer(reader)
        date = parse_http_date(head.split(b"\r\nDate: ")[1].split(b"\r\n")[0].decode())
        assert date is not None
        assert before <= date <= time.time()
        seen.add(date)
        await asyncio.sleep(0.05)


async def test_answers_and_accesses_are_counted(harness: AssetsHarness) -> None:
    names = {"method": "GET", "status": "200", "cache": "hit"}
    before = (
        counted("distributor_requests_total", **names),
        counted("distributor_sent_bytes_total", source="local"),
        counted("distributor_time_to_first_byte_seconds_count", cache="hit"),
    )
    reader, writer = await harness.connect()
    for object_id in ("1", "2", "1"):
        writer.write(ask(object_id))
        assert (await read_answer(reader))[1] == harness.data[object_id]
    await eventually(lambda: counted("distributor_requests_total", **names) == before[0] + 3)
    assert counted("distributor_sent_bytes_total", source="local") == before[1] + LARGE + 20 * KIB
    assert counted("distributor_time_to_first_byte_seconds_count", cache="hit") == before[2] + 3
