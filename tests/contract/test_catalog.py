"""The contract of the catalog port, for every adapter, in front of one real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from distributor_node.services.demo.manifest import manifest_text
from distributor_node.services.demo.objects import DemoObject, bytes_object
from distributor_node.services.demo.squid import TestSquid
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.shared.adapters.catalogs.cached import CachedCatalog, CacheLimits
from distributor_node.shared.adapters.catalogs.joystream import JoystreamCatalog, SquidLimits
from distributor_node.shared.adapters.catalogs.manifest import ManifestCatalog
from distributor_node.shared.adapters.catalogs.origin import OriginCatalog
from distributor_node.shared.domain.errors import CatalogUnavailable
from distributor_node.shared.domain.objects import Assignment, ObjectId
from distributor_node.shared.ports.catalog import Catalog

OBJECTS: list[DemoObject] = [
    bytes_object("1", b"a" * 1000, "image/png"),
    bytes_object("2", b"b" * 2000, "text/vtt"),
    bytes_object("3", b""),
]
CANNOT_LIST = ("origin", "cached origin")
LIMITS = CacheLimits(positive_ttl=60, negative_ttl=60, max_in_flight=2, wait=30)


def build(kind: str, node: StorageNode, directory: Path) -> Catalog:
    origin = OriginCatalog(node.object_url("{id}"), timeout=30)
    if kind == "manifest":
        path = directory / "manifest.yaml"
        path.write_text(manifest_text(OBJECTS, node.object_url("")))
        return ManifestCatalog(path)
    return origin if kind == "origin" else CachedCatalog(origin, LIMITS)


@asynccontextmanager
async def opened(catalog: Catalog) -> AsyncIterator[Catalog]:
    await catalog.open()
    try:
        yield catalog
    finally:
        await catalog.close()


async def build_joystream(kind: str, node: StorageNode, stack: AsyncExitStack) -> Catalog:
    squid = await stack.enter_async_context(TestSquid(OBJECTS, [node.url]).run())
    joystream = JoystreamCatalog(
        squid.url, SquidLimits(timeout=30, list_timeout=30, list_batch=1, list_pause=0), refuse_private=False
    )
    return joystream if kind == "joystream" else CachedCatalog(joystream, LIMITS)


@pytest.fixture(params=["manifest", "origin", "cached origin", "joystream", "cached joystream"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def catalog(kind: str, tmp_path: Path) -> AsyncIterator[Catalog]:
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(StorageNode(OBJECTS).run())
        if kind.endswith("joystream"):
            built = await build_joystream(kind, node, stack)
        else:
            built = build(kind, node, tmp_path)
        yield await stack.enter_async_context(opened(built))


@pytest.mark.parametrize("wanted", OBJECTS, ids=lambda item: str(item.object_id))
async def test_an_object_is_described(kind: str, catalog: Catalog, wanted: DemoObject) -> None:
    found = await catalog.look_up(ObjectId(wanted.object_id))
    assert found is not None
    assert found.object_id == wanted.object_id
    assert found.size == wanted.size
    # A squid knows the types of subtitles alone.
    knows_type = "joystream" not in kind or wanted.media_type.startswith("text/")
    assert found.media_type == (wanted.media_type if knows_type else None)
    assert found.accepted
    assert len(found.sources) == 1
    assert found.sources[0].endswith(f"/api/v1/files/{wanted.object_id}")


async def test_the_same_object_always_has_the_same_etag(catalog: Catalog) -> None:
    first, second = await catalog.look_up(ObjectId("1")), await catalog.look_up(ObjectId("1"))
    assert first is not None
    assert second is not None
    assert first.etag == second.etag


async def test_an_unknown_object_does_not_exist(catalog: Catalog) -> None:
    assert await catalog.look_up(ObjectId("404")) is None
    assert await catalog.look_up(ObjectId("404")) is None


async def test_many_may_ask_at_once(catalog: Catalog) -> None:
    wanted = ["1", "2", "3", "404"] * 25
    found = await asyncio.gather(*(catalog.look_up(ObjectId(object_id)) for object_id in wanted))
    assert [item.object_id if item else None for item in found] == [
        None if object_id == "404" else object_id for object_id in wanted
    ]


async def test_a_list_is_complete_or_an_error(kind: str, catalog: Catalog) -> None:
    assert catalog.can_list == (kind not in CANNOT_LIST)
    try:
        listed = [item async for batch in catalog.list_objects(Assignment()) for item in batch]
    except CatalogUnavailable:
        assert kind in CANNOT_LIST
    else:
        assert sorted(item.object_id for item in listed) == ["1", "2", "3"]


async def test_a_list_covers_the_requested_assignment(kind: str, catalog: Catalog) -> None:
    theirs, ours = (Assignment(bucket_ids=frozenset({bucket})) for bucket in ("9:9", "0:1"))
    if kind in CANNOT_LIST:  # nor is it silent about it: an empty list would empty the cache
        for assignment in (theirs, ours):
            with pytest.raises(CatalogUnavailable):
                _ = [batch async for batch in catalog.list_objects(assignment)]
        return
    try:
        assert [batch async for batch in catalog.list_objects(theirs)] == []
    except CatalogUnavailable:
        assert "joystream" in kind  # a bucket that the squid leaves out may be there all the same
    batches = [batch async for batch in catalog.list_objects(ours)]
    assert sum(len(batch) for batch in batches) == len(OBJECTS)


async def test_the_buckets_are_known(kind: str, catalog: Catalog) -> None:
    buckets = await catalog.bucket_ids()
    assert list(buckets) == ([] if kind in CANNOT_LIST else ["0:1"])


async def test_the_bases_of_storage_nodes_are_known(kind: str, catalog: Catalog) -> None:
    known = await catalog.look_up(ObjectId("1"))
    assert known is not None
    (url,) = known.sources
    expected = [] if kind in CANNOT_LIST else [url.removesuffix("files/1")]
    assert list(await catalog.source_bases()) == expected


async def test_its_url_is_shown_where_it_has_one(kind: str, catalog: Catalog) -> None:
    assert (catalog.public_url == "") == (kind == "manifest")


async def test_its_server_reports_its_state_if_it_is_a_squid(kind: str, catalog: Catalog) -> None:
    status = await catalog.status()
    assert (status.blocks_processed is not None) == ("joystream" in kind)
    assert (status.version is not None) == ("joystream" in kind)
    assert await catalog.chain_head() is None  # none is configured
