"""Writes and hashes what arrives, in a thread, while more arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from services.fetcher.disk import DiskThreads
from services.fetcher.flushing import LONGEST_WAIT, MOST_WAITING, lot_size
from services.fetcher.lease_keeper import LeaseKeeper
from shared.adapters.volume import PartialFile
from shared.domain.objects import Hasher
from shared.observability.metrics import WRITTEN_BYTES
from shared.runtime.threads import wait_uncancellable

_WORTH_A_CALL = 64 * 1024  # bytes; smaller pieces are joined, larger ones not copied


class PartialWriter:
    """One write is under way while the next lot is received; memory is bounded by a lot or two.

    `on_first_bytes` is called once, when the first bytes are on disk and more are to come; it must not fail. `on_whole`
    is called in the thread that has written the object's last byte, so that clients wait for one change of threads, not
    for two; what it returns is the `verdict`, which is None if no byte was missing from the beginning.
    """

    def __init__(
        self,
        partial: PartialFile,
        hasher: Hasher | None,
        keeper: LeaseKeeper,
        disk: DiskThreads,
        on_first_bytes: Callable[[], Coroutine[Any, Any, None]],
        on_whole: Callable[[], bool],
    ) -> None:
        self._partial = partial
        self._hasher = hasher
        self._keeper = keeper
        self._disk = disk
        self._on_first_bytes = on_first_bytes
        self._on_whole = on_whole
        self.verdict: bool | None = None
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._received = 0
        self._ended = False
        self._telling: asyncio.Task[None] | None = None
        self._some, self._enough, self._room = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def writing(self, offset: int) -> AsyncIterator[None]:
        """Within, `put` what comes next from `offset`. Whatever ends the context, what was put is on disk after it,
        unless the lease is lost or the disk refuses; the disk's errors come out here or from `put`."""
        writer = asyncio.create_task(self._write_lots(offset), name="partial-writer")
        writer.add_done_callback(lambda _: self._room.set())
        self._writer = writer
        try:
            yield
        finally:
            self._ended = True
            self._some.set()
            self._enough.set()
            try:
                await wait_uncancellable(writer)
            finally:
                if self._telling is not None:
                    await wait_uncancellable(self._telling)
            failure = writer.exception()
        if failure is not None:
            raise failure

    async def put(self, data: bytes) -> None:
        """Hand over the next bytes; waits while too many are on their way to the disk."""
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        self._received += len(data)
        self._some.set()
        if self._waiting_bytes >= lot_size(self._received):
            self._enough.set()
        while self._waiting_bytes >= MOST_WAITING and not self._writer.done():
            self._room.clear()
            await self._room.wait()
        if self._writer.done():
            self._writer.result()

    async def _write_lots(self, offset: int) -> None:
        first = True
        while await self._next_lot():
            lot, self._waiting = self._waiting, []
            length, self._waiting_bytes = self._waiting_bytes, 0
            self._some.clear()
            self._enough.clear()
            self._room.set()
            await self._keeper.confirm()
            await self._disk.run(self._write, offset, lot, length)
            WRITTEN_BYTES.inc(length)
            offset += length
            if first and self.verdict is None:
                # Its reply is not waited for here; and where all bytes are there, the next word is the verdict's.
                self._telling = asyncio.create_task(self._on_first_bytes(), name="first-bytes")
            first = False

    async def _next_lot(self) -> bool:
        """True when there is a lot worth writing; False when there is nothing left and nothing will come."""
        while not self._waiting:
            if self._ended:
                return False
            await self._some.wait()
            self._some.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(LONGEST_WAIT):
                await self._enough.wait()
        return True

    def _write(self, offset: int, lot: list[bytes], length: int) -> None:
        if length < len(lot) * _WORTH_A_CALL:
            lot = [b"".join(lot)]
        for data in lot:
            self._partial.write(offset, data)
            offset += len(data)
            if self._hasher is not None:
                self._hasher.update(data)
        if offset == self._partial.record.size:
            self.verdict = self._on_whole()
