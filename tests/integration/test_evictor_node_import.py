"""Objects of an existing node. On another file system they are copied, verified, the most used first, within the limit.
On the same one they are moved, but not beside the partial file of a live lease."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from distributor_node.services.evictor.node_import import ImportCopier, NodeImport
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.adapters.volume.intake import DONE, ImportResult, ImportSource
from distributor_node.shared.domain.errors import StateStoreUnavailable, VolumeError
from distributor_node.shared.domain.objects import ObjectId, StoredRecord
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import Lease
from tests.integration.evictor_harness import (
    SIZE,
    EvictorHarness,
    ListedCatalog,
    body_of,
    evictor_harness,
    media_object,
)
from tests.waiting import eventually

MEMORY = Path("/dev/shm")
NAMES = ("1", "2", "3", "4")


async def take_all(_: Sequence[ObjectId]) -> Sequence[ObjectId]:
    """An index that refuses nothing."""
    return ()


class Silent(MemoryStateStore):
    """Out of reach for the next `commits` of them."""

    commits = 0

    async def commit(self, lease: Lease, stored_at: float) -> bool:
        if self.commits:
            self.commits -= 1
            raise StateStoreUnavailable("silent")
        return await super().commit(lease, stored_at)


@dataclass
class Harness:
    assets: Path
    state: Silent
    volume: Volume
    catalog: ListedCatalog
    node_import: NodeImport
    copier: ImportCopier

    def left(self) -> list[str]:
        return sorted(path.name for path in self.assets.iterdir() if path.name.isdigit())

    def is_hit(self, name: str) -> bool:
        found = self.volume.open_object(ObjectId(name))
        if found is None:
            return False
        data = found.read(0, SIZE + 1)
        found.close()
        return data == body_of(name)

    async def accesses(self) -> dict[str, int]:
        _, accesses = await self.state.read_accesses("", 100)
        return {access.object_id: access.views for access in accesses}


@pytest.fixture
async def harness(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    """Room for as many objects as the test's parameter says."""
    if not MEMORY.is_dir() or MEMORY.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    limit = getattr(request, "param", 10) * footprint(SIZE)
    assets = MEMORY / f"distributor-copying-{os.getpid()}"
    assets.mkdir()
    catalog, now = ListedCatalog(), int(time.time() * 1000)
    for name in NAMES:
        (assets / name).write_bytes(body_of(name))
        catalog.objects[ObjectId(name)] = media_object(name, body_of(name))
    recorded = [[name, {"sizeKB": 20, "popularity": int(name), "lastAccessTime": now}] for name in NAMES]
    (assets / "cache.json").write_text(json.dumps({"lruCacheGroups": [recorded]}))
    volume = Volume(tmp_path / "volume")
    volume.prepare()
    state = Silent(limit, StateTimeouts(lease_seconds=10), time.time)
    term = await state.lead("one", 3600)
    assert term is not None
    await state.set_reconciled(term)
    import_source = ImportSource(volume.root, assets)
    node_import = NodeImport(state, import_source, assets)
    copier = ImportCopier(state, volume, catalog, import_source, node_import)
    yield Harness(assets, state, volume, catalog, node_import, copier)
    shutil.rmtree(assets)
    volume.close()


async def test_all_are_copied_verified_and_counted(harness: Harness) -> None:
    await harness.node_import.link_files(take_all)
    assert harness.node_import.needs_copy
    assert await harness.copier.run() is None
    assert all(harness.is_hit(name) for name in NAMES)
    assert harness.left() == []
    usage = await harness.state.usage()
    assert (usage.used, usage.reserved) == (len(NAMES) * footprint(SIZE), 0)
    assert await harness.accesses() == {"2": 1, "3": 2, "4": 3}, "one view each came with the object"


@pytest.mark.parametrize("harness", [2], indirect=True)
async def test_an_object_that_finds_no_room_stays_where_it_is(harness: Harness) -> None:
    await harness.node_import.link_files(take_all)
    assert await harness.copier.run() is not None, "worth trying again"
    assert harness.left() == ["1", "2"], "the most used came first"
    usage = await harness.state.usage()
    assert usage.used + usage.reserved <= usage.limit


async def test_corrupt_and_unknown_ones_are_left(harness: Harness) -> None:
    (harness.assets / "2").write_bytes(body_of("2")[:-1] + b"!")
    (harness.assets / "3").write_bytes(b"cut short")
    del harness.catalog.objects[ObjectId("4")]
    await harness.node_import.link_files(take_all)
    await harness.copier.run()
    assert harness.is_hit("1")
    assert harness.left() == ["2", "3", "4"]
    usage = await harness.state.usage()
    assert (usage.objects, usage.reserved) == (1, 0)


async def test_a_second_run_copies_nothing_twice(harness: Harness) -> None:
    await harness.node_import.link_files(take_all)
    await harness.copier.run()
    (harness.assets / "1").write_bytes(body_of("1"))
    assert await harness.copier.run() is None
    assert harness.left() == []
    assert (await harness.state.usage()).objects == len(NAMES)


async def test_an_object_stored_but_not_committed_is_not_copied_twice(harness: Harness) -> None:
    await harness.node_import.link_files(take_all)
    harness.state.commits = 1
    with pytest.raises(StateStoreUnavailable):
        await harness.copier.run()
    assert harness.is_hit("4"), "the most used comes first"
    assert harness.left() == list(NAMES)
    (harness.assets / "4").write_bytes(b"?" * SIZE)  # to be seen if it were read again
    rows = harness.state.tables.rows
    rows[ObjectId("4")] = replace(rows[ObjectId("4")], ends=0.0)  # its lease has run out
    assert await harness.copier.run() is None
    assert harness.left() == []
    assert all(harness.is_hit(name) for name in NAMES)
    usage = await harness.state.usage()
    assert (usage.used, usage.reserved) == (4 * footprint(SIZE), 0)


async def test_an_unreadable_object_keeps_no_others_from_being_copied(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the most used, so that it comes first."""
    complete = harness.volume.complete_record

    def fail(object_id: ObjectId) -> StoredRecord | None:
        if object_id == "4":
            raise VolumeError("stat 4: Input/output error")
        return complete(object_id)

    await harness.node_import.link_files(take_all)
    monkeypatch.setattr(harness.volume, "complete_record", fail)
    assert await harness.copier.run() is None
    assert harness.left() == ["4"]
    assert (await harness.state.usage()).objects == 3


# On the same file system


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.servers)])
async def node(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EvictorHarness]:
    redis = None
    if request.param == "redis":
        redis = (request.getfixturevalue("redis_url"), request.getfixturevalue("redis_prefix"))
    async with evictor_harness(tmp_path, redis) as made:
        yield made


async def test_an_unreadable_file_keeps_no_others_from_being_moved(
    node: EvictorHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = tmp_path / "old"
    assets.mkdir()
    for name in ("1", "2", "3"):
        (assets / name).write_bytes(body_of(name))
    link = os.link

    def fail(source: Path, *arguments: Any, **options: Any) -> None:
        if Path(source).name == "2":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        link(source, *arguments, **options)

    monkeypatch.setattr(os, "link", fail)
    await NodeImport(node.state, ImportSource(node.root, assets), None).link_files(take_all)
    assert [path.name for path in assets.iterdir()] == ["2"]
    assert sorted(path.name for path in node.root.glob("objects/*/*")) == ["1", "3"]


async def test_a_file_waits_for_the_end_of_the_lease_of_its_object(
    node: EvictorHarness, tmp_path: Path
) -> None:
    async with node.evictor():
        await eventually(node.reconciled)
    lease = await node.begin_fetch("1")
    node.leave_partial("1", SIZE)
    assets = tmp_path / "old"
    assets.mkdir()
    for name in ("1", "2"):
        (assets / name).write_bytes(body_of(name))
        node.catalog.objects[ObjectId(name)] = media_object(name, body_of(name))

    async def keep() -> None:
        while True:
            assert await node.state.renew(lease)
            await asyncio.sleep(0.05)

    async def both_count() -> bool:
        return len(await node.entries()) == 2 and await node.fetch_of("1") is None

    settings = node.settings(partial_keep=1.0)  # and as often it is looked whether the lease has ended
    storage = settings.storage.model_copy(update={"import_assets": assets})
    kept = asyncio.create_task(keep())
    async with node.evictor_of(settings.model_copy(update={"storage": storage})):
        await eventually((node.root / DONE).exists)
        assert not kept.done()
        assert [path.name for path in assets.iterdir()] == ["1"]
        assert not node.has("1")
        assert await node.matches_volume()
        kept.cancel()  # the worker has died
        with suppress(asyncio.CancelledError):
            await kept
        await eventually(both_count)
        # The file that was left behind goes a moment after its copy counts.
        await eventually(lambda: not list(assets.iterdir()))
        assert await node.matches_volume()
    assert node.path_of("1").read_bytes() == body_of("1")


async def test_a_fetch_that_begins_while_a_file_is_placed_keeps_it_out(
    node: EvictorHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. The import reads the leases. 2. A fetch begins. 3. The import places the file of its object.

    It would not count beside the partial file of a live lease.
    """
    async with node.evictor():
        await eventually(node.reconciled)
    assets = tmp_path / "old"
    assets.mkdir()
    for name in ("1", "2"):
        (assets / name).write_bytes(body_of(name))
    place, leases, loop = ImportSource.place, list[Lease](), asyncio.get_running_loop()

    def place_late(import_source: ImportSource, object_id: ObjectId) -> ImportResult:
        if object_id == "1" and not leases:
            begun = asyncio.run_coroutine_threadsafe(node.begin_fetch("1"), loop)
            leases.append(begun.result(30))
            node.leave_partial("1", SIZE)
        return place(import_source, object_id)

    async def keep() -> None:
        while True:
            await asyncio.sleep(0.05)
            for lease in leases:
                assert await node.state.renew(lease)

    monkeypatch.setattr(ImportSource, "place", place_late)
    settings = node.settings(partial_keep=1.0)
    storage = settings.storage.model_copy(update={"import_assets": assets})
    kept = asyncio.create_task(keep())
    async with node.evictor_of(settings.model_copy(update={"storage": storage})):
        await eventually((node.root / DONE).exists)
        assert leases
        assert not kept.done()
        assert [path.name for path in assets.iterdir()] == ["1"]
        assert not node.has("1")
        assert await node.matches_volume()
        kept.cancel()  # the worker has died
        with suppress(asyncio.CancelledError):
            await kept
        await eventually(lambda: not list(assets.iterdir()))
        assert await node.matches_volume()
    assert node.path_of("1").read_bytes() == body_of("1")
