"""Writes and hashes received bytes in a thread, while more bytes are received."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from distributor_node.services.fetcher.lease import LeaseRenewer
from distributor_node.shared.adapters.volume import PartialFile
from distributor_node.shared.domain.objects import Hasher
from distributor_node.shared.observability.metrics import WRITTEN_BYTES
from distributor_node.shared.runtime.threads import BlockingPool, wait_uncancellable
from distributor_node.shared.waiting import wait_event

MAX_BATCH = 1024 * 1024
"""Bytes that are written without waiting for more."""

HIGH_WATER = 2 * MAX_BATCH
"""Received and unwritten bytes at which `put` waits, and with it the source."""

MAX_LATENCY = 0.05
"""Seconds after which received bytes are written, however few: clients of a slow source wait for them."""

_UNBATCHED_BYTES = 64 * 1024
"""The first bytes of a stream, which are written at once."""

_MIN_WRITE = 64 * 1024
"""Mean bytes of a piece below which the pieces of a batch are joined. Joining copies, so larger ones are not."""


class PartialWriter:
    """Writes one batch while the next is received. Memory is bounded by HIGH_WATER and the batch being written."""

    def __init__(
        self,
        partial: PartialFile,
        hasher: Hasher | None,
        renewer: LeaseRenewer,
        disk: BlockingPool,
        on_first_bytes: Callable[[], Coroutine[Any, Any, None]],
        on_complete: Callable[[], bool],
        reserve: Callable[[int], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """Callbacks:

        - `on_first_bytes` is called once, when the first bytes are on disk and more are to come. It must not raise.
        - `on_complete` is called in the thread that wrote the object's last byte, so that clients wait for one thread
          switch instead of two. Its result is stored in `verified`. Not called while the length is unknown.
        - `reserve` is called before bytes are written, with the size that the file will have.
        """
        self._partial = partial
        self._hasher = hasher
        self._renewer = renewer
        self._disk = disk
        self._on_first_bytes = on_first_bytes
        self._on_complete = on_complete
        self._reserve = reserve
        self.verified: bool | None = (
            None  # None: `on_complete` was not called, for nothing was missing at the start
        )
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._received = 0
        self._closed = False
        self._notify_task: asyncio.Task[None] | None = None
        self._has_data, self._batch_ready, self._has_room = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def writing(self, offset: int) -> AsyncIterator[None]:
        """Within the block, `put` the bytes that follow `offset`.

        When the block has ended, for any reason, all bytes given to `put` are on disk, unless the lease was lost or
        the disk failed. Errors of the disk are raised here or by `put`.
        """
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
        """Hand over the next bytes. Waits while HIGH_WATER bytes are unwritten."""
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
        while await self._wait_for_batch():
            batch, self._pending = self._pending, []
            length, self._pending_bytes = self._pending_bytes, 0
            self._has_data.clear()
            self._batch_ready.clear()
            self._has_room.set()
            await self._renewer.ensure_valid()
            if self._reserve is not None:
                await self._reserve(offset + length)
            await self._disk.run(self._write, offset, batch, length)
            WRITTEN_BYTES.inc(length)
            offset += length
            if first and self.verified is None:
                # In the background, so that writing goes on. Where all bytes are written, `on_complete` notifies.
                self._notify_task = asyncio.create_task(self._on_first_bytes(), name="first-bytes")
            first = False

    async def _wait_for_batch(self) -> bool:
        """Return True when a batch is to be written, False after the last one."""
        while not self._pending:
            if self._closed:
                return False
            await self._has_data.wait()
            self._has_data.clear()
        await wait_event(self._batch_ready, MAX_LATENCY)
        return True

    def _write(self, offset: int, batch: list[bytes], length: int) -> None:
        """Blocking: call from a worker thread."""
        if length < len(batch) * _MIN_WRITE:
            batch = [b"".join(batch)]
        for data in batch:
            self._partial.write(offset, data)
            offset += len(data)
            if self._hasher is not None:
                self._hasher.update(data)
        if offset == self._partial.record.size and not self._partial.record.growing:
            self.verified = self._on_complete()


def batch_size(received: int) -> int:
    """Return the bytes that make a batch, after `received` bytes of this stream.

    Any number for the first 64 KiB, which clients wait for. Then a quarter of the received bytes, so that clients that
    read the partial file are never far behind.
    """
    return 1 if received < _UNBATCHED_BYTES else min(received // 4, MAX_BATCH)
