"""One GET from miss to hit, with real processes on real Redis and RabbitMQ."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time

from distributor_node.services.api.assets.revalidation import Validation
from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import MIB, DemoObject, generated_object
from tests.end_to_end.client import Answer, get
from tests.end_to_end.conftest import Harness


def body_of(item: DemoObject) -> bytes:
    return item.content.read(0, item.size)


def assert_whole(answer: Answer, item: DemoObject) -> None:
    assert answer.status == 200
    assert answer.complete
    assert hashlib.sha256(answer.body).digest() == hashlib.sha256(body_of(item)).digest()


async def test_a_miss_then_a_hit(harness: Harness) -> None:
    item = generated_object("1", 3 * MIB)
    harness.publish([item])
    await harness.stack.up()
    first = await get(harness.stack.url("1"))
    assert_whole(first, item)
    assert (first.headers["x-cache"], first.headers["x-data-source"]) == ("miss", "local")
    assert first.headers["cache-control"] == "max-age=180, must-revalidate"
    await harness.stack.until_hit("1")
    second = await get(harness.stack.url("1"))
    assert_whole(second, item)
    assert (second.headers["x-cache"], second.headers["x-data-source"]) == ("hit", "local")
    assert second.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert second.headers["etag"] == first.headers["etag"]
    assert len(harness.first.requests.of("1", "GET")) == 1


async def test_counters_are_precreated_at_zero(harness: Harness) -> None:
    """A count that begins at 1 has not grown, for Prometheus: the first requests would be missing."""
    harness.publish([])
    await harness.stack.up()
    (api,) = harness.stack.of("api")
    metrics = (await get(f"{api.health_url}/metrics")).body.decode()
    for cache in ("hit", "miss", "pending"):
        assert f'distributor_requests_total{{cache="{cache}",method="GET",status="200"}} 0.0' in metrics
    for result in Validation:
        assert f'distributor_revalidations_total{{result="{result.name.lower()}"}} 0.0' in metrics


async def test_fifty_first_requests_make_one_download(harness: Harness) -> None:
    item = generated_object("1", 16 * MIB)
    harness.publish([item])
    harness.first.faults.add(
        Fault(bytes_per_second=16 * MIB)
    )  # the last request comes before the download ends
    await harness.stack.up(fetchers=2, workers=2)
    answers = await asyncio.gather(*(get(harness.stack.url("1"), timeout=120) for _ in range(50)))
    expected = hashlib.sha256(body_of(item)).digest()
    for answer in answers:
        assert (answer.status, answer.complete) == (200, True)
        assert hashlib.sha256(answer.body).digest() == expected
    assert len(harness.first.requests.of("1", "GET")) == 1


async def test_the_first_byte_arrives_while_the_source_is_still_sending(harness: Harness) -> None:
    item = generated_object("1", 8 * MIB)
    harness.publish([item])
    harness.first.faults.add(Fault(bytes_per_second=2 * MIB))
    await harness.stack.up()
    began = time.time()
    answer = await get(harness.stack.url("1"))
    assert_whole(answer, item)
    (download,) = harness.first.requests.of("1", "GET")
    assert download.first_byte_at is not None
    assert download.finished_at is not None
    first_byte_at = began + answer.first_byte_after
    assert download.first_byte_at <= first_byte_at < download.finished_at


async def test_ranges_of_a_pending_object_near_and_far(harness: Harness) -> None:
    item = generated_object("1", 24 * MIB)
    harness.publish([item])
    harness.first.faults.add(Fault(bytes_per_second=4 * MIB), Match(ranged=False))
    await harness.stack.up()
    whole = asyncio.create_task(get(harness.stack.url("1")))
    await asyncio.sleep(0.5)
    near, far = await asyncio.gather(
        get(harness.stack.url("1"), {"Range": "bytes=1000-99999"}),
        get(harness.stack.url("1"), {"Range": "bytes=-65536"}),
    )
    assert (near.status, near.headers["x-cache"], near.headers["x-data-source"]) == (206, "pending", "local")
    assert near.headers["content-range"] == f"bytes 1000-99999/{item.size}"
    assert near.body == item.content.read(1000, 99_000)
    assert (far.status, far.headers["x-cache"], far.headers["x-data-source"]) == (206, "pending", "external")
    assert far.headers["content-range"] == f"bytes {item.size - 65536}-{item.size - 1}/{item.size}"
    assert far.body == item.content.read(item.size - 65536, 65536)
    assert not whole.done()
    assert_whole(await whole, item)


async def test_a_killed_fetchers_download_is_resumed_by_another(harness: Harness) -> None:
    item = generated_object("1", 16 * MIB)
    harness.publish([item])
    harness.first.faults.add(Fault(bytes_per_second=4 * MIB), Match(endpoint="files", first=1))
    harness.stack.environment["DISTRIBUTOR_FETCH__LEASE"] = "3"
    harness.stack.environment["DISTRIBUTOR_FETCH__LEASE_RENEWAL"] = "1"
    await harness.stack.up()
    (fetcher,) = harness.stack.of("fetcher")
    following = asyncio.create_task(get(harness.stack.url("1"), timeout=120))
    await harness.stack.until_on_volume(4 * MIB)
    fetcher.kill()
    harness.stack.add("fetcher")
    assert_whole(await following, item)
    await harness.stack.until_hit("1")
    downloads = harness.first.requests.of("1", "GET")
    assert any((record.range or "").startswith("bytes=") for record in downloads[1:])
    hit = await get(harness.stack.url("1"))
    assert_whole(hit, item)


async def test_wrong_bytes_from_the_first_source_never_arrive_as_complete(harness: Harness) -> None:
    items = [generated_object(str(number), size) for number, size in ((1, 40_000), (2, 5 * MIB))]
    harness.publish(items, both=True)
    harness.first.faults.add(Fault(flip_byte_at=30_000))
    # The one that is right seems slow, so that the other is asked first, however long its first probe took.
    harness.second.faults.add(Fault(latency_before_headers=1.0), Match(endpoint="version"))
    await harness.stack.up()
    for item in items:
        answer = await get(harness.stack.url(item.object_id))
        assert answer.status == 200
        if answer.complete:
            assert_whole(answer, item)
        await harness.stack.until_hit(item.object_id)
        assert_whole(await get(harness.stack.url(item.object_id)), item)
    (fetcher,) = harness.stack.of("fetcher")
    metrics = (await get(f"{fetcher.health_url}/metrics")).body.decode()
    counted = [
        line
        for line in metrics.splitlines()
        if f'source="127.0.0.1:{harness.first.port}"' in line
        and "failures" in line
        and 'reason="invalid_response"' in line
    ]
    assert len(counted) == 1
    # Once caught, it is asked after the other for a while: the second object need not come from it at all.
    assert float(counted[0].split()[-1]) in {1, 2}


async def test_small_corrupt_objects_are_served_correctly_at_the_first_request(harness: Harness) -> None:
    item = generated_object("1", 40_000)
    harness.publish([item], both=True)
    harness.first.faults.add(Fault(flip_byte_at=30_000))
    await harness.stack.up()
    assert_whole(await get(harness.stack.url("1")), item)


async def test_the_storage_limit_is_never_exceeded(harness: Harness) -> None:
    await never_passes_the_limit(harness, seconds=12, least_asked=40)


async def never_passes_the_limit(harness: Harness, seconds: float, least_asked: int) -> None:
    """Eight clients ask for three times what fits, for so many seconds."""
    items = [generated_object(str(number), 5 * MIB) for number in range(1, 61)]
    harness.publish(items)
    limit = 100 * MIB
    harness.stack.environment["DISTRIBUTOR_STORAGE__LIMIT"] = str(limit)
    harness.stack.environment["DISTRIBUTOR_EVICTOR__MIN_IDLE"] = "1"
    await harness.stack.up(fetchers=2)
    expected = {item.object_id: hashlib.sha256(body_of(item)).digest() for item in items}
    until = time.monotonic() + seconds
    highest = 0
    asked = 0

    async def watch() -> None:
        nonlocal highest
        while time.monotonic() < until:
            highest = max(highest, await asyncio.to_thread(harness.stack.bytes_on_volume))
            await asyncio.sleep(0.05)

    async def ask(chance: random.Random) -> None:
        nonlocal asked
        while time.monotonic() < until:
            object_id = str(chance.randint(1, 60))
            answer = await get(harness.stack.url(object_id))
            assert (answer.status, answer.complete) == (200, True)
            assert hashlib.sha256(answer.body).digest() == expected[object_id]
            asked += 1

    await asyncio.gather(watch(), *(ask(random.Random(seed)) for seed in range(8)))
    assert highest <= limit
    assert highest > limit // 2
    assert asked > least_asked


async def test_an_object_larger_than_the_limit_is_proxied_and_evicts_nothing(harness: Harness) -> None:
    small, large = generated_object("1", 2 * MIB), generated_object("2", 30 * MIB)
    harness.publish([small, large])
    harness.stack.environment["DISTRIBUTOR_STORAGE__LIMIT"] = "20M"
    await harness.stack.up()
    await get(harness.stack.url("1"))
    await harness.stack.until_hit("1")
    answer = await get(harness.stack.url("2"))
    assert_whole(answer, large)
    assert (answer.headers["x-cache"], answer.headers["x-data-source"]) == ("miss", "external")
    assert (await get(harness.stack.url("1"))).headers["x-cache"] == "hit"


async def test_a_truncated_file_is_no_hit_and_is_repaired(harness: Harness) -> None:
    item = generated_object("1", 2 * MIB)
    harness.publish([item])
    await harness.stack.up()
    await get(harness.stack.url("1"))
    await harness.stack.until_hit("1")
    (path,) = harness.stack.volume.glob("objects/*/1")
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.truncate(1000)
    answer = await get(harness.stack.url("1"))
    assert_whole(answer, item)
    assert answer.headers["x-cache"] != "hit"
    await harness.stack.until_hit("1")
    assert_whole(await get(harness.stack.url("1")), item)


async def test_odd_ranges_of_a_hit(harness: Harness) -> None:
    item = generated_object("1", 100_000)
    harness.publish([item])
    await harness.stack.up()
    await get(harness.stack.url("1"))
    await harness.stack.until_hit("1")
    longer = await get(harness.stack.url("1"), {"Range": "bytes=-500000"})
    assert longer.body == body_of(item)
    for malformed in ("bytes=100-50", "bytes=a-b", "lines=1-2", "bytes=", "bytes=--5"):
        answer = await get(harness.stack.url("1"), {"Range": malformed})
        assert (answer.status, len(answer.body)) == (200, item.size), malformed
    beyond = await get(harness.stack.url("1"), {"Range": "bytes=100000-"})
    assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{item.size}")
