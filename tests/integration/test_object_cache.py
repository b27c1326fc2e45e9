"""Open files and bodies in memory never outlive the object, and never hold its space."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from time import time

import pytest

from distributor_node.services.api.assets.decision import Span
from distributor_node.services.api.fast_path.object_cache import (
    IDLE_SECONDS,
    MAX_IN_MEMORY,
    REVALIDATE_SECONDS,
    CachedObject,
    OpenObjectCache,
)
from distributor_node.services.api.headers import HIT, TAIL, as_block, content_head
from distributor_node.shared.adapters.volume import RemovalState, Volume
from distributor_node.shared.domain.http_caching import Freshness
from distributor_node.shared.domain.objects import ObjectId, StoredRecord
from tests.volume_size import bytes_on_volume

SMALL, LARGE = 1000, MAX_IN_MEMORY + 1
LATER = REVALIDATE_SECONDS + 0.01


class Harness:
    """A volume, what is hot of it, and a clock of our own."""

    def __init__(
        self, root: Path, memory: int = 1024**2, max_open_files: int = 10, *, http_caching: bool = False
    ) -> None:
        self.volume = Volume(root)
        self.volume.prepare()
        self.now = 100.0
        self.cache = OpenObjectCache(
            self.volume, memory, max_open_files, lambda: self.now, http_caching=http_caching
        )

    def store(self, object_id: str, data: bytes, freshness: Freshness | None = None) -> None:
        etag = f'"{data[:3].hex()}"'
        record = StoredRecord(ObjectId(object_id), len(data), etag, None, "image/png", 1, freshness=freshness)
        partial = self.volume.open_partial_for_writing(record)
        partial.write(0, data)
        partial.publish(record)
        partial.close()

    def acquire(self, object_id: str) -> CachedObject | None:
        found = self.cache.get(object_id.encode(), self.now)
        if found is None or self.now < found.acquired_until:
            return found
        return self.cache.acquire(object_id.encode(), found)

    def bytes_of(self, object_id: str) -> bytes | None:
        found = self.acquire(object_id)
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
def harness(tmp_path: Path) -> Iterator[Harness]:
    made = Harness(tmp_path / "volume")
    yield made
    made.cache.close()
    made.volume.close()


async def test_an_open_object_is_in_use_until_it_is_idle(harness: Harness) -> None:
    harness.store("1", b"a" * LARGE)
    assert harness.bytes_of("1") == b"a" * LARGE
    assert harness.remove("1") is RemovalState.IN_USE
    harness.now += IDLE_SECONDS + 0.01
    await harness.cache.sweep()
    assert harness.remove("1") is RemovalState.READY
    assert bytes_on_volume(harness.volume.root) == 0
    assert harness.bytes_of("1") is None


async def test_an_object_only_looked_up_is_not_in_use(harness: Harness) -> None:
    """As by HEAD, however often; nor does that prolong a use."""
    for size, object_id in ((SMALL, "1"), (LARGE, "2")):
        harness.store(object_id, b"a" * size)
        for _ in range(3):
            assert harness.cache.get(object_id.encode(), harness.now) is not None
            harness.now += LATER
        assert harness.remove(object_id) is RemovalState.READY
    harness.store("3", b"a" * LARGE)
    assert harness.bytes_of("3") is not None
    assert harness.remove("3") is RemovalState.IN_USE
    for _ in range(int(IDLE_SECONDS / LATER) + 1):
        harness.now += LATER
        assert harness.cache.get(b"3", harness.now) is not None
        await harness.cache.sweep()
    assert harness.remove("3") is RemovalState.READY
    assert bytes_on_volume(harness.volume.root) == 0


async def test_an_object_being_removed_is_not_acquired(harness: Harness) -> None:
    harness.store("1", b"a" * LARGE)
    assert harness.cache.get(b"1", harness.now) is not None
    removal = harness.volume.removal(ObjectId("1"))
    assert removal.begin() is RemovalState.READY
    assert harness.acquire("1") is None
    removal.unlink()
    removal.close()
    assert harness.acquire("1") is None


async def test_bodies_of_removed_objects_are_dropped(harness: Harness) -> None:
    for object_id in ("1", "2"):
        harness.store(object_id, b"a" * SMALL)
        for _ in range(2):
            harness.now += LATER
            assert harness.bytes_of(object_id) is not None
    await harness.cache.sweep()
    assert harness.remove("1") is RemovalState.READY
    harness.now += 11
    await harness.cache.sweep()
    harness.store("1", b"b" * SMALL)
    cached = harness.cache.get(b"1", harness.now)
    assert cached is not None
    assert cached.body is None
    cached = harness.cache.get(b"2", harness.now)
    assert cached is not None
    assert cached.body == b"a" * SMALL


async def test_an_object_renamed_to_trash_is_noticed_and_closed(harness: Harness) -> None:
    harness.store("1", b"a" * LARGE)
    assert harness.bytes_of("1") is not None
    harness.volume.removal(ObjectId("1")).rename_to_trash()
    harness.now += LATER
    assert harness.bytes_of("1") is None
    assert harness.remove("1") is RemovalState.READY
    assert bytes_on_volume(harness.volume.root) == 0


async def test_a_file_being_sent_stays_open_until_it_is_sent(harness: Harness) -> None:
    harness.store("1", b"a" * LARGE)
    cached = harness.acquire("1")
    assert cached is not None
    cached.begin_send()
    harness.volume.removal(ObjectId("1")).rename_to_trash()
    harness.now += IDLE_SECONDS + LATER
    assert harness.bytes_of("1") is None
    await harness.cache.sweep()
    assert os.pread(cached.descriptor, LARGE, 0) == b"a" * LARGE
    assert harness.remove("1") is RemovalState.IN_USE
    cached.end_send()
    assert harness.remove("1") is RemovalState.READY


async def test_a_body_in_memory_takes_no_lock_and_is_dropped_with_its_object(harness: Harness) -> None:
    harness.store("1", b"a" * SMALL)
    assert harness.bytes_of("1") == b"a" * SMALL
    harness.now += LATER
    cached = harness.acquire("1")
    assert cached is not None
    assert cached.body == b"a" * SMALL
    assert harness.remove("1") is RemovalState.READY
    assert bytes_on_volume(harness.volume.root) == 0
    harness.now += LATER
    assert harness.bytes_of("1") is None


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_another_file_under_the_name_is_served_whole(harness: Harness, size: int) -> None:
    harness.store("1", b"a" * size)
    for _ in range(3):
        assert harness.bytes_of("1") == b"a" * size
        harness.now += LATER
    path = next((harness.volume.root / "objects").glob("*/1"))
    path.rename(path.with_name("old"))
    harness.store("1", b"b" * size)
    cached = harness.cache.get(b"1", harness.now)
    assert cached is not None
    assert cached.representation.etag == f'"{b"bbb".hex()}"'
    assert harness.bytes_of("1") == b"b" * size


async def test_a_truncated_file_is_dropped_from_the_object_cache(harness: Harness) -> None:
    harness.store("1", b"a" * LARGE)
    assert harness.bytes_of("1") is not None
    os.truncate(next((harness.volume.root / "objects").glob("*/1")), 5)
    harness.now += LATER
    assert harness.bytes_of("1") is None


async def test_open_files_and_memory_are_bounded(tmp_path: Path) -> None:
    harness = Harness(tmp_path / "volume", memory=20 * 1024, max_open_files=3)
    for number in range(20):
        harness.store(str(number), bytes([number]) * SMALL)
        harness.store(str(100 + number), bytes([number]) * LARGE)
    for _ in range(3):
        for number in range(20):
            assert harness.bytes_of(str(number)) == bytes([number]) * SMALL
            assert harness.bytes_of(str(100 + number)) == bytes([number]) * LARGE
        harness.now += LATER
    root = str(harness.volume.root)
    paths = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    assert sum(path.startswith(root) and Path(path).is_file() for path in paths) <= 3
    harness.cache.close()
    harness.volume.close()


@pytest.mark.parametrize("key", [b"", b"..", b"a/b", b"\xff", b"7"])
async def test_a_missing_object_is_not_cached(harness: Harness, key: bytes) -> None:
    assert harness.cache.get(key, harness.now) is None


async def test_an_empty_object_is_left_to_the_framework(harness: Harness) -> None:
    harness.store("1", b"")
    assert harness.bytes_of("1") is None


async def test_what_is_sent_of_an_object_that_can_become_stale(tmp_path: Path) -> None:
    """Its headers hold for a second, and are those of the other path."""
    harness = Harness(tmp_path / "volume", http_caching=True)
    harness.store("1", b"a" * SMALL, Freshness(int(time()) - 10, 60, cache_control="max-age=60"))
    cached = harness.acquire("1")
    assert cached is not None
    assert harness.now >= cached.tail_until
    assert cached.renew_tail(harness.now)
    assert harness.now < cached.tail_until <= harness.now + 1
    sent = cached.headers.whole + cached.tail
    age = int(sent.partition(b"\r\nAge: ")[2].partition(b"\r\n")[0])
    assert 10 <= age < 20
    assert b"\r\nCache-Status: distributor; hit; ttl=%d\r\n" % (60 - age) in sent
    span = Span(0, SMALL - 1, SMALL)
    expected = content_head(cached.representation, HIT, span, "local").headers
    expected |= {"Cache-Status": f"distributor; hit; ttl={60 - age}", "Age": str(age)}
    assert sent == b"HTTP/1.1 200 OK\r\n" + as_block(expected) + TAIL
    harness.cache.close()


@pytest.mark.parametrize("freshness", [Freshness(int(time()) - 61, 60), None])
async def test_a_stale_object_is_left_to_sanic(tmp_path: Path, freshness: Freshness | None) -> None:
    """None: it was stored before freshness was recorded."""
    harness = Harness(tmp_path / "volume", http_caching=True)
    harness.store("1", b"a" * SMALL, freshness)
    cached = harness.acquire("1")
    assert cached is not None
    assert harness.now >= cached.tail_until
    assert not cached.renew_tail(harness.now)
    harness.cache.close()
