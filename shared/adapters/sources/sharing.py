"""Exchanges what this process sees of the sources with what the others see, in batches."""

from __future__ import annotations

import asyncio
from typing import Self

import structlog

from shared.adapters.sources.health import HealthBook
from shared.domain.errors import StateStoreUnavailable
from shared.ports.source_memory import SourceMemory

logger = structlog.get_logger()


class SourceSharing:
    """`book` is used by whoever reads from sources; without a memory (one process) it is all there is."""

    def __init__(self, book: HealthBook, memory: SourceMemory | None, interval: float) -> None:
        """`interval`: seconds between two exchanges."""
        self.book = book
        self._memory = memory
        self._interval = interval
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._down = False

    async def open(self) -> None:
        """Learn what the others know (if they can be heard), and go on exchanging in the background."""
        if self._memory is not None:
            await self._memory.open()
            await self.exchange()
            self._task = asyncio.create_task(self._run(), name="share-sources")

    async def close(self) -> None:
        """Hand over what is left."""
        if self._memory is None:
            return
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            await self.exchange()
        await self._memory.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def exchange(self) -> None:
        """Now. What the memory does not take is kept for the next time, and this process goes by what it sees."""
        if self._memory is None:
            return
        async with self._turn:
            news, corrupted = self.book.take_news()
            try:
                shared = await self._memory.exchange(news, corrupted, self.book.clock())
            except StateStoreUnavailable as error:
                self.book.put_back()
                self._note_down(str(error))
            except BaseException:
                self.book.put_back()
                raise
            else:
                self.book.learn(shared)
                self._down = False

    def _note_down(self, reason: str) -> None:
        if not self._down:
            self._down = True
            logger.warning("sources_not_shared", reason=reason)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self.exchange()
