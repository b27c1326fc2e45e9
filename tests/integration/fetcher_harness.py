"""What a fetcher needs: a real volume, storage nodes with scripted faults, a state store in memory."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from distributor_node.services.demo.objects import DemoObject, bytes_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.services.fetcher.admission import Admission, AdmissionRules, LeaseTimes
from distributor_node.services.fetcher.download import FetchLimits
from distributor_node.services.fetcher.fetch import FetchRunner
from distributor_node.services.fetcher.fetcher import DeadLetterHandler, FailureRecorder, Worker
from distributor_node.shared.adapters.sources import SourceClient, SourceLimits
from distributor_node.shared.adapters.sources.failover import FailoverReader
from distributor_node.shared.adapters.sources.health import SourceHealthRegistry
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.jobs import FetchJob, RetryPlan
from distributor_node.shared.domain.objects import ContentHash, MediaObject, ObjectId
from distributor_node.shared.ports.state_store import Term
from distributor_node.shared.runtime.threads import BlockingPool
from tests.waiting import eventually

LIMITS = SourceLimits(
    connect_timeout=2, first_byte_timeout=1, stall_timeout=1, minimum_rate=1, large_reads=True
)
OBJECT_ID = ObjectId.parse("7")
RETRIES = RetryPlan((5.0, 30.0))
LIMIT = 64 * 1024 * 1024


@dataclass(slots=True)
class Harness:
    """Its workers share state store and volume, as processes do."""

    state: MemoryStateStore
    term: Term
    volume: Volume
    failover_reader: FailoverReader
    disk: BlockingPool
    nodes: Sequence[StorageNode]
    times: LeaseTimes  # of the leases
    space_wait: float
    names: list[str] = field(default_factory=list)

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(node.object_url(OBJECT_ID) for node in self.nodes)

    def worker(self, limits: FetchLimits | None = None) -> Worker:
        name = f"worker-{len(self.names)}"
        self.names.append(name)
        rules = AdmissionRules(LIMIT // 2, self.space_wait, self.times.lease)
        return Worker(
            Admission(self.state, self.volume, self.disk, rules, name),
            FetchRunner(self.state, self.volume, self.failover_reader, self.disk, self.times, limits),
            FailureRecorder(self.state, RETRIES, failure_memory=60.0),
        )

    def dead_letter_handler(self) -> DeadLetterHandler:
        return DeadLetterHandler(self.state, self.volume, self.disk, "worker-last", failure_memory=60.0)

    def stored(self) -> bytes | None:
        """Return the bytes of the complete object, None if it is not stored."""
        found = self.volume.open_object(OBJECT_ID)
        if found is None:
            return None
        data = found.read(0, found.record.size + 1)
        found.close()
        return data

    def partial_size(self) -> int | None:
        reader = self.volume.open_partial(OBJECT_ID)
        if reader is None:
            return None
        size = reader.state().size
        reader.close()
        return size

    async def until_partial(self, size: int) -> None:
        """Wait until the partial file has `size` bytes."""

        async def grown() -> bool:
            return (self.partial_size() or 0) >= size

        await eventually(grown)

    def job(self, wanted: MediaObject) -> FetchJob:
        return FetchJob(wanted, request_id="r-1", published_at=time.time())

    def wanted(self, data: bytes, media_type: str | None = None, *, hashed: bool = True) -> MediaObject:
        return MediaObject(
            OBJECT_ID, len(data), hash_of(data) if hashed else None, media_type, sources=self.sources
        )


def hash_of(data: bytes) -> ContentHash:
    hasher = ContentHash("blake3", bytes(32)).hasher()
    hasher.update(data)
    return ContentHash("blake3", hasher.digest())


@asynccontextmanager
async def fetcher_harness(
    folder: Path,
    contents: Sequence[bytes | DemoObject],
    *,
    lease: float = 15.0,
    space_wait: float = 0.3,
    limit: int = LIMIT,
    reconciled: bool = True,
    state_kind: type[MemoryStateStore] = MemoryStateStore,
) -> AsyncIterator[Harness]:
    """Start one storage node for each of `contents`, which it serves as object 7."""
    async with AsyncExitStack() as stack:
        volume = Volume(folder)
        volume.prepare()
        stack.callback(volume.close)
        state = state_kind(limit, StateTimeouts(lease_seconds=lease), time.time)
        term = await state.lead("evictor", 3600)
        assert term is not None
        if reconciled:
            await state.set_reconciled(term)
        nodes = []
        for content in contents:
            held = bytes_object(OBJECT_ID, content) if isinstance(content, bytes) else content
            nodes.append(await stack.enter_async_context(StorageNode([held]).run()))
        client = await stack.enter_async_context(SourceClient(LIMITS))
        disk = BlockingPool(8)
        stack.push_async_callback(disk.close)
        times = LeaseTimes(lease, lease / 4)
        yield Harness(
            state,
            term,
            volume,
            FailoverReader(client, SourceHealthRegistry()),
            disk,
            nodes,
            times,
            space_wait,
        )
