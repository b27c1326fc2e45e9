"""Unassigned and corrupt objects are removed; an implausible or missing catalog list removes nothing."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from distributor_node.services.evictor import integrity
from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.services.evictor.integrity import Scrub
from distributor_node.services.evictor.removal import ObjectRemover
from distributor_node.shared.adapters.volume import FoundObject
from distributor_node.shared.adapters.volume.layout import SHARDS, shard
from distributor_node.shared.adapters.volume.records import encode_record
from distributor_node.shared.domain.eviction import make_policy
from distributor_node.shared.domain.objects import ObjectId, StoredRecord
from distributor_node.shared.domain.space import footprint
from tests.counters import counted
from tests.integration.evictor_harness import SIZE, EvictorHarness, body_of, evictor_harness, media_object
from tests.waiting import eventually

NAMES = ["one", "two", "three", "four"]


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[EvictorHarness]:
    async with evictor_harness(tmp_path) as made:
        yield made


def list_objects(harness: EvictorHarness, *names: str) -> None:
    harness.catalog.objects = {ObjectId(name): media_object(name, body_of(name)) for name in names}


async def test_unassigned_objects_are_removed(harness: EvictorHarness) -> None:
    list_objects(harness, *NAMES)
    async with harness.evictor(assignment_interval=0.05):
        await eventually(harness.reconciled)
        await harness.store(*NAMES)
        list_objects(harness, "two", "three", "four", "others")
        await eventually(lambda: not harness.has("one"))

        async def dropped() -> bool:
            return sorted(await harness.entries()) == ["four", "three", "two"]

        await eventually(dropped)
        assert await harness.used() == 3 * footprint(SIZE)


def reconciled(result: str) -> float:
    return counted("distributor_reconciled_total", result=result)


def scrubbed() -> float:
    return counted("distributor_scrubbed_objects_total", result="ok")


@pytest.mark.parametrize("listed", [(), ("one",), ("others", "more")])
async def test_an_implausible_list_drops_nothing(harness: EvictorHarness, listed: tuple[str, ...]) -> None:
    list_objects(harness, *NAMES)
    before = reconciled("assignment_rejected")
    async with harness.evictor(assignment_interval=0.05):
        await eventually(harness.reconciled)
        await harness.store(*NAMES)
        list_objects(harness, *listed)
        await eventually(lambda: reconciled("assignment_rejected") >= before + 3)
        assert sorted(await harness.entries()) == sorted(NAMES)


async def test_a_catalog_that_is_down_drops_nothing(harness: EvictorHarness) -> None:
    harness.catalog.down = True
    before = reconciled("assignment_unavailable")
    async with harness.evictor(assignment_interval=0.05):
        await eventually(harness.reconciled)
        await harness.store(*NAMES)
        await eventually(lambda: reconciled("assignment_unavailable") >= before + 2)
        assert sorted(await harness.entries()) == sorted(NAMES)


async def test_scrub_finds_corruption(harness: EvictorHarness) -> None:
    corrupt = counted("distributor_evictions_total", reason="corrupt")
    for name in NAMES:
        harness.put_file(name)
    path = harness.path_of("two")
    seen = path.stat()
    body = bytearray(path.read_bytes())
    body[SIZE // 2] ^= 1
    path.write_bytes(body)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    async with harness.evictor(scrub_rate=100 * SIZE):

        async def gone() -> bool:
            return sorted(await harness.entries()) == ["four", "one", "three"]

        await eventually(gone)
        await eventually(harness.matches_volume)
        # Counted after the store has released it, by a task that the end of the evictor cancels
        await eventually(lambda: counted("distributor_evictions_total", reason="corrupt") > corrupt)
        assert not harness.has("two")
    assert counted("distributor_evictions_total", reason="corrupt") == corrupt + 1


async def test_scrub_keeps_its_rate_and_leaves_intact_objects(harness: EvictorHarness) -> None:
    before, started = scrubbed(), time.monotonic()
    for name in NAMES:
        harness.put_file(name)
    async with harness.evictor(scrub_rate=2 * SIZE):
        await eventually(harness.reconciled)
        await eventually(lambda: scrubbed() > before)
        await asyncio.sleep(1)
        assert scrubbed() - before <= 2 * (time.monotonic() - started) + 1
        assert len(await harness.entries()) == 4


def put_holes(root: Path, count: int, size: int) -> set[str]:
    """Objects of holes, without a hash: one in each directory, the others in three directories. Returns their names."""
    first, rest = dict[str, str](), list[str]()
    for number in range(100 * count):
        name = str(number)
        if first.setdefault(shard(name), name) != name and shard(name) in SHARDS[40:43]:
            rest.append(name)
        if len(first) + len(rest) >= count and len(first) == len(SHARDS):
            break
    for name in (*first.values(), *rest):
        record = StoredRecord(ObjectId(name), size, None, None, "video/mp4", 1_700_000_000)
        for kind in ("objects", "records"):
            (root / kind / shard(name)).mkdir(exist_ok=True)
        (root / "records" / shard(name) / name).write_bytes(encode_record(record))
        with (root / "objects" / shard(name) / name).open("wb") as file:
            file.truncate(size)
    return {*first.values(), *rest}


async def test_the_scrub_visits_every_directory_of_five_terabytes(
    harness: EvictorHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other scans of the volume, as by reconciliation, go on all the time. Three directories are larger than what the
    kernel lists at once."""
    names = put_holes(harness.root, 4000, 5 * 1024**4 // 4000)
    assert sum(path.stat().st_size for path in harness.root.glob("objects/*/*")) > 4.9 * 1024**4
    monkeypatch.setattr(integrity, "_MIN_SECONDS_PER_OBJECT", 0.0)
    visited = Counter[str]()

    index = EvictionIndex(harness.state, harness.volume, partial(make_policy, "lru-sp"))
    scrub = Scrub(harness.volume, ObjectRemover(harness.state, harness.volume, index), 20_000_000)
    open_raw_of_volume, before = harness.volume.open_raw, scrubbed()

    def count_and_open(object_id: ObjectId) -> int | None:
        visited[object_id] += 1
        return open_raw_of_volume(object_id)

    monkeypatch.setattr(harness.volume, "open_raw", count_and_open)
    term = await harness.term()
    for _ in range(len(names) // 50):
        if await scrub.step(term):  # the pause after a round
            break
        found = {file.object_id for file in harness.volume.scan_objects() if isinstance(file, FoundObject)}
        assert found == names
    assert {shard(name) for name in visited} == set(SHARDS)
    assert visited == Counter(names), "each object once"
    assert scrubbed() - before == len(names)
