"""A listener's bounded queue of announcements: the oldest are dropped when the reader lags."""

from __future__ import annotations

import asyncio
from collections import deque

from shared.adapters.state_times import MAX_ANNOUNCEMENTS
from shared.ports.state_store import Announcement


class AnnouncementQueue:
    """Written by one adapter, read with `async for` by one listener; it never ends by itself."""

    def __init__(self) -> None:
        self._waiting: deque[Announcement] = deque(maxlen=MAX_ANNOUNCEMENTS)
        self._arrived = asyncio.Event()

    def put(self, announcement: Announcement) -> None:
        self._waiting.append(announcement)
        self._arrived.set()

    def __aiter__(self) -> AnnouncementQueue:
        return self

    async def __anext__(self) -> Announcement:
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        return self._waiting.popleft()
