"""Repair of files without a record, in batches, by the list of the right assignment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.services.evictor.integrity import Repair
from distributor_node.services.evictor.node_import import NodeImport
from distributor_node.services.evictor.removal import ObjectRemover
from distributor_node.shared.adapters.volume.intake import ImportSource
from distributor_node.shared.domain.eviction import Lru
from distributor_node.shared.domain.objects import Assignment, DistributionBucket, MediaObject, ObjectId
from tests.integration.evictor_harness import EvictorHarness, body_of, evictor_harness, media_object


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[EvictorHarness]:
    async with evictor_harness(tmp_path) as made:
        yield made


def remover_of(harness: EvictorHarness) -> ObjectRemover:
    return ObjectRemover(harness.state, harness.volume, EvictionIndex(harness.state, harness.volume, Lru))


async def test_an_object_unknown_to_the_catalog_does_not_block_others(
    harness: EvictorHarness,
) -> None:
    names = [f"o{number}" for number in range(250)]
    for name in names:
        harness.put_file(name, b"x" + name.encode())
        harness.record_path_of(name).unlink()
    repair = Repair(harness.volume, harness.catalog, remover_of(harness), None)
    repair.max_lookups = 100
    term = await harness.term()
    for _ in range(3):
        await repair.run(term)
    assert sorted(harness.catalog.asked) == sorted(names), "each of them once"
    await repair.run(term)
    assert len(harness.catalog.asked) == 350, "and then from the beginning"


async def test_the_list_of_an_import_is_that_of_the_current_assignment(
    harness: EvictorHarness, tmp_path: Path
) -> None:
    harness.put_file("one")
    harness.record_path_of("one").unlink()
    known = media_object("one", body_of("one"))
    harness.catalog.objects[ObjectId("one")] = MediaObject(
        known.object_id, known.size, known.content_hash, buckets=(DistributionBucket("0:2"),)
    )
    assignment = Assignment(frozenset({"0:1"}))
    node_import = NodeImport(harness.state, ImportSource(harness.root, tmp_path), None)
    repair = Repair(harness.volume, harness.catalog, remover_of(harness), lambda: assignment, node_import)
    assignment = Assignment(frozenset({"0:2"}))
    await repair.run(await harness.term())
    assert harness.volume.read_record(ObjectId("one")) is not None
    assert harness.catalog.asked == []
