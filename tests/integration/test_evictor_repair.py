"""Files without a record, when there are more of them than one run asks about; and whose list is asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.evictor.index import EvictionIndex
from services.evictor.removals import Removals
from services.evictor.repair import Repair
from services.evictor.takeover import Takeover
from shared.adapters.volume.intake import Intake
from shared.domain.eviction import Lru
from shared.domain.objects import DistributionBucket, Duty, MediaObject, ObjectId
from tests.integration.evictor_world import EvictorWorld, body_of, evictor_world, media_object


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[EvictorWorld]:
    async with evictor_world(tmp_path) as made:
        yield made


def removals_of(world: EvictorWorld) -> Removals:
    return Removals(world.state, world.volume, EvictionIndex(world.state, world.volume, Lru))


async def test_what_the_catalog_does_not_know_keeps_nothing_else_from_being_asked_about(
    world: EvictorWorld,
) -> None:
    names = [f"o{number}" for number in range(250)]
    for name in names:
        world.put_file(name, b"x" + name.encode())
        world.record_path_of(name).unlink()
    repair = Repair(world.volume, world.catalog, removals_of(world), None)
    repair.questions_most = 100
    term = await world.term()
    for _ in range(3):
        await repair.run(term)
    assert sorted(world.catalog.asked) == sorted(names), "each of them once"
    await repair.run(term)
    assert len(world.catalog.asked) == 350, "and then from the beginning"


async def test_the_list_of_a_takeover_is_that_of_the_duty_in_force(
    world: EvictorWorld, tmp_path: Path
) -> None:
    world.put_file("one")
    world.record_path_of("one").unlink()
    known = media_object("one", body_of("one"))
    world.catalog.objects[ObjectId("one")] = MediaObject(
        known.object_id, known.size, known.content_hash, buckets=(DistributionBucket("0:2"),)
    )
    duty = Duty(frozenset({"0:1"}))
    takeover = Takeover(Intake(world.root, tmp_path), None)
    repair = Repair(world.volume, world.catalog, removals_of(world), lambda: duty, takeover)
    duty = Duty(frozenset({"0:2"}))
    await repair.run(await world.term())
    assert world.volume.read_record(ObjectId("one")) is not None
    assert world.catalog.asked == []
