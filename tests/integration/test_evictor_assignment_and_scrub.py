"""Unassigned and corrupt objects are removed; an implausible or missing catalog list removes nothing."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint
from tests.counters import counted
from tests.integration.evictor_harness import (
    SIZE,
    EvictorHarness,
    body_of,
    evictor_harness,
    media_object,
)
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
