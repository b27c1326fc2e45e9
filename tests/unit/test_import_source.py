"""Files of a flat directory are linked into the volume without copying."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from distributor_node.shared.adapters.volume import Volume, intake
from distributor_node.shared.adapters.volume.intake import ImportResult, ImportSource
from distributor_node.shared.adapters.volume.layout import shard
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.objects import ObjectId
from tests.bad_inode import fail_stat_of

ONE = ObjectId("1")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "volume"
    volume = Volume(root)
    volume.prepare()
    volume.close()
    return root


def place_of(root: Path, object_id: str) -> Path:
    folder = root / "objects" / shard(object_id)
    folder.mkdir(exist_ok=True)
    return folder / object_id


def test_a_file_is_moved_and_stays_the_same_file(root: Path) -> None:
    (root / "1").write_bytes(b"one")
    inode = (root / "1").stat().st_ino
    assert not list((root / "objects").iterdir()), "the shard is made by the import"
    import_source = ImportSource(root, root)
    assert [(found.object_id, found.size) for found in import_source.pending()] == [("1", 3)]
    assert import_source.place(ONE) is ImportResult.MOVED
    import_source.remove(ONE)
    assert place_of(root, "1").stat().st_ino == inode
    assert place_of(root, "1").stat().st_nlink == 1
    assert not list(import_source.pending())
    assert import_source.place(ONE) is ImportResult.MISSING
    import_source.close()


def test_a_file_whose_state_cannot_be_read_keeps_no_others_waiting(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("1", "2", "3"):
        (root / name).write_bytes(b"theirs")
    fail_stat_of("2", monkeypatch)
    import_source = ImportSource(root, root)
    assert sorted(found.object_id for found in import_source.pending()) == ["1", "3"]
    import_source.close()


def test_existing_objects_stay(root: Path) -> None:
    place_of(root, "1").write_bytes(b"ours")
    (root / "1").write_bytes(b"theirs")
    assert ImportSource(root, root).place(ONE) is ImportResult.EXISTS
    assert place_of(root, "1").read_bytes() == b"ours"
    assert not (root / "1").exists()


def test_existing_objects_stay_where_links_are_unsupported(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links here")

    place_of(root, "1").write_bytes(b"ours")
    (root / "1").write_bytes(b"theirs")
    import_source = ImportSource(root, root)
    monkeypatch.setattr(os, "link", no_links)
    assert import_source.place(ONE) is ImportResult.EXISTS
    assert place_of(root, "1").read_bytes() == b"ours"
    import_source.close()


def test_killed_between_the_two_names(root: Path) -> None:
    (root / "1").write_bytes(b"one")
    os.link(root / "1", place_of(root, "1"))
    import_source = ImportSource(root, root)
    assert import_source.place(ONE) is ImportResult.MOVED
    import_source.remove(ONE)
    assert place_of(root, "1").read_bytes() == b"one"
    assert place_of(root, "1").stat().st_nlink == 1
    import_source.close()


def test_what_was_placed_is_taken_back_and_nothing_else(root: Path) -> None:
    (root / "1").write_bytes(b"theirs")
    import_source = ImportSource(root, root)
    import_source.take_back(ONE)
    assert import_source.place(ONE) is ImportResult.MOVED
    import_source.take_back(ONE)
    assert not place_of(root, "1").exists()
    assert (root / "1").read_bytes() == b"theirs"
    assert import_source.place(ONE) is ImportResult.MOVED
    place_of(root, "1").unlink()
    place_of(root, "1").write_bytes(b"ours")  # a fetch has published it
    import_source.take_back(ONE)
    assert place_of(root, "1").read_bytes() == b"ours"
    import_source.close()


def test_only_files_named_like_the_networks_objects(root: Path, tmp_path: Path) -> None:
    assets = tmp_path / "assets"
    assets.mkdir()
    for name in ("12", "cache.json", "12.part", "a", ".13", "1" * 30):
        (assets / name).write_bytes(b"x")
    (assets / "14").mkdir()
    (assets / "15").symlink_to(assets / "12")
    assert [found.object_id for found in ImportSource(root, assets).pending()] == ["12"]


def test_another_file_system_has_to_be_copied(root: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == root.stat().st_dev:
        pytest.skip("there is no second file system")
    assets = memory / f"distributor-intake-{os.getpid()}"
    assets.mkdir()
    try:
        (assets / "1").write_bytes(b"one")
        import_source = ImportSource(root, assets)
        assert import_source.place(ONE) is ImportResult.OTHER_DEVICE
        assert (assets / "1").exists()
        import_source.remove(ONE)
        assert not (assets / "1").exists()
    finally:
        for left in assets.iterdir():
            left.unlink()
        assets.rmdir()


def test_a_missing_directory_is_reported(root: Path, tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="read the assets"):
        list(ImportSource(root, tmp_path / "nothing").pending())


def test_the_verified_mark_is_visible_to_all(root: Path) -> None:
    import_source, other = ImportSource(root, root), ImportSource(root, root)
    assert not other.is_done()
    import_source.mark(done=True)
    import_source.mark(done=True)
    assert other.is_done()
    import_source.mark(done=False)
    import_source.mark(done=False)
    assert not other.is_done()


@pytest.fixture
def read_only_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names in this directory cannot be removed."""
    assets, unlink = tmp_path / "assets", Path.unlink
    assets.mkdir()

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.parent == assets:
            raise OSError(errno.EROFS, "read-only")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    return assets


def test_a_file_whose_name_stays_is_imported_once(root: Path, read_only_assets: Path) -> None:
    (read_only_assets / "1").write_bytes(b"one")
    import_source = ImportSource(root, read_only_assets)
    assert import_source.place(ONE) is ImportResult.MOVED
    import_source.remove(ONE)
    place_of(root, "1").unlink()  # evicted
    for again in (import_source, ImportSource(root, read_only_assets)):
        assert not list(again.pending())
        assert again.place(ONE) is ImportResult.EXCLUDED
    assert not place_of(root, "1").exists()


def test_a_purged_object_is_not_imported(root: Path) -> None:
    for name in ("1", "2"):
        (root / name).write_bytes(b"content")
    import_source, of_the_next_leader = ImportSource(root, root), ImportSource(root, root)
    assert import_source.place(ObjectId("2")) is ImportResult.MOVED
    of_the_next_leader.exclude(ONE)
    of_the_next_leader.exclude(ONE)
    assert import_source.place(ONE) is ImportResult.EXCLUDED, "a former leader looks again, too"
    assert (root / ".import-excluded").read_text() == "1\n"


def test_an_exclusion_is_on_disk_when_it_returns(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut must not let a purged object be imported."""
    synced, sync = set[Path](), os.fsync

    def note(descriptor: int) -> None:
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    ImportSource(root, root).exclude(ONE)
    assert {root, root / ".import-excluded"} <= synced


def test_a_line_that_was_cut_is_written_again(root: Path) -> None:
    (root / ".import-excluded").write_text("7\n12")  # killed while it wrote 1234
    import_source = ImportSource(root, root)
    import_source.exclude(ONE)
    assert (root / ".import-excluded").read_text() == "7\n1\n"
    assert import_source.is_excluded(ObjectId("7"))
    assert not import_source.is_excluded(ObjectId("12"))


def test_a_lock_that_is_held_for_long_is_reported(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "_LOCK_TIMEOUT", 0.05)
    with (root / ".import-excluded").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(VolumeError, match="another process holds it"):
            ImportSource(root, root).exclude(ONE)
