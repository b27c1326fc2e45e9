"""A volume, a state store and evictors, for the tests of the evictor."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from distributor_node.services.evictor.evictor import Evictor
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.adapters.volume import PartialFile, Volume
from distributor_node.shared.domain.errors import CatalogUnavailable
from distributor_node.shared.domain.objects import (
    Assignment,
    ContentHash,
    MediaObject,
    ObjectId,
    StoredRecord,
    entity_tag,
    path_of,
)
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.catalog import CatalogStatus
from distributor_node.shared.ports.state_store import Fetch, Granted, IndexEntry, Lease, StateStore, Term
from distributor_node.shared.settings.model import Settings
from tests.volume_size import bytes_on_volume

SIZE = 20_000
LIMIT = 10 * footprint(SIZE)
LEADERSHIP, RENEWAL = 3.0, 0.4


def body_of(name: str, size: int = SIZE) -> bytes:
    return (name.encode() * (size // len(name) + 1))[:size]


def record_of(name: str, body: bytes) -> StoredRecord:
    object_id = name if isinstance(name, ObjectId) else ObjectId.parse(name)
    content_hash, path = ContentHash("blake3", blake3(body).digest()), path_of(object_id, None)
    etag = entity_tag(content_hash)
    return StoredRecord(object_id, len(body), etag, content_hash, "image/png", 1_700_000_000, name=path)


def media_object(name: str, body: bytes) -> MediaObject:
    return MediaObject(ObjectId.parse(name), len(body), record_of(name, body).content_hash, "image/png")


class ListedCatalog:
    """A catalog of what the test says; `down` makes it fail, `left_out` are missing from its lists alone."""

    def __init__(self) -> None:
        self.objects: dict[ObjectId, MediaObject] = {}
        self.left_out: set[ObjectId] = set()
        self.asked: list[ObjectId] = []
        self.down = False

    @property
    def can_list(self) -> bool:
        return True

    @property
    def public_url(self) -> str:
        return ""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def can_have(self, object_id: ObjectId) -> bool:
        return True

    async def look_up(self, object_id: ObjectId, client: str | None = None) -> MediaObject | None:
        self._fail_if_down()
        self.asked.append(object_id)
        return self.objects.get(object_id)

    async def forget(self, outdated: MediaObject) -> None: ...

    async def forget_object(self, object_id: ObjectId) -> None: ...

    @property
    def lookups_fail(self) -> bool:
        return False

    def sources_of(self, object_id: ObjectId) -> Sequence[str]:
        return ()

    async def list_objects(self, assignment: Assignment) -> AsyncIterator[Sequence[MediaObject]]:
        self._fail_if_down()
        listed = [known for known in self.objects.values() if known.object_id not in self.left_out]
        yield [known for known in listed if assignment.covers(known)]

    async def bucket_ids(self, worker_id: int | None = None) -> Sequence[str]:
        return ()

    async def source_bases(self) -> Sequence[str]:
        return ()

    async def status(self) -> CatalogStatus:
        return CatalogStatus()

    async def chain_head(self) -> int | None:
        return None

    def _fail_if_down(self) -> None:
        if self.down:
            raise CatalogUnavailable("down")


@dataclass
class EvictorHarness:
    """`state` and `volume` as the workers and the API see them."""

    state: StateStore
    volume: Volume
    root: Path
    catalog: ListedCatalog = field(default_factory=ListedCatalog)

    def settings(self, **evictor: Any) -> Settings:
        given = {
            "leadership": LEADERSHIP,
            "leadership_renewal": RENEWAL,
            "interval": 0.05,
            "scrub_rate": 0,
            **{name: value for name, value in evictor.items() if name != "min_idle"},
        }
        settings = Settings.model_validate(
            {
                "storage": {
                    "path": self.root,
                    "limit": LIMIT,
                    "high_watermark": 0.9,
                    "low_watermark": 0.5,
                },
                "catalog": {"kind": "manifest", "manifest": self.root / "none.yaml"},
                "evictor": given,
            }
        )
        # Less than operators may choose: tests need not wait
        hurried = settings.evictor.model_copy(update={"min_idle": evictor.get("min_idle", 0.0)})
        return settings.model_copy(update={"evictor": hurried})

    @asynccontextmanager
    async def evictor(self, **settings: Any) -> AsyncIterator[Evictor]:
        """An evictor at work until the end of the block; should it fail, so does the test."""
        async with self.evictor_of(self.settings(**settings)) as evictor:
            yield evictor

    @asynccontextmanager
    async def evictor_of(self, settings: Settings) -> AsyncIterator[Evictor]:
        evictor = Evictor(settings, self.state, self.volume, self.catalog)
        serving = asyncio.create_task(evictor.serve())
        try:
            yield evictor
        finally:
            serving.cancel()
            with suppress(asyncio.CancelledError):
                await serving

    def put_file(self, name: str, body: bytes | None = None, changed_at: float | None = None) -> StoredRecord:
        """A complete file with its record, as of `changed_at`; the store is not told."""
        body = body_of(name) if body is None else body
        record = record_of(name, body)
        partial = self.volume.open_partial_for_writing(record)
        partial.write(0, body)
        partial.mark_verified()
        if changed_at is not None:  # before it is there to be seen
            os.utime(self.root / "incoming" / f"{name}.part", (changed_at, changed_at))
        partial.publish(record)
        partial.close()
        return record

    def begin_partial(self, name: str, written: int, size: int = SIZE) -> PartialFile:
        """A partial file, still held by its writer; the store is not told."""
        body = body_of(name, size)
        partial = self.volume.open_partial_for_writing(record_of(name, body))
        partial.write(0, body[:written])
        return partial

    def leave_partial(self, name: str, written: int, size: int = SIZE) -> None:
        self.begin_partial(name, written, size).close()

    async def park(self, name: str, written: int, size: int = SIZE) -> None:
        """A fetch that was given up: only what its file holds stays reserved."""
        lease = await self.begin_fetch(name, size)
        partial = self.begin_partial(name, written, size)
        held = partial.held
        partial.close()
        await self.state.park(lease, held)

    async def store(self, *names: str, age: float = 0.0) -> None:
        """Fetch objects as a worker does; last accessed `age` seconds ago, each a minute later than the one before."""
        for name in names:
            lease = await self.begin_fetch(name)
            self.put_file(name, changed_at=time.time() - age)
            assert await self.state.commit(lease, time.time() - age)
            age = max(0.0, age - 60)

    async def begin_fetch(self, name: str, size: int = SIZE) -> Lease:
        granted = await self.state.begin(ObjectId(name), size, "worker-1")
        assert isinstance(granted, Granted), granted
        return granted.lease

    async def entries(self) -> dict[str, IndexEntry]:
        return {str(entry.object_id): entry async for batch in self.state.entries() for entry in batch}

    async def fetch_of(self, name: str) -> Fetch | None:
        return (await self.state.find(ObjectId(name))).fetch

    def has(self, name: str) -> bool:
        return self.volume.find_object(ObjectId(name)) is not None

    def path_of(self, name: str) -> Path:
        return next(self.root.glob(f"objects/*/{name}"))

    def record_path_of(self, name: str) -> Path:
        return next(self.root.glob(f"records/*/{name}"))

    async def reconciled(self) -> bool:
        return (await self.state.usage()).reconciled

    async def used(self) -> int:
        return (await self.state.usage()).used

    async def term(self) -> Term:
        """Lead, as an evictor of the test's own."""
        term = await self.state.lead("test", 60.0)
        assert term is not None
        return term

    async def matches_volume(self) -> bool:
        """The index stands for exactly what is on the volume."""
        usage = await self.state.usage()
        return usage.reconciled and bytes_on_volume(self.root) <= usage.used + usage.reserved


@asynccontextmanager
async def evictor_harness(
    folder: Path, redis: tuple[str, str] | None = None
) -> AsyncIterator[EvictorHarness]:
    """Over the memory store, or over Redis at (url, prefix)."""
    times = StateTimeouts(lease_seconds=0.5, operation_timeout=2.0)
    state: StateStore = MemoryStateStore(LIMIT, times, time.time)
    if redis is not None:
        state = RedisStateStore(*redis, LIMIT, times)
    volume = Volume(folder / "volume")
    volume.prepare()
    await state.open()
    try:
        yield EvictorHarness(state, volume, folder / "volume")
    finally:
        await state.close()
        volume.close()
