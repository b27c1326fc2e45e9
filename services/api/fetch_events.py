"""Waking the requests that wait for a fetch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.ports.state_store import Announcement, StateStore, Topic

_RECONNECT_DELAY = 1.0

logger = structlog.get_logger()


class FetchEvents:
    """One listener for the whole process; `run` is its task. A wake-up may be lost, so whoever waits also looks.

    `on_settings` is called when orders may have changed."""

    def __init__(self, state: StateStore, on_settings: Callable[[], None] | None = None) -> None:
        self._state = state
        self._on_settings = on_settings
        self._waiting: dict[ObjectId, set[asyncio.Event]] = {}

    async def wait(self, object_id: ObjectId, timeout: float) -> bool:
        """Wait for a change of this object's fetch; False if `timeout` seconds have passed without one."""
        changed = asyncio.Event()
        self._waiting.setdefault(object_id, set()).add(changed)
        try:
            async with asyncio.timeout(timeout):
                await changed.wait()
            return True
        except TimeoutError:
            return False
        finally:
            others = self._waiting[object_id]
            others.discard(changed)
            if not others:
                del self._waiting[object_id]

    @property
    def waiting(self) -> int:
        """How many objects are waited for."""
        return len(self._waiting)

    async def run(self) -> None:
        """Listen until cancelled. While the store is down nobody is woken, and all waiters time out."""
        while True:
            try:
                async with self._state.listen() as announcements:
                    async for announcement in announcements:
                        self._wake(announcement)
            except StateStoreUnavailable as error:
                logger.warning("fetch_event_subscription_lost", reason=str(error))
            await asyncio.sleep(_RECONNECT_DELAY)

    def _wake(self, announcement: Announcement) -> None:
        if announcement.topic is Topic.FETCH_CHANGED:
            for changed in self._waiting.get(ObjectId(announcement.object_id), ()):
                changed.set()
        elif announcement.topic is Topic.SETTINGS_CHANGED:
            if self._on_settings is not None:
                self._on_settings()
            # Said after every reconnect: announcements may have been missed meanwhile.
            for waiters in self._waiting.values():
                for changed in waiters:
                    changed.set()
