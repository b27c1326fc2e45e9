"""The source client against a server with every fault."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from anyio._backends._asyncio import AsyncIOBackend

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import GeneratedContent, bytes_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.shared.adapters.sources import SourceClient, SourceLimits, SourceObservation
from distributor_node.shared.adapters.sources.client import Expected
from distributor_node.shared.domain.conditionals import ByteRange, Version
from distributor_node.shared.domain.errors import (
    InvalidInput,
    SourceError,
    SourceRefused,
    SourceTooSlow,
    SourceUnreachable,
    SourceWrong,
)
from tests.servers.unresponsive_server import unresponsive_server

SIZE = 3_000_000
DATA = GeneratedContent(1, SIZE).read(0, SIZE)
LIMITS = SourceLimits(
    connect_timeout=1, first_byte_timeout=1, stall_timeout=1, minimum_rate=20_000, max_connections=4
)
RANGE = ByteRange(1_000_000, 1_999_999)


@pytest.fixture
async def node() -> AsyncIterator[StorageNode]:
    async with StorageNode([bytes_object("1", DATA, "video/mp4"), bytes_object("2", b"")]).run() as node:
        yield node


@pytest.fixture
def seen() -> list[SourceObservation]:
    return []


@pytest.fixture
async def client(seen: list[SourceObservation]) -> AsyncIterator[SourceClient]:
    async with SourceClient(LIMITS, seen.append) as client:
        yield client


async def read(
    client: SourceClient, url: str, byte_range: ByteRange | None = None, size: int | None = SIZE
) -> bytes:
    received = bytearray()
    await read_into(received, client, url, byte_range, size)
    return bytes(received)


async def read_into(
    received: bytearray,
    client: SourceClient,
    url: str,
    byte_range: ByteRange | None = None,
    size: int | None = SIZE,
) -> None:
    async with client.get(url, byte_range, Expected(Version(size=size))) as answer:
        async for chunk in answer.chunks:
            received += chunk


async def test_the_whole_object(
    node: StorageNode, client: SourceClient, seen: list[SourceObservation]
) -> None:
    async with client.get(node.object_url("1"), None, Expected(Version(size=SIZE))) as answer:
        assert (answer.status, answer.first, answer.length, answer.total) == (200, 0, SIZE, SIZE)
        assert answer.media_type == "video/mp4"
        assert b"".join([chunk async for chunk in answer.chunks]) == DATA
    assert node.requests[0].headers["accept-encoding"] == "identity"
    assert [(item.received, item.failure) for item in seen] == [(SIZE, None)]
    assert seen[0].source == f"127.0.0.1:{node.port}"
    assert seen[0].first_byte is not None
    assert 0 < seen[0].first_byte <= seen[0].waited


async def test_the_library_s_free_locks_do_not_give_the_loop_back(
    node: StorageNode, client: SourceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back = 0
    checkpoint = AsyncIOBackend.cancel_shielded_checkpoint

    async def counting() -> None:
        nonlocal given_back
        given_back += 1
        await checkpoint()

    monkeypatch.setattr(AsyncIOBackend, "cancel_shielded_checkpoint", counting)
    for _ in range(2):
        assert await read(client, node.object_url("1"), RANGE) == DATA[1_000_000:2_000_000]
    assert given_back == 0


async def test_a_range(node: StorageNode, client: SourceClient) -> None:
    async with client.get(node.object_url("1"), RANGE, Expected(Version(size=SIZE))) as answer:
        assert (answer.status, answer.first, answer.length, answer.total) == (
            206,
            RANGE.first,
            RANGE.length,
            SIZE,
        )
        assert b"".join([chunk async for chunk in answer.chunks]) == DATA[RANGE.first : RANGE.last + 1]


async def test_an_empty_object(node: StorageNode, client: SourceClient) -> None:
    assert await read(client, node.object_url("2"), size=0) == b""


async def test_an_object_of_unknown_size(node: StorageNode, client: SourceClient) -> None:
    assert await read(client, node.object_url("1"), size=None) == DATA
    node.faults.add(Fault(omit_content_length=True))
    async with client.get(node.object_url("1")) as answer:
        assert answer.length is None
        assert b"".join([chunk async for chunk in answer.chunks]) == DATA


async def test_a_range_outside_the_object_is_never_sent(node: StorageNode, client: SourceClient) -> None:
    with pytest.raises(InvalidInput):
        await read(client, node.object_url("1"), ByteRange(0, SIZE))
    assert len(node.requests) == 0


async def test_a_body_without_length_ends_at_the_catalogs_size(
    node: StorageNode, client: SourceClient
) -> None:
    node.faults.add(Fault(omit_content_length=True))
    assert await read(client, node.object_url("1")) == DATA


async def test_an_ignored_range_is_cut_out_of_the_whole(node: StorageNode, client: SourceClient) -> None:
    node.faults.add(Fault(ignore_range=True))
    assert await read(client, node.object_url("1"), RANGE) == DATA[RANGE.first : RANGE.last + 1]
    tail = ByteRange(SIZE - 5, SIZE - 1)
    assert await read(client, node.object_url("1"), tail) == DATA[-5:]


@pytest.mark.parametrize(
    ("fault", "status"),
    [(Fault(status=status), status) for status in (304, 403, 404, 416, 500)],
)
async def test_refusals(
    node: StorageNode, client: SourceClient, seen: list[SourceObservation], fault: Fault, status: int
) -> None:
    node.faults.add(fault)
    with pytest.raises(SourceRefused) as caught:
        await read(client, node.object_url("1"))
    assert caught.value.status == status
    assert seen[0].failure == "http_error"
    assert len(node.requests) == 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault(gzip=True),
        Fault(content_length_delta=1, body_delta=1),
        Fault(content_length_delta=-1, body_delta=-1),
        Fault(headers=(("Content-Range", "bytes 0-9/3000000"),)),
        Fault(headers=(("Content-Range", None),)),
        Fault(headers=(("Content-Range", f"bytes {RANGE.first}-{RANGE.last}/2999999"),)),
    ],
)
async def test_headers_that_contradict_give_no_byte(
    node: StorageNode, client: SourceClient, seen: list[SourceObservation], fault: Fault
) -> None:
    node.faults.add(fault)
    received = bytearray()
    with pytest.raises(SourceWrong):
        await read_into(received, client, node.object_url("1"), RANGE)
    assert received == b""
    assert seen[0].failure == "invalid_response"


@pytest.mark.parametrize("fault", [Fault(endless_body=True), Fault(omit_content_length=True, body_delta=1)])
@pytest.mark.parametrize("byte_range", [None, RANGE])
async def test_an_overlong_body_is_never_complete(
    node: StorageNode, client: SourceClient, fault: Fault, byte_range: ByteRange | None
) -> None:
    node.faults.add(fault)
    wanted = DATA if byte_range is None else DATA[byte_range.first : byte_range.last + 1]
    received = bytearray()
    with pytest.raises(SourceWrong):
        await read_into(received, client, node.object_url("1"), byte_range)
    assert len(received) < len(wanted)
    assert wanted.startswith(received)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(cut_after=500_000),
        Fault(cut_after=500_000, cut_by_reset=True),
        Fault(cut_after=500_000, omit_content_length=True),
        Fault(body_delta=-1),
        Fault(body_delta=-1, omit_content_length=True),
        Fault(cut_after=0),
    ],
)
async def test_an_aborted_body(
    node: StorageNode, client: SourceClient, seen: list[SourceObservation], fault: Fault
) -> None:
    node.faults.add(fault)
    received = bytearray()
    with pytest.raises(SourceUnreachable):
        await read_into(received, client, node.object_url("1"))
    assert DATA.startswith(received)
    assert len(received) < SIZE
    assert seen[0].failure == "unreachable"


async def test_connection_refused(client: SourceClient, seen: list[SourceObservation]) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        with pytest.raises(SourceUnreachable) as caught:
            await read(client, f"http://127.0.0.1:{reserved.getsockname()[1]}/1")
    assert caught.value.__cause__ is not None
    assert (seen[0].first_byte, seen[0].failure) == (None, "unreachable")


async def test_no_connection_in_time(client: SourceClient) -> None:
    with unresponsive_server() as (_, port):
        async with asyncio.timeout(60):
            with pytest.raises(SourceUnreachable, match="ConnectTimeout"):
                await read(client, f"http://127.0.0.1:{port}/1")


async def test_tls_errors(node: StorageNode, client: SourceClient) -> None:
    with pytest.raises(SourceError) as caught:
        await read(client, node.object_url("1").replace("http:", "https:"))
    assert isinstance(caught.value, (SourceUnreachable, SourceTooSlow))


@pytest.mark.parametrize("url", ["http://user:secret@127.0.0.1/1", "ftp://127.0.0.1/1", "1", "http://a b/"])
async def test_urls_that_are_never_requested(client: SourceClient, url: str) -> None:
    with pytest.raises(SourceUnreachable) as caught:
        await read(client, url)
    assert "secret" not in str(caught.value)


@asynccontextmanager
async def talker(answer: bytes, pause: float = 0) -> AsyncIterator[str]:
    """A server that says what it is told, byte by byte if there is a pause (seconds)."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                for start in range(0, len(answer), 1 if pause else len(answer)):
                    writer.write(answer[start : start + 1] if pause else answer)
                    await writer.drain()
                    await asyncio.sleep(pause)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/1"
    finally:
        server.close()
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    "answer",
    [
        b"rubbish\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
    ],
)
async def test_invalid_http(client: SourceClient, answer: bytes) -> None:
    async with talker(answer) as url:
        with pytest.raises(SourceUnreachable):
            await read(client, url)


async def test_a_head_without_end(client: SourceClient) -> None:
    async with talker(b"HTTP/1.1 200 OK\r\n" + b"a" * 200_000) as url:
        with pytest.raises(SourceWrong, match="response head: expected at most"):
            await read(client, url)


async def test_headers_that_drip(client: SourceClient) -> None:
    async with talker(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1000, pause=0.02) as url:
        with pytest.raises(SourceTooSlow):
            await asyncio.wait_for(read(client, url), 60)


async def test_chunked_bodies(client: SourceClient) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with talker(head + b"5\r\nhello\r\n0\r\n\r\n") as url:
        assert await read(client, url, size=5) == b"hello"
        assert await read(client, url, size=None) == b"hello"
        with pytest.raises(SourceWrong):
            await read(client, url, size=4)
        with pytest.raises(SourceUnreachable):
            await read(client, url, size=6)


async def test_a_complete_body_without_terminator_is_accepted(client: SourceClient) -> None:
    async with talker(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n") as url:
        assert await read(client, url, size=5) == b"hello"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(hang_before_headers=True),
        Fault(hang_after=0),
        Fault(hang_after=100_000),
        Fault(bytes_per_second=2000),
        Fault(drip_bytes_per_second=2000, drip_after=100_000),
    ],
)
async def test_too_slow(
    node: StorageNode, client: SourceClient, seen: list[SourceObservation], fault: Fault
) -> None:
    node.faults.add(fault)
    received = bytearray()
    async with asyncio.timeout(60):
        with pytest.raises(SourceTooSlow):
            await read_into(received, client, node.object_url("1"))
    assert DATA.startswith(received)
    assert seen[0].failure == "too_slow"


async def test_a_slow_source_above_the_minimum_rate_is_kept(node: StorageNode, client: SourceClient) -> None:
    node.faults.add(Fault(drip_bytes_per_second=60_000, drip_after=SIZE - 100_000))
    assert await read(client, node.object_url("1")) == DATA


async def test_the_limit_for_the_first_byte_is_not_one_for_the_rest(node: StorageNode) -> None:
    node.faults.add(Fault(latency_before_body=1.5))
    async with SourceClient(replace(LIMITS, first_byte_timeout=1, stall_timeout=20)) as client:
        assert await read(client, node.object_url("1")) == DATA


async def test_a_server_that_says_nothing_is_given_up_early_and_asked_once(
    node: StorageNode, seen: list[SourceObservation]
) -> None:
    async with SourceClient(
        replace(LIMITS, first_byte_timeout=30, first_data_timeout=0.3), seen.append
    ) as client:
        assert await read(client, node.object_url("1")) == DATA
        assert await read(client, node.object_url("2"), size=0) == b""  # leaves a connection to be reused
        node.faults.add(Fault(hang_before_headers=True))
        async with asyncio.timeout(10):
            with pytest.raises(SourceUnreachable, match=r"no bytes within 0\.3 s"):
                await read(client, node.object_url("1"))
    assert len(node.requests.of("1")) == 2


async def test_a_server_that_says_that_it_is_working_has_the_time_for_the_first_byte() -> None:
    """By an interim response (RFC 9110 section 15.2)."""

    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(1.0)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc")
        writer.close()
        closed.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/1"
    limits = replace(LIMITS, first_byte_timeout=30, first_data_timeout=0.3)
    async with server, SourceClient(limits) as client:
        assert await read(client, url, size=3) == b"abc"
        await closed.wait()
    closed.clear()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/1"
    limits = replace(LIMITS, first_byte_timeout=0.5, first_data_timeout=0.3)
    async with server, SourceClient(limits) as client:
        with pytest.raises(SourceTooSlow):
            await read(client, url, size=3)
        await closed.wait()


async def test_a_reader_that_pauses_costs_the_source_nothing(node: StorageNode, client: SourceClient) -> None:
    received = bytearray()
    async with client.get(node.object_url("1"), None, Expected(Version(size=SIZE))) as answer:
        async for chunk in answer.chunks:
            if not received:
                await asyncio.sleep(LIMITS.stall_timeout * 2)
            received += chunk
    assert received == DATA


async def test_connections_are_reused(node: StorageNode, client: SourceClient) -> None:
    for _ in range(3):
        await read(client, node.object_url("1"))
    assert {record.connection for record in node.requests} == {1}


async def test_a_reused_connection_that_is_closed_is_replaced_once(
    node: StorageNode, client: SourceClient, seen: list[SourceObservation]
) -> None:
    await read(client, node.object_url("1"))
    node.faults.add(Fault(close_reused_connection=True))
    assert await read(client, node.object_url("1")) == DATA
    assert [record.connection for record in node.requests] == [1, 1, 2]
    assert [item.failure for item in seen] == [None, None]


async def test_a_closed_new_connection_is_not_retried(client: SourceClient) -> None:
    asked = 0

    def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        writer.transport.abort()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server:
        with pytest.raises(SourceUnreachable):
            await read(client, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/1")
    assert asked == 1


async def test_idle_connections_are_left_before_the_source_closes_them(
    node: StorageNode, client: SourceClient
) -> None:
    await read(client, node.object_url("1"))
    await node.drop_connections()
    assert await read(client, node.object_url("1")) == DATA
    assert len(node.requests) == 2


async def test_a_reader_may_stop_early(
    node: StorageNode, client: SourceClient, seen: list[SourceObservation]
) -> None:
    for _ in range(LIMITS.max_connections * 3):
        async with client.get(node.object_url("1"), None, Expected(Version(size=SIZE))) as answer:
            assert DATA.startswith(await anext(answer.chunks))
    assert {item.failure for item in seen} == {None}
    assert await read(client, node.object_url("1")) == DATA


async def test_cancelled_readers_free_their_slot(node: StorageNode, client: SourceClient) -> None:
    slow = [
        Fault(hang_before_headers=True),
        Fault(hang_after=0),
        Fault(latency_before_headers=0.01),
    ]
    for fault in slow:
        node.faults.clear()
        node.faults.add(fault)
        for delay in (0, 0.005, 0.02):
            readers = [asyncio.create_task(read(client, node.object_url("1"))) for _ in range(12)]
            await asyncio.sleep(delay)
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
    node.faults.clear()
    everyone = [read(client, node.object_url("1")) for _ in range(LIMITS.max_connections)]
    assert await asyncio.gather(*everyone) == [DATA] * LIMITS.max_connections


async def test_connections_are_bounded_and_waiting_for_one_too(
    node: StorageNode, client: SourceClient
) -> None:
    node.faults.add(Fault(hang_after=100), Match(first=LIMITS.max_connections))
    limits = replace(LIMITS, stall_timeout=5)
    async with SourceClient(limits) as patient:
        readers = [
            asyncio.create_task(read(patient, node.object_url("1"))) for _ in range(limits.max_connections)
        ]
        await node.requests.wait_for(lambda requests: len(requests) == limits.max_connections)
        with pytest.raises(SourceError, match="connections are in use"):
            await read(patient, node.object_url("1"))
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        assert await read(patient, node.object_url("1")) == DATA


async def test_the_environment_is_ignored(
    node: StorageNode, monkeypatch: pytest.MonkeyPatch, seen: list[SourceObservation]
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    async with SourceClient(LIMITS, seen.append) as client:
        assert await read(client, node.object_url("1")) == DATA


async def test_closing_ends_what_is_being_read(node: StorageNode) -> None:
    client = SourceClient(LIMITS)
    with pytest.raises(SourceUnreachable):
        await read(client, node.object_url("1"))
    await client.open()
    node.faults.add(Fault(hang_after=100_000))
    async with client.get(node.object_url("1"), None, Expected(Version(size=SIZE))) as answer:
        await anext(answer.chunks)
        await client.close()
        with pytest.raises(SourceError):
            async for _ in answer.chunks:
                pass


async def test_a_name_that_resolves_to_a_private_address_is_not_asked(node: StorageNode) -> None:
    """Names are not checked here: `localhost` stands for any name that resolves to a private address."""
    async with SourceClient(replace(LIMITS, refuse_private=True)) as client:
        for host in ("localhost", "127.0.0.1"):
            with pytest.raises(SourceUnreachable, match="private address"):
                await read(client, f"http://{host}:{node.port}/api/v1/files/1")
    assert len(node.requests) == 0


async def test_bytes_of_a_body_are_counted_while_it_arrives(node: StorageNode) -> None:
    """A download of minutes must not be counted at its end alone."""
    counted: list[tuple[str, int]] = []
    before_the_end = 0
    async with SourceClient(LIMITS, count_bytes=lambda *count: counted.append(count)) as client:
        async with client.get(node.object_url("1"), None, Expected(Version(size=SIZE))) as answer:
            async for _ in answer.chunks:
                before_the_end = sum(count for _, count in counted)
        assert before_the_end > SIZE // 2
        assert sum(count for _, count in counted) == SIZE
        assert {source for source, _ in counted} == {f"127.0.0.1:{node.port}"}
        assert len(counted) < 20, "not once for each chunk"
        counted.clear()
        node.faults.add(Fault(cut_after=100_000))
        with pytest.raises(SourceUnreachable):
            await read(client, node.object_url("1"))
    assert sum(count for _, count in counted) == 100_000
