"""The window of one fetch: a large object is read only as far ahead of its viewers as they need.

1. A stream that is too far ahead is not read until its viewers come nearer. The source's connection stays open, and TCP
   holds the source back.
2. While the main stream waits, the download has no slot.
3. After some time without viewers the fetch ends, and keeps what it has. So does one that waits for its viewers while
   others need its place or the room that is reserved for it (`Slot.is_displaced`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import structlog

from distributor_node.services.fetcher.admission import FetchTask
from distributor_node.services.fetcher.scheduler import Slot
from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.space import Completion, FetchWindow
from distributor_node.shared.observability.metrics import DOWNLOADS_PAUSED
from distributor_node.shared.ports.state_store import StateStore
from distributor_node.shared.waiting import ended_by, wait_event

logger = structlog.get_logger()

LOOK_INTERVAL = 0.25
"""Seconds between two looks at where viewers are, at most."""
_MIN_LOOK_INTERVAL = 0.01


class FetchPaused(Exception):
    """A fetch has ended because it had no viewers for long, or its place or room is needed. Its bytes are kept."""


@dataclass(frozen=True, slots=True)
class WindowLimits:
    """How far ahead of viewers large objects are read."""

    window: int  # bytes
    above: int = 0  # bytes of an object up to which all of it is read
    near: int = 4 * 1024 * 1024  # bytes up to which viewers ahead of the main stream wait for it
    viewer_timeout: float = 30.0  # seconds without viewers after which a fetch ends
    has_spare_time: Callable[[Slot | None], Awaitable[bool]] | None = None
    """Whether nothing else is to be fetched, and there is room: then all of it is read."""


class ViewerWindow:
    """Holds back the streams of one fetch that are too far ahead of its viewers, and ends it when there are none."""

    def __init__(
        self,
        state: StateStore,
        task: FetchTask,
        size: int,
        limits: WindowLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock`: in seconds."""
        self._state = state
        self._object_id = task.media_object.object_id
        self._slot = task.slot
        self._limits = limits
        self._clock = clock
        self.rule = FetchWindow(size, limits.window, clock(), near=limits.near, ordered=task.ordered)
        self._reading = 0  # side streams that are not held back
        self._held_at: float | None = (
            None  # since when the main stream is held back, or waits for a side stream
        )
        self._told: Completion | None = None
        self._changed, self._urgent = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def running(self, *, resumed: bool) -> AsyncIterator[None]:
        """Follow the viewers during the block. Ends it and raises FetchPaused when the fetch is to end.

        `resumed`: there are bytes of an earlier attempt. They may be enough, so the first look is waited for.
        """
        if resumed:
            await self._look(self._clock())
        watching = asyncio.create_task(self._watch(), name=f"window-{self._object_id}")
        async with ended_by(watching):
            yield
        if not watching.cancelled():
            watching.result()
            raise FetchPaused(f"no viewers of {self._object_id}, or others need its place")

    async def _watch(self) -> None:
        """Return when the fetch is to end."""
        while True:
            now = self._clock()
            await self._look(now)
            if self._held_at is not None and not self._reading and self._is_given_up(now):
                return
            # A pause is as long as the viewer needs to come nearer. The looks of one are a part of that apart.
            held_for = LOOK_INTERVAL if self._held_at is None else (now - self._held_at) / 4
            await wait_event(self._urgent, max(_MIN_LOOK_INTERVAL, min(held_for, LOOK_INTERVAL)))
            self._urgent.clear()

    def _is_given_up(self, now: float) -> bool:
        displaced = self._slot is not None and self._slot.is_displaced
        return displaced or self.rule.alone_for(now) >= self._limits.viewer_timeout

    async def _look(self, now: float) -> None:
        try:
            known = await self._state.followers(self._object_id)
            spare = await self._has_spare_time()
        except StateStoreUnavailable:
            self.rule.update(now, (), untold=True)
        else:
            self.rule.update(
                now,
                known.viewers,
                views=known.views,
                ordered=known.whole,
                told=known.told,
                untold=known.untold,
                spare_time=spare,
            )
        completion = self.rule.completion
        if completion is not self._told:
            self._told = completion
            logger.debug("fetch_window_changed", object_id=self._object_id, completion=completion)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _has_spare_time(self) -> bool:
        if self._limits.has_spare_time is None:
            return False
        if self._held_at is None and self.rule.completion is not Completion.SPARE_TIME:
            return False
        return await self._limits.has_spare_time(self._slot)

    @contextmanager
    def side_stream(self, change: int = 1) -> Iterator[None]:
        """A side stream reads during the block. `change` -1: one is held back."""
        self._reading += change
        try:
            yield
        finally:
            self._reading -= change

    @contextmanager
    def main_stream_held(self, missing: int) -> Iterator[None]:
        """The main stream waits during the block, and needs no slot. `missing`: bytes that are not written yet."""
        self._held_at = self._clock()
        DOWNLOADS_PAUSED.inc()
        if self._slot is not None:
            self._slot.pause(missing)
        try:
            yield
        finally:
            if self._slot is not None:
                self._slot.resume()
            DOWNLOADS_PAUSED.dec()
            self._held_at = None

    def look_now(self) -> None:
        """Ask for the viewers at once: a stream has come to the limit that they were known to set."""
        self._urgent.set()

    async def change(self) -> None:
        """Wait until the viewers were looked at again."""
        await self._changed.wait()
