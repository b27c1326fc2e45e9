"""An unreadable file stops no work on others, and is never forgotten in the sums."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from distributor_node.shared.adapters.volume import (
    FoundObject,
    FoundPartial,
    Removal,
    RemovalState,
    UnknownFile,
    UnreadableFile,
    Volume,
)
from distributor_node.shared.adapters.volume.layout import shard
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.objects import ObjectId, StoredRecord
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import Access
from tests.integration.evictor_harness import (
    LIMIT,
    SIZE,
    EvictorHarness,
    body_of,
    evictor_harness,
    media_object,
)
from tests.waiting import eventually


class BadSector(Volume):
    """A volume with one file that can be opened and not be read."""

    unreadable = ObjectId("bad")

    def open_raw(self, object_id: ObjectId) -> int | None:
        descriptor = super().open_raw(object_id)
        if descriptor is None or object_id != self.unreadable:
            return descriptor
        os.close(descriptor)
        [path] = self.root.glob(f"objects/*/{object_id}")
        return os.open(path, os.O_WRONLY)


class UnremovableFile(Removal):
    """The removal of an object that the disk fails to open."""

    def begin(self) -> RemovalState:
        raise VolumeError("open: Input/output error")


class Unreadable(Volume):
    """A volume whose disk tells nothing of one object, as with EIO."""

    bad = ObjectId("none")

    def removal(self, object_id: ObjectId) -> Removal:
        removal = super().removal(object_id)
        if object_id == self.bad:
            removal.__class__ = UnremovableFile
        return removal

    def find_object(self, object_id: ObjectId) -> FoundObject | None:
        self._fail(object_id)
        return super().find_object(object_id)

    def open_raw(self, object_id: ObjectId) -> int | None:
        self._fail(object_id)
        return super().open_raw(object_id)

    def partial_record(self, object_id: ObjectId) -> StoredRecord | None:
        self._fail(object_id)
        return super().partial_record(object_id)

    def _fail(self, object_id: ObjectId) -> None:
        if object_id == self.bad:
            raise VolumeError(f"stat {object_id}: Input/output error")


@pytest.fixture
async def unreadable(harness: EvictorHarness) -> AsyncIterator[Unreadable]:
    """The volume of the harness. Nothing is unreadable until `bad` is set."""
    volume = harness.volume = Unreadable(harness.root)
    yield volume
    volume.close()


async def test_an_unreadable_object_in_the_access_log_stops_nothing(
    harness: EvictorHarness, unreadable: Unreadable
) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("good", age=3600)
        unreadable.bad = ObjectId("bad")
        await harness.state.record_accesses([Access(unreadable.bad, 1, time.time())])
        await harness.state.record_accesses([Access(ObjectId("good"), 41, time.time())])
    async with harness.evictor():

        async def applied() -> bool:
            return (await harness.entries())["good"].frequency == 42

        await eventually(applied)
        await harness.store(*(f"o{number}" for number in range(9)), age=1800)  # above the high watermark

        async def evicted() -> bool:
            return await harness.used() <= LIMIT // 2

        await eventually(evicted)


async def test_an_unreadable_victim_does_not_stop_eviction(
    harness: EvictorHarness, unreadable: Unreadable
) -> None:
    """It is the first in the order of eviction."""
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("bad", *(f"o{number}" for number in range(8)), age=36_000)
    unreadable.bad = ObjectId("bad")
    async with harness.evictor():
        await harness.state.request_space(ObjectId("wanted"), 4 * SIZE, 60.0)

        async def evicted() -> bool:
            return await harness.used() <= LIMIT - 4 * footprint(SIZE)

        await eventually(evicted)
    assert "bad" in await harness.entries()
    assert list(harness.root.glob("objects/*/bad"))


async def test_an_unreadable_partial_file_does_not_keep_the_room_of_others(
    harness: EvictorHarness, unreadable: Unreadable
) -> None:
    """It is the first that is given up for an object that asks for room."""
    async with harness.evictor():
        await eventually(harness.reconciled)
    for name in ("bad", "other"):
        lease = await harness.begin_fetch(name, 4 * SIZE)
        harness.leave_partial(name, 4 * SIZE - 100, 4 * SIZE)
        await harness.state.park(lease)
    unreadable.bad = ObjectId("bad")
    settings = harness.settings()
    hurried = settings.fetch.model_copy(update={"space_wait": 0.1})  # parked fetches are given up after this
    async with harness.evictor_of(settings.model_copy(update={"fetch": hurried})):
        await harness.state.request_space(ObjectId("wanted"), 4 * SIZE, 60.0)
        await eventually(lambda: not harness.root.joinpath("incoming", "other.part").exists())
    assert harness.root.joinpath("incoming", "bad.part").exists()


async def test_an_unreadable_object_is_no_obstacle_to_scrub_and_sweep(
    harness: EvictorHarness, unreadable: Unreadable
) -> None:
    names = [f"o{number}" for number in range(5)]
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("o0", "o1", "o2")
        for name in names[:3]:
            harness.path_of(name).write_bytes(b"?" * SIZE)
        for name in ("p0", "p1", "p2"):
            harness.leave_partial(name, 1000)
            os.utime(harness.root / "incoming" / f"{name}.part", (1, 1))
    first = min(names[:3], key=lambda name: shard(ObjectId(name)))  # as the scrub comes to them
    unreadable.bad = ObjectId(first)
    async with harness.evictor(scrub_rate=1_000_000_000, partial_keep=0.2):
        await eventually(lambda: not harness.root.joinpath("incoming", "p2.part").exists())
        await eventually(lambda: list(harness.root.glob("objects/*/o*")) == [harness.path_of(first)])
    unreadable.bad = ObjectId("p1")
    harness.leave_partial("p1", 1000)
    harness.leave_partial("p3", 1000)
    for name in ("p1", "p3"):
        os.utime(harness.root / "incoming" / f"{name}.part", (1, 1))
    async with harness.evictor(partial_keep=0.2):
        await eventually(lambda: not harness.root.joinpath("incoming", "p3.part").exists())


async def test_an_unreadable_object_delays_no_other_purge(
    harness: EvictorHarness, unreadable: Unreadable
) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("good")
        lease = await harness.begin_fetch("bad")
        harness.leave_partial("bad", 1000)
        await harness.state.park(lease)
    unreadable.bad = ObjectId("bad")
    await harness.state.request_purges([unreadable.bad, ObjectId("good")])

    async def only_bad_is_left() -> bool:
        return [request.object_id for request in await harness.state.pending_purges(9)] == ["bad"]

    async with harness.evictor():
        await eventually(only_bad_is_left)
    assert not harness.has("good")


class UnreadableParts(Volume):
    """A volume whose disk fails for parts of objects. A part is a function of this class."""

    fails: str = ""

    def find_object(self, object_id: ObjectId) -> FoundObject | None:
        self._fail("find_object")
        return super().find_object(object_id)

    def read_record(self, object_id: ObjectId) -> StoredRecord | None:
        self._fail("read_record")
        return super().read_record(object_id)

    def partial_record(self, object_id: ObjectId) -> StoredRecord | None:
        self._fail("partial_record")
        return super().partial_record(object_id)

    def scan_partials(self) -> Iterator[FoundPartial | UnknownFile]:
        for seen in super().scan_partials():
            bad = isinstance(seen, FoundPartial) and self.fails == "scan_partials"
            yield UnreadableFile(f"incoming/{seen}", "Input/output error") if bad else seen

    def _fail(self, part: str) -> None:
        if part == self.fails:
            raise VolumeError(f"{part}: Input/output error")


@pytest.mark.parametrize("fails", ["find_object", "partial_record", "scan_partials"])
async def test_the_index_does_not_stand_for_a_volume_with_unreadable_files(
    harness: EvictorHarness, fails: str
) -> None:
    """What cannot be counted may be of any size: no space is granted before it is."""
    volume = harness.volume = UnreadableParts(harness.root)
    harness.put_file("one")
    harness.leave_partial("two", 1000)
    volume.fails = fails
    with capture_logs() as logs:
        async with harness.evictor():
            await eventually(lambda: "reconciliation_finished" in [line["event"] for line in logs])
            assert not await harness.reconciled()
            volume.fails = ""
            await eventually(harness.reconciled)
            assert await harness.matches_volume()
    volume.close()


async def test_an_object_with_an_unreadable_record_counts(harness: EvictorHarness) -> None:
    volume = harness.volume = UnreadableParts(harness.root)
    harness.put_file("one")
    volume.fails = "read_record"
    async with harness.evictor():
        await eventually(harness.reconciled)
        assert await harness.used() == footprint(SIZE)
        volume.fails = ""
    volume.close()


@pytest.mark.parametrize("hashed", [True, False])
async def test_an_unreadable_file_does_not_block_others(tmp_path: Path, hashed: bool) -> None:
    async with evictor_harness(tmp_path) as harness:
        harness.volume = BadSector(harness.root)
        names = ["bad", *(f"o{number}" for number in range(4))]
        for name in names:
            harness.put_file(name)
            harness.record_path_of(name).unlink()
            known = media_object(name, body_of(name))
            harness.catalog.objects[known.object_id] = known if hashed else replace(known, content_hash=None)
        with capture_logs() as logs:
            async with harness.evictor():
                await eventually(lambda: all(harness.volume.read_record(ObjectId(n)) for n in names[1:]))
                await eventually(
                    lambda: (
                        ("objects_not_repaired", 1) in [(line["event"], line.get("count")) for line in logs]
                    )
                )
        assert harness.has("bad")
        harness.volume.close()
