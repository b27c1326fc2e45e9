"""Writes and hashes what arrives, in a thread, while more arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from distributor_node.services.fetcher.lease import LeaseRenewer
from distributor_node.shared.adapters.volume import PartialFile
from distributor_node.shared.domain.objects import Hasher
from distributor_node.shared.observability.metrics import WRITTEN_BYTES
from distributor_node.shared.runtime.threads import BlockingPool, wait_uncancellable

_MIN_WRITE = 64 * 1024  # bytes; smaller pieces are joined, larger ones not copied


class PartialWriter:
    """One write is under way while the next batch is received; memory is bounded by a batch or two.

    `on_first_bytes` is called once, when the first bytes are on disk and more are to come; it must not fail.
    `on_complete` is called in the thread that has written the object's last byte, so that clients wait for one change
    of threads, not for two; what it returns is `verified`, which is None if no byte was missing from the beginning.
    """

    def __init__(
        self,
        partial: PartialFile,
        hasher: Hasher | None,
        renewer: LeaseRenewer,
        disk: BlockingPool,
        on_first_bytes: Callable[[], Coroutine[Any, Any, None]],
        on_complete: Callable[[], bool],
    ) -> None:
        self._partial = partial
        self._hasher = hasher
        self._renewer = renewer
        self._disk = disk
        self._on_first_bytes = on_first_bytes
        self._on_complete = on_complete
        self.verified: bool | None = None
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._received = 0
        self._closed = False
        self._notify_task: asyncio.Task[None] | None = None
        self._has_data, self._batch_ready, self._has_room = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def writing(self, offset: int) -> AsyncIterator[None]:
        """Within, `put` what comes next from `offset`. Whatever ends the context, what was put is on disk after it,
        unless the lease is lost or the disk refuses; the disk's errors come out here or from `put`."""
        writer = asyncio.create_task(self._write_batches(offset), name="partial-writer")
        writer.add_done_callback(lambda _: self._has_room.set())
        self._writer = writer
        try:
            yield
        finally:
            self._closed = True
            self._has_data.set()
            self._batch_ready.set()
            try:
                await wait_uncancellable(writer)
            finally:
                if self._notify_task is not None:
                    await wait_uncancellable(self._notify_task)
            failure = writer.exception()
        if failure is not None:
            raise failure

    async def put(self, data: bytes) -> None:
        """Hand over the next bytes; waits while too many are on their way to the disk."""
        self._pending.append(data)
        self._pending_bytes += len(data)
        self._received += len(data)
        self._has_data.set()
        if self._pending_bytes >= batch_size(self._received):
            self._batch_ready.set()
        while self._pending_bytes >= HIGH_WATER and not self._writer.done():
            self._has_room.clear()
            await self._has_room.wait()
        if self._writer.done():
            self._writer.result()

    async def _write_batches(self, offset: int) -> None:
        first = True
        while await self._next_batch():
            batch, self._pending = self._pending, []
            length, self._pending_bytes = self._pending_bytes, 0
            self._has_data.clear()
            self._batch_ready.clear()
            self._has_room.set()
            await self._renewer.ensure_valid()
            await self._disk.run(self._write, offset, batch, length)
            WRITTEN_BYTES.inc(length)
            offset += length
            if first and self.verified is None:
                # Its reply is not waited for here; and where all bytes are there, `on_complete` notifies.
                self._notify_task = asyncio.create_task(self._on_first_bytes(), name="first-bytes")
            first = False

    async def _next_batch(self) -> bool:
        """True when there is a batch worth writing; False when there is nothing left and nothing will come."""
        while not self._pending:
            if self._closed:
                return False
            await self._has_data.wait()
            self._has_data.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(MAX_LATENCY):
                await self._batch_ready.wait()
        return True

    def _write(self, offset: int, batch: list[bytes], length: int) -> None:
        if length < len(batch) * _MIN_WRITE:
            batch = [b"".join(batch)]
        for data in batch:
            self._partial.write(offset, data)
            offset += len(data)
            if self._hasher is not None:
                self._hasher.update(data)
        if offset == self._partial.record.size:
            self.verified = self._on_complete()


# When received bytes are written: at once in the beginning, where a client waits for them, in larger batches later.

MAX_BATCH = 1024 * 1024
"""Bytes after which a write is due in any case."""

HIGH_WATER = 2 * MAX_BATCH
"""Bytes received and not yet written beyond which the source has to wait."""

MAX_LATENCY = 0.05
"""Seconds after which received bytes are written, however few: a follower of a slow source waits for them."""

_UNBATCHED_BYTES = 64 * 1024


def batch_size(received: int) -> int:
    """Bytes worth a write of their own, after `received` bytes of this stream: any for the first 64 KiB, then a quarter
    of what has come so far, so that followers are never far behind."""
    return 1 if received < _UNBATCHED_BYTES else min(received // 4, MAX_BATCH)
