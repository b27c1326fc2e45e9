"""What cannot be fetched in time, or ever, comes from a source; and what is refused is refused clearly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from services.api.assets.decision import HOLD_BACK
from services.demo.knobs import Behaviour, Match
from shared.domain.objects import DistributionBucket, Duty, ObjectId
from shared.ports.state_store import FetchPhase
from tests.integration.assets_world import LIMIT, MIB, AssetsWorld, assets_world

SIZE = MIB + 7


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[AssetsWorld]:
    async with assets_world(tmp_path, first_byte_wait=0.2) as running:
        running.add("1", SIZE)
        yield running


async def phase(world: AssetsWorld, object_id: str) -> FetchPhase | None:
    fetch = (await world.context.state.find(ObjectId(object_id))).fetch
    return fetch.phase if fetch else None


async def test_a_miss_without_a_worker_is_proxied_and_its_job_goes_on(world: AssetsWorld) -> None:
    answer = await world.get("1")
    assert (answer.status, answer.body) == (200, world.data["1"])
    assert answer.headers["x-cache"] == "miss"
    assert answer.headers["x-data-source"] == "external"
    assert answer.headers["cache-control"] == "max-age=180, must-revalidate"
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-length"] == str(SIZE)
    assert await world.jobs() == 1
    assert await phase(world, "1") is FetchPhase.QUEUED
    assert (await world.get("1")).headers["x-cache"] == "pending"
    assert await world.jobs() == 1


async def test_a_far_range_of_a_miss_is_proxied_at_once_and_starts_the_fetch(tmp_path: Path) -> None:
    async with assets_world(tmp_path, first_byte_wait=5, far_range_distance=1000) as world:
        data = world.add("1", SIZE)
        answer = await world.get("1", {"Range": "bytes=-100"})
        assert (answer.status, answer.body) == (206, data[-100:])
        assert (answer.headers["x-cache"], answer.headers["x-data-source"]) == ("miss", "external")
        assert answer.took < 2
        assert await world.jobs() == 1


async def test_preconditions_and_ranges_of_a_miss_need_no_fetch(world: AssetsWorld) -> None:
    etag = world.catalog.objects["1"].etag
    for headers, status in (
        ({"If-None-Match": etag}, 304),
        ({"If-Match": '"other"'}, 412),
        ({"Range": f"bytes={SIZE}-"}, 416),
    ):
        answer = await world.get("1", headers)
        assert answer.status == status
        assert answer.headers["x-cache"] == "miss"
    assert await world.jobs() == 0
    assert len(world.node.requests) == 0


async def test_what_can_never_fit_is_proxied_and_never_fetched(world: AssetsWorld) -> None:
    world.add("2", 3000, size=LIMIT)
    answer = await world.get("2", {"Range": "bytes=0-99"})
    # The nodes hold less than the catalog says: that is a wrong source, not a short answer.
    assert answer.status == 502
    assert await world.jobs() == 0


async def test_an_oversize_object_is_proxied(tmp_path: Path) -> None:
    async with assets_world(tmp_path) as world:
        data = world.add("1", SIZE)
        small = world.context.settings.storage.model_copy(update={"max_cached_item": SIZE - 1})
        object.__setattr__(world.context.settings, "storage", small)
        answer = await world.get("1")
        assert (answer.body, answer.headers["x-cache"], answer.headers["x-data-source"]) == (
            data,
            "miss",
            "external",
        )
        assert "stored" not in answer.headers["cache-status"]
        assert await world.jobs() == 0


async def test_an_object_of_unknown_size_is_proxied_as_long_as_the_source_says(world: AssetsWorld) -> None:
    data = world.add("2", 200_000, size=None, media_type=None)
    answer = await world.get("2", {"Range": "bytes=0-9"})
    assert (answer.status, answer.body, answer.complete) == (200, data, True)
    assert answer.headers["content-length"] == "200000"
    assert answer.headers["content-type"] == "video/mp4"
    world.node.knobs.add(Behaviour(omit_content_length=True))
    answer = await world.get("2")
    assert (answer.body, answer.complete, answer.headers["transfer-encoding"]) == (data, True, "chunked")
    head = await world.get("2", method="HEAD")
    assert (head.status, head.headers.get("content-length")) == (200, None)
    assert await world.jobs() == 0


async def test_wrong_bytes_never_make_a_complete_answer(world: AssetsWorld) -> None:
    for node in (world.node, world.second):
        node.knobs.add(Behaviour(flip_byte_at=10))
    answer = await world.get("1")
    assert answer.status == 200
    assert not answer.complete
    labels = {"source": world.node.url.removeprefix("http://"), "reason": "wrong"}
    assert REGISTRY.get_sample_value("distributor_source_failures_total", labels) == 1


async def test_all_but_the_end_flows_while_the_source_still_sends(world: AssetsWorld) -> None:
    world.node.knobs.add(Behaviour(hang_after=SIZE - 1000), Match(first=1))
    reader, writer = await world.connect()
    writer.write(b"GET /api/v1/assets/1 HTTP/1.1\r\nHost: a\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    body = await reader.readexactly(SIZE - HOLD_BACK)
    assert not world.node.requests[0].finished
    # The same source again, at the same byte, after it was found too slow.
    body += await reader.readexactly(HOLD_BACK)
    assert body == world.data["1"]


async def test_a_volume_that_fails_costs_no_answer(world: AssetsWorld) -> None:
    path = world.store("1")
    record = world.volume.root / "records" / path.parent.name / "1"
    record.unlink()
    record.mkdir()
    answer = await world.get("1")
    assert (answer.body, answer.headers["x-cache"], answer.headers["x-data-source"]) == (
        world.data["1"],
        "miss",
        "external",
    )
    assert await world.jobs() == 0


async def test_wrong_bytes_of_a_small_object_come_right_from_another_source(world: AssetsWorld) -> None:
    data = world.add("2", 5000)
    world.node.knobs.add(Behaviour(flip_byte_at=10))
    answer = await world.get("2")
    assert (answer.status, answer.body) == (200, data)
    world.second.knobs.add(Behaviour(flip_byte_at=11))
    assert (await world.get("2")).status == 502


async def test_a_range_that_reaches_the_end_is_verified_unless_it_begins_far_on(tmp_path: Path) -> None:
    async with assets_world(tmp_path, state_down=True, far_range_distance=300_000) as world:
        data = world.add("1", SIZE)
        answer = await world.get("1", {"Range": "bytes=100-"})
        assert (answer.status, answer.body, answer.complete) == (206, data[100:], True)
        assert answer.headers["content-range"] == f"bytes 100-{SIZE - 1}/{SIZE}"
        assert answer.headers["content-length"] == str(SIZE - 100)
        for node in (world.node, world.second):
            node.knobs.add(Behaviour(flip_byte_at=10))
            node.requests.clear()
        assert (await world.get("1", {"Range": "bytes=100-199"})).body == data[100:200]
        assert (await world.get("1", {"Range": "bytes=300001-"})).body == data[300_001:]
        asked = [record.range for record in world.node.requests]
        assert asked == ["bytes=100-199", f"bytes=300001-{SIZE - 1}"]
        answer = await world.get("1", {"Range": "bytes=300000-"})
        assert (answer.status, answer.complete) == (206, False)
        assert len(answer.body) <= SIZE - 300_000 - HOLD_BACK


async def test_wrong_bytes_of_a_small_range_to_the_end_come_right_from_another_source(
    world: AssetsWorld,
) -> None:
    data = world.add("2", 5000)
    world.node.knobs.add(Behaviour(flip_byte_at=4000))
    answer = await world.get("2", {"Range": "bytes=-2000"})
    assert (answer.status, answer.body) == (206, data[-2000:])
    world.second.knobs.add(Behaviour(flip_byte_at=11))
    assert (await world.get("2", {"Range": "bytes=-2000"})).status == 502


async def test_the_source_is_replaced_at_the_same_byte(world: AssetsWorld) -> None:
    world.node.knobs.add(Behaviour(cut_after=300_000))
    answer = await world.get("1")
    assert (answer.status, answer.body) == (200, world.data["1"])


async def test_sources_that_fail_or_hang(world: AssetsWorld) -> None:
    for node in (world.node, world.second):
        node.knobs.add(Behaviour(status=500), Match(object_id="1"))
        node.knobs.add(Behaviour(hang_before_headers=True), Match(object_id="2"))
    world.add("2", SIZE)
    for object_id, status in (("1", 502), ("2", 504)):
        answer = await world.get(object_id)
        assert answer.status == status
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.json()["message"]


@pytest.mark.parametrize("trouble", [Behaviour(hang_before_headers=True), Behaviour(hang_after=100)], ids=str)
async def test_all_sources_together_have_one_time_limit_for_the_first_byte(
    tmp_path: Path, trouble: Behaviour
) -> None:
    async with assets_world(tmp_path, first_byte_wait=0.05, proxied_first_byte_wait=0.3) as world:
        world.add("1", 5000)
        for node in (world.node, world.second):
            node.knobs.add(trouble)
        answer = await world.get("1")
        assert (answer.status, answer.json()["type"]) == (504, "sources_too_slow")
        assert (len(world.node.requests), len(world.second.requests)) == (1, 0)


async def test_a_proxied_answer_that_has_begun_may_take_longer(tmp_path: Path) -> None:
    async with assets_world(tmp_path, first_byte_wait=0.05, proxied_first_byte_wait=0.3) as world:
        data = world.add("1", SIZE)
        world.node.knobs.add(Behaviour(bytes_per_second=SIZE))
        answer = await world.get("1")
        assert (answer.status, answer.body) == (200, data)


async def test_too_many_proxied_answers(tmp_path: Path) -> None:
    async with assets_world(tmp_path, first_byte_wait=0.05, max_proxied=1) as world:
        for object_id in ("1", "2"):
            world.add(object_id, SIZE)
        world.node.knobs.add(Behaviour(latency_before_headers=0.8), Match(object_id="1"))
        slow = asyncio.create_task(world.get("1"))
        await world.node.requests.wait_for(lambda log: len(log) == 1)
        answer = await world.get("2")
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert (await slow).body == world.data["1"]
        assert (await world.get("2")).status == 200


async def test_a_remembered_failure_is_proxied(world: AssetsWorld) -> None:
    await world.context.state.record_failure(ObjectId("1"), "hopeless", 60)
    answer = await world.get("1")
    assert (answer.body, answer.headers["x-data-source"]) == (world.data["1"], "external")
    assert await world.jobs() == 0


async def test_without_a_state_store_misses_are_proxied(tmp_path: Path) -> None:
    async with assets_world(tmp_path, state_down=True) as world:
        data = world.add("1", SIZE)
        answer = await world.get("1")
        assert (answer.body, answer.headers["x-cache"], answer.headers["x-data-source"]) == (
            data,
            "miss",
            "external",
        )
        assert (await world.get("1", method="HEAD")).headers["x-cache"] == "miss"


async def test_without_a_queue_misses_are_proxied_and_the_claim_is_withdrawn(tmp_path: Path) -> None:
    async with assets_world(tmp_path, queue_down=True, first_byte_wait=5) as world:
        data = world.add("1", SIZE)
        answer = await world.get("1")
        assert (answer.body, answer.headers["x-data-source"]) == (data, "external")
        assert answer.took < 2
        assert await phase(world, "1") is None


async def test_without_a_catalog_the_unknown_is_refused_for_a_while(world: AssetsWorld) -> None:
    world.store("1")
    world.add("2", SIZE)
    world.catalog.down = True
    assert (await world.get("1")).status == 200
    answer = await world.get("2")
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert (await world.get("2", method="HEAD")).status == 503


async def test_refusals(world: AssetsWorld) -> None:
    world.context.duty.current = Duty(bucket_ids=frozenset({"0:1"}))
    ours = (DistributionBucket("0:1"),)
    world.add("2", SIZE, buckets=(DistributionBucket("9:9"),))
    world.add("3", SIZE, buckets=ours, accepted=False)
    for object_id, status, message in (
        ("999", 404, "Data object does not exist"),
        ("2", 421, "Data object not served by this node"),
        ("3", 404, "Data object has not been uploaded yet"),
    ):
        answer = await world.get(object_id)
        assert (answer.status, answer.json()["message"]) == (status, message)
        head = await world.get(object_id, method="HEAD")
        assert (head.status, head.body) == (status, b"")


@pytest.mark.parametrize(
    "tricky",
    [
        "..%2f..%2fetc%2fpasswd",
        "%00",
        "a%00b",
        "..",
        ".",
        "a/b",
        "%2e%2e",
        "x" * 5000,
        "a%0d%0ab",
        "%ff",
        "1;2",
        "",
    ],
)
async def test_path_tricks_get_400_by_get_and_by_head(world: AssetsWorld, tricky: str) -> None:
    statuses = [(await world.get(tricky, method=method)).status for method in ("GET", "HEAD")]
    assert statuses == [400, 400]


async def test_head_of_a_miss_starts_nothing(world: AssetsWorld) -> None:
    answer = await world.get("1", method="HEAD")
    assert (answer.status, answer.headers["x-cache"]) == (200, "miss")
    assert answer.headers["content-length"] == str(SIZE)
    assert await world.jobs() == 0
    assert await phase(world, "1") is None


async def test_an_empty_object(world: AssetsWorld) -> None:
    world.add("2", 0)
    for _ in range(2):
        answer = await world.get("2")
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")
    assert await world.jobs() == 1
