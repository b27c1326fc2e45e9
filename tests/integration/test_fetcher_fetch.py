"""One fetch: what the sources send, and what is on the volume afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from distributor_node.services.api.assets.decision import Representation
from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import MODIFIED_AT, GeneratedContent, bytes_object
from distributor_node.shared.adapters.volume import PartialFile
from distributor_node.shared.domain.errors import VolumeFull
from distributor_node.shared.domain.jobs import Ack, Nack, Retry
from distributor_node.shared.domain.objects import MediaObject, StoredRecord
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import FetchPhase, Granted
from tests.counters import counted
from tests.integration.fetcher_harness import OBJECT_ID, Harness, fetcher_harness
from tests.waiting import eventually

SIZE = 3 * 1024 * 1024 + 17
DATA = GeneratedContent(7, SIZE).read(0, SIZE)
PNG = b"\x89PNG\r\n\x1a\n" + DATA[:1000]


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    async with fetcher_harness(tmp_path, [DATA, DATA]) as ready:
        yield ready


async def fetch(harness: Harness, wanted: MediaObject | None = None) -> object:
    return await harness.worker().handle(harness.job(wanted or harness.wanted(DATA)))


async def assert_stored(harness: Harness, data: bytes = DATA) -> None:
    assert harness.stored() == data
    assert harness.partial_size() is None
    usage = await harness.state.usage()
    assert (usage.used, usage.reserved, usage.objects) == (footprint(len(data)), 0, 1)
    assert (await harness.state.find(OBJECT_ID)).fetch is None


async def test_an_object_is_fetched_verified_and_committed(harness: Harness) -> None:
    written = counted("distributor_written_bytes_total")
    assert await fetch(harness) == Ack("fetched")
    await assert_stored(harness)
    assert counted("distributor_written_bytes_total") == written + SIZE


@pytest.mark.parametrize("data", [b"", b"x"])
async def test_small_and_empty_objects(tmp_path: Path, data: bytes) -> None:
    async with fetcher_harness(tmp_path, [data]) as harness:
        assert await fetch(harness, harness.wanted(data)) == Ack("fetched")
        await assert_stored(harness, data)


async def test_without_a_hash_the_size_is_the_check(harness: Harness) -> None:
    assert await fetch(harness, harness.wanted(DATA, hashed=False)) == Ack("fetched")
    await assert_stored(harness)


async def test_the_media_type_is_seen_in_the_bytes(tmp_path: Path) -> None:
    async with fetcher_harness(tmp_path, [PNG]) as harness:
        await fetch(harness, harness.wanted(PNG, "video/mp4"))
        record = harness.volume.read_record(OBJECT_ID)
        assert record is not None
        assert record.media_type == "image/png"
        assert record.etag == harness.wanted(PNG).etag


@pytest.mark.parametrize("hashed", [True, False])
async def test_the_date_of_the_source_is_kept_and_shown(harness: Harness, hashed: bool) -> None:
    """So `wget -N` and an If-Range with a date work from one node to the next."""
    assert await fetch(harness, harness.wanted(DATA, hashed=hashed)) == Ack("fetched")
    record = harness.volume.read_record(OBJECT_ID)
    assert record is not None
    assert record.stored_at > MODIFIED_AT
    assert Representation.from_record(record, complete=True).last_modified == MODIFIED_AT


async def test_a_type_unknown_to_the_catalog_is_recorded_before_the_first_byte(tmp_path: Path) -> None:
    held = [bytes_object(OBJECT_ID, DATA, told) for told in ("video/webm", "video/x-other")]
    async with fetcher_harness(tmp_path, held) as harness:
        harness.nodes[0].faults.add(Fault(cut_after=700_000))
        harness.nodes[1].faults.add(Fault(bytes_per_second=2_000_000), Match(first=1))
        running = asyncio.create_task(harness.worker().handle(harness.job(harness.wanted(DATA))))
        await harness.until_partial(1)
        assert sidecar_type(harness) == "video/webm"
        await harness.until_partial(800_000)
        running.cancel()
        await running
        harness.nodes[0].faults.add(Fault(status=500))
        running = asyncio.create_task(harness.worker().handle(harness.job(harness.wanted(DATA))))
        await harness.nodes[1].requests.wait_for(lambda log: len(log) == 2)
        assert sidecar_type(harness) == "video/webm"
        assert await running == Ack("fetched")
        record = harness.volume.read_record(OBJECT_ID)
        assert record is not None
        assert record.media_type == "application/octet-stream"


async def test_the_catalogs_type_is_noted_whatever_the_source_says(tmp_path: Path) -> None:
    async with fetcher_harness(tmp_path, [bytes_object(OBJECT_ID, DATA, "video/webm")]) as harness:
        harness.nodes[0].faults.add(Fault(bytes_per_second=4_000_000))
        running = asyncio.create_task(harness.worker().handle(harness.job(harness.wanted(DATA, "video/mp4"))))
        await harness.until_partial(1)
        assert sidecar_type(harness) == "video/mp4"
        assert await running == Ack("fetched")


def sidecar_type(harness: Harness) -> str | None:
    sidecar = harness.volume.partial_record(OBJECT_ID)
    assert sidecar is not None
    return sidecar.media_type


async def test_a_cached_object_is_not_fetched_again(harness: Harness) -> None:
    await fetch(harness)
    assert await fetch(harness) == Ack("already_cached")
    assert len(harness.nodes[0].requests) == 1


async def test_a_source_that_aborts_is_replaced_at_the_same_byte(harness: Harness) -> None:
    harness.nodes[0].faults.add(Fault(cut_after=1_000_000))
    assert await fetch(harness) == Ack("fetched")
    await assert_stored(harness)
    asked = harness.nodes[1].requests[0].range
    assert asked is not None
    assert not asked.startswith("bytes=0-")


async def test_a_source_that_stalls_is_replaced(harness: Harness) -> None:
    harness.nodes[0].faults.add(Fault(hang_after=1_000_000))
    assert await fetch(harness) == Ack("fetched")
    await assert_stored(harness)


async def test_corrupt_bytes_are_fetched_again_from_another_source(harness: Harness) -> None:
    harness.nodes[0].faults.add(Fault(flip_byte_at=1_234_567))
    assert await fetch(harness) == Ack("fetched")
    await assert_stored(harness)
    assert harness.nodes[1].requests[0].range is None


async def test_of_several_sources_the_corrupt_one_is_found(harness: Harness) -> None:
    harness.nodes[0].faults.add(Fault(cut_after=1_000_000, flip_byte_at=5), Match(first=1))
    harness.nodes[0].faults.add(Fault(flip_byte_at=5))
    assert await fetch(harness) == Ack("fetched")
    await assert_stored(harness)


async def test_corrupt_bytes_from_all_sources_leave_nothing(harness: Harness) -> None:
    for node in harness.nodes:
        node.faults.add(Fault(flip_byte_at=SIZE - 1))
    assert await fetch(harness) == Retry("all sources sent corrupt bytes")
    assert [len(node.requests) for node in harness.nodes] == [1, 1]
    await assert_nothing_is_left(harness)


@pytest.mark.parametrize(
    "trouble",
    [
        Fault(status=404),
        Fault(body_delta=-9, content_length_delta=-9),
        Fault(body_delta=9, content_length_delta=9),
        Fault(hang_before_headers=True),
    ],
    ids=str,
)
async def test_failing_sources_leave_no_partial_file(harness: Harness, trouble: Fault) -> None:
    for node in harness.nodes:
        node.faults.add(trouble)
    assert isinstance(await fetch(harness), Retry)
    await assert_nothing_is_left(harness)


async def assert_nothing_is_left(harness: Harness) -> None:
    usage = await harness.state.usage()
    assert (usage.used, usage.reserved, harness.partial_size(), harness.stored()) == (0, 0, None, None)
    assert (await harness.state.find(OBJECT_ID)).fetch is None


async def test_bytes_received_before_all_sources_failed_are_kept_and_resumed(harness: Harness) -> None:
    for node in harness.nodes:
        node.faults.add(Fault(cut_after=700_000))
    outcome = await fetch(harness)
    assert isinstance(outcome, Retry)
    assert outcome.reason.startswith("all sources failed")
    object_status = await harness.state.find(OBJECT_ID)
    assert object_status.fetch is not None
    assert object_status.fetch.phase is FetchPhase.PARKED
    size = harness.partial_size()
    assert size is not None
    assert size >= 700_000
    for node in harness.nodes:
        node.faults.clear()
        node.requests.clear()
    assert await fetch(harness) == Ack("fetched")
    await assert_stored(harness)
    asked = [record.range for node in harness.nodes for record in node.requests]
    assert asked == [f"bytes={size}-{SIZE - 1}"]


async def test_a_stopped_fetch_is_requeued_and_resumed(harness: Harness) -> None:
    harness.nodes[0].faults.add(Fault(bytes_per_second=2_000_000), Match(first=1))
    running = asyncio.create_task(harness.worker().handle(harness.job(harness.wanted(DATA))))
    await harness.until_partial(100_000)
    running.cancel()
    assert await running == Nack()
    object_status = await harness.state.find(OBJECT_ID)
    assert object_status.fetch is not None
    assert object_status.fetch.phase is FetchPhase.PARKED
    size = harness.partial_size()
    assert await fetch(harness) == Ack("fetched")
    await assert_stored(harness)
    assert harness.nodes[0].requests[1].range == f"bytes={size}-{SIZE - 1}"


async def test_bytes_of_other_content_are_not_resumed(harness: Harness) -> None:
    old = harness.wanted(b"o" * SIZE)
    harness.nodes[0].faults.add(Fault(bytes_per_second=2_000_000), Match(first=1))
    running = asyncio.create_task(harness.worker().handle(harness.job(old)))
    await harness.until_partial(100_000)
    running.cancel()
    await running
    assert await fetch(harness) == Ack("fetched")
    await assert_stored(harness)
    assert harness.nodes[0].requests[1].range is None


@pytest.mark.parametrize("intact", [True, False])
async def test_a_verified_file_is_published_while_a_follower_holds_it(harness: Harness, intact: bool) -> None:
    """1. A worker verifies a file. 2. A client follows it. 3. The worker dies before it publishes the file."""
    wanted = harness.wanted(DATA)
    partial = harness.volume.open_partial_for_writing(
        StoredRecord(OBJECT_ID, SIZE, wanted.etag, wanted.content_hash, None, 0)
    )
    partial.write(0, DATA if intact else b"x" * SIZE)
    partial.mark_verified()
    partial.close()
    follower = harness.volume.open_partial(OBJECT_ID)
    assert follower is not None
    assert follower.lock_shared()
    outcome = await fetch(harness, wanted)
    if intact:
        assert outcome == Ack("fetched")
        await assert_stored(harness)
    else:  # a power cut has spared the mark and not the bytes
        assert isinstance(outcome, Retry)
        assert harness.stored() is None
    assert not [record for node in harness.nodes for record in node.requests]
    follower.close()


@pytest.mark.parametrize("hashed", [True, False])
async def test_a_disk_that_is_full_at_publication_cuts_no_verified_file(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, hashed: bool
) -> None:
    """The record finds no room. A client is sending the file, and the next attempt needs no source."""
    followers, publish = [], PartialFile.publish

    def fail(partial: PartialFile, record: StoredRecord) -> None:
        follower = harness.volume.open_partial(OBJECT_ID)
        assert follower is not None
        assert follower.lock_shared()
        followers.append(follower)
        raise VolumeFull("no space for the record")

    monkeypatch.setattr(PartialFile, "publish", fail)
    wanted = harness.wanted(DATA, hashed=hashed)
    assert isinstance(await fetch(harness, wanted), Retry)
    assert followers[0].read(0, SIZE + 1) == DATA
    assert await reserves(harness, SIZE), "the bytes count while they are on the volume"
    assert sum(await harness.state.space_requests()) >= SIZE
    monkeypatch.setattr(PartialFile, "publish", publish)
    if hashed:
        assert await fetch(harness, wanted) == Ack("fetched")
        await assert_stored(harness)
        assert sum(len(node.requests) for node in harness.nodes) == 1
    followers[0].close()


async def test_what_a_larger_object_had_reserved_is_returned_once_its_file_is_cut(harness: Harness) -> None:
    size = SIZE + 1_000_000
    older = await harness.state.begin(OBJECT_ID, size, "worker-before")
    assert isinstance(older, Granted)
    partial = harness.volume.open_partial_for_writing(
        StoredRecord(OBJECT_ID, size, '"older"', None, "text/plain", 0)
    )
    partial.write(0, b"o" * size)
    partial.close()
    await harness.state.park(older.lease)
    harness.nodes[0].faults.add(Fault(bytes_per_second=2_000_000), Match(first=1))
    running = asyncio.create_task(harness.worker().handle(harness.job(harness.wanted(DATA))))
    await eventually(lambda: reserves(harness, SIZE))
    assert (harness.partial_size() or 0) < SIZE
    assert await running == Ack("fetched")
    await assert_stored(harness)


async def reserves(harness: Harness, size: int) -> bool:
    return (await harness.state.usage()).reserved == footprint(size)


async def test_corrupt_bytes_on_the_volume_restart_the_download_and_spare_the_source(
    harness: Harness,
) -> None:
    harness.nodes[0].faults.add(Fault(hang_after=1_000_000))
    harness.nodes[1].faults.add(Fault(status=404))
    await fetch(harness)
    partial = harness.volume.root / "incoming" / f"{OBJECT_ID}.part"
    with partial.open("r+b") as file:
        file.write(b"rot")
    for node in harness.nodes:
        node.faults.clear()
    assert await fetch(harness) == Ack("fetched")
    await assert_stored(harness)
