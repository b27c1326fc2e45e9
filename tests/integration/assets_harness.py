"""An API process on a real port, with scripted storage nodes and fetches that a test drives by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.service import make_context, serve_api
from distributor_node.services.demo.objects import GeneratedContent, bytes_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.shared.adapters.queue_memory import MemoryJobQueue
from distributor_node.shared.adapters.sources.client import SourceClient
from distributor_node.shared.adapters.sources.connections import SourceLimits
from distributor_node.shared.adapters.sources.failover import FailoverReader
from distributor_node.shared.adapters.sources.health import SourceHealthRegistry
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.adapters.volume import PartialFile, Volume
from distributor_node.shared.domain.errors import CatalogUnavailable, LookupRefused, QueryRejected
from distributor_node.shared.domain.jobs import RetryPlan
from distributor_node.shared.domain.objects import (
    Assignment,
    ContentHash,
    MediaObject,
    ObjectId,
    StoredRecord,
)
from distributor_node.shared.ports.catalog import CatalogStatus
from distributor_node.shared.ports.state_store import Granted, Lease, StateStore, WorkerReport
from distributor_node.shared.settings.model import Settings
from tests.end_to_end.client import Answer, get
from tests.waiting import eventually

KIB, MIB = 1024, 1024 * 1024
LIMIT = 64 * MIB
STORED_AT = 1_700_000_000


def content(object_id: str, size: int) -> bytes:
    return GeneratedContent(int(object_id), size).read(0, size)


class ListedCatalog:
    """The far end of the catalog port: what the test lists, as late as it says, or nothing at all."""

    def __init__(self) -> None:
        self.objects: dict[str, MediaObject] = {}
        self.down = False
        self.fails = False  # what it says of its last look-ups
        self.delay = 0.0
        self.asked = 0
        self.clients: list[str | None] = []  # that asked, in order
        self.refuse = False
        self.impossible: set[str] = set()  # ids that it cannot have
        self.rejected_workers: set[int | None] = set()  # for which a query is not supported

    @property
    def can_list(self) -> bool:
        return True

    @property
    def public_url(self) -> str:
        return ""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def can_have(self, object_id: ObjectId) -> bool:
        return object_id not in self.impossible

    async def look_up(self, object_id: ObjectId, client: str | None = None) -> MediaObject | None:
        self.clients.append(client)
        if self.refuse:
            raise LookupRefused("too many look-ups wait", "queue_full")
        self.asked += 1
        await asyncio.sleep(self.delay)
        if self.down:
            raise CatalogUnavailable("down")
        return self.objects.get(object_id)

    async def forget(self, outdated: MediaObject) -> None: ...

    async def forget_object(self, object_id: ObjectId) -> None: ...

    @property
    def lookups_fail(self) -> bool:
        return self.fails

    def sources_of(self, object_id: ObjectId) -> Sequence[str]:
        return ()

    async def list_objects(self, assignment: Assignment) -> AsyncIterator[Sequence[MediaObject]]:
        yield list(self.objects.values())

    async def bucket_ids(self, worker_id: int | None = None) -> Sequence[str]:
        if worker_id in self.rejected_workers:
            raise QueryRejected('Variable "$w" of type "Int!"')
        return ()

    async def source_bases(self) -> Sequence[str]:
        return ()

    async def status(self) -> CatalogStatus:
        return CatalogStatus()

    async def chain_head(self) -> int | None:
        return None


@dataclass
class ManualFetch:
    """A fetch at a test's pace: the verbs of a worker, one by one."""

    state: StateStore
    lease: Lease
    partial: PartialFile
    data: bytes
    written: int = 0

    def write_to(self, end: int) -> None:
        self.partial.write(self.written, self.data[self.written : end])
        self.written = end

    def verify(self) -> None:
        self.partial.mark_verified()

    async def complete(self, media_type: str = "image/png") -> None:
        """`media_type`: what the first bytes have shown."""
        self.write_to(len(self.data))
        self.verify()
        self.partial.publish(replace(self.partial.record, media_type=media_type))
        self.partial.close()
        assert await self.state.commit(self.lease, time.time())


@dataclass
class AssetsHarness:
    """`node` and `second` hold what `add` gave them; both are sources of it, in this order."""

    context: ApiContext
    catalog: ListedCatalog
    node: StorageNode
    second: StorageNode
    queue: MemoryJobQueue
    port: int = 0
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    data: dict[str, bytes] = field(default_factory=dict)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def volume(self) -> Volume:
        return self.context.volume

    def add(self, object_id: str, length: int, **changes: Any) -> bytes:
        """An object that the catalog and both nodes know; `changes` are what the catalog says otherwise."""
        data = content(object_id, length)
        self.add_bytes(object_id, data, **changes)
        return data

    def add_bytes(self, object_id: str, data: bytes, **changes: Any) -> None:
        """Likewise, with these bytes."""
        self.data[object_id] = data
        for node in (self.node, self.second):
            node.objects[object_id] = bytes_object(object_id, data, "video/mp4")
        fields: dict[str, Any] = {
            "size": len(data),
            "content_hash": ContentHash("blake3", _digest(data)),
            "media_type": "image/png",
            "sources": (self.node.object_url(object_id), self.second.object_url(object_id)),
        }
        self.catalog.objects[object_id] = MediaObject(ObjectId(object_id), **(fields | changes))

    def record(self, object_id: str) -> StoredRecord:
        known = self.catalog.objects[object_id]
        return StoredRecord(
            known.object_id, len(self.data[object_id]), known.etag, known.content_hash,
            known.media_type or "image/png", STORED_AT, name=known.name,
        )  # fmt: skip

    def store(self, object_id: str) -> Path:
        """Put a complete object on the volume; where it lies."""
        partial = self.volume.open_partial_for_writing(self.record(object_id))
        partial.write(0, self.data[object_id])
        partial.mark_verified()
        partial.publish(self.record(object_id))
        partial.close()
        return next((self.volume.root / "objects").glob(f"*/{object_id}"))

    async def begin(self, object_id: str, written: int = 0) -> ManualFetch:
        """A worker has taken the job and written so many bytes."""
        record = replace(self.record(object_id), media_type=self.catalog.objects[object_id].media_type)
        granted = await self.context.state.begin(record.object_id, record.size, "worker-1")
        assert isinstance(granted, Granted)
        fetch = ManualFetch(
            self.context.state,
            granted.lease,
            self.volume.open_partial_for_writing(record),
            self.data[object_id],
        )
        fetch.write_to(written)
        return fetch

    async def get(
        self, object_id: str, headers: Mapping[str, str] | None = None, *, method: str = "GET"
    ) -> Answer:
        url = f"http://127.0.0.1:{self.port}/api/v1/assets/{object_id}"
        return await get(url, headers, method=method, timeout=60)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A raw connection; it ends with the harness at the latest."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=64 * KIB)
        self.writers.append(writer)
        return reader, writer

    async def is_hit(self, object_id: str) -> bool:
        return (await self.get(object_id, method="HEAD")).headers.get("x-cache") == "hit"

    async def has_job(self) -> bool:
        return await self.jobs() > 0

    async def jobs(self) -> int:
        return (await self.queue.depth()).ready

    async def until_pending(self, object_id: str, requests: int) -> None:
        """Return when so many requests wait for bytes of the object, or are being sent them as they come."""

        async def as_many() -> bool:
            viewers = (await self.context.viewers.positions(watched=True)).get("viewers", {})
            return len(viewers.get(object_id, ())) == requests

        await eventually(as_many, what=f"{requests} pending requests of {object_id}")

    def open_files(self) -> int:
        """Files of the volume (objects and partial files) that this process has open."""
        root, found = str(self.volume.root), 0
        for descriptor in Path("/proc/self/fd").iterdir():
            try:
                path = descriptor.readlink()
            except OSError:
                continue
            found += str(path).startswith(root) and not path.is_dir()
        return found


@asynccontextmanager
async def assets_harness(
    root: Path,
    *,
    state_down: bool = False,
    queue_down: bool = False,
    log_hits: bool = False,
    log_clients: bool = False,
    store: StateStore | None = None,
    admission: Mapping[str, Any] | None = None,
    fetch: Mapping[str, Any] | None = None,
    workers: int = 1,
    clock: Callable[[], float] = time.time,
    **public_api: Any,
) -> AsyncIterator[AssetsHarness]:
    """A running API. `state_down`: its Redis is not there; `queue_down`: its queue takes no job; `store`: another one
    than usual; `workers`: fetchers that have reported, with 8 free slots each; `clock`: of the usual store."""
    settings = Settings(
        metrics={"host": "127.0.0.1", "port": 0},
        dashboard={"enabled": False},
        catalog={"manifest": root / "unused.yaml"},
        storage={"path": root / "volume", "limit": LIMIT},
        public_api={"host": "127.0.0.1", "port": 0, "first_byte_wait": 0.5} | public_api,
        fetch={"lease": 1.0, "lease_renewal": 0.3} | dict(fetch or {}),
        state_store={"operation_timeout": 0.3},
        admission=admission or {},
        shutdown_deadline=4.0,
        log={"hits": log_hits, "client_address": log_clients},
    )
    times = StateTimeouts(operation_timeout=0.3)
    state: StateStore = store or MemoryStateStore(LIMIT, times, clock)
    if state_down:
        state = RedisStateStore(f"unix://{root}/no-redis.sock", "test:", LIMIT, times)
    queue, catalog, volume = MemoryJobQueue(RetryPlan()), ListedCatalog(), Volume(settings.storage.path)
    volume.prepare()
    async with AsyncExitStack() as stack:
        stack.callback(volume.close)
        nodes = [await stack.enter_async_context(StorageNode([]).run()) for _ in range(2)]
        limits = SourceLimits(connect_timeout=2, first_byte_timeout=2, stall_timeout=2, minimum_rate=1)
        client = await stack.enter_async_context(SourceClient(limits))
        await state.open()
        stack.push_async_callback(state.close)
        if not queue_down:
            await queue.open()
            stack.push_async_callback(queue.close)
        if not state_down:
            term = await state.lead("evictor", 600)
            assert term is not None
            await state.set_reconciled(term)
            for number in range(1, workers + 1):
                await state.report_worker(WorkerReport(f"worker-{number}", 8, 0, 0, 0.0), 3600)
        context = make_context(
            settings, volume, state, queue, catalog, FailoverReader(client, SourceHealthRegistry())
        )
        harness = AssetsHarness(context, catalog, nodes[0], nodes[1], queue)
        listening = asyncio.Event()

        def on_listening(port: int) -> None:
            harness.port = port
            listening.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(serve_api(context, harness.stop, on_listening=on_listening))
            try:
                await asyncio.wait_for(listening.wait(), 30)
                yield harness
            finally:
                for writer in harness.writers:
                    writer.transport.abort()
                harness.stop.set()


def _digest(data: bytes) -> bytes:
    hasher = ContentHash("blake3", bytes(32)).hasher()
    hasher.update(data)
    return hasher.digest()
