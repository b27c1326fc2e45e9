"""What is kept open or in memory of hot objects never outlives the object, and never keeps its space."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.api.assets.hot import BELIEVED_SECONDS, IDLE_SECONDS, LARGEST_IN_MEMORY, HotObject, HotObjects
from shared.adapters.volume import RemovalState, Volume
from shared.domain.objects import ObjectId, StoredRecord

SMALL, LARGE = 1000, LARGEST_IN_MEMORY + 1
LATER = BELIEVED_SECONDS + 0.01


class World:
    """A volume, what is hot of it, and a clock of our own."""

    def __init__(self, root: Path, memory: int = 1024**2, most_open: int = 10) -> None:
        self.volume = Volume(root)
        self.volume.prepare()
        self.now = 100.0
        self.hot = HotObjects(self.volume, memory, most_open, lambda: self.now)

    def store(self, object_id: str, data: bytes) -> None:
        record = StoredRecord(ObjectId(object_id), len(data), f'"{data[:3].hex()}"', None, "image/png", 1)
        partial = self.volume.open_partial_for_writing(record)
        partial.write(0, data)
        partial.publish(record)
        partial.close()

    def take(self, object_id: str) -> HotObject | None:
        found = self.hot.get(object_id.encode(), self.now)
        if found is None or self.now < found.taken_until:
            return found
        return self.hot.take(object_id.encode(), found)

    def bytes_of(self, object_id: str) -> bytes | None:
        found = self.take(object_id)
        if found is None:
            return None
        found.used_at = self.now
        return found.body if found.body is not None else os.pread(found.descriptor, found.size + 1, 0)

    def remove(self, object_id: str) -> RemovalState:
        removal = self.volume.removal(ObjectId(object_id))
        try:
            state = removal.begin()
            if state is RemovalState.READY:
                removal.unlink()
            return state
        finally:
            removal.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "volume")
    yield made
    made.hot.close()
    made.volume.close()


async def test_what_is_hot_is_in_use_and_free_once_nobody_asks(world: World) -> None:
    world.store("1", b"a" * LARGE)
    assert world.bytes_of("1") == b"a" * LARGE
    assert world.remove("1") is RemovalState.IN_USE
    world.now += IDLE_SECONDS + 0.01
    await world.hot.sweep()
    assert world.remove("1") is RemovalState.READY
    assert world.volume.measure() == 0
    assert world.bytes_of("1") is None


async def test_what_is_only_looked_at_is_not_in_use(world: World) -> None:
    """As by HEAD, however often; nor does that prolong a use."""
    for size, object_id in ((SMALL, "1"), (LARGE, "2")):
        world.store(object_id, b"a" * size)
        for _ in range(3):
            assert world.hot.get(object_id.encode(), world.now) is not None
            world.now += LATER
        assert world.remove(object_id) is RemovalState.READY
    world.store("3", b"a" * LARGE)
    assert world.bytes_of("3") is not None
    assert world.remove("3") is RemovalState.IN_USE
    for _ in range(int(IDLE_SECONDS / LATER) + 1):
        world.now += LATER
        assert world.hot.get(b"3", world.now) is not None
        await world.hot.sweep()
    assert world.remove("3") is RemovalState.READY
    assert world.volume.measure() == 0


async def test_what_is_being_removed_is_not_taken(world: World) -> None:
    world.store("1", b"a" * LARGE)
    assert world.hot.get(b"1", world.now) is not None
    removal = world.volume.removal(ObjectId("1"))
    assert removal.begin() is RemovalState.READY
    assert world.take("1") is None
    removal.unlink()
    removal.close()
    assert world.take("1") is None


async def test_bodies_of_objects_that_are_gone_are_forgotten(world: World) -> None:
    for object_id in ("1", "2"):
        world.store(object_id, b"a" * SMALL)
        for _ in range(2):
            world.now += LATER
            assert world.bytes_of(object_id) is not None
    await world.hot.sweep()
    assert world.remove("1") is RemovalState.READY
    world.now += 11
    await world.hot.sweep()
    world.store("1", b"b" * SMALL)
    hot = world.hot.get(b"1", world.now)
    assert hot is not None
    assert hot.body is None
    hot = world.hot.get(b"2", world.now)
    assert hot is not None
    assert hot.body == b"a" * SMALL


async def test_what_is_set_aside_is_missed_and_let_go(world: World) -> None:
    world.store("1", b"a" * LARGE)
    assert world.bytes_of("1") is not None
    world.volume.removal(ObjectId("1")).set_aside()
    world.now += LATER
    assert world.bytes_of("1") is None
    assert world.remove("1") is RemovalState.READY
    assert world.volume.measure() == 0


async def test_what_is_sent_stays_open_until_it_has_been_sent(world: World) -> None:
    world.store("1", b"a" * LARGE)
    hot = world.take("1")
    assert hot is not None
    hot.begin_send()
    world.volume.removal(ObjectId("1")).set_aside()
    world.now += IDLE_SECONDS + LATER
    assert world.bytes_of("1") is None
    await world.hot.sweep()
    assert os.pread(hot.descriptor, LARGE, 0) == b"a" * LARGE
    assert world.remove("1") is RemovalState.IN_USE
    hot.end_send()
    assert world.remove("1") is RemovalState.READY


async def test_a_body_in_memory_takes_no_lock_and_goes_with_its_object(world: World) -> None:
    world.store("1", b"a" * SMALL)
    assert world.bytes_of("1") == b"a" * SMALL
    world.now += LATER
    hot = world.take("1")
    assert hot is not None
    assert hot.body == b"a" * SMALL
    assert world.remove("1") is RemovalState.READY
    assert world.volume.measure() == 0
    world.now += LATER
    assert world.bytes_of("1") is None


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_another_file_under_the_name_is_served_whole(world: World, size: int) -> None:
    world.store("1", b"a" * size)
    for _ in range(3):
        assert world.bytes_of("1") == b"a" * size
        world.now += LATER
    path = next((world.volume.root / "objects").glob("*/1"))
    path.rename(path.with_name("old"))
    world.store("1", b"b" * size)
    hot = world.hot.get(b"1", world.now)
    assert hot is not None
    assert hot.described.etag == f'"{b"bbb".hex()}"'
    assert world.bytes_of("1") == b"b" * size


async def test_a_file_cut_short_is_no_longer_hot(world: World) -> None:
    world.store("1", b"a" * LARGE)
    assert world.bytes_of("1") is not None
    os.truncate(next((world.volume.root / "objects").glob("*/1")), 5)
    world.now += LATER
    assert world.bytes_of("1") is None


async def test_open_files_and_memory_are_bounded(tmp_path: Path) -> None:
    world = World(tmp_path / "volume", memory=20 * 1024, most_open=3)
    for number in range(20):
        world.store(str(number), bytes([number]) * SMALL)
        world.store(str(100 + number), bytes([number]) * LARGE)
    for _ in range(3):
        for number in range(20):
            assert world.bytes_of(str(number)) == bytes([number]) * SMALL
            assert world.bytes_of(str(100 + number)) == bytes([number]) * LARGE
        world.now += LATER
    root = str(world.volume.root)
    paths = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    assert sum(path.startswith(root) and Path(path).is_file() for path in paths) <= 3
    world.hot.close()
    world.volume.close()


@pytest.mark.parametrize("key", [b"", b"..", b"a/b", b"\xff", b"7"])
async def test_what_is_not_there_is_not_hot(world: World, key: bytes) -> None:
    assert world.hot.get(key, world.now) is None


async def test_an_empty_object_is_left_to_the_framework(world: World) -> None:
    world.store("1", b"")
    assert world.bytes_of("1") is None
