"""The file that tells API processes which ids the catalog's last list has named."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from distributor_node.shared.adapters.volume import known_ids
from distributor_node.shared.adapters.volume.known_ids import NAME, KnownIds, KnownIdsDraft
from distributor_node.shared.domain.objects import ObjectId

IDS = [ObjectId(str(number)) for number in range(1000)]
OTHER = ObjectId("1000")


def write(root: Path, object_ids: Sequence[ObjectId]) -> None:
    draft = KnownIdsDraft()
    draft.update(object_ids)
    draft.write(root)


async def test_what_was_listed_is_known(tmp_path: Path) -> None:
    write(tmp_path, [*IDS, *IDS])
    known = KnownIds(tmp_path)
    await known.open()
    assert len(known) == len(IDS)
    assert all(object_id in known for object_id in IDS)
    assert OTHER not in known
    await known.close()


async def test_a_newer_list_replaces_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = KnownIds(tmp_path)
    await known.refresh()
    assert len(known) == 0
    write(tmp_path, IDS)
    await known.refresh()
    assert OTHER not in known
    write(tmp_path, [OTHER])
    await known.refresh()
    assert (OTHER in known, IDS[0] in known) == (True, False)
    opened: list[object] = []
    monkeypatch.setattr(known_ids, "read_capped", opened.append)
    await known.refresh()
    assert not opened, "an unchanged file is not read again"


@pytest.mark.parametrize("damage", ["short", "long", "garbage", "empty", "directory", "missing"])
async def test_an_unusable_file_changes_nothing(tmp_path: Path, damage: str) -> None:
    write(tmp_path, IDS)
    known, path = KnownIds(tmp_path), tmp_path / NAME
    await known.refresh()
    raw = path.read_bytes()
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(
            {"short": raw[:-1], "long": raw + b"\0", "garbage": os.urandom(64), "empty": b""}[damage]
        )
    await known.refresh()
    assert IDS[0] in known
    assert len(known) == len(IDS)


async def test_the_number_of_ids_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_ids, "MAX_IDS", 10)
    write(tmp_path, IDS)
    known = KnownIds(tmp_path)
    await known.refresh()
    assert len(known) == 10


def test_drafts_of_killed_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / f"{NAME},1234.new").write_bytes(b"begun")
    write(tmp_path, IDS)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
