"""A file that is not as it was verified is hashed again before it is served: other times, another inode."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from distributor_node.services.api.fast_path.object_cache import REVALIDATE_SECONDS
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.adapters.volume.records import RECORD_VERSION, FileState, decode_stored
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.jobs import Ack, JobOutcome, Requeue
from distributor_node.shared.domain.objects import StoredRecord
from tests.counters import counted
from tests.integration.assets_harness import assets_harness
from tests.integration.fetcher_harness import OBJECT_ID, Harness, fetcher_harness, hash_of

DATA = bytes(range(256)) * 1000
CHANGED = "distributor_changed_files_total"


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    made = Volume(tmp_path / "volume")
    made.prepare()
    yield made
    made.close()


def publish(volume: Volume, *, hashed: bool = True) -> Path:
    record = StoredRecord(
        OBJECT_ID, len(DATA), None, hash_of(DATA) if hashed else None, "image/png", 1_700_000_000
    )
    partial = volume.open_partial_for_writing(record)
    partial.write(0, DATA)
    partial.mark_verified()
    partial.publish(record)
    partial.close()
    return path_of(volume)


def path_of(volume: Volume) -> Path:
    (path,) = volume.root.glob(f"objects/*/{OBJECT_ID}")
    return path


def is_hit(volume: Volume) -> bool:
    """As another process sees it, which has cached nothing."""
    other = Volume(volume.root)
    try:
        return other.complete_record(OBJECT_ID) is not None
    finally:
        other.close()


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"x" * 40)


def overwrite_and_hide(path: Path) -> None:
    seen = path.stat()
    overwrite(path)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def copy(path: Path) -> None:
    """As a volume that is restored from a backup."""
    backup = path.with_name("backup")
    shutil.copy2(path, backup)
    backup.replace(path)


def change_mode(path: Path) -> None:
    path.chmod(0o600)


@pytest.mark.parametrize("change", [overwrite, overwrite_and_hide, touch, copy, change_mode])
def test_a_changed_file_is_no_hit_counted_and_logged_once(
    volume: Volume, change: Callable[[Path], None]
) -> None:
    path = publish(volume)
    assert volume.complete_record(OBJECT_ID) is not None
    assert is_hit(volume)
    before = counted(CHANGED)
    change(path)
    with capture_logs() as logs:
        assert volume.complete_record(OBJECT_ID) is None
        assert volume.complete_record(OBJECT_ID) is None
    assert [line["event"] for line in logs] == ["object_file_changed"]
    assert counted(CHANGED) - before == 2
    assert not is_hit(volume)


@pytest.mark.parametrize(
    ("change", "hit"), [(overwrite, False), (touch, False), (copy, True), (change_mode, True)]
)
def test_without_a_hash_only_a_change_of_content_counts(
    volume: Volume, change: Callable[[Path], None], hit: bool
) -> None:
    change(publish(volume, hashed=False))
    assert is_hit(volume) is hit


def test_a_record_of_the_version_before_is_a_hit_and_reads_the_records_of_this_one(volume: Volume) -> None:
    path = publish(volume)
    record = Path(str(path).replace("/objects/", "/records/"))
    fields = json.loads(record.read_bytes())
    assert fields["version"] == RECORD_VERSION == 1, "the version before ignores the state of the file"
    del fields["file"]
    record.write_text(json.dumps(fields))
    overwrite(path)
    assert is_hit(volume)


def test_a_hit_needs_no_additional_call(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(volume)
    assert volume.complete_record(OBJECT_ID) is not None
    calls: list[str] = []

    def count(name: str, real: Callable[..., Any]) -> None:
        def counting(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, counting)

    for name in ("open", "fstat", "stat", "pread", "read"):
        count(name, getattr(os, name))
    found = volume.open_object(OBJECT_ID)
    monkeypatch.undo()
    assert found is not None
    found.close()
    assert calls == ["open", "fstat"]


def test_the_change_time_is_filled_in_after_the_rename(volume: Volume) -> None:
    path = publish(volume)
    record = Path(str(path).replace("/objects/", "/records/"))
    _, state = decode_stored(record.read_bytes())
    assert state == FileState.of(path.stat())
    assert len(str(state)) == len(str(FileState(state.inode, state.size, state.modified_ns)))


def test_a_file_that_changes_while_it_is_verified_gets_no_record(volume: Volume) -> None:
    path = publish(volume)
    record = volume.read_record(OBJECT_ID)
    assert record is not None
    before = FileState.of(path.stat())
    overwrite(path)
    with pytest.raises(VolumeError, match="changed while it was verified"):
        volume.write_record(record, before)


async def run_job(harness: Harness) -> JobOutcome:
    return await harness.worker().handle(harness.job(harness.wanted(DATA)))


@pytest.mark.parametrize("change", [touch, copy, change_mode])
async def test_right_bytes_are_a_hit_again_without_a_download(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    async with fetcher_harness(tmp_path / "v", [DATA]) as harness:
        assert await run_job(harness) == Ack()
        requests = len(harness.nodes[0].requests)
        change(path_of(harness.volume))
        assert harness.stored() is None
        assert await run_job(harness) == Ack("already_cached")
        assert harness.stored() == DATA
        assert is_hit(harness.volume)
        assert len(harness.nodes[0].requests) == requests


@pytest.mark.parametrize("change", [overwrite, overwrite_and_hide])
async def test_wrong_bytes_are_replaced_by_a_download(tmp_path: Path, change: Callable[[Path], None]) -> None:
    async with fetcher_harness(tmp_path / "v", [DATA]) as harness:
        assert await run_job(harness) == Ack()
        change(path_of(harness.volume))
        assert await run_job(harness) == Ack()
        assert harness.stored() == DATA
        assert is_hit(harness.volume)


async def test_two_jobs_of_one_worker_hash_the_file_once(tmp_path: Path) -> None:
    async with fetcher_harness(tmp_path / "v", [DATA]) as harness:
        worker = harness.worker()
        job = harness.job(harness.wanted(DATA))
        assert await worker.handle(job) == Ack()
        touch(path_of(harness.volume))
        worker._admission._hashing.add(OBJECT_ID)
        assert await worker.handle(job) == Requeue("its file is being verified")
        assert path_of(harness.volume).read_bytes() == DATA


@pytest.mark.parametrize("size", [10_000, 200_000], ids=["in memory", "by sendfile"])
async def test_a_client_gets_the_right_bytes(tmp_path: Path, size: int) -> None:
    """Also where the object is open, or its bytes are in memory, since it was requested before."""
    async with assets_harness(tmp_path, first_byte_wait=0.3) as harness:
        data = harness.add("1", size)
        path = harness.store("1")
        for _ in range(3):
            answer = await harness.get("1")
            assert (answer.body, answer.headers["x-cache"]) == (data, "hit")
        overwrite(path)
        await asyncio.sleep(1.5 * REVALIDATE_SECONDS)
        answer = await harness.get("1")
        assert (answer.status, answer.body) == (200, data)
        assert answer.headers["x-cache"] != "hit"
        assert await harness.has_job(), "its fetch hashes the file"
