"""The volume: a file on it is complete or clearly partial, and no removal truncates a running response."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import multiprocessing
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from blake3 import blake3
from structlog.testing import capture_logs

from distributor_node.services.api.service import watch_volume
from distributor_node.shared.adapters.volume import (
    FoundObject,
    FoundPartial,
    OpenObject,
    PartialHeld,
    RemovalState,
    UnknownFile,
    UnreadableFile,
    Volume,
)
from distributor_node.shared.adapters.volume import partial as partial_module
from distributor_node.shared.adapters.volume.layout import file_system_of, shard
from distributor_node.shared.domain.errors import VolumeError, VolumeFull
from distributor_node.shared.domain.objects import ContentHash, ObjectId, StoredRecord, entity_tag
from tests.bad_inode import fail_stat_of
from tests.volume_size import bytes_on_volume
from tests.waiting import eventually

BODY = bytes(range(256)) * 1000


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    made = Volume(tmp_path / "volume")
    made.prepare()
    yield made
    made.close()


def record_of(name: str, body: bytes = BODY) -> StoredRecord:
    object_id = ObjectId.parse(name)
    content_hash = ContentHash("blake3", blake3(body).digest())
    etag = entity_tag(content_hash)
    return StoredRecord(object_id, len(body), etag, content_hash, "image/png", 1_700_000_000)


def store(volume: Volume, name: str, body: bytes = BODY) -> StoredRecord:
    record = record_of(name, body)
    partial = volume.open_partial_for_writing(record)
    partial.write(0, body)
    partial.mark_verified()
    partial.publish(record)
    partial.close()
    return record


def opened(volume: Volume, name: str) -> OpenObject:
    found = volume.open_object(ObjectId(name))
    assert found is not None
    return found


def path_of(volume: Volume, name: str) -> Path:
    (found,) = (volume.root / "objects").glob(f"*/{name}")
    return found


def test_a_published_object_is_read_back_with_its_record(volume: Volume) -> None:
    record = store(volume, "1")
    found = opened(volume, "1")
    assert found.record == record
    assert found.read(0, len(BODY) + 1) == BODY
    found.close()


def test_publishing_leaves_nothing_in_incoming(volume: Volume) -> None:
    store(volume, "1")
    assert list((volume.root / "incoming").iterdir()) == []


def test_a_partial_file_is_no_object(volume: Volume) -> None:
    partial = volume.open_partial_for_writing(record_of("1"))
    partial.write(0, BODY)
    assert volume.open_object(ObjectId("1")) is None
    partial.close()


def test_a_partial_file_survives_its_writer_and_is_resumed(volume: Volume) -> None:
    partial = volume.open_partial_for_writing(record_of("1"))
    partial.write(0, BODY[:1000])
    partial.close()
    again = volume.open_partial_for_writing(record_of("1"))
    assert again.size == 1000
    assert again.read(0, 5000) == BODY[:1000]
    again.close()


def test_only_one_writer_at_a_time(volume: Volume) -> None:
    partial = volume.open_partial_for_writing(record_of("1"))
    with pytest.raises(PartialHeld):
        volume.open_partial_for_writing(record_of("1"))
    partial.close()
    volume.open_partial_for_writing(record_of("1")).close()


def write_and_hang(root: Path, signals: Connection) -> None:
    held = Volume(root).open_partial_for_writing(record_of("1"))
    held.write(0, BODY[:77])
    signals.send(True)
    signals.recv()


def test_a_killed_writer_releases_its_lock(volume: Volume) -> None:
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=write_and_hang, args=(volume.root, theirs))
    process.start()
    assert ours.poll(20)
    with pytest.raises(PartialHeld):
        volume.open_partial_for_writing(record_of("1"))
    process.kill()
    process.join(10)
    again = volume.open_partial_for_writing(record_of("1"))
    assert again.size == 77
    again.close()


def test_a_reader_sees_growth_then_verification_then_keeps_reading(volume: Volume) -> None:
    partial = volume.open_partial_for_writing(record_of("1"))
    partial.write(0, BODY[:1000])
    reader = volume.open_partial(ObjectId("1"))
    assert reader is not None
    assert (reader.state().size, reader.state().verified, reader.state().unlinked) == (1000, False, False)
    partial.write(1000, BODY[1000:])
    partial.mark_verified()
    assert (reader.state().size, reader.state().verified) == (len(BODY), True)
    partial.publish(record_of("1"))
    partial.close()
    assert reader.read(0, len(BODY)) == BODY
    assert not reader.state().unlinked
    reader.close()


@pytest.mark.parametrize("ending", ["restart", "discard"])
def test_a_reader_sees_that_its_file_is_removed_and_its_bytes_freed(volume: Volume, ending: str) -> None:
    partial = volume.open_partial_for_writing(record_of("1"))
    partial.write(0, BODY[:1000])
    reader = volume.open_partial(ObjectId("1"))
    assert reader is not None
    getattr(partial, ending)()
    assert reader.state().unlinked
    assert reader.read(0, 1000) == b""
    reader.close()
    partial.close()


def test_a_failed_discard_releases_the_lock(volume: Volume) -> None:
    partial = volume.open_partial_for_writing(record_of("1"))
    (volume.root / "incoming" / "1.part").unlink()
    (volume.root / "incoming" / "1.part").mkdir()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(VolumeError):
        partial.discard()
    assert len(list(Path("/proc/self/fd").iterdir())) == before - 2, "the file and its directory"
    (volume.root / "incoming" / "1.part").rmdir()
    volume.open_partial_for_writing(record_of("1")).close()


def test_resuming_a_verified_partial_takes_the_mark_away(volume: Volume) -> None:
    partial = volume.open_partial_for_writing(record_of("1"))
    partial.write(0, BODY)
    partial.mark_verified()
    partial.close()
    again = volume.open_partial_for_writing(record_of("1"))
    reader = volume.open_partial(ObjectId("1"))
    assert reader is not None
    assert not reader.state().verified
    reader.close()
    again.close()


def test_a_partials_record_is_known_before_its_first_byte(volume: Volume) -> None:
    partial = volume.open_partial_for_writing(record_of("1"))
    assert volume.partial_record(ObjectId("1")) == record_of("1")
    partial.discard()
    assert volume.partial_record(ObjectId("1")) is None


def test_a_published_object_can_be_held_and_not_removed_while_its_writer_still_has_it(volume: Volume) -> None:
    partial = volume.open_partial_for_writing(record_of("1"))
    partial.write(0, BODY)
    partial.publish(record_of("1"))
    removal = volume.removal(ObjectId("1"))
    assert removal.begin() is RemovalState.IN_USE
    removal.close()
    found = volume.open_object(ObjectId("1"))
    assert found is not None
    assert found.lock_shared()
    found.close()
    partial.close()


def test_a_media_type_from_the_source_is_recorded_with_the_next_bytes(volume: Volume) -> None:
    untold = replace(record_of("1"), media_type=None)
    partial = volume.open_partial_for_writing(untold)
    assert volume.partial_record(ObjectId("1")) == untold
    for told in ("application/vnd.a-long-name; charset=utf-8", "text/vtt"):
        partial.set_media_type(told)
        partial.write(0, b"some")
        assert volume.partial_record(ObjectId("1")) == replace(untold, media_type=told)
    partial.close()


def test_bytes_of_another_version_are_dropped_before_the_sidecar_changes(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash in between must not leave the new sidecar beside the old bytes."""
    before = volume.open_partial_for_writing(record_of("1"))
    before.write(0, b"old")
    before.close()
    other = replace(record_of("1"), size=1000)
    sizes: list[int] = []

    def note(name: str, body: bytes, directory: int, **durable: bool) -> None:
        sizes.append((volume.root / "incoming" / "1.part").stat().st_size)
        raise OSError(errno.EIO, "crashed here")

    with monkeypatch.context() as patched:
        patched.setattr(partial_module, "atomic_write", note)
        with pytest.raises(VolumeError):
            volume.open_partial_for_writing(other, empty=True)
    assert sizes == [0]
    assert volume.partial_record(ObjectId("1")) == record_of("1")
    after = volume.open_partial_for_writing(other, empty=True)
    assert (after.size, volume.partial_record(ObjectId("1"))) == (0, other)
    after.close()


def test_a_sparse_file_of_another_version_is_dropped_although_it_names_nothing(volume: Volume) -> None:
    before = volume.open_partial_for_writing(record_of("1"))
    before.make_sparse(0)
    before.close()
    after = volume.open_partial_for_writing(replace(record_of("1"), etag='"another"'), empty=True)
    assert not after.is_sparse
    after.close()


def test_the_file_system_is_known_by_its_mount(volume: Volume) -> None:
    descriptor = os.open("/proc/self", os.O_RDONLY)
    try:
        assert file_system_of(descriptor) == "proc"
    finally:
        os.close(descriptor)
    kind = subprocess.run(
        ["stat", "--file-system", "--format=%T", volume.root], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert volume.is_on_local_disk() == (
        kind in ("ext2/ext3", "overlayfs", "tmpfs", "xfs", "btrfs", "f2fs", "zfs")
    )


def test_cleanup_changes_no_sidecar(volume: Volume) -> None:
    volume.open_partial_for_writing(record_of("1")).close()
    stranger = replace(record_of("1"), etag='"another"')
    held = volume.open_partial_for_writing(stranger, write_sidecar=False)
    assert volume.partial_record(ObjectId("1")) == record_of("1")
    held.close()
    volume.open_partial_for_writing(replace(stranger, object_id=ObjectId("2")), write_sidecar=False).close()
    assert volume.partial_record(ObjectId("2")) is None


def test_a_link_under_an_objects_name_is_not_removable_and_is_replaced(
    volume: Volume, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"kept")
    place = tmp_path / "volume" / "objects" / shard(ObjectId("1")) / "1"
    place.parent.mkdir()
    place.symlink_to(outside)
    removal = volume.removal(ObjectId("1"))
    assert removal.begin() is RemovalState.ABSENT
    removal.close()
    partial = volume.open_partial_for_writing(record_of("1"))
    partial.write(0, BODY)
    partial.publish(record_of("1"))
    partial.close()
    assert not place.is_symlink()
    assert outside.read_bytes() == b"kept"


def test_too_little_room_is_found_out_before_the_first_byte(volume: Volume) -> None:
    partial = volume.open_partial_for_writing(replace(record_of("1"), size=1 << 60))
    with pytest.raises(VolumeFull):
        partial.check_free_space()
    partial.discard()


def truncate(path: Path) -> None:
    os.truncate(path, 10)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def replace_by_link(path: Path) -> None:
    outside = path.parent.parent.parent / "outside"
    outside.write_bytes(BODY)
    path.unlink()
    path.symlink_to(outside)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [truncate, grow, replace_by_link, replace_by_directory, Path.unlink])
def test_a_file_that_differs_from_its_record_is_no_hit(volume: Volume, harm: Callable[[Path], None]) -> None:
    store(volume, "1")
    opened(volume, "1").close()  # the record is in the cache now
    harm(path_of(volume, "1"))
    assert volume.open_object(ObjectId("1")) is None


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"version":1}', b"\xff\xfe", b"x" * 5000])
def test_an_object_with_a_broken_record_is_no_hit(volume: Volume, body: bytes) -> None:
    store(volume, "1")
    (record,) = (volume.root / "records").glob("*/1")
    record.write_bytes(body)
    assert volume.open_object(ObjectId("1")) is None


def test_a_shard_directory_replaced_by_a_link_is_not_followed(volume: Volume, tmp_path: Path) -> None:
    store(volume, "1")
    folder = path_of(volume, "1").parent
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    fresh = Volume(volume.root)
    assert fresh.open_object(ObjectId("1")) is None
    fresh.close()


def test_an_object_is_being_sent_while_a_sender_locks_it(volume: Volume) -> None:
    one = ObjectId("1")
    assert not volume.is_being_sent(one), "there is no such object"
    store(volume, "1")
    sending = opened(volume, "1")
    assert not volume.is_being_sent(one), "open is not locked"
    assert sending.lock_shared()
    assert volume.is_being_sent(one)
    assert not volume.is_being_sent(ObjectId("2"))
    volume.removal(one).rename_to_trash()
    assert volume.is_being_sent(one), "a purged object that is still being sent"
    sending.close()
    assert not volume.is_being_sent(one)


def test_an_object_that_is_locked_for_removal_is_not_being_sent(volume: Volume) -> None:
    store(volume, "1")
    removal = volume.removal(ObjectId("1"))
    assert removal.begin() is RemovalState.READY
    assert not volume.is_being_sent(ObjectId("1"))
    removal.close()


def test_an_object_that_is_being_sent_is_not_removed(volume: Volume) -> None:
    store(volume, "1")
    sending = opened(volume, "1")
    assert sending.lock_shared()
    removal = volume.removal(ObjectId("1"))
    assert removal.begin() is RemovalState.IN_USE
    sending.close()
    assert removal.begin() is RemovalState.READY
    removal.unlink()
    removal.close()
    assert volume.removal(ObjectId("1")).begin() is RemovalState.ABSENT
    assert bytes_on_volume(volume.root) == 0


def test_sending_does_not_begin_while_an_object_is_being_removed(volume: Volume) -> None:
    store(volume, "1")
    opened_before = opened(volume, "1")
    removal = volume.removal(ObjectId("1"))
    assert removal.begin() is RemovalState.READY
    assert not opened_before.lock_shared()
    removal.unlink()
    removal.close()
    assert not opened_before.lock_shared()
    opened_before.close()


@pytest.mark.parametrize("accel_redirect", [False, True])
def test_an_open_file_keeps_its_bytes_only_where_a_server_in_front_may_send_them(
    tmp_path: Path, *, accel_redirect: bool
) -> None:
    volume = Volume(tmp_path / "volume", accel_redirect=accel_redirect)
    volume.prepare()
    store(volume, "1")
    descriptor = os.open(path_of(volume, "1"), os.O_RDONLY)
    removal = volume.removal(ObjectId("1"))
    assert removal.begin() is RemovalState.READY
    removal.unlink()
    removal.close()
    assert os.pread(descriptor, len(BODY), 0) == (BODY if accel_redirect else b"")
    os.close(descriptor)
    volume.close()


def test_a_reader_locks_the_verified_file_before_the_writer_unlocks_it(volume: Volume) -> None:
    partial = volume.open_partial_for_writing(record_of("1"))
    partial.write(0, BODY)
    reader = volume.open_partial(ObjectId("1"))
    assert reader is not None
    assert not reader.lock_shared(), "not verified: the writer alone has it"
    partial.mark_verified()
    with pytest.raises(PartialHeld):
        volume.open_partial_for_writing(record_of("1"))
    assert reader.lock_shared()
    partial.publish(record_of("1"))
    partial.close()
    assert volume.removal(ObjectId("1")).begin() is RemovalState.IN_USE
    reader.close()


def test_an_object_stays_locked_until_every_send_of_it_is_closed(volume: Volume) -> None:
    store(volume, "1")
    first, second = opened(volume, "1"), opened(volume, "1")
    assert first.lock_shared()
    assert second.lock_shared()
    first.close()
    assert volume.removal(ObjectId("1")).begin() is RemovalState.IN_USE
    second.close()
    removal = volume.removal(ObjectId("1"))
    assert removal.begin() is RemovalState.READY
    removal.close()


def test_rename_to_trash_hides_an_object_and_lets_its_readers_finish(volume: Volume) -> None:
    store(volume, "1")
    sending = opened(volume, "1")
    assert sending.lock_shared()
    removal = volume.removal(ObjectId("1"))
    removal.rename_to_trash()
    assert volume.open_object(ObjectId("1")) is None
    assert bytes_on_volume(volume.root) == len(BODY)
    assert removal.begin() is RemovalState.IN_USE
    assert sending.read(0, len(BODY)) == BODY
    sending.close()
    assert removal.begin() is RemovalState.READY
    removal.unlink()
    removal.close()
    assert bytes_on_volume(volume.root) == 0


def test_scans_find_all_objects_and_report_unknown_files(volume: Volume) -> None:
    store(volume, "1")
    store(volume, "2", b"")
    volume.open_partial_for_writing(record_of("3")).close()
    (volume.root / "objects" / "00").mkdir()
    (volume.root / "objects" / "00" / "..strange").write_bytes(b"x")
    (volume.root / "incoming" / "link.part").symlink_to("/etc/passwd")
    objects = list(volume.scan_objects())
    found = {(item.object_id, item.size) for item in objects if isinstance(item, FoundObject)}
    assert found == {("1", len(BODY)), ("2", 0)}
    assert [item for item in objects if isinstance(item, UnknownFile)] == [
        UnknownFile("objects/00/..strange")
    ]
    partials = list(volume.scan_partials())
    assert [item.object_id for item in partials if isinstance(item, FoundPartial)] == ["3"]
    assert [item for item in partials if isinstance(item, UnknownFile)] == [UnknownFile("incoming/link.part")]


def test_two_scans_at_once_each_see_everything(volume: Volume) -> None:
    names = {f"o{number}" for number in range(40)}
    for name in names:
        store(volume, name)
        volume.open_partial_for_writing(record_of(f"p{name}")).close()
    standing = [volume.scan_objects(), volume.scan_partials()]
    for scan in standing:
        next(iter(scan))
    assert {item.object_id for item in volume.scan_objects() if isinstance(item, FoundObject)} == names
    assert {item.object_id for item in volume.scan_partials() if isinstance(item, FoundPartial)} == {
        f"p{name}" for name in names
    }
    assert not list(volume.scan_unrecorded())
    assert volume.remove_orphan_records(older_than_seconds=-5) == 0
    assert [len(list(scan)) for scan in standing] == [39, 39]


def test_orphan_records_are_swept_when_old(volume: Volume) -> None:
    store(volume, "1")
    path_of(volume, "1").unlink()
    store(volume, "2")
    assert volume.remove_orphan_records(older_than_seconds=3600) == 0
    assert volume.remove_orphan_records(older_than_seconds=-5) == 1
    assert volume.read_record(ObjectId("1")) is None
    assert volume.read_record(ObjectId("2")) is not None


def test_a_record_in_incoming_without_its_partial_file_is_swept_when_old(volume: Volume) -> None:
    for name in ("1", "2"):
        volume.open_partial_for_writing(record_of(name)).close()
    incoming = volume.root / "incoming"
    (incoming / "1.part").unlink()  # as renaming it does, after which the worker was killed
    assert volume.remove_orphan_records(older_than_seconds=3600) == 0
    assert volume.remove_orphan_records(older_than_seconds=-5) == 1
    assert sorted(path.name for path in incoming.iterdir()) == ["2.json", "2.part"]


def shards_of(volume: Volume, name: str) -> list[Path]:
    return [volume.root / kind / shard(ObjectId(name)) for kind in ("objects", "records")]


def test_shards_are_made_when_first_written_to(volume: Volume) -> None:
    assert not list(volume.root.glob("*/*"))
    store(volume, "1")
    assert sorted(volume.root.glob("*/*")) == sorted(shards_of(volume, "1"))
    store(volume, "1")
    assert opened(volume, "1").record == record_of("1")


def test_the_name_of_a_new_shard_is_synced(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(volume.root).as_posix()
        synced.append(re.sub(r",[0-9a-f]{8},new$", ",DRAFT,new", path))  # each draft has a name of its own
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    store(volume, "1")
    number = shard(ObjectId("1"))
    new_record = f"records/{number}/1,DRAFT,new"
    assert synced == [
        "incoming/1.part",
        "records",
        new_record,
        f"records/{number}",
        "objects",
        f"objects/{number}",
    ]
    synced.clear()
    store(volume, "1")
    assert synced == ["incoming/1.part", new_record, f"records/{number}", f"objects/{number}"]


def test_a_missing_shard_is_a_miss_everywhere(volume: Volume) -> None:
    one = ObjectId("1")
    assert volume.open_object(one) is None
    assert volume.complete_record(one) is None
    assert volume.identity_of(one) is None
    assert volume.read_record(one) is None
    assert volume.find_object(one) is None
    assert volume.open_raw(one) is None
    assert volume.removal(one).begin() is RemovalState.ABSENT
    assert not list(volume.scan_objects())
    assert not list(volume.scan_unrecorded())
    assert volume.remove_orphan_records(older_than_seconds=-5) == 0
    volume.check()
    assert volume.replacements == 0


def test_a_reader_finds_what_another_process_stores_in_a_new_shard(volume: Volume) -> None:
    reader = Volume(volume.root)
    assert reader.open_object(ObjectId("1")) is None
    assert reader.complete_record(ObjectId("1")) is None
    reader.check()
    store(volume, "1")
    assert reader.complete_record(ObjectId("1")) == record_of("1")
    assert [found.object_id for found in reader.scan_objects() if isinstance(found, FoundObject)] == ["1"]
    reader.close()


def test_two_processes_make_one_shard_at_once(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    number = shard(ObjectId("1"))
    make = os.mkdir

    def make_second(path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        make(path, mode, dir_fd=dir_fd)  # another process is quicker
        make(path, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", make_second)
    store(volume, "1")
    assert path_of(volume, "1").parent.name == number
    assert volume.complete_record(ObjectId("1")) == record_of("1")


def test_a_verified_file_of_a_dead_writer_is_published_while_it_is_sent(volume: Volume) -> None:
    record = record_of("1", BODY)
    writer = volume.open_partial_for_writing(record)
    writer.write(0, BODY)
    assert volume.open_verified_partial(record) is None
    writer.mark_verified()
    follower = volume.open_partial(ObjectId("1"))
    assert follower is not None
    assert follower.lock_shared()
    assert volume.open_verified_partial(replace(record, size=len(BODY) + 1)) is None
    slow = volume.open_verified_partial(record)
    assert slow is not None
    writer.close()
    with pytest.raises(PartialHeld):
        volume.open_partial_for_writing(record)
    heir = volume.open_verified_partial(record)
    assert heir is not None
    for publisher in (heir, slow):  # the slow one finds that it was published already
        publisher.publish(record)
        publisher.close()
    assert volume.complete_record(ObjectId("1")) == record
    assert follower.read(0, len(BODY)) == BODY
    follower.close()


def test_a_scan_goes_on_after_a_file_whose_state_cannot_be_read(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        store(volume, ObjectId(str(number)))
    fail_stat_of("7", monkeypatch)
    found = list(volume.scan_objects())
    assert len([file for file in found if isinstance(file, FoundObject)]) == 19
    [bad] = [file for file in found if isinstance(file, UnreadableFile)]
    assert bad.path.endswith("/7")
    assert not list(volume.scan_unrecorded())


def test_a_stopped_removal_does_not_hide_a_newer_file(volume: Volume) -> None:
    store(volume, ObjectId("1"))
    removal, seen = volume.removal(ObjectId("1")), volume.identity_of(ObjectId("1"))
    other = volume.removal(ObjectId("1"))
    assert other.begin() is RemovalState.READY
    other.unlink()
    store(volume, ObjectId("1"))  # not by the same inode, which `other` still has open
    other.close()
    with pytest.raises(VolumeError, match="another file"):
        removal.rename_to_trash(seen)
    assert volume.complete_record(ObjectId("1")) is not None


def test_a_rewritten_record_is_noticed_by_other_processes(volume: Volume) -> None:
    record = store(volume, ObjectId("1"))
    reader = Volume(volume.root)
    assert reader.complete_record(ObjectId("1")) == record
    rewritten = replace(record, media_type="text/x-rewritten")
    volume.write_record(rewritten)
    assert reader.complete_record(ObjectId("1")) == rewritten
    reader.close()


def test_the_trash_replaces_no_file_that_may_be_sent(volume: Volume) -> None:
    for body in (b"older", b"newer"):
        store(volume, ObjectId("1"), body)
        volume.removal(ObjectId("1")).rename_to_trash()
    trashed = sorted(volume.scan_trash(), key=lambda file: len(file.name))
    assert [file.object_id for file in trashed] == ["1", "1"]
    assert trashed[0].name == "1"
    reader = os.open(volume.root / "leaving" / "1", os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    assert [volume.unlink_trashed(file) for file in trashed] == [False, True]
    os.close(reader)
    assert volume.unlink_trashed(trashed[0])
    assert not list(volume.scan_trash())


def test_an_object_without_a_records_shard_is_unrecorded_removable_and_repairable(volume: Volume) -> None:
    store(volume, "1")
    objects, records = shards_of(volume, "1")
    shutil.rmtree(records)
    fresh = Volume(volume.root)
    assert [found.object_id for found in fresh.scan_unrecorded()] == ["1"]
    fresh.write_record(record_of("1"))
    assert fresh.complete_record(ObjectId("1")) == record_of("1")
    shutil.rmtree(records)
    fresh.close()
    removal = fresh.removal(ObjectId("1"))
    assert removal.begin() is RemovalState.READY
    removal.unlink()
    removal.close()
    assert not list(objects.iterdir())
    fresh.close()


def test_an_object_without_a_records_shard_is_moved_to_the_trash(volume: Volume) -> None:
    store(volume, "1")
    shutil.rmtree(shards_of(volume, "1")[1])
    fresh = Volume(volume.root)
    fresh.removal(ObjectId("1")).rename_to_trash()
    assert fresh.find_object(ObjectId("1")) is None
    assert (volume.root / "leaving" / "1").exists()
    fresh.close()


def test_records_without_an_objects_shard_are_orphans(volume: Volume) -> None:
    store(volume, "1")
    shutil.rmtree(shards_of(volume, "1")[0])
    fresh = Volume(volume.root)
    assert fresh.remove_orphan_records(older_than_seconds=-5) == 1
    assert fresh.read_record(ObjectId("1")) is None
    fresh.close()


def test_a_removed_objects_directory_is_an_error_and_not_an_empty_volume(volume: Volume) -> None:
    store(volume, "1")
    two = ObjectId("2")
    assert shard(two) != shard(ObjectId("1"))
    shutil.rmtree(volume.root / "objects")
    with pytest.raises(VolumeError):
        list(volume.scan_objects())
    with pytest.raises(VolumeError):
        volume.find_object(two)
    fresh = Volume(volume.root)
    with pytest.raises(VolumeError):
        fresh.remove_orphan_records(older_than_seconds=-5)
    assert fresh.read_record(ObjectId("1")) is not None
    fresh.close()


def test_a_shard_that_was_removed_is_made_again(volume: Volume) -> None:
    store(volume, "1")
    for folder in shards_of(volume, "1"):
        shutil.rmtree(folder)
    volume.check()
    store(volume, "1")
    assert volume.complete_record(ObjectId("1")) == record_of("1")


def test_a_volume_that_is_gone_or_replaced_is_noticed(volume: Volume, tmp_path: Path) -> None:
    store(volume, "1")
    volume.check()
    volume.root.rename(tmp_path / "moved")
    with pytest.raises(VolumeError):
        volume.check()
    replacements = volume.replacements
    volume.root.mkdir()
    with pytest.raises(VolumeError):  # the bare mount point of a volume that has gone
        volume.check()
    with pytest.raises(VolumeError):
        volume.open_partial_for_writing(record_of("2"))
    volume.root.rmdir()
    (tmp_path / "moved").rename(volume.root)
    volume.check()
    opened(volume, "1").close()
    (volume.root / "objects").rename(tmp_path / "former")
    volume.prepare()
    volume.check()
    assert volume.open_object(ObjectId("1")) is None
    assert volume.replacements > replacements


def test_a_download_under_way_keeps_to_the_volume_it_began_on(volume: Volume, tmp_path: Path) -> None:
    partial = volume.open_partial_for_writing(record_of("1"))
    volume.root.rename(tmp_path / "former")
    volume.prepare()
    for _ in range(3):
        volume.check()
    volume.close()
    partial.write(0, BODY)
    partial.restart()
    assert (tmp_path / "former" / "incoming" / "1.part").exists()
    partial.discard()
    assert list((tmp_path / "former" / "incoming").iterdir()) == []


async def test_volume_checks_see_the_current_volume(volume: Volume, tmp_path: Path) -> None:
    store(volume, "1")
    opened(volume, "1").close()
    with capture_logs() as logs:
        watching = asyncio.create_task(watch_volume(volume, seconds=0.01))
        volume.root.rename(tmp_path / "former")
        await eventually(lambda: len(logs) == 1)
        Volume(volume.root).prepare()
        await eventually(lambda: len(logs) == 2)
        watching.cancel()
    assert [line["event"] for line in logs] == ["volume_unavailable", "volume_replaced"]
    assert volume.open_object(ObjectId("1")) is None


def test_an_unwritable_volume_is_refused_with_the_reason(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with pytest.raises(VolumeError, match="prepare the volume"):
        Volume(blocked / "volume").prepare()


def test_ids_that_look_like_our_own_suffixes_do_not_collide(volume: Volume) -> None:
    for name in ("a", "a.part", "a.json"):
        store(volume, name, name.encode())
    for name in ("a", "a.part", "a.json"):
        found = opened(volume, name)
        assert found.read(0, 100) == name.encode()
        found.close()
