"""The joystream catalog against a test squid with every fault it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import structlog

from distributor_node.services.demo.manifest import known_hash
from distributor_node.services.demo.objects import BytesContent, DemoObject, bytes_object
from distributor_node.services.demo.squid import SquidFaults, StorageBucket, TestSquid
from distributor_node.services.demo.squid.sdl import BIGINT_WORKER
from distributor_node.shared.adapters.catalogs.cached import CachedCatalog, CacheLimits
from distributor_node.shared.adapters.catalogs.joystream import JoystreamCatalog, SquidLimits
from distributor_node.shared.domain.errors import CatalogUnavailable, ConfigurationError, QueryRejected
from distributor_node.shared.domain.objects import Assignment, DistributionBucket, MediaObject, ObjectId
from distributor_node.shared.ports.catalog import CatalogStatus
from distributor_node.shared.runtime.factories import build_catalog
from distributor_node.shared.settings.model import CatalogSettings, Settings
from tests.waiting import eventually

OBJECTS = [
    bytes_object("1", b"a" * 1000, "image/png"),
    bytes_object("2", b"b" * 2000, "text/vtt"),
    DemoObject("3", BytesContent(b"c"), held=False),
    DemoObject("4", BytesContent(b"d"), "text/html"),
    DemoObject("900", BytesContent(b"e"), bucket="9:9"),
]
NODES: list[str | StorageBucket] = [
    "https://one.example/",
    "https://two.example/storage",
    StorageBucket("2", "https://three.example", active=False),
    StorageBucket("3", None),
    StorageBucket("4", "http://127.0.0.1:8080"),
    StorageBucket("5", "https://user:secret@four.example/"),
]
ONE, TWO, UNKNOWN = ObjectId("1"), ObjectId("2"), ObjectId("404")
LIMITS = SquidLimits(timeout=20, list_timeout=20, list_batch=1, list_pause=0.0)
HURRIED = replace(LIMITS, timeout=0.3, list_timeout=0.3)
"""For questions that will not be answered."""
OURS, WORKER = Assignment(frozenset({"0:1"})), Assignment(worker_id=7)


@pytest.fixture
async def squid() -> AsyncIterator[TestSquid]:
    squid = TestSquid(OBJECTS, NODES, workers={7: ["0:1"], 8: ["9:9"]}, bags_per_bucket=3)
    async with squid.run():
        yield squid


@asynccontextmanager
async def opened(
    squid: TestSquid, limits: SquidLimits = LIMITS, *, refuse_private: bool = True
) -> AsyncIterator[JoystreamCatalog]:
    catalog = JoystreamCatalog(squid.url, limits, refuse_private=refuse_private)
    await catalog.open()
    try:
        yield catalog
    finally:
        await catalog.close()


@pytest.fixture
async def catalog(squid: TestSquid) -> AsyncIterator[JoystreamCatalog]:
    async with opened(squid) as catalog:
        yield catalog


async def listed(catalog: JoystreamCatalog, assignment: Assignment) -> list[str]:
    return sorted(
        item.object_id for batch in [b async for b in catalog.list_objects(assignment)] for item in batch
    )


async def test_an_object_is_described_in_full(catalog: JoystreamCatalog) -> None:
    found = await catalog.look_up(TWO)
    assert found is not None
    assert (found.size, found.media_type, found.accepted) == (2000, "text/vtt", True)
    assert str(found.content_hash) == known_hash(OBJECTS[1])
    assert found.sources == (
        "https://one.example/api/v1/files/2",
        "https://two.example/storage/api/v1/files/2",
    )
    assert found.buckets == (DistributionBucket("0:1", frozenset({7})),)
    assert OURS.covers(found)
    assert WORKER.covers(found)
    assert not Assignment(worker_id=990).covers(found)  # invited, no more
    assert not Assignment(frozenset({"9:9"})).covers(found)


async def test_private_sources_are_kept_unless_refused(squid: TestSquid) -> None:
    async with opened(squid, refuse_private=False) as catalog:
        found = await catalog.look_up(ONE)
    assert found is not None
    assert found.sources[2:] == ("http://127.0.0.1:8080/api/v1/files/1",)


@pytest.mark.parametrize(("chosen", "kept"), [({}, 0), ({"refuse_private_sources": False}, 1)])
async def test_by_default_the_network_cannot_name_this_machine_as_a_source(
    squid: TestSquid, chosen: dict[str, Any], kept: int
) -> None:
    catalog = CatalogSettings(kind="joystream", squid=squid.url, timeout=20, **chosen)
    built = build_catalog(Settings(catalog=catalog))
    await built.open()
    try:
        found = await built.look_up(ONE)
    finally:
        await built.close()
    assert found is not None
    assert len([url for url in found.sources if "127.0.0.1" in url]) == kept


async def test_unknown_not_uploaded_and_odd_objects(catalog: JoystreamCatalog) -> None:
    assert await catalog.look_up(UNKNOWN) is None
    announced, page = await catalog.look_up(ObjectId("3")), await catalog.look_up(ObjectId("4"))
    assert announced is not None
    assert page is not None
    assert not announced.accepted
    assert page.media_type is None


async def test_nulls_are_tolerated(squid: TestSquid, catalog: JoystreamCatalog) -> None:
    for nulls in (("operatorMetadata",), ("nodeEndpoint",), ("type", "operatorMetadata", "nodeEndpoint")):
        squid.faults = SquidFaults(nulls=nulls)
        found = await catalog.look_up(TWO)
        assert found is not None
        assert found.sources == ()
        assert await catalog.active_storage_endpoints() == ()
    squid.faults = SquidFaults(nulls=("squidStatus",))
    assert await catalog.status() == CatalogStatus(version="1.8.0-demo")


async def test_the_network_and_the_squid_itself(squid: TestSquid, catalog: JoystreamCatalog) -> None:
    endpoints = await catalog.active_storage_endpoints()
    assert [endpoint.api_url for endpoint in endpoints] == [
        "https://one.example/api/v1/",
        "https://two.example/storage/api/v1/",
    ]
    assert await catalog.status() == CatalogStatus(squid.height, "1.8.0-demo")
    assert await catalog.bucket_ids() == ("0:1", "9:9")


FAULTS = {
    "hanging": SquidFaults(hang=True),
    "slow": SquidFaults(latency=3600),
    "errors": SquidFaults(errors=True),
    "errors beside data": SquidFaults(errors_beside_data=True),
    "500": SquidFaults(status=500),
    "429": SquidFaults(status=429),
    "redirect": SquidFaults(redirect_to="http://127.0.0.1:1/"),
    "garbage": SquidFaults(garbage=True),
    "huge": SquidFaults(huge=20 * 1024 * 1024),
}
UNANSWERED = ("hanging", "slow")


@pytest.mark.parametrize("fault", FAULTS)
async def test_every_fault_is_unavailability_in_time(squid: TestSquid, fault: str) -> None:
    squid.faults = FAULTS[fault]
    async with opened(squid, HURRIED if fault in UNANSWERED else LIMITS) as catalog:
        for object_id in (ONE, UNKNOWN):
            with pytest.raises(CatalogUnavailable):
                await catalog.look_up(object_id)
        for ask in (catalog.bucket_ids, catalog.active_storage_endpoints, catalog.status):
            with pytest.raises(CatalogUnavailable):
                await ask()
        with pytest.raises(CatalogUnavailable):
            await listed(catalog, OURS)
        squid.faults = SquidFaults()

        async def recovered() -> bool:
            try:
                assert await catalog.look_up(UNKNOWN) is None
                assert await listed(catalog, OURS) == ["1", "2", "3", "4"]
            except CatalogUnavailable:
                return False
            return True

        await eventually(recovered)


async def test_an_outage_is_unavailability_and_is_survived(
    squid: TestSquid, catalog: JoystreamCatalog
) -> None:
    assert await catalog.look_up(ONE) is not None
    await squid.start_outage()
    with pytest.raises(CatalogUnavailable):
        await catalog.look_up(ONE)
    await squid.end_outage()
    assert await catalog.look_up(ONE) is not None


async def test_a_squid_down_at_the_start_is_tolerated(squid: TestSquid) -> None:
    await squid.start_outage()
    async with opened(squid) as catalog:
        await squid.end_outage()
        assert await catalog.look_up(ONE) is not None


async def test_an_invalid_url_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError):
        await JoystreamCatalog("http://user:secret@squid.example/", LIMITS, refuse_private=True).open()


@pytest.mark.parametrize("assignment", [OURS, WORKER], ids=["buckets", "worker"])
async def test_the_list_of_the_assignment(
    squid: TestSquid, catalog: JoystreamCatalog, assignment: Assignment
) -> None:
    batches = [batch async for batch in catalog.list_objects(assignment)]
    objects = [item for batch in batches for item in batch]
    assert sorted(item.object_id for item in objects) == ["1", "2", "3", "4"]
    assert len(batches) == 3
    assert all(assignment.covers(item) for item in objects)
    assert {item.media_type for item in objects} == {None, "text/vtt"}
    questions = [record for record in squid.requests if record.operation == "FirstPageOfBags"]
    assert [record.variables["bags"] for record in questions] == [1, 1, 1]


async def test_the_list_of_everything(catalog: JoystreamCatalog) -> None:
    assert await listed(catalog, Assignment()) == ["1", "2", "3", "4", "900"]


async def test_a_worker_without_buckets_has_nothing(catalog: JoystreamCatalog) -> None:
    assert await listed(catalog, Assignment(worker_id=12345)) == []


async def test_a_list_pauses_between_batches(squid: TestSquid) -> None:
    async with opened(squid, SquidLimits(list_batch=2, list_pause=0.2)) as catalog:
        assert len(await listed(catalog, OURS)) == 4
    times = [record.started_at for record in squid.requests if record.operation.endswith("PageOfBags")]
    assert len(times) == 3, "two batches; only the first had to be asked whether there is more"
    assert all(later - earlier >= 0.2 for earlier, later in pairwise(times))


PARTIAL = {
    "a bag is missing": SquidFaults(missing_bags=("dynamic:channel:0012",)),
    "a bucket is missing": SquidFaults(missing_buckets=("0:1",)),
    "lists are empty": SquidFaults(empty_lists=True),
    "the second batch fails": SquidFaults(errors=True, operations=("FirstPageOfBags",), spare=1),
    "the last batch hangs": SquidFaults(hang=True, operations=("FirstPageOfBags",), spare=2),
}


@pytest.mark.parametrize("fault", PARTIAL)
async def test_an_incomplete_list_always_raises(squid: TestSquid, fault: str) -> None:
    squid.faults = PARTIAL[fault]
    async with opened(squid, replace(LIMITS, list_timeout=2.0)) as catalog:
        with pytest.raises(CatalogUnavailable):
            await listed(catalog, OURS)


@pytest.mark.parametrize("page", [1, 2, 3, 4, 5])
async def test_bags_are_read_in_pages(squid: TestSquid, page: int) -> None:
    async with opened(squid, SquidLimits(list_batch=3, list_pause=0, list_page=page)) as catalog:
        batches = [batch async for batch in catalog.list_objects(OURS)]
    assert [item.object_id for batch in batches for item in batch] == ["1", "2", "3", "4"]
    assert max(map(len, batches)) == min(page, 4)
    assert all(OURS.covers(item) for batch in batches for item in batch)


async def test_a_squid_with_a_smaller_page_of_its_own(squid: TestSquid) -> None:
    squid.faults = SquidFaults(page_limit=3)
    async with opened(squid, SquidLimits(list_batch=3, list_pause=0)) as catalog:
        assert await listed(catalog, OURS) == ["1", "2", "3", "4"]


async def test_a_page_too_large_is_split_in_halves(squid: TestSquid) -> None:
    async with opened(
        squid, SquidLimits(list_batch=3, list_pause=0, list_page=4, max_list_response=600)
    ) as catalog:
        assert await listed(catalog, OURS) == ["1", "2", "3", "4"]
    sizes = [record.variables["n"] for record in squid.requests if record.operation.endswith("PageOfBags")]
    assert sizes[0] == 4
    assert sizes[-1] < 4
    async with opened(
        squid, SquidLimits(list_batch=3, list_pause=0, list_page=4, max_list_response=150)
    ) as catalog:
        with pytest.raises(CatalogUnavailable):
            await listed(catalog, OURS)


async def test_a_squid_that_ignores_where_a_page_begins_is_not_read_for_ever(squid: TestSquid) -> None:
    squid.faults = SquidFaults(ignore_id_gt=True)
    async with opened(squid, SquidLimits(list_batch=3, list_pause=0, list_page=2)) as catalog:
        with pytest.raises(CatalogUnavailable, match="twice"):
            await listed(catalog, OURS)


async def test_ids_of_workers_as_decimal_strings(squid: TestSquid, catalog: JoystreamCatalog) -> None:
    """The next squid's BigInt: the list of a worker, its buckets, and whether an object is ours."""
    squid.faults = SquidFaults(schema=BIGINT_WORKER)
    assert await catalog.bucket_ids(7) == ("0:1",)
    assert await listed(catalog, WORKER) == ["1", "2", "3", "4"]
    found = await catalog.look_up(TWO)
    assert found is not None
    assert WORKER.covers(found)
    asked = [
        record for record in squid.requests if record.operation == "BagsOfWorker" and not record.rejected
    ]
    assert [record.variables["w"] for record in asked] == ["7"]
    squid.faults = SquidFaults()
    assert await catalog.bucket_ids(8) == ("9:9",)
    assert await listed(catalog, WORKER) == ["1", "2", "3", "4"]


async def test_a_refused_question_is_told_apart_and_logged_once(
    squid: TestSquid, catalog: JoystreamCatalog
) -> None:
    squid.faults = SquidFaults(schema="without_workers")
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            with pytest.raises(QueryRejected):
                await catalog.bucket_ids(7)
    assert [entry["operation"] for entry in logs if entry["log_level"] == "error"] == ["BucketsOfWorker"]
    assert await catalog.bucket_ids() == ("0:1", "9:9")


@pytest.mark.parametrize(
    "schema", ["deprecated_only", "without_deprecated", "without_batches", "current", BIGINT_WORKER]
)
async def test_each_generation_of_servers_is_understood(
    squid: TestSquid, catalog: JoystreamCatalog, schema: str
) -> None:
    squid.faults = SquidFaults(schema=schema)
    found = await catalog.look_up(TWO)
    assert found is not None
    assert found.size == 2000
    assert await catalog.look_up(UNKNOWN) is None
    for assignment in (OURS, WORKER):
        assert await listed(catalog, assignment) == ["1", "2", "3", "4"]
    assert len(await catalog.active_storage_endpoints()) == 2


async def test_the_switch_is_persisted_and_undone(squid: TestSquid, catalog: JoystreamCatalog) -> None:
    async def refused(schema: str) -> int:
        squid.faults = SquidFaults(schema=schema)
        squid.requests.clear()
        assert await catalog.look_up(ONE) is not None
        return sum(record.rejected for record in squid.requests)

    assert await refused("current") == 0
    assert await refused("deprecated_only") > 0
    assert await refused("deprecated_only") == 0
    assert await refused("without_deprecated") > 0
    assert await refused("without_deprecated") == 0


async def test_two_hundred_unknown_ids_at_a_hanging_squid(squid: TestSquid) -> None:
    squid.faults = SquidFaults(hang=True)
    inner = JoystreamCatalog(squid.url, SquidLimits(timeout=2), refuse_private=True)
    limits = CacheLimits(positive_ttl=60, negative_ttl=60, max_in_flight=8, wait=2)
    catalog = CachedCatalog(inner, limits)
    await catalog.open()
    ids = [ObjectId(str(1000 + number)) for number in range(200)]
    one_after_another = len(ids) / limits.max_in_flight * limits.wait
    started = time.monotonic()
    outcomes = await asyncio.gather(
        *(catalog.look_up(object_id, "a") for object_id in [*ids, *ids]), return_exceptions=True
    )
    assert time.monotonic() - started < one_after_another / 4
    assert all(isinstance(outcome, CatalogUnavailable) for outcome in outcomes)
    assert squid.requests.max_in_flight <= 8
    assert max(squid.requests.count_for(object_id) for object_id in ids) == 1
    await squid.requests.wait_for(lambda requests: requests.in_flight == 0)
    squid.faults = SquidFaults()

    async def answers() -> bool:
        try:
            return await catalog.look_up(ids[0]) is None
        except CatalogUnavailable:
            return False

    await eventually(answers)
    await catalog.close()


async def test_a_known_object_is_known_while_the_squid_hangs(squid: TestSquid) -> None:
    now = 0.0
    inner = JoystreamCatalog(squid.url, LIMITS, refuse_private=True)
    limits = CacheLimits(positive_ttl=60, negative_ttl=60, max_in_flight=8, wait=20, stale_wait=0.3)
    catalog = CachedCatalog(inner, limits, lambda: now)
    await catalog.open()
    known = await catalog.look_up(ONE)
    assert isinstance(known, MediaObject)
    now = 1000.0
    for fault in (SquidFaults(status=503), SquidFaults(errors=True)):
        squid.faults = fault
        assert await catalog.look_up(ONE) == known
        now += 1000
    await squid.start_outage()
    assert await catalog.look_up(ONE) == known
    await squid.end_outage()
    now += 1000
    squid.faults = SquidFaults(hang=True)
    assert await catalog.look_up(ONE) == known
    await catalog.close()
