"""Pending objects: streamed from the growing file, never completed before verification."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from distributor_node.services.api.assets.decision import UNVERIFIED_TAIL_BYTES
from distributor_node.services.api.assets.response import ResponseWriter
from distributor_node.services.demo.faults import Fault
from distributor_node.shared.adapters.volume import RemovalState
from distributor_node.shared.domain.extents import Extents
from distributor_node.shared.domain.objects import ObjectId
from tests.counters import counted
from tests.end_to_end.client import Answer, read_answer
from tests.integration.assets_harness import KIB, MIB, AssetsHarness, assets_harness
from tests.waiting import eventually

SIZE = 2 * MIB + 33


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[AssetsHarness]:
    async with assets_harness(tmp_path, first_byte_wait=3.0, far_range_distance=256 * KIB) as running:
        running.add("1", SIZE)
        yield running


class Client:
    """One GET whose body is read as the test likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.head = b""

    async def read_head(self) -> bytes:
        self.head = await self.reader.readuntil(b"\r\n\r\n")
        return self.head

    async def take(self, length: int) -> bytes:
        async with asyncio.timeout(60):
            return await self.reader.readexactly(length)

    async def rest(self) -> bytes:
        """Everything until the connection ends."""
        async with asyncio.timeout(60):
            return await self.reader.read(-1)

    async def silent(self, seconds: float = 0.2) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return not await self.reader.read(1)
        except TimeoutError:
            return True


async def ask(harness: AssetsHarness, object_id: str, extra: str = "") -> Client:
    client = Client(*await harness.connect())
    head = f"GET /api/v1/assets/{object_id} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{extra}\r\n"
    client.writer.write(head.encode())
    return client


async def test_a_pending_object_is_streamed_to_its_end(harness: AssetsHarness) -> None:
    fetch = await harness.begin("1", written=100_000)
    client = await ask(harness, "1")
    head = (await client.read_head()).decode().lower()
    for line in (
        "x-cache: pending",
        "x-data-source: local",
        "cache-control: max-age=180, must-revalidate",
        f"content-length: {SIZE}",
        "content-type: image/png",
        f"etag: {harness.catalog.objects['1'].etag}".lower(),
        "cache-status: distributor; fwd=uri-miss; stored; collapsed",
    ):
        assert line in head
    assert "last-modified" not in head
    body = await client.take(100_000)
    for end in (200_000, 900_000, SIZE):
        fetch.write_to(end)
        body += await client.take(min(end, SIZE - UNVERIFIED_TAIL_BYTES) - len(body))
    await fetch.complete()
    body += await client.rest()
    assert body == harness.data["1"]
    assert harness.catalog.asked == 0
    assert (await harness.get("1")).headers["x-cache"] == "hit"


async def test_a_client_that_leaves_with_all_bytes_has_not_disconnected_early(
    harness: AssetsHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may close the connection before the handler has ended."""

    async def finish(_: ResponseWriter) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(ResponseWriter, "finish", finish)
    before = counted("distributor_aborted_responses_total", reason="client_disconnected")
    fetch = await harness.begin("1")
    clients = [await ask(harness, "1"), await ask(harness, "1")]
    fetch.write_to(SIZE // 2)
    for client in clients:
        await client.read_head()
    clients[1].writer.transport.abort()
    await fetch.complete()
    await clients[0].take(SIZE)
    clients[0].writer.close()
    await eventually(lambda: counted("distributor_requests_in_progress") == 0)
    assert counted("distributor_aborted_responses_total", reason="client_disconnected") == before + 1


async def test_without_a_catalog_type_the_sources_type_is_sent_with_the_first_bytes(
    harness: AssetsHarness,
) -> None:
    """A response that begins after the fetch has ended has the stored type instead."""
    data = harness.add("2", SIZE, media_type=None)
    missed = await ask(harness, "2")
    await eventually(harness.has_job)
    fetch = await harness.begin("2")
    pending = await ask(harness, "2")
    await harness.until_pending("2", 2)
    fetch.partial.set_media_type("video/webm")
    fetch.write_to(SIZE // 2)
    heads = [(await client.read_head()).decode().lower() for client in (missed, pending)]
    inner = await harness.get("2", {"Range": "bytes=0-99"})
    head = await harness.get("2", method="HEAD")
    await fetch.complete()
    assert ["content-type: video/webm\r\n" in text for text in heads] == [True, True]
    assert ["x-cache: miss\r\n" in heads[0], "x-cache: pending\r\n" in heads[1]] == [True, True]
    assert [answer.headers["content-type"] for answer in (inner, head)] == ["video/webm"] * 2
    assert [answer.headers["x-cache"] for answer in (inner, head)] == ["pending"] * 2
    assert [await client.rest() for client in (missed, pending)] == [data, data]
    assert (await harness.get("2")).headers["content-type"] == "image/png"


async def test_a_far_range_of_a_fetch_without_a_type_has_its_sources_type(harness: AssetsHarness) -> None:
    harness.add("2", SIZE, media_type=None)
    fetch = await harness.begin("2", written=10)
    far = await harness.get("2", {"Range": "bytes=-10"})
    assert (far.headers["x-data-source"], far.headers["content-type"]) == ("external", "video/mp4")
    await fetch.complete()


async def test_an_object_completed_in_the_meantime_has_its_stored_type(harness: AssetsHarness) -> None:
    harness.add("2", SIZE, media_type=None)
    missed = asyncio.create_task(harness.get("2"))
    await eventually(harness.has_job)
    await (await harness.begin("2")).complete("image/webp")
    answer = await missed
    assert (answer.headers["x-cache"], answer.headers["content-type"]) == ("miss", "image/webp")


async def test_a_file_streamed_to_a_paused_client_cannot_be_removed_once_complete(tmp_path: Path) -> None:
    async with assets_harness(tmp_path) as harness:
        data = harness.add("9", 24 * MIB)
        fetch = await harness.begin("9", written=20 * MIB)
        client = await ask(harness, "9")
        await client.read_head()
        body = await client.take(100_000)  # and no more: the connection fills up
        await fetch.complete()

        def is_held() -> bool:
            removal = harness.volume.removal(ObjectId("9"))
            state = removal.begin()
            removal.close()
            return state is RemovalState.IN_USE

        await eventually(is_held)
        assert body + await client.rest() == data


async def test_the_end_is_held_back_until_the_object_is_verified(harness: AssetsHarness) -> None:
    fetch = await harness.begin("1", written=SIZE)
    client = await ask(harness, "1")
    await client.read_head()
    body = await client.take(SIZE - UNVERIFIED_TAIL_BYTES)
    assert await client.silent()
    fetch.verify()
    assert body + await client.rest() == harness.data["1"]
    await fetch.complete()


async def test_a_small_object_sends_nothing_before_it_is_verified(harness: AssetsHarness) -> None:
    data = harness.add("2", 1000)
    fetch = await harness.begin("2", written=1000)
    client = await ask(harness, "2")
    assert await client.silent()
    await fetch.complete()
    answer = await read_answer(client.reader, time.monotonic())
    assert (answer.status, answer.body, answer.headers["x-data-source"]) == (200, data, "local")


async def test_a_discarded_file_aborts_the_response(harness: AssetsHarness) -> None:
    fetch = await harness.begin("1", written=SIZE)
    client = await ask(harness, "1")
    await client.read_head()
    body = await client.take(1000)
    fetch.partial.restart()
    body += await client.rest()
    assert len(body) <= SIZE - UNVERIFIED_TAIL_BYTES
    fetch.partial.discard()


async def test_a_file_restarted_before_the_first_byte_is_invisible_to_the_client(
    harness: AssetsHarness,
) -> None:
    data = harness.add("2", 50_000)
    fetch = await harness.begin("2", written=50_000)
    client = await ask(harness, "2")
    assert await client.silent()
    fetch.partial.restart()
    fetch.written = 0
    await asyncio.sleep(0.05)
    await fetch.complete()
    answer = await read_answer(client.reader, time.monotonic())
    assert (answer.body, answer.headers["x-cache"]) == (data, "pending")


async def test_an_inner_range_is_followed_and_exact(harness: AssetsHarness) -> None:
    fetch = await harness.begin("1", written=100_000)
    client = await ask(harness, "1", "Range: bytes=90000-150000\r\n")
    await client.read_head()
    assert f"Content-Range: bytes 90000-150000/{SIZE}".lower() in client.head.decode().lower()
    body = await client.take(10_000)
    fetch.write_to(400_000)
    body += await client.rest()
    assert body == harness.data["1"][90_000:150_001]
    await fetch.complete()


async def test_a_near_range_waits_and_a_far_one_is_proxied_at_once(harness: AssetsHarness) -> None:
    fetch = await harness.begin("1", written=100_000)
    near = asyncio.create_task(harness.get("1", {"Range": "bytes=200000-200099"}))
    far = await harness.get("1", {"Range": "bytes=-5000"})
    assert (far.status, far.headers["x-data-source"], far.headers["x-cache"]) == (206, "external", "pending")
    assert far.body == harness.data["1"][-5000:]
    assert far.headers["content-range"] == f"bytes {SIZE - 5000}-{SIZE - 1}/{SIZE}"
    assert not near.done()
    fetch.write_to(300_000)
    answer = await near
    assert (answer.status, answer.headers["x-data-source"]) == (206, "local")
    assert answer.body == harness.data["1"][200_000:200_100]
    await fetch.complete()


async def test_a_dead_fetch_is_finished_from_a_source_in_the_same_answer(harness: AssetsHarness) -> None:
    fetch = await harness.begin("1", written=700_000)
    client = await ask(harness, "1")
    await client.read_head()
    body = await client.take(700_000)
    fetch.partial.close()
    await harness.context.state.record_failure(fetch.lease.object_id, "given up", 60)
    await harness.context.state.park(fetch.lease)
    body += await client.rest()
    assert body == harness.data["1"]
    assert [record.range for record in harness.node.requests] == [f"bytes=700000-{SIZE - 1}"]


async def test_a_dead_fetch_with_wrong_bytes_on_disk_never_completes(harness: AssetsHarness) -> None:
    fetch = await harness.begin("1", written=0)
    fetch.data = b"?" + harness.data["1"][1:]
    fetch.write_to(700_000)
    client = await ask(harness, "1")
    await client.read_head()
    body = await client.take(700_000)
    fetch.partial.close()
    await harness.context.state.record_failure(fetch.lease.object_id, "given up", 60)
    await harness.context.state.park(fetch.lease)
    body += await client.rest()
    assert len(body) < SIZE
    # The wrong bytes were none of the source's: it is asked again, and gives the right ones.
    await harness.context.state.release(fetch.lease)
    harness.node.requests.clear()
    assert (await harness.get("1")).body == harness.data["1"]
    assert (len(harness.node.requests), len(harness.second.requests)) == (1, 0)


async def test_another_worker_resumes_and_readers_notice_nothing(harness: AssetsHarness) -> None:
    fetch = await harness.begin("1", written=700_000)
    client = await ask(harness, "1")
    await client.read_head()
    body = await client.take(700_000)
    fetch.partial.close()
    await harness.context.state.park(fetch.lease)
    await asyncio.sleep(0.3)
    resumed = await harness.begin("1", written=0)
    resumed.written = 700_000
    await resumed.complete()
    assert body + await client.rest() == harness.data["1"]
    assert len(harness.node.requests) == 0


async def test_a_miss_publishes_one_job_and_streams_it(harness: AssetsHarness) -> None:
    harness.catalog.delay = 0.2
    clients = [asyncio.create_task(harness.get("1")) for _ in range(50)]
    await eventually(harness.has_job)
    fetch = await harness.begin("1", written=SIZE // 2)
    await fetch.complete()
    answers: list[Answer] = await asyncio.gather(*clients)
    assert await harness.jobs() == 1
    assert {answer.body for answer in answers} == {harness.data["1"]}
    assert sorted(answer.headers["x-cache"] for answer in answers).count("miss") == 1
    assert {answer.headers["x-data-source"] for answer in answers} == {"local"}


async def test_a_client_that_leaves_ends_no_fetch_and_leaves_no_file_open(harness: AssetsHarness) -> None:
    client = await ask(harness, "1")
    await eventually(harness.has_job)
    client.writer.transport.abort()
    await harness.until_pending("1", 0)
    fetch = await harness.begin("1", written=500_000)
    before = harness.open_files()
    second = await ask(harness, "1")
    await second.read_head()
    assert harness.open_files() == before + 1
    second.writer.transport.abort()
    await eventually(lambda: harness.open_files() <= before)
    await fetch.complete()
    assert (await harness.get("1")).body == harness.data["1"]


async def test_head_of_a_pending_object(harness: AssetsHarness) -> None:
    fetch = await harness.begin("1", written=10)
    answer = await harness.get("1", method="HEAD")
    assert (answer.status, answer.headers["x-cache"], answer.headers["content-length"]) == (
        200,
        "pending",
        str(SIZE),
    )
    await fetch.complete()


async def test_without_pending_streaming_the_object_is_proxied(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, follow_growing_files=False) as harness:
        data = harness.add("1", SIZE)
        fetch = await harness.begin("1", written=SIZE)
        answer = await harness.get("1")
        assert (answer.body, answer.headers["x-cache"], answer.headers["x-data-source"]) == (
            data,
            "pending",
            "external",
        )
        await fetch.complete()


async def test_the_source_of_the_fetch_is_tried_first(harness: AssetsHarness) -> None:
    fetch = await harness.begin("1", written=10)
    await harness.context.state.renew(fetch.lease, harness.second.object_url("1"))
    harness.node.faults.add(Fault(status=500))
    answer = await harness.get("1", {"Range": "bytes=-10"})
    assert answer.body == harness.data["1"][-10:]
    assert (len(harness.node.requests), len(harness.second.requests)) == (0, 1)
    await fetch.complete()


@pytest.mark.parametrize("first", [0, 100_000])
async def test_a_sparse_file_with_wrong_bytes_that_were_sent_never_completes(
    harness: AssetsHarness, first: int
) -> None:
    """What is missing in front of them keeps the bytes on disk from being hashed in order."""
    fetch = await harness.begin("1", written=0)
    data = bytearray(harness.data["1"])
    data[200_000] ^= 1
    fetch.data = bytes(data)
    fetch.write_to(700_000)
    client = await ask(harness, "1", f"Range: bytes={first}-\r\n" if first else "")
    await client.read_head()
    body = await client.take(700_000 - first)
    assert body == fetch.data[first:700_000]
    if first:
        fetch.partial.make_sparse(40_960)
        fetch.partial.name_extents(Extents.of((0, 40_960), (98_304, 700_000)))
    else:
        fetch.partial.make_sparse(700_000)  # names whole blocks: less than was sent
    fetch.partial.close()
    await harness.context.state.record_failure(fetch.lease.object_id, "given up", 60)
    await harness.context.state.park(fetch.lease)
    body += await client.rest()
    assert len(body) < SIZE - first
