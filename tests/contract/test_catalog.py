"""What every catalog promises, run against each of them, in front of one real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.demo.manifest import manifest_text
from services.demo.objects import DemoObject, bytes_object
from services.demo.storage_node import StorageNode
from shared.adapters.catalogs.cached import CachedCatalog, CacheLimits
from shared.adapters.catalogs.manifest import ManifestCatalog
from shared.adapters.catalogs.origin import OriginCatalog
from shared.domain.errors import CatalogUnavailable
from shared.domain.objects import Duty, ObjectId
from shared.ports.catalog import Catalog

OBJECTS: list[DemoObject] = [
    bytes_object("1", b"a" * 1000, "image/png"),
    bytes_object("2", b"b" * 2000, "text/vtt"),
    bytes_object("3", b""),
]
LIMITS = CacheLimits(positive_ttl=60, negative_ttl=60, max_in_flight=2, wait=5)


def build(kind: str, node: StorageNode, directory: Path) -> Catalog:
    origin = OriginCatalog(node.object_url("{id}"), timeout=5)
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


@pytest.fixture(params=["manifest", "origin", "cached origin"])
async def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Catalog]:
    async with StorageNode(OBJECTS).run() as node, opened(build(request.param, node, tmp_path)) as catalog:
        yield catalog


@pytest.mark.parametrize("wanted", OBJECTS, ids=lambda item: str(item.object_id))
async def test_an_object_is_described(catalog: Catalog, wanted: DemoObject) -> None:
    found = await catalog.look_up(ObjectId(wanted.object_id))
    assert found is not None
    assert found.object_id == wanted.object_id
    assert found.size == wanted.size
    assert found.media_type == wanted.media_type
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


async def test_a_list_is_whole_or_an_error(catalog: Catalog) -> None:
    try:
        listed = [item async for batch in catalog.list_objects(Duty()) for item in batch]
    except CatalogUnavailable:
        assert not isinstance(catalog, ManifestCatalog)
    else:
        assert sorted(item.object_id for item in listed) == ["1", "2", "3"]


async def test_a_list_is_of_the_duty_asked_for(catalog: Catalog) -> None:
    if not isinstance(catalog, ManifestCatalog):
        pytest.skip("an origin has no buckets")
    assert [batch async for batch in catalog.list_objects(Duty(bucket_ids=frozenset({"9:9"})))] == []
    batches = [batch async for batch in catalog.list_objects(Duty(bucket_ids=frozenset({"0:1"})))]
    assert sum(len(batch) for batch in batches) == len(OBJECTS)


async def test_the_buckets_are_known(catalog: Catalog) -> None:
    buckets = await catalog.bucket_ids()
    assert list(buckets) == (["0:1"] if isinstance(catalog, ManifestCatalog) else [])
