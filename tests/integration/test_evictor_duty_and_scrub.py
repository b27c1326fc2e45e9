"""Objects no longer ours, and objects that have rotted, leave the cache; a catalog's bad day drops nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.domain.objects import ObjectId
from shared.domain.space import footprint
from shared.observability.metrics import EVICTIONS, RECONCILED, SCRUBBED_OBJECTS
from tests.integration.evictor_world import (
    SIZE,
    EvictorWorld,
    body_of,
    eventually,
    evictor_world,
    media_object,
)

NAMES = ["one", "two", "three", "four"]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[EvictorWorld]:
    async with evictor_world(tmp_path) as made:
        yield made


def list_objects(world: EvictorWorld, *names: str) -> None:
    world.catalog.objects = {ObjectId(name): media_object(name, body_of(name)) for name in names}


async def test_objects_no_longer_ours_leave(world: EvictorWorld) -> None:
    list_objects(world, *NAMES)
    async with world.evictor(duty_interval=0.05):
        await eventually(world.reconciled)
        await world.store(*NAMES)
        list_objects(world, "two", "three", "four", "others")
        await eventually(lambda: not world.has("one"))

        async def dropped() -> bool:
            return sorted(await world.entries()) == ["four", "three", "two"]

        await eventually(dropped)
        assert await world.used() == 3 * footprint(SIZE)


@pytest.mark.parametrize("listed", [(), ("one",), ("others", "more")])
async def test_an_implausible_list_drops_nothing(world: EvictorWorld, listed: tuple[str, ...]) -> None:
    list_objects(world, *NAMES)
    before = RECONCILED.labels("duty_refused")._value.get()
    async with world.evictor(duty_interval=0.05):
        await eventually(world.reconciled)
        await world.store(*NAMES)
        list_objects(world, *listed)
        await eventually(lambda: RECONCILED.labels("duty_refused")._value.get() >= before + 3)
        assert sorted(await world.entries()) == sorted(NAMES)


async def test_a_catalog_that_is_down_drops_nothing(world: EvictorWorld) -> None:
    world.catalog.down = True
    before = RECONCILED.labels("duty_unavailable")._value.get()
    async with world.evictor(duty_interval=0.05):
        await eventually(world.reconciled)
        await world.store(*NAMES)
        await eventually(lambda: RECONCILED.labels("duty_unavailable")._value.get() >= before + 2)
        assert sorted(await world.entries()) == sorted(NAMES)


async def test_scrub_finds_rot(world: EvictorWorld) -> None:
    rotten = EVICTIONS.labels("rotten")._value.get()
    for name in NAMES:
        world.put_file(name)
    path = world.path_of("two")
    seen = path.stat()
    body = bytearray(path.read_bytes())
    body[SIZE // 2] ^= 1
    path.write_bytes(body)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    async with world.evictor(scrub_rate=100 * SIZE):

        async def gone() -> bool:
            return sorted(await world.entries()) == ["four", "one", "three"]

        await eventually(gone)
        await eventually(world.true_to_the_volume)
        assert not world.has("two")
    assert EVICTIONS.labels("rotten")._value.get() == rotten + 1


async def test_scrub_keeps_to_its_rate_and_leaves_sound_objects(world: EvictorWorld) -> None:
    sound = SCRUBBED_OBJECTS.labels("sound")._value.get()
    for name in NAMES:
        world.put_file(name)
    async with world.evictor(scrub_rate=2 * SIZE):
        await eventually(world.reconciled)
        await asyncio.sleep(1.2)
        assert 1 <= SCRUBBED_OBJECTS.labels("sound")._value.get() - sound <= 3
        assert len(await world.entries()) == 4
