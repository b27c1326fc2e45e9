"""Fetch events from the state store: wakes requests that wait for a fetch, and reports changed operator state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.ports.state_store import Announcement, StateStore, Topic
from distributor_node.shared.waiting import wait_event

_RECONNECT_DELAY = 1.0

logger = structlog.get_logger()


class FetchEvents:
    """One subscription per process. Events may be lost, so waiters must also poll."""

    def __init__(self, state: StateStore, on_settings: Callable[[], None] | None = None) -> None:
        """`on_settings` is called when the operator state may have changed."""
        self._state = state
        self._on_settings = on_settings
        self._waiting: dict[ObjectId, set[asyncio.Event]] = {}

    async def wait(self, object_id: ObjectId, timeout: float) -> bool:
        """Wait for a change of this object's fetch. Returns False after `timeout` seconds without one."""
        changed = asyncio.Event()
        self._waiting.setdefault(object_id, set()).add(changed)
        try:
            return await wait_event(changed, timeout)
        finally:
            others = self._waiting[object_id]
            others.discard(changed)
            if not others:
                del self._waiting[object_id]

    @property
    def waiting(self) -> int:
        """The number of objects that requests wait for."""
        return len(self._waiting)

    async def run(self) -> None:
        """Listen until cancelled. While the store is down no event arrives, and all waiters time out."""
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
            # Also announced after every reconnect: wake all waiters, since announcements may have been missed.
            for waiters in self._waiting.values():
                for changed in waiters:
                    changed.set()
