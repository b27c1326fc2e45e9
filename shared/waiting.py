"""Bounded waiting in an event loop: events with a limit, exponential backoff, shares of a turn, background tasks."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any
from weakref import WeakValueDictionary

_Queue = deque[tuple[asyncio.Future[None], int]]

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


class Turns:
    """Bounds how much work begins in one turn of the event loop, so that what else waits for the loop gets its turn."""

    def __init__(self, room: int, seconds: float = 0.0) -> None:
        """`room`: units of work in a turn. `seconds`: the next ones begin so much later, and not in the next turn."""
        self._room = self._left = room
        self._seconds = seconds
        self._short: _Queue = deque()
        self._long: _Queue = deque()
        self._queues = (self._short, self._long)  # in the order of the current turn
        self._reserved = 0  # units of the next turn, for a call that waits outside of the queues
        self._admitted = (
            False  # a call from the queues was given room of this turn, and goes on in the next one
        )
        self._refilling = False
        self._began = 0.0  # the current turn, if turns last for some seconds

    async def take(self, cost: int = 1, *, long: bool = False) -> None:
        """Wait until there is room for `cost` units, at most those of a turn, in the order of the calls.

        `long`: this is one of many calls for the same purpose. Such calls have a queue of their own. Where others wait
        too, both queues come first in every second turn.
        """
        if not self._short and not self._long and not self._reserved:
            if cost <= self._left or self._has_lasted():
                self._spend(cost)
                return
            if long and not self._seconds and not self._admitted:
                # Alone, it is the first one of the next turn. A future would resume it one turn of the loop later, in
                # which it would find room for a second piece.
                self._reserved = cost
                await asyncio.sleep(0)
                return
        admitted = asyncio.get_running_loop().create_future()
        (self._long if long else self._short).append((admitted, cost))
        await admitted

    @property
    def short_ones_wait(self) -> bool:
        """Whether calls that are not `long` wait."""
        return bool(self._short)

    def _has_lasted(self) -> bool:
        """Whether the turn has lasted its `seconds`, and another one begins: timers fire up to a millisecond later."""
        if not self._seconds or time.monotonic() - self._began < self._seconds:
            return False
        self._left = self._room
        return True

    def _spend(self, cost: int) -> None:
        if self._seconds and self._left == self._room:
            self._began = time.monotonic()
        self._left -= cost
        if not self._refilling:
            self._refilling = True
            loop = asyncio.get_running_loop()
            if self._seconds:
                loop.call_later(self._seconds, self._refill)
            else:
                loop.call_soon(self._refill)

    def _refill(self) -> None:
        """Begin a turn. What was cancelled while it waited is passed over."""
        left = self._began + self._seconds - time.monotonic() if self._seconds else 0.0
        if left > 0:  # the timer is that of the turn before: see `_has_lasted`
            asyncio.get_running_loop().call_later(left, self._refill)
            return
        self._refilling = False
        self._left = self._room
        self._admitted = False
        if self._reserved:
            self._spend(self._reserved)
            self._reserved = 0
        self._queues = self._queues[::-1]
        for waiting in self._queues:
            while waiting:
                admitted, cost = waiting[0]
                if not admitted.done():
                    if cost > self._left:
                        break
                    self._spend(cost)
                    self._admitted = True
                    admitted.set_result(None)
                waiting.popleft()


TURN_BYTES = 256 * 1024
"""Bytes of streamed bodies that one turn of the event loop handles. One read of a connection brings at most as many."""
_LEAST_COST = 32 * 1024  # a small piece takes nearly as long as a large one
REQUEST_SPACING = 0.002
"""Seconds between the begins of two requests to sources."""
CROWD_SPACING = 0.01
"""Seconds between the begins of two requests to sources for a client that has many responses in progress."""


class TurnBudget:
    """Bounds the work that one turn of the event loop does for strangers: a piece of a body, or the begin of a request.

    Two hundred streams would otherwise each handle a piece in the same turn, and two hundred clients that connect at
    once would have their requests begun in one; every other request would wait for all of them. A single stream is not
    slowed: it gets its pieces from the loop one turn at a time in any case.
    """

    def __init__(self, turn_bytes: int = TURN_BYTES) -> None:
        self._turn_bytes = turn_bytes
        self._work, self._requests = Turns(turn_bytes), Turns(1, REQUEST_SPACING)
        self._clients: WeakValueDictionary[str, Turns] = (
            WeakValueDictionary()
        )  # those that wait, or began just now

    def take(self, size: int) -> Coroutine[Any, Any, None]:
        """Wait until a turn has room for `size` bytes, in the order of the calls.

        A piece larger than a turn has one for itself.
        """
        return self._work.take(min(max(size, _LEAST_COST), self._turn_bytes), long=True)

    async def take_whole(self) -> None:
        """Wait for a turn in which no other work begins: a request takes as long as a large piece, or longer.

        Where streams wait for their turns too, every second one is for requests.
        """
        await self._work.take(self._turn_bytes)

    @property
    def requests_wait(self) -> bool:
        """Whether a request waits for a turn."""
        return self._work.short_ones_wait

    async def take_request(self, client: str | None = None) -> None:
        """Wait until a request to a source may begin, in the order of the calls.

        `client`: of a request of a client that has many others in progress: those of one client begin further apart.

        Most of its work (connect, send, read the head, begin the response) comes when the source has answered, and two
        hundred sources may answer in one turn. It is spread by the time between the begins, which is about as long as
        this work. Those of a client with many others take no more than a fifth of the loop's time.
        """
        if client is not None:
            pace = self._clients.get(client)
            if pace is None:
                pace = self._clients[client] = Turns(1, CROWD_SPACING)
            await pace.take()
        await self._requests.take()
        await self.take_whole()


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and return once all have ended. Their results and errors are left to the owner of the tasks."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


@asynccontextmanager
async def ended_by(task: asyncio.Task[Any]) -> AsyncIterator[None]:
    """Run the block until it ends, or until the task does: then the block is cancelled, and left without an error.

    The task is cancelled with the block, and has ended when this returns. Its result is left to the caller.
    """
    # A timeout without a deadline: `reschedule` ends the block, and `expired` tells that from a cancellation.
    scope = asyncio.timeout(None)
    try:
        async with scope:
            running = True

            def end_block(_: asyncio.Task[Any]) -> None:
                if running:
                    scope.reschedule(asyncio.get_running_loop().time())

            task.add_done_callback(end_block)
            try:
                yield
            finally:
                running = False
    except TimeoutError:
        if not scope.expired():
            raise
    finally:
        await cancel_and_wait(task)


@asynccontextmanager
async def background(work: Coroutine[Any, Any, Any], name: str) -> AsyncIterator[asyncio.Task[Any]]:
    """Run a coroutine beside the block; cancel it and wait for its end when the block ends."""
    task = asyncio.create_task(work, name=name)
    try:
        yield task
    finally:
        await cancel_and_wait(task)
