"""Bytes of a growing file go to the client's socket by sendfile, with the guarantees of those that are read."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from distributor_node.services.api.assets.decision import UNVERIFIED_TAIL_BYTES
from distributor_node.services.api.assets.response import CHUNK_BYTES
from distributor_node.services.api.protocol import PublicProtocol
from tests.counters import counted
from tests.integration.assets_harness import KIB, MIB, AssetsHarness, assets_harness
from tests.waiting import eventually

SIZE = 5 * MIB + 4321
STEPS = (1, 4095, 4097, 99_999, 65_536, 3, 700_001, 1_048_576, 12_345)


class Sendfile:
    """What os.sendfile sent: the end of the furthest byte, and how many there were."""

    def __init__(self) -> None:
        self.furthest = self.total = 0
        self.before: Callable[[], None] = lambda: None

    def __call__(self, connection: int, file: int, offset: int, length: int) -> int:
        self.before()
        sent = _SENDFILE(connection, file, offset, length)
        self.furthest, self.total = max(self.furthest, offset + sent), self.total + sent
        return sent


_SENDFILE = os.sendfile


@pytest.fixture
def sendfile(monkeypatch: pytest.MonkeyPatch) -> Sendfile:
    counting = Sendfile()
    monkeypatch.setattr(os, "sendfile", counting)
    return counting


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[AssetsHarness]:
    async with assets_harness(tmp_path, first_byte_wait=3.0, fast_lane=False) as running:
        running.add("1", SIZE)
        yield running


def sent_bytes() -> float:
    return counted("distributor_sent_bytes_total", source="local")


class Client:
    """A GET of object 1 on a connection of its own."""

    def __init__(self, harness: AssetsHarness, receive_buffer: int = 0, *, version: str = "1.1") -> None:
        self._harness, self._version = harness, version
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.setblocking(False)
        self.received = bytearray()

    async def ask(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self.socket, ("127.0.0.1", self._harness.port))
        head = f"GET /api/v1/assets/1 HTTP/{self._version}\r\nHost: a\r\nConnection: close\r\n\r\n"
        await loop.sock_sendall(self.socket, head.encode())

    async def read(self, pause: float = 0.0, piece: int = 256 * KIB) -> bytes:
        """Read the body to the end of the connection, so many bytes at a time."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(60):
            try:
                while data := await loop.sock_recv(self.socket, piece):
                    self.received += data
                    await asyncio.sleep(pause)
            except ConnectionResetError:
                pass
        self.socket.close()
        return self.body

    @property
    def body(self) -> bytes:
        return bytes(self.received.partition(b"\r\n\r\n")[2])


async def test_a_file_that_grows_in_odd_steps_reaches_slow_and_fast_clients_whole(
    harness: AssetsHarness, sendfile: Sendfile
) -> None:
    before = sent_bytes()
    fetch = await harness.begin("1", written=STEPS[0])
    fast, slow = Client(harness), Client(harness, receive_buffer=8 * KIB)
    reading = []
    for client, pause, piece in ((fast, 0.0, MIB), (slow, 0.0005, 16 * KIB)):
        await client.ask()
        reading.append(asyncio.create_task(client.read(pause, piece)))
    step = 0
    while fetch.written < SIZE:
        step += 1
        fetch.write_to(min(SIZE, fetch.written + STEPS[step % len(STEPS)]))
        await asyncio.sleep(0.002)
    await fetch.complete()
    bodies = await asyncio.gather(*reading)
    assert [body == harness.data["1"] for body in bodies] == [True, True]
    assert sendfile.total > SIZE
    await eventually(lambda: sent_bytes() - before == 2 * SIZE)


async def test_sendfile_sends_no_byte_that_is_not_verified(
    harness: AssetsHarness, sendfile: Sendfile
) -> None:
    fetch = await harness.begin("1", written=SIZE)
    client = Client(harness)
    await client.ask()
    reading = asyncio.create_task(client.read())
    allowed = SIZE - UNVERIFIED_TAIL_BYTES
    await eventually(lambda: len(client.body) == allowed)
    await asyncio.sleep(0.1)
    assert len(client.body) == allowed
    assert 0 < sendfile.furthest <= allowed
    await fetch.complete()
    assert await reading == harness.data["1"]


async def test_a_file_that_is_emptied_between_two_sends_aborts_the_response(
    harness: AssetsHarness, sendfile: Sendfile
) -> None:
    before = sent_bytes()
    fetch = await harness.begin("1", written=SIZE)
    client = Client(harness, receive_buffer=8 * KIB)

    def restart() -> None:
        if sendfile.total > MIB and fetch.written:
            fetch.written = 0
            fetch.partial.restart()
            fetch.partial.write(0, bytes(SIZE))

    sendfile.before = restart
    await client.ask()
    body = await client.read()
    assert not fetch.written
    assert MIB < len(body) < SIZE
    assert body == harness.data["1"][: len(body)]
    assert len(body) <= sent_bytes() - before < SIZE
    fetch.partial.discard()


async def test_what_is_not_in_memory_is_read_in_a_thread(
    harness: AssetsHarness, sendfile: Sendfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv

    def from_disk(descriptor: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError(errno.EAGAIN, "not in memory")
        return preadv(descriptor, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", from_disk)
    fetch = await harness.begin("1", written=MIB)
    client = Client(harness)
    await client.ask()
    reading = asyncio.create_task(client.read())
    await asyncio.sleep(0.05)
    await fetch.complete()
    assert await reading == harness.data["1"]
    assert not sendfile.total


async def test_a_response_to_http_1_0_is_read(harness: AssetsHarness, sendfile: Sendfile) -> None:
    fetch = await harness.begin("1", written=MIB)
    client = Client(harness, version="1.0")
    await client.ask()
    reading = asyncio.create_task(client.read())
    await eventually(lambda: len(client.body) == MIB)
    await fetch.complete()
    assert await reading == harness.data["1"]
    assert not sendfile.total


async def test_a_complete_file_is_sent_without_copies_too(harness: AssetsHarness, sendfile: Sendfile) -> None:
    before = sent_bytes()
    harness.store("1")
    client = Client(harness, receive_buffer=8 * KIB)
    await client.ask()
    assert await client.read(piece=32 * KIB) == harness.data["1"]
    assert sendfile.total > 0
    await eventually(lambda: sent_bytes() - before == SIZE)


async def test_a_complete_file_that_is_truncated_aborts_the_response(
    harness: AssetsHarness, sendfile: Sendfile
) -> None:
    path = harness.store("1")
    client = Client(harness, receive_buffer=8 * KIB)

    def truncate() -> None:
        if sendfile.total > MIB:
            os.truncate(path, 0)

    sendfile.before = truncate
    await client.ask()
    body = await client.read()
    assert MIB < len(body) < SIZE
    assert body == harness.data["1"][: len(body)]


async def test_a_connection_is_as_before_after_a_body_from_a_file(
    harness: AssetsHarness, sendfile: Sendfile
) -> None:
    fetch = await harness.begin("1", written=3 * CHUNK_BYTES)
    reader, writer = await harness.connect()
    for request in range(2):
        writer.write(b"GET /api/v1/assets/1 HTTP/1.1\r\nHost: a\r\n\r\n")
        async with asyncio.timeout(60):
            head = await reader.readuntil(b"\r\n\r\n")
            assert f"content-length: {SIZE}".encode() in head.lower()
            if not request:
                await fetch.complete()
            assert await reader.readexactly(SIZE) == harness.data["1"]
    assert sendfile.total > 0


async def test_a_client_that_reads_steadily_is_not_taken_for_one_that_reads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte that it reads is replaced at once: as many are unsent as before."""
    monkeypatch.setattr(PublicProtocol, "_unsent", lambda _: 150_000)
    async with assets_harness(tmp_path, fast_lane=False, send_stall_limit=1.0) as harness:
        harness.add("1", SIZE)
        fetch = await harness.begin("1", written=SIZE - 1)
        steady, silent = Client(harness, receive_buffer=8 * KIB), Client(harness, receive_buffer=8 * KIB)
        await silent.ask()
        await steady.ask()
        reading = asyncio.create_task(steady.read(pause=0.004, piece=32 * KIB))
        await asyncio.sleep(1.5)
        await fetch.complete()
        assert await reading == harness.data["1"]
        assert len(await silent.read()) < SIZE


@pytest.mark.parametrize("size", [600 * KIB, MIB, 1280 * KIB, 2 * MIB, 3 * MIB + 17])
async def test_all_but_the_first_piece_and_the_last_page_are_sent_by_sendfile(
    tmp_path: Path, sendfile: Sendfile, size: int
) -> None:
    """Or a last piece that is as quickly read."""
    async with assets_harness(tmp_path, fast_lane=False) as harness:
        harness.add("1", size)
        fetch = await harness.begin("1", written=size)
        fetch.verify()
        answer = await harness.get("1")
        assert answer.body == harness.data["1"]
        await fetch.complete()
    full = 4 * 32 * KIB  # where the socket was full
    assert size - sendfile.total <= 2 * CHUNK_BYTES + full
