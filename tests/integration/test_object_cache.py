"""Open files and bodies in memory never outlive the object, and never hold its space."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from time import time
from types import SimpleNamespace

import pytest

from distributor_node.services.api.assets.decision import Span
from distributor_node.services.api.fast_path.object_cache import (
    IDLE_SECONDS,
    MAX_IN_MEMORY,
    RESIDENT_SECONDS,
    REVALIDATE_SECONDS,
    WATCHED_IDLE_SECONDS,
    WATCHED_SECONDS,
    CachedObject,
    OpenObjectCache,
)
from distributor_node.services.api.headers import HIT, TAIL, as_block, content_head
from distributor_node.shared.adapters.volume import RemovalState, Volume
from distributor_node.shared.domain.http_caching import Freshness
from distributor_node.shared.domain.objects import ObjectId, StoredRecord
from tests.compiled import needs_source
from tests.counters import counted
from tests.volume_size import bytes_on_volume
from tests.waiting import eventually

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


# Where the kernel tells of changes


@pytest.fixture
async def watched(harness: Harness) -> AsyncIterator[Harness]:
    harness.cache.start_watch()
    harness.store("0", b"a")
    watch = harness.volume.watch_changes()
    covered = watch is not None and watch.covers("0")
    if watch is not None:
        watch.close()
    if not covered:
        pytest.skip(f"the file system of {harness.volume.root} is not one of those that are watched")
    yield harness
    harness.cache.stop_watch()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The objects whose file was looked at."""
    seen: list[str] = []
    real = Volume.identity_of

    def look(volume: Volume, object_id: ObjectId) -> object:
        seen.append(object_id)
        return real(volume, object_id)

    monkeypatch.setattr(Volume, "identity_of", look)
    return seen


def path_of(harness: Harness, object_id: str = "1") -> Path:
    (path,) = harness.volume.root.glob(f"objects/*/{object_id}")
    return path


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_a_watched_object_is_looked_at_every_few_seconds(
    watched: Harness, looks: list[str], size: int
) -> None:
    watched.store("1", b"a" * size)
    began = watched.now
    while watched.now < began + 2 * WATCHED_SECONDS:
        assert watched.bytes_of("1") == b"a" * size
        watched.now += LATER
        await asyncio.sleep(0)
    assert 1 <= len(looks) <= 3


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x")


def replace_file(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize(
    "change",
    [
        overwrite,
        replace_file,
        Path.unlink,
        lambda path: os.truncate(path, 5),
        lambda path: os.truncate(path, 100_000),
        lambda path: os.utime(path, ns=(0, 0)),
        lambda path: path.chmod(0o600),
        lambda path: path.rename(path.with_name("away")),
        lambda path: path.parent.rename(path.parent.with_name("away")),
    ],
    ids=[
        "overwritten",
        "replaced",
        "unlinked",
        "cut",
        "grown",
        "times",
        "mode",
        "renamed",
        "directory renamed",
    ],
)
async def test_a_change_of_a_watched_file_is_noticed_at_once(
    watched: Harness, size: int, change: Callable[[Path], None]
) -> None:
    """The test's clock stands still: without the kernel's word the object would be served for WATCHED_SECONDS."""
    watched.store("1", b"a" * size)
    for _ in range(3):
        watched.acquire("1")
        watched.now += LATER
    first = watched.acquire("1")
    assert first is not None
    path = path_of(watched)
    change(path)

    def noticed() -> bool:
        found = watched.cache.get(b"1", watched.now)
        return found is not first or first.fresh_until <= watched.now + REVALIDATE_SECONDS

    if path.parent.exists():
        await eventually(noticed, 10)
    else:  # its open directory still leads to the file: looked at again, as it was
        before = first.fresh_until
        watched.now += LATER
        await eventually(
            lambda: watched.cache.get(b"1", watched.now) is None or first.fresh_until > before, 10
        )


async def test_a_removed_file_is_closed_at_once(watched: Harness) -> None:
    watched.store("1", b"a" * LARGE)
    assert watched.bytes_of("1") is not None
    watched.volume.removal(ObjectId("1")).rename_to_trash()
    await eventually(lambda: watched.remove("1") is RemovalState.READY, 10)
    assert not list(watched.volume.root.glob("leaving/*"))


async def test_an_attempt_to_remove_a_watched_object_closes_it_when_it_is_idle(watched: Harness) -> None:
    watched.store("1", b"a" * LARGE)
    assert watched.bytes_of("1") is not None
    watched.now += IDLE_SECONDS + 0.01
    await watched.cache.sweep()
    assert watched.remove("1") is RemovalState.IN_USE, "it stays open for its next use"
    await eventually(lambda: watched.remove("1") is RemovalState.READY, 10)


async def test_an_attempt_to_remove_an_object_in_use_closes_it_a_second_after_its_last_use(
    watched: Harness,
) -> None:
    watched.store("1", b"a" * LARGE)
    assert watched.bytes_of("1") is not None
    found = watched.cache.get(b"1", watched.now)
    assert found is not None
    assert watched.remove("1") is RemovalState.IN_USE
    await eventually(lambda: found.idle_limit == IDLE_SECONDS, 10)
    assert watched.remove("1") is RemovalState.IN_USE
    watched.now += IDLE_SECONDS + 0.01
    await watched.cache.sweep()
    assert watched.remove("1") is RemovalState.READY


async def test_a_watched_object_is_closed_after_some_seconds(watched: Harness) -> None:
    watched.store("1", b"a" * LARGE)
    assert watched.bytes_of("1") is not None
    watched.now += WATCHED_IDLE_SECONDS - 0.1
    await watched.cache.sweep()
    found = watched.cache.get(b"1", watched.now)
    assert found is not None
    assert found.locked
    watched.now += 0.2
    await watched.cache.sweep()
    assert found.dropped


async def test_a_file_with_two_names_is_looked_at_as_often_as_before(
    watched: Harness, looks: list[str]
) -> None:
    """The kernel does not tell of a change through a name in another directory."""
    watched.store("1", b"a" * LARGE)
    os.link(path_of(watched), watched.volume.root / "another")
    assert watched.bytes_of("1") is not None
    for _ in range(5):
        watched.now += LATER
        watched.bytes_of("1")
    assert len(looks) == 5


async def test_where_nothing_is_watched_objects_are_looked_at_as_before(
    watched: Harness, looks: list[str]
) -> None:
    """Also those that were watched until now."""
    watched.store("1", b"a" * LARGE)
    assert watched.bytes_of("1") is not None
    watched.cache.stop_watch()
    for _ in range(5):
        watched.bytes_of("1")
        watched.now += LATER
    assert len(looks) == 5


async def test_another_volume_at_the_path_is_noticed(watched: Harness) -> None:
    watched.store("1", b"a" * LARGE)
    assert watched.bytes_of("1") is not None
    root = watched.volume.root
    root.rename(root.with_name("away"))
    Volume(root).prepare()
    watched.volume.check()
    await watched.cache.sweep()
    assert watched.bytes_of("1") is None


@needs_source
async def test_a_send_that_waited_for_the_disk_has_the_page_cache_asked_again(
    watched: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = 7
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_inblock=blocks))
    watched.store("1", b"a" * LARGE)
    found = watched.acquire("1")
    assert found is not None
    cache = watched.cache
    assert cache.resident_seconds == RESIDENT_SECONDS
    assert found.is_resident(0, LARGE, watched.now, cache.resident_seconds)
    assert watched.now + REVALIDATE_SECONDS < found.resident_until
    before = counted("distributor_blocked_send_seconds_count")
    cache._blocks_read = blocks
    for _ in range(2):
        cache.note_blocked(0.5, watched.now)
    assert cache.resident_seconds == RESIDENT_SECONDS, "the process waited for the CPU"
    before += 2
    blocks += 1
    cache.note_blocked(0.5, watched.now)
    assert counted("distributor_blocked_send_seconds_count") == before + 1
    assert watched.now >= found.resident_until
    assert cache.resident_seconds == REVALIDATE_SECONDS
    await cache.sweep()
    assert cache.resident_seconds == REVALIDATE_SECONDS
    watched.now += 11
    await cache.sweep()
    assert cache.resident_seconds == RESIDENT_SECONDS
