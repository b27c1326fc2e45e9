"""Entries of a manifest that are replaced: what we hold of the old version is no hit any more, and is removed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from blake3 import blake3

from distributor_node.services.evictor import assignment
from distributor_node.services.evictor.evictor import Evictor
from distributor_node.shared.adapters.catalogs.manifest import ManifestCatalog
from distributor_node.shared.domain.objects import ContentHash
from tests.integration.evictor_harness import SIZE, EvictorHarness, body_of, evictor_harness
from tests.waiting import eventually


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[EvictorHarness]:
    async with evictor_harness(tmp_path) as made:
        yield made


def entry(name: str, body: bytes | None = None, *, hashed: bool = True, size: int | None = None) -> str:
    body = body_of(name) if body is None else body
    hash_line = f", hash: {ContentHash('blake3', blake3(body).digest())}" if hashed else ""
    return f'  - {{id: "{name}", size: {len(body) if size is None else size}{hash_line}}}\n'


class Manifest:
    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, *entries: str) -> None:
        draft = self.path.with_suffix(".new")
        draft.write_text('version: 1\nbase_urls: ["http://127.0.0.1:1/"]\nobjects:\n' + "".join(entries))
        draft.replace(self.path)


@asynccontextmanager
async def evictor_of(harness: EvictorHarness, manifest: Manifest) -> AsyncIterator[None]:
    catalog = ManifestCatalog(manifest.path, check_interval=0.05)
    await catalog.open()
    evictor = Evictor(harness.settings(), harness.state, harness.volume, catalog)
    serving = asyncio.create_task(evictor.serve())
    try:
        yield
    finally:
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving
        await catalog.close()


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest(tmp_path / "manifest.yaml")


async def test_replaced_entries_are_removed_after_a_reload(
    harness: EvictorHarness, manifest: Manifest
) -> None:
    manifest.write(*(entry(name) for name in "123456"))
    for name in "123456":
        harness.put_file(name)
    async with evictor_of(harness, manifest):
        await eventually(harness.reconciled)
        manifest.write(
            entry("1"),
            entry("2", b"new" * SIZE),  # another hash and size
            entry("3", body_of("x")),  # another hash of the same size
            entry("4", hashed=False),  # no hash any more, and nothing else is different
            entry("5", hashed=False, size=SIZE + 1),
            entry("6"),
        )
        gone = {"2", "3", "5"}
        await eventually(lambda: not any(harness.has(name) for name in gone))

        async def forgotten() -> bool:  # an entry goes after its file
            return gone.isdisjoint(await harness.entries())

        await eventually(forgotten)
        entries = await harness.entries()
    assert {name for name in "123456" if harness.has(name)} == {"1", "4", "6"}
    assert entries.keys() == {"1", "4", "6"}
    assert await harness.matches_volume()


async def test_entries_replaced_while_the_node_was_down(harness: EvictorHarness, manifest: Manifest) -> None:
    for name in "12":
        harness.put_file(name)
    manifest.write(entry("1"), entry("2", body_of("x")))
    async with evictor_of(harness, manifest):
        await eventually(lambda: not harness.has("2"))
    assert harness.has("1")


async def test_an_old_version_that_is_stored_after_the_reload_is_removed_too(
    harness: EvictorHarness, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A fetch begins by the old entry; 2. the manifest is read again and compared; 3. the fetch ends."""
    monkeypatch.setattr(assignment, "_ROUNDS", (0.0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2))
    harness.put_file("1")
    manifest.write(entry("1"), entry("2"))
    async with evictor_of(harness, manifest):
        await eventually(harness.reconciled)
        manifest.write(entry("1", body_of("x")), entry("2", body_of("y")))
        await eventually(lambda: not harness.has("1"))
        await harness.store("2")
        await eventually(lambda: not harness.has("2"))


async def test_an_invalid_manifest_replaces_nothing(harness: EvictorHarness, manifest: Manifest) -> None:
    manifest.write(entry("1"), entry("2"))
    for name in "12":
        harness.put_file(name)
    async with evictor_of(harness, manifest):
        await eventually(harness.reconciled)
        manifest.write(entry("1", body_of("x")), "  - {id: 5}\n")
        await asyncio.sleep(0.5)
        assert harness.has("1")
        manifest.write(entry("1", body_of("x")), entry("2"))
        await eventually(lambda: not harness.has("1"))
    assert harness.has("2")
