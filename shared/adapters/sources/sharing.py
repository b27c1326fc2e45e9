"""Exchanges what this process sees of the sources with what the others see, in batches."""

from __future__ import annotations

import asyncio
from typing import Self

import structlog

from shared.adapters.sources.health import SourceHealthRegistry
from shared.domain.errors import StateStoreUnavailable
from shared.ports.source_memory import SharedSourceStats

logger = structlog.get_logger()


class SourceStatsSync:
    """`registry` is used by whoever reads from sources; without shared stats (one process) it is all there is."""

    def __init__(
        self, registry: SourceHealthRegistry, shared_stats: SharedSourceStats | None, interval: float
    ) -> None:
        """`interval`: seconds between two exchanges."""
        self.registry = registry
        self._shared_stats = shared_stats
        self._interval = interval
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._down = False

    async def open(self) -> None:
        """Learn what the others know (if they can be heard), and go on exchanging in the background."""
        if self._shared_stats is not None:
            await self._shared_stats.open()
            await self.sync()
            self._task = asyncio.create_task(self._run(), name="share-sources")

    async def close(self) -> None:
        """Hand over what is left."""
        if self._shared_stats is None:
            return
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            await self.sync()
        await self._shared_stats.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def sync(self) -> None:
        """Now. What the store does not take is kept for the next time, and this process goes by what it sees."""
        if self._shared_stats is None:
            return
        async with self._lock:
            deltas, corrupted = self.registry.take_delta()
            try:
                shared = await self._shared_stats.sync(deltas, corrupted, self.registry.clock())
            except StateStoreUnavailable as error:
                self.registry.restore()
                self._note_down(str(error))
            except BaseException:
                self.registry.restore()
                raise
            else:
                self.registry.merge(shared)
                self._down = False

    def _note_down(self, reason: str) -> None:
        if not self._down:
            self._down = True
            logger.warning("source_stats_sync_failed", reason=reason)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self.sync()
