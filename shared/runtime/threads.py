"""Runs blocking calls in worker threads. A cancellation is delivered only after the thread has finished.

So callers never close a file, release a reservation or clean up under a call that is still running.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from math import inf
from typing import Any, ParamSpec, Protocol, TypeVar

from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.objects import ContentHash, Hasher

Params = ParamSpec("Params")
Result = TypeVar("Result")


class ThreadCall(Protocol):
    """Runs a blocking call in a thread, as `BlockingPool.run` and `run_blocking` do."""

    async def __call__(
        self, call: Callable[Params, Result], /, *args: Params.args, **kwargs: Params.kwargs
    ) -> Result: ...


SLOW_CALL = 0.01
"""Seconds that a short call may block the event loop. A disk that takes longer may take much longer next time."""

BUSY_CALL = 0.1
"""Seconds after which a call that has not ended shows that the disk is not idle."""

SLOW_PAUSE = 10.0
"""Seconds for which short calls have threads after one that was slow."""


class BlockingPool:
    """A pool of `count` threads for writing, hashing and syncing. Other blocking work does not queue behind these.

    Threads start when first used. `close` waits for running calls.
    """

    def __init__(self, count: int) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="disk")
        self._in_loop_from = inf  # monotonic seconds until which `run_short` has threads
        self._begun: dict[int, float] = {}  # when the calls that run now were begun, the oldest one first
        self._count = 0

    async def run(
        self, call: Callable[Params, Result], /, *args: Params.args, **kwargs: Params.kwargs
    ) -> Result:
        """The result of the call. As `run_blocking`, in a thread of this pool."""
        loop, number = asyncio.get_running_loop(), self._count
        self._count, self._begun[number] = number + 1, time.monotonic()
        try:
            work = loop.run_in_executor(self._executor, lambda: call(*args, **kwargs))
            return await result_uncancellable(work)
        finally:
            del self._begun[number]

    @property
    def keeps_short_calls_in_loop(self) -> bool:
        """Whether `run_short` needs no thread now."""
        now = time.monotonic()
        return now >= self._in_loop_from and now - next(iter(self._begun.values()), now) <= BUSY_CALL

    def keep_short_calls_in_loop(self) -> None:
        """From now on `run_short` needs no thread while the disk is quick. For a loop that serves no clients."""
        self._in_loop_from = -inf

    async def run_short(
        self, call: Callable[Params, Result], /, *args: Params.args, **kwargs: Params.kwargs
    ) -> Result:
        """As `run`, for a call that a quick disk answers before a thread would have begun it.

        After `keep_short_calls_in_loop` it runs in the event loop, unless a call in a thread has not ended for
        BUSY_CALL: the disk has other work, or hangs. A call of more than SLOW_CALL in the loop sends those of the next
        SLOW_PAUSE to threads.
        """
        if not self.keeps_short_calls_in_loop:
            return await self.run(call, *args, **kwargs)
        began_at = time.monotonic()
        try:
            return call(*args, **kwargs)
        finally:
            ended_at = time.monotonic()
            if ended_at - began_at > SLOW_CALL:
                self._in_loop_from = ended_at + SLOW_PAUSE

    async def close(self) -> None:
        await asyncio.to_thread(self._executor.shutdown)


async def run_blocking(
    call: Callable[Params, Result], /, *args: Params.args, **kwargs: Params.kwargs
) -> Result:
    """The result of the call, which runs in a thread of the event loop's default executor.

    A cancellation is raised after the call has ended, and its result is lost then. A call that opens something leaves
    it where the caller finds it.
    """
    return await result_uncancellable(asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs)))


async def next_chunk(found: Iterable[Result], at_most: int) -> list[Result]:
    """Up to `at_most` further items of a blocking scan. Empty at its end."""
    return await run_blocking(_take, found, at_most)


def _take(found: Iterable[Result], at_most: int) -> list[Result]:
    return list(islice(found, at_most))


async def result_uncancellable(work: asyncio.Future[Result]) -> Result:
    """The result of `work`. A cancellation is raised only after `work` has ended."""
    await wait_uncancellable(work)
    return work.result()


async def wait_uncancellable(work: asyncio.Future[Any]) -> None:
    """Wait for the end of `work`, through any number of cancellations. The last one is raised afterwards.

    An exception of `work` is not raised.
    """
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not work.cancelled():
            work.exception()  # retrieved, so that asyncio does not log it: the cancellation takes precedence
        raise cancelled


# Hashing: in slices, so that a shutdown waits for one slice and not for the whole file

_CHUNK = 1024 * 1024

Read = Callable[[int, int], bytes]
"""Bytes at an offset, up to a length; empty at the end. Blocking."""


async def hash_file(call: ThreadCall, descriptor: int, expected: ContentHash, rate: int = 0) -> ContentHash:
    """The hash of a whole file by the algorithm of `expected`, at `rate` bytes per second (0: unlimited).

    Raises VolumeError if the disk cannot read it, or if the file is removed in the meantime: an open descriptor would
    keep its bytes on the disk, uncounted.
    """
    hasher = expected.hasher()
    await hash_through(call, partial(_read_once, descriptor), hasher, rate)
    return ContentHash(expected.algorithm, hasher.digest())


async def hash_through(
    call: ThreadCall, read: Read, hasher: Hasher, rate: int = 0, chunk: int = _CHUNK
) -> int:
    """Feed all that `read` returns to `hasher`, at `rate` bytes per second (0: unlimited). Returns the bytes fed."""
    offset, begun = 0, time.monotonic()
    length = min(chunk, max(rate, 4096)) if rate else chunk
    while fed := await call(_feed, read, hasher, offset, length):
        offset += fed
        if rate:
            await asyncio.sleep(max(0.0, begun + offset / rate - time.monotonic()))
    return offset


def _feed(read: Read, hasher: Hasher, offset: int, length: int) -> int:
    data = read(offset, length)
    hasher.update(data)
    return len(data)


def _read_once(descriptor: int, offset: int, length: int) -> bytes:
    try:
        if os.fstat(descriptor).st_nlink == 0:
            raise VolumeError("the file was removed while it was read")
        data = os.pread(descriptor, length, offset)
        # Bytes that are read only for hashing should not displace others from the page cache
        os.posix_fadvise(descriptor, offset, len(data), os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise VolumeError(f"read at offset {offset}: {error.strerror}") from error
    return data
