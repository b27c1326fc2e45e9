"""Objects that cannot be fetched in time, or at all, are proxied; error responses are clear."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from distributor_node.services.api.assets.decision import UNVERIFIED_TAIL_BYTES
from distributor_node.services.api.assets.proxy import MANY_OF_ONE_CLIENT
from distributor_node.services.demo.faults import Fault, Match
from distributor_node.shared import waiting
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.objects import Assignment, DistributionBucket, ObjectId
from distributor_node.shared.ports.state_store import FailureCause, FetchPhase
from tests.integration.assets_harness import LIMIT, MIB, AssetsHarness, assets_harness
from tests.waiting import eventually

SIZE = MIB + 7


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[AssetsHarness]:
    async with assets_harness(tmp_path, first_byte_wait=0.2) as running:
        running.add("1", SIZE)
        yield running


async def phase(harness: AssetsHarness, object_id: str) -> FetchPhase | None:
    fetch = (await harness.context.state.find(ObjectId(object_id))).fetch
    return fetch.phase if fetch else None


async def test_a_miss_without_a_worker_is_proxied_and_its_job_goes_on(harness: AssetsHarness) -> None:
    answer = await harness.get("1")
    assert (answer.status, answer.body) == (200, harness.data["1"])
    assert answer.headers["x-cache"] == "miss"
    assert answer.headers["x-data-source"] == "external"
    assert answer.headers["cache-control"] == "max-age=180, must-revalidate"
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-length"] == str(SIZE)
    assert await harness.jobs() == 1
    assert await phase(harness, "1") is FetchPhase.QUEUED
    assert (await harness.get("1")).headers["x-cache"] == "pending"
    assert await harness.jobs() == 1


async def test_a_far_range_of_a_miss_is_proxied_at_once_and_starts_the_fetch(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, first_byte_wait=3600, far_range_distance=1000) as harness:
        data = harness.add("1", SIZE)
        answer = await harness.get("1", {"Range": "bytes=-100"})
        assert (answer.status, answer.body) == (206, data[-100:])
        assert (answer.headers["x-cache"], answer.headers["x-data-source"]) == ("miss", "external")
        assert await harness.jobs() == 1


async def test_preconditions_and_ranges_of_a_miss_need_no_fetch(harness: AssetsHarness) -> None:
    etag = harness.catalog.objects["1"].etag or ""
    for headers, status in (
        ({"If-None-Match": etag}, 304),
        ({"If-Match": '"other"'}, 412),
        ({"Range": f"bytes={SIZE}-"}, 416),
    ):
        answer = await harness.get("1", headers)
        assert answer.status == status
        assert answer.headers["x-cache"] == "miss"
    assert await harness.jobs() == 0
    assert len(harness.node.requests) == 0


async def test_an_object_that_can_never_fit_is_proxied_and_never_fetched(harness: AssetsHarness) -> None:
    harness.add("2", 3000, size=LIMIT)
    answer = await harness.get("2", {"Range": "bytes=0-99"})
    # The nodes hold less than the catalog says: that is a wrong source, not a short answer.
    assert answer.status == 502
    assert await harness.jobs() == 0


async def test_an_oversize_object_is_proxied(tmp_path: Path) -> None:
    async with assets_harness(tmp_path) as harness:
        data = harness.add("1", SIZE)
        forbid_storing(harness)
        answer = await harness.get("1")
        assert (answer.body, answer.headers["x-cache"], answer.headers["x-data-source"]) == (
            data,
            "miss",
            "external",
        )
        assert "stored" not in answer.headers["cache-status"]
        assert await harness.jobs() == 0


async def test_an_object_of_unknown_size_is_proxied_as_long_as_the_source_says(
    harness: AssetsHarness,
) -> None:
    data = harness.add("2", 200_000, size=None, media_type=None)
    answer = await harness.get("2", {"Range": "bytes=0-9"})
    assert (answer.status, answer.body, answer.complete) == (200, data, True)
    assert answer.headers["content-length"] == "200000"
    assert answer.headers["content-type"] == "video/mp4"
    harness.node.faults.add(Fault(omit_content_length=True))
    answer = await harness.get("2")
    assert (answer.body, answer.complete, answer.headers["transfer-encoding"]) == (data, True, "chunked")
    head = await harness.get("2", method="HEAD")
    assert (head.status, head.headers.get("content-length")) == (200, None)
    assert await harness.jobs() == 0


async def test_corrupt_bytes_never_make_a_complete_response(harness: AssetsHarness) -> None:
    for node in (harness.node, harness.second):
        node.faults.add(Fault(flip_byte_at=10))
    answer = await harness.get("1")
    assert answer.status == 200
    assert not answer.complete
    labels = {"source": harness.node.url.removeprefix("http://"), "reason": "invalid_response"}
    assert REGISTRY.get_sample_value("distributor_source_failures_total", labels) == 1


async def test_all_but_the_end_is_streamed_while_the_source_still_sends(harness: AssetsHarness) -> None:
    harness.node.faults.add(Fault(hang_after=SIZE - 1000), Match(first=1))
    reader, writer = await harness.connect()
    writer.write(b"GET /api/v1/assets/1 HTTP/1.1\r\nHost: a\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    body = await reader.readexactly(SIZE - UNVERIFIED_TAIL_BYTES)
    assert not harness.node.requests[0].finished
    # The same source again, at the same byte, after it was found too slow.
    body += await reader.readexactly(UNVERIFIED_TAIL_BYTES)
    assert body == harness.data["1"]


async def test_a_failing_volume_costs_no_response(
    harness: AssetsHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise VolumeError("Input/output error")

    harness.store("1")
    monkeypatch.setattr(Volume, "open_object", fail)
    answer = await harness.get("1")
    assert (answer.body, answer.headers["x-cache"], answer.headers["x-data-source"]) == (
        harness.data["1"],
        "miss",
        "external",
    )
    assert await harness.jobs() == 0


async def test_a_corrupt_small_object_is_served_correctly_from_another_source(harness: AssetsHarness) -> None:
    data = harness.add("2", 5000)
    harness.node.faults.add(Fault(flip_byte_at=10))
    answer = await harness.get("2")
    assert (answer.status, answer.body) == (200, data)
    harness.second.faults.add(Fault(flip_byte_at=11))
    assert (await harness.get("2")).status == 502


async def test_a_range_that_reaches_the_end_is_verified_unless_it_begins_far_on(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, state_down=True, far_range_distance=300_000) as harness:
        data = harness.add("1", SIZE)
        answer = await harness.get("1", {"Range": "bytes=100-"})
        assert (answer.status, answer.body, answer.complete) == (206, data[100:], True)
        assert answer.headers["content-range"] == f"bytes 100-{SIZE - 1}/{SIZE}"
        assert answer.headers["content-length"] == str(SIZE - 100)
        for node in (harness.node, harness.second):
            node.faults.add(Fault(flip_byte_at=10))
            node.requests.clear()
        assert (await harness.get("1", {"Range": "bytes=100-199"})).body == data[100:200]
        assert (await harness.get("1", {"Range": "bytes=300001-"})).body == data[300_001:]
        asked = [record.range for record in harness.node.requests]
        assert asked == ["bytes=100-199", f"bytes=300001-{SIZE - 1}"]
        answer = await harness.get("1", {"Range": "bytes=300000-"})
        assert (answer.status, answer.complete) == (206, False)
        assert len(answer.body) <= SIZE - 300_000 - UNVERIFIED_TAIL_BYTES


async def test_a_corrupt_small_range_to_the_end_is_served_correctly_from_another_source(
    harness: AssetsHarness,
) -> None:
    data = harness.add("2", 5000)
    harness.node.faults.add(Fault(flip_byte_at=4000))
    answer = await harness.get("2", {"Range": "bytes=-2000"})
    assert (answer.status, answer.body) == (206, data[-2000:])
    harness.second.faults.add(Fault(flip_byte_at=11))
    harness.add("3", 5000)  # of object 2 the right bytes are still in memory
    assert (await harness.get("3", {"Range": "bytes=-2000"})).status == 502


async def test_the_source_is_replaced_at_the_same_byte(harness: AssetsHarness) -> None:
    harness.node.faults.add(Fault(cut_after=300_000))
    answer = await harness.get("1")
    assert (answer.status, answer.body) == (200, harness.data["1"])


async def test_sources_that_fail_or_hang(harness: AssetsHarness) -> None:
    for node in (harness.node, harness.second):
        node.faults.add(Fault(status=500), Match(object_id="1"))
        node.faults.add(Fault(hang_before_headers=True), Match(object_id="2"))
    harness.add("2", SIZE)
    for object_id, status in (("1", 502), ("2", 504)):
        answer = await harness.get(object_id)
        assert answer.status == status
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.json()["message"]


@pytest.mark.parametrize("trouble", [Fault(hang_before_headers=True), Fault(hang_after=100)], ids=str)
async def test_all_sources_together_have_one_time_limit_for_the_first_byte(
    tmp_path: Path, trouble: Fault
) -> None:
    async with assets_harness(tmp_path, first_byte_wait=0.05, proxied_first_byte_wait=0.3) as harness:
        harness.add("1", 5000)
        for node in (harness.node, harness.second):
            node.faults.add(trouble)
        answer = await harness.get("1")
        assert (answer.status, answer.json()["type"]) == (504, "sources_too_slow")
        assert (len(harness.node.requests), len(harness.second.requests)) == (1, 0)


async def test_a_proxied_answer_that_has_begun_may_take_longer(tmp_path: Path) -> None:
    wait = 2.0
    async with assets_harness(tmp_path, first_byte_wait=0.05, proxied_first_byte_wait=wait) as harness:
        data = harness.add("1", SIZE)
        harness.node.faults.add(Fault(bytes_per_second=SIZE // 4))
        began = time.monotonic()
        answer = await harness.get("1")
        assert (answer.status, answer.body) == (200, data)
        assert time.monotonic() - began > wait  # it has gone on after the wait


async def test_too_many_proxied_answers(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, first_byte_wait=0.05, max_proxied=1) as harness:
        for object_id in ("1", "2"):
            harness.add(object_id, SIZE)
        harness.node.faults.add(Fault(latency_before_headers=0.8), Match(object_id="1"))
        slow = asyncio.create_task(harness.get("1"))
        await harness.node.requests.wait_for(lambda log: len(log) == 1)
        answer = await harness.get("2")
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert (await slow).body == harness.data["1"]
        assert (await harness.get("2")).status == 200


def forbid_storing(harness: AssetsHarness) -> None:
    small = harness.context.settings.storage.model_copy(update={"max_cached_item": SIZE - 1})
    object.__setattr__(harness.context.settings, "storage", small)


async def test_requests_one_after_the_other_do_not_wait_for_their_client_s_pace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "CROWD_SPACING", 3600.0)
    async with assets_harness(tmp_path) as harness:
        data = harness.add("1", SIZE)
        forbid_storing(harness)
        for _ in range(MANY_OF_ONE_CLIENT + 4):
            assert (await harness.get("1")).body == data


async def test_a_client_with_many_proxied_answers_begins_others_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "CROWD_SPACING", 3600.0)
    async with assets_harness(tmp_path, proxied_first_byte_wait=3600) as harness:
        harness.add("1", SIZE)
        forbid_storing(harness)
        harness.node.faults.add(Fault(latency_before_headers=3600))
        asking = [asyncio.create_task(harness.get("1")) for _ in range(MANY_OF_ONE_CLIENT + 4)]
        await harness.node.requests.wait_for(lambda log: len(log) > MANY_OF_ONE_CLIENT)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await harness.node.requests.wait_for(lambda log: len(log) > MANY_OF_ONE_CLIENT + 1)
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)


async def test_a_remembered_failure_is_proxied(harness: AssetsHarness) -> None:
    await harness.context.state.record_failure(ObjectId("1"), "dead-lettered", 60)
    answer = await harness.get("1")
    assert (answer.body, answer.headers["x-data-source"]) == (harness.data["1"], "external")
    assert await harness.jobs() == 0


async def test_a_source_that_sends_an_object_ends_its_failure(harness: AssetsHarness) -> None:
    """Its only source was down for a moment when it was asked for first."""
    await harness.context.state.record_failure(ObjectId("1"), "unreachable", 600, FailureCause.SOURCES)
    assert (await harness.get("1", {"Range": "bytes=0-99"})).headers["x-data-source"] == "external"
    assert await harness.jobs() == 0

    async def can_be_claimed() -> bool:
        return (await harness.context.state.find(ObjectId("1"))).failure is None

    await eventually(can_be_claimed)
    await harness.get("1", {"Range": "bytes=0-99"})
    await eventually(harness.has_job)


async def test_an_object_that_fails_again_is_not_fetched_for_every_request(harness: AssetsHarness) -> None:
    state = harness.context.state
    await state.record_failure(ObjectId("1"), "cut", 600, FailureCause.SOURCES)
    await harness.get("1", {"Range": "bytes=0-99"})

    async def can_be_claimed() -> bool:
        return (await state.find(ObjectId("1"))).failure is None

    await eventually(can_be_claimed)
    await state.record_failure(ObjectId("1"), "cut", 600, FailureCause.SOURCES)
    for _ in range(5):
        await harness.get("1", {"Range": "bytes=0-99"})
    assert not await can_be_claimed()


async def test_only_the_right_bytes_end_a_failure_by_wrong_ones(harness: AssetsHarness) -> None:
    state = harness.context.state

    async def can_be_claimed() -> bool:
        return (await state.find(ObjectId("1"))).failure is None

    await state.record_failure(ObjectId("1"), "corrupt", 600, FailureCause.CORRUPT)
    await harness.get("1", {"Range": "bytes=0-99"})
    assert not await can_be_claimed()
    assert (await harness.get("1")).body == harness.data["1"]
    await eventually(can_be_claimed)


async def test_without_a_state_store_misses_are_proxied(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, state_down=True) as harness:
        data = harness.add("1", SIZE)
        answer = await harness.get("1")
        assert (answer.body, answer.headers["x-cache"], answer.headers["x-data-source"]) == (
            data,
            "miss",
            "external",
        )
        assert (await harness.get("1", method="HEAD")).headers["x-cache"] == "miss"


async def test_without_a_queue_misses_are_proxied_and_the_claim_is_released(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, queue_down=True, first_byte_wait=3600) as harness:
        data = harness.add("1", SIZE)
        answer = await harness.get("1")
        assert (answer.body, answer.headers["x-data-source"]) == (data, "external")
        assert await phase(harness, "1") is None


async def test_without_a_catalog_the_unknown_is_refused_for_a_while(harness: AssetsHarness) -> None:
    harness.store("1")
    harness.add("2", SIZE)
    harness.catalog.down = True
    assert (await harness.get("1")).status == 200
    answer = await harness.get("2")
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert (await harness.get("2", method="HEAD")).status == 503


async def test_refusals(harness: AssetsHarness) -> None:
    harness.context.assignment.current = Assignment(bucket_ids=frozenset({"0:1"}))
    ours = (DistributionBucket("0:1"),)
    harness.add("2", SIZE, buckets=(DistributionBucket("9:9"),))
    harness.add("3", SIZE, buckets=ours, accepted=False)
    for object_id, status, message in (
        ("999", 404, "Data object does not exist"),
        ("2", 421, "Data object not served by this node"),
        ("3", 404, "Data object has not been uploaded yet"),
    ):
        answer = await harness.get(object_id)
        assert (answer.status, answer.json()["message"]) == (status, message)
        head = await harness.get(object_id, method="HEAD")
        assert (head.status, head.body) == (status, b"")


@pytest.mark.parametrize(
    "tricky",
    [
        "..%2f..%2fetc%2fpasswd",
        "%00",
        "a%00b",
        "..",
        ".",
        "%2e%2e",
        "x" * 5000,
        "a%0d%0ab",
        "%ff",
        "",
    ],
)
async def test_path_tricks_get_400_by_get_and_by_head(harness: AssetsHarness, tricky: str) -> None:
    statuses = [(await harness.get(tricky, method=method)).status for method in ("GET", "HEAD")]
    assert statuses == [400, 400]


async def test_head_of_a_miss_starts_nothing(harness: AssetsHarness) -> None:
    answer = await harness.get("1", method="HEAD")
    assert (answer.status, answer.headers["x-cache"]) == (200, "miss")
    assert answer.headers["content-length"] == str(SIZE)
    assert await harness.jobs() == 0
    assert await phase(harness, "1") is None


async def test_an_empty_object(harness: AssetsHarness) -> None:
    harness.add("2", 0)
    for _ in range(2):
        answer = await harness.get("2")
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")
    assert await harness.jobs() == 1
