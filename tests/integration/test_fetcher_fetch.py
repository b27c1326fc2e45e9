"""One fetch: what comes from the sources, and what lies on the volume after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from services.demo.generated import GeneratedContent
from services.demo.knobs import Behaviour, Match
from services.demo.objects import bytes_object
from shared.domain.jobs import Done, HandBack, TryLater
from shared.domain.objects import MediaObject
from shared.domain.space import footprint
from shared.ports.state_store import FetchPhase
from tests.integration.fetcher_world import OBJECT_ID, World, fetcher_world

SIZE = 3 * 1024 * 1024 + 17
DATA = GeneratedContent(7, SIZE).read(0, SIZE)
PNG = b"\x89PNG\r\n\x1a\n" + DATA[:1000]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with fetcher_world(tmp_path, [DATA, DATA]) as ready:
        yield ready


async def fetch(world: World, wanted: MediaObject | None = None) -> object:
    return await world.worker().handle(world.job(wanted or world.wanted(DATA)))


async def assert_stored(world: World, data: bytes = DATA) -> None:
    assert world.stored() == data
    assert world.partial_size() is None
    usage = await world.state.usage()
    assert (usage.used, usage.reserved, usage.objects) == (footprint(len(data)), 0, 1)
    assert (await world.state.find(OBJECT_ID)).fetch is None


async def test_an_object_is_fetched_verified_and_committed(world: World) -> None:
    written = REGISTRY.get_sample_value("distributor_written_bytes_total") or 0.0
    assert await fetch(world) == Done("fetched")
    await assert_stored(world)
    assert REGISTRY.get_sample_value("distributor_written_bytes_total") == written + SIZE


@pytest.mark.parametrize("data", [b"", b"x"])
async def test_small_and_empty_objects(tmp_path: Path, data: bytes) -> None:
    async with fetcher_world(tmp_path, [data]) as world:
        assert await fetch(world, world.wanted(data)) == Done("fetched")
        await assert_stored(world, data)


async def test_without_a_hash_the_size_is_the_check(world: World) -> None:
    assert await fetch(world, world.wanted(DATA, hashed=False)) == Done("fetched")
    await assert_stored(world)


async def test_the_media_type_is_seen_in_the_bytes(tmp_path: Path) -> None:
    async with fetcher_world(tmp_path, [PNG]) as world:
        await fetch(world, world.wanted(PNG, "video/mp4"))
        record = world.volume.read_record(OBJECT_ID)
        assert record is not None
        assert record.media_type == "image/png"
        assert record.etag == world.wanted(PNG).etag


async def test_a_type_that_the_catalog_does_not_know_is_noted_before_the_first_byte(tmp_path: Path) -> None:
    held = [bytes_object(OBJECT_ID, DATA, told) for told in ("video/webm", "video/x-other")]
    async with fetcher_world(tmp_path, held) as world:
        world.nodes[0].knobs.add(Behaviour(cut_after=700_000))
        world.nodes[1].knobs.add(Behaviour(bytes_per_second=2_000_000), Match(first=1))
        running = asyncio.create_task(world.worker().handle(world.job(world.wanted(DATA))))
        await world.until_partial(1)
        assert sidecar_type(world) == "video/webm"
        await world.until_partial(800_000)
        running.cancel()
        await running
        world.nodes[0].knobs.add(Behaviour(status=500))
        running = asyncio.create_task(world.worker().handle(world.job(world.wanted(DATA))))
        await world.nodes[1].requests.wait_for(lambda log: len(log) == 2)
        assert sidecar_type(world) == "video/webm"
        assert await running == Done("fetched")
        record = world.volume.read_record(OBJECT_ID)
        assert record is not None
        assert record.media_type == "application/octet-stream"


async def test_the_catalogs_type_is_noted_whatever_the_source_says(tmp_path: Path) -> None:
    async with fetcher_world(tmp_path, [bytes_object(OBJECT_ID, DATA, "video/webm")]) as world:
        world.nodes[0].knobs.add(Behaviour(bytes_per_second=4_000_000))
        running = asyncio.create_task(world.worker().handle(world.job(world.wanted(DATA, "video/mp4"))))
        await world.until_partial(1)
        assert sidecar_type(world) == "video/mp4"
        assert await running == Done("fetched")


def sidecar_type(world: World) -> str | None:
    sidecar = world.volume.partial_record(OBJECT_ID)
    assert sidecar is not None
    return sidecar.media_type


async def test_what_is_cached_already_is_not_fetched_again(world: World) -> None:
    await fetch(world)
    assert await fetch(world) == Done("already cached")
    assert len(world.nodes[0].requests) == 1


async def test_a_source_that_cuts_is_replaced_at_the_same_byte(world: World) -> None:
    world.nodes[0].knobs.add(Behaviour(cut_after=1_000_000))
    assert await fetch(world) == Done("fetched")
    await assert_stored(world)
    asked = world.nodes[1].requests[0].range
    assert asked is not None
    assert not asked.startswith("bytes=0-")


async def test_a_source_that_stalls_is_replaced(world: World) -> None:
    world.nodes[0].knobs.add(Behaviour(hang_after=1_000_000))
    assert await fetch(world) == Done("fetched")
    await assert_stored(world)


async def test_wrong_bytes_are_fetched_anew_from_another_source(world: World) -> None:
    world.nodes[0].knobs.add(Behaviour(flip_byte_at=1_234_567))
    assert await fetch(world) == Done("fetched")
    await assert_stored(world)
    assert world.nodes[1].requests[0].range is None


async def test_of_several_sources_the_liar_is_found(world: World) -> None:
    world.nodes[0].knobs.add(Behaviour(cut_after=1_000_000, flip_byte_at=5), Match(first=1))
    world.nodes[0].knobs.add(Behaviour(flip_byte_at=5))
    assert await fetch(world) == Done("fetched")
    await assert_stored(world)


async def test_wrong_bytes_everywhere_leave_nothing(world: World) -> None:
    for node in world.nodes:
        node.knobs.add(Behaviour(flip_byte_at=SIZE - 1))
    assert await fetch(world) == TryLater("all sources gave wrong bytes")
    assert [len(node.requests) for node in world.nodes] == [1, 1]
    await assert_nothing_is_left(world)


@pytest.mark.parametrize(
    "trouble",
    [
        Behaviour(status=404),
        Behaviour(body_delta=-9, content_length_delta=-9),
        Behaviour(body_delta=9, content_length_delta=9),
        Behaviour(hang_before_headers=True),
    ],
    ids=str,
)
async def test_sources_that_give_nothing_leave_nothing(world: World, trouble: Behaviour) -> None:
    for node in world.nodes:
        node.knobs.add(trouble)
    assert isinstance(await fetch(world), TryLater)
    await assert_nothing_is_left(world)


async def assert_nothing_is_left(world: World) -> None:
    usage = await world.state.usage()
    assert (usage.used, usage.reserved, world.partial_size(), world.stored()) == (0, 0, None, None)
    assert (await world.state.find(OBJECT_ID)).fetch is None


async def test_what_came_before_all_failed_is_kept_and_gone_on_from(world: World) -> None:
    for node in world.nodes:
        node.knobs.add(Behaviour(cut_after=700_000))
    outcome = await fetch(world)
    assert isinstance(outcome, TryLater)
    assert outcome.reason.startswith("all sources failed")
    object_status = await world.state.find(OBJECT_ID)
    assert object_status.fetch is not None
    assert object_status.fetch.phase is FetchPhase.PARKED
    size = world.partial_size()
    assert size is not None
    assert size >= 700_000
    for node in world.nodes:
        node.knobs.clear()
        node.requests.clear()
    assert await fetch(world) == Done("fetched")
    await assert_stored(world)
    asked = [record.range for node in world.nodes for record in node.requests]
    assert asked == [f"bytes={size}-{SIZE - 1}"]


async def test_a_stopped_fetch_is_handed_back_and_gone_on_from(world: World) -> None:
    world.nodes[0].knobs.add(Behaviour(bytes_per_second=2_000_000), Match(first=1))
    running = asyncio.create_task(world.worker().handle(world.job(world.wanted(DATA))))
    await world.until_partial(100_000)
    running.cancel()
    assert await running == HandBack()
    object_status = await world.state.find(OBJECT_ID)
    assert object_status.fetch is not None
    assert object_status.fetch.phase is FetchPhase.PARKED
    size = world.partial_size()
    assert await fetch(world) == Done("fetched")
    await assert_stored(world)
    assert world.nodes[0].requests[1].range == f"bytes={size}-{SIZE - 1}"


async def test_bytes_of_other_content_are_not_gone_on_from(world: World) -> None:
    old = world.wanted(b"o" * SIZE)
    world.nodes[0].knobs.add(Behaviour(bytes_per_second=2_000_000), Match(first=1))
    running = asyncio.create_task(world.worker().handle(world.job(old)))
    await world.until_partial(100_000)
    running.cancel()
    await running
    assert await fetch(world) == Done("fetched")
    await assert_stored(world)
    assert world.nodes[0].requests[1].range is None


async def test_rotten_bytes_on_the_volume_cost_a_new_start_not_the_source(world: World) -> None:
    world.nodes[0].knobs.add(Behaviour(hang_after=1_000_000))
    world.nodes[1].knobs.add(Behaviour(status=404))
    await fetch(world)
    partial = world.volume.root / "incoming" / f"{OBJECT_ID}.part"
    with partial.open("r+b") as file:
        file.write(b"rot")
    for node in world.nodes:
        node.knobs.clear()
    assert await fetch(world) == Done("fetched")
    await assert_stored(world)
