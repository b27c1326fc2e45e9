"""The state store port in one process's memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from shared.adapters.announcement_queue import AnnouncementQueue
from shared.adapters.state_memory.orders import MemoryOrders
from shared.adapters.state_memory.tables import Tables
from shared.adapters.state_times import StateTimeouts
from shared.ports.state_store import Announcement, Topic


class MemoryStateStore(MemoryOrders):
    """`limit`: of the volume, in bytes; `clock`: POSIX seconds. All tasks of the process share one instance."""

    def __init__(self, limit: int, timeouts: StateTimeouts, clock: Callable[[], float]) -> None:
        super().__init__(Tables(limit, timeouts, clock))

    async def open(self) -> None:
        """Nothing to get ready."""

    async def close(self) -> None:
        """Nothing to give back."""

    async def ping(self) -> None:
        """Always there."""

    async def server_stats(self) -> None:
        """No server, no stats."""

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[AsyncIterator[Announcement]]:
        queue = AnnouncementQueue()
        queue.put(Announcement(Topic.SETTINGS_CHANGED))
        self._tables.listeners.add(queue)
        try:
            yield queue
        finally:
            self._tables.listeners.discard(queue)
