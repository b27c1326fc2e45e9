"""Bounded waiting in an event loop: events with a limit, exponential backoff, tasks that are cancelled and awaited."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boot_time() -> float:
    """Seconds since the machine started, those included in which it was suspended.

    For leases and terms: the monotonic clock stands still while a virtual machine is suspended, and the lease expires.
    """
    return time.clock_gettime(_BOOT_CLOCK)


async def wait_event(event: asyncio.Event, seconds: float) -> bool:
    """Wait until `event` is set, at most `seconds`. Returns whether it is set; clearing it is up to the caller."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


class Backoff:
    """Delays in seconds before trying again: doubling from `first` up to `cap`.

    With `jitter` each delay is drawn from its upper half, so that many processes do not retry in step.
    """

    def __init__(self, first: float = 0.1, cap: float = 2.0, *, jitter: bool = True) -> None:
        self._first, self._cap, self._jitter = first, cap, jitter
        self._next = first

    def reset(self) -> None:
        """Start again at `first`, after a success."""
        self._next = self._first

    def next_delay(self) -> float:
        """The next delay in seconds, without waiting."""
        delay = self._next
        self._next = min(self._cap, self._next * 2)
        return delay * random.uniform(0.5, 1.0) if self._jitter else delay  # noqa: S311  nothing secret about it

    async def wait(self) -> None:
        """Sleep for the next delay."""
        await asyncio.sleep(self.next_delay())


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and return once all have ended. Their results and errors are left to the owner of the tasks."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


@asynccontextmanager
async def background(work: Coroutine[Any, Any, Any], name: str) -> AsyncIterator[asyncio.Task[Any]]:
    """Run a coroutine beside the block; cancel it and wait for its end when the block ends."""
    task = asyncio.create_task(work, name=name)
    try:
        yield task
    finally:
        await cancel_and_wait(task)
