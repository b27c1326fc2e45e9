"""API and fetcher in one process: responses while an object is fetched."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.fetcher.admission import Admission, AdmissionRules, LeaseTimes
from distributor_node.services.fetcher.fetch import FetchRunner
from distributor_node.services.fetcher.fetcher import DeadLetterHandler, FailureRecorder, Worker
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.ports.state_store import Claim, ObjectStatus
from distributor_node.shared.runtime.threads import BlockingPool
from tests.integration.assets_harness import LIMIT, MIB, AssetsHarness, assets_harness
from tests.integration.fetcher_harness import RETRIES
from tests.waiting import eventually

SIZE = 2 * MIB + 11
RATE = 4 * MIB


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[AssetsHarness]:
    async with assets_harness(tmp_path, first_byte_wait=3.0) as running, fetching(running):
        running.add("1", SIZE)
        yield running


@asynccontextmanager
async def fetching(harness: AssetsHarness) -> AsyncIterator[None]:
    """A worker takes the jobs that the API publishes."""
    state, volume, disk = harness.context.state, harness.volume, BlockingPool(4)
    rules = AdmissionRules(LIMIT // 2, space_wait=0.3, lease=15.0)
    worker = Worker(
        Admission(state, volume, disk, rules, "worker-1"),
        FetchRunner(
            state,
            volume,
            harness.context.failover_reader,
            disk,
            LeaseTimes(lease=15.0, renewal=4.0),
        ),
        FailureRecorder(state, RETRIES, failure_memory=60.0),
    )
    dead_letter_handler = DeadLetterHandler(state, volume, disk, "worker-1", failure_memory=60.0)
    consuming = asyncio.create_task(harness.queue.consume(worker.handle, 4, dead_letter_handler.handle))
    try:
        yield
    finally:
        consuming.cancel()
        await asyncio.wait({consuming})
        await disk.close()


async def test_many_first_requests_make_one_download_and_stream(harness: AssetsHarness) -> None:
    harness.node.faults.add(Fault(bytes_per_second=MIB))
    began = time.time()
    answers = await asyncio.gather(*(harness.get("1") for _ in range(20)))
    assert {answer.body for answer in answers} == {harness.data["1"]}
    assert {answer.headers["x-data-source"] for answer in answers} == {"local"}
    assert [record.range for record in harness.node.requests] == [None]
    assert len(harness.second.requests) == 0
    finished_at = harness.node.requests[0].finished_at
    assert finished_at is not None
    assert all(began + answer.first_byte_after < finished_at for answer in answers)
    await eventually(lambda: harness.is_hit("1"))


async def test_the_first_clients_of_an_object_without_a_type_get_its_sources_type(
    harness: AssetsHarness,
) -> None:
    harness.add("2", SIZE, media_type=None)
    harness.node.faults.add(Fault(bytes_per_second=RATE))
    answers = await asyncio.gather(*(harness.get("2") for _ in range(3)))
    assert {answer.headers["x-data-source"] for answer in answers} == {"local"}
    assert {answer.headers["content-type"] for answer in answers} == {"video/mp4"}


async def test_a_dying_source_is_invisible_to_the_client(harness: AssetsHarness) -> None:
    harness.node.faults.add(Fault(cut_after=700_000, bytes_per_second=RATE))
    answer = await harness.get("1")
    assert (answer.body, answer.headers["x-data-source"]) == (harness.data["1"], "local")
    assert harness.second.requests[0].range == f"bytes=700000-{SIZE - 1}"


async def test_wrong_bytes_from_the_first_source(harness: AssetsHarness) -> None:
    harness.node.faults.add(Fault(flip_byte_at=5, bytes_per_second=RATE))
    answers = await asyncio.gather(*(harness.get("1") for _ in range(5)))
    assert all(answer.body == harness.data["1"] for answer in answers if answer.complete)
    async with asyncio.timeout(60):
        while (answer := await harness.get("1")).headers["x-cache"] != "hit":
            assert not answer.complete or answer.body == harness.data["1"]
    assert answer.body == harness.data["1"]


async def test_the_end_of_a_slow_object_is_sent_immediately(tmp_path: Path) -> None:
    async with (
        assets_harness(tmp_path, first_byte_wait=3.0, far_range_distance=64 * 1024) as harness,
        fetching(harness),
    ):
        data = harness.add("1", SIZE)
        harness.node.faults.add(Fault(bytes_per_second=MIB), Match(ranged=False))
        whole = asyncio.create_task(harness.get("1"))
        await harness.node.requests.wait_for(lambda log: len(log) == 1)
        end = await harness.get("1", {"Range": "bytes=-4096"})
        assert (end.status, end.body, end.headers["x-data-source"]) == (206, data[-4096:], "external")
        start = await harness.get("1", {"Range": "bytes=100-199"})
        assert (start.status, start.body, start.headers["x-data-source"]) == (206, data[100:200], "local")
        assert not whole.done()
        assert (await whole).body == data


class ObservedStore(MemoryStateStore):
    """Notes what requests ask of it until a fetch begins."""

    def __init__(self) -> None:
        super().__init__(LIMIT, StateTimeouts(), time.time)
        self.calls: list[str] = []

    async def find(self, object_id: ObjectId) -> ObjectStatus:
        self.calls.append("find")
        return await super().find(object_id)

    async def claim(self, *arguments: Any, **named: Any) -> Claim:
        self.calls.append("claim")
        return await super().claim(*arguments, **named)


async def test_a_miss_waits_for_one_reply_of_the_state_store(tmp_path: Path) -> None:
    store = ObservedStore()
    async with assets_harness(tmp_path, store=store, first_byte_wait=3.0) as harness, fetching(harness):
        harness.add("1", 64 * 1024)
        assert (await harness.get("1")).headers["x-cache"] == "miss"
        assert store.calls[0] == "claim"


async def test_a_pending_object_without_a_file_is_told_by_the_claim(tmp_path: Path) -> None:
    store = ObservedStore()
    async with assets_harness(tmp_path, store=store, first_byte_wait=5.0) as harness:
        harness.add("1", SIZE)
        first = asyncio.create_task(harness.get("1"))
        await eventually(harness.has_job)
        store.calls.clear()
        second = asyncio.create_task(harness.get("1"))
        await eventually(lambda: store.calls)
        assert store.calls[0] == "claim"
        await (await harness.begin("1")).complete()
        answers = await asyncio.gather(first, second)
        assert [answer.headers["x-cache"] for answer in answers] == ["miss", "pending"]
        assert [answer.body for answer in answers] == [harness.data["1"]] * 2
        assert await harness.jobs() == 1


@pytest.mark.parametrize("method", ["HEAD", "GET"])
async def test_what_starts_no_fetch_claims_nothing(tmp_path: Path, method: str) -> None:
    store = ObservedStore()
    async with assets_harness(tmp_path, store=store) as harness:
        harness.add("1", SIZE)
        headers = {} if method == "HEAD" else {"If-None-Match": "*"}
        await harness.get("1", headers, method=method)
        assert store.calls == ["find"]
