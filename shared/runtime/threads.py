"""Waiting for what runs in a thread: nothing stops it, so nobody goes on before it has ended."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, ParamSpec, Protocol, TypeVar

from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.objects import ContentHash, Hasher

Params = ParamSpec("Params")
Result = TypeVar("Result")


class ThreadCall(Protocol):
    """Runs a call that blocks in some thread, and waits for it as `result_uncancellable` does."""

    async def __call__(
        self, call: Callable[Params, Result], /, *args: Params.args, **kwargs: Params.kwargs
    ) -> Result: ...


async def wait_uncancellable(work: asyncio.Future[Any]) -> None:
    """Wait for its end through any number of cancellations; one is raised after it. What `work` raised is not."""
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not work.cancelled():
            work.exception()  # seen: the cancellation is what counts now
        raise cancelled


async def result_uncancellable(work: asyncio.Future[Result]) -> Result:
    """Its result. A cancellation is raised only after it has ended: no file is ever closed, and no reservation given
    back, under a call that still runs, and whoever cleans up finds files at rest."""
    await wait_uncancellable(work)
    return work.result()


# Reading a file through, slice by slice, to know its hash: a stop waits for one slice, not for the file.

_CHUNK = 1024 * 1024

Read = Callable[[int, int], bytes]
"""Bytes at an offset, up to a length; empty at the end. Blocks."""


async def hash_through(
    call: ThreadCall, read: Read, hasher: Hasher, rate: int = 0, chunk: int = _CHUNK
) -> int:
    """Feed all that `read` gives, from its beginning, at `rate` bytes a second (0: as fast as it comes); how many
    bytes that were."""
    offset, begun = 0, time.monotonic()
    length = min(chunk, max(rate, 4096)) if rate else chunk
    while fed := await call(_feed, read, hasher, offset, length):
        offset += fed
        if rate:
            await asyncio.sleep(max(0.0, begun + offset / rate - time.monotonic()))
    return offset


async def hash_file(call: ThreadCall, descriptor: int, expected: ContentHash, rate: int = 0) -> ContentHash:
    """The hash, of `expected`'s algorithm, of a whole file. VolumeError if the disk cannot read it, or if the file is
    removed meanwhile: to keep it open to the end would keep its bytes on the disk, uncounted."""
    hasher = expected.hasher()
    await hash_through(call, partial(_read_once, descriptor), hasher, rate)
    return ContentHash(expected.algorithm, hasher.digest())


def _feed(read: Read, hasher: Hasher, offset: int, length: int) -> int:
    data = read(offset, length)
    hasher.update(data)
    return len(data)


def _read_once(descriptor: int, offset: int, length: int) -> bytes:
    try:
        if os.fstat(descriptor).st_nlink == 0:
            raise VolumeError("removed while it was read")
        data = os.pread(descriptor, length, offset)
        # What is read here is not worth a place in the page cache
        os.posix_fadvise(descriptor, offset, len(data), os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise VolumeError(f"read at {offset}: {error.strerror}") from error
    return data


# Threads for what blocks: writing, hashing, syncing. The fetcher's own, so that nobody else's work queues behind.

Arguments = ParamSpec("Arguments")


class BlockingPool:
    """`count` threads, started when first used; `close` waits for what they do."""

    def __init__(self, count: int) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="disk")

    async def run(
        self, call: Callable[Arguments, Result], /, *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> Result:
        """The call's result. A cancellation is raised only after the call has ended: no file is ever closed, and no
        reservation given back, under a write that still runs. What the call returns is lost then: one that opens
        something leaves it where the caller can find it."""
        loop = asyncio.get_running_loop()
        return await result_uncancellable(
            loop.run_in_executor(self._executor, lambda: call(*arguments, **options))
        )

    async def close(self) -> None:
        await asyncio.to_thread(self._executor.shutdown)


# Calls of the volume, in a thread, that are never left running behind the caller's back.


async def run_blocking(
    call: Callable[Params, Result], /, *args: Params.args, **kwargs: Params.kwargs
) -> Result:
    """Run in a thread. When cancelled, wait for its end before giving in: whoever cleans up finds files at rest.

    What the call returns is lost then: one that opens something leaves it where the caller can find it."""
    return await result_uncancellable(asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs)))


async def next_chunk(found: Iterable[Result], at_most: int) -> list[Result]:
    """Up to `at_most` more of a scan, read in a thread; empty at its end."""
    return await run_blocking(_take, found, at_most)


def _take(found: Iterable[Result], at_most: int) -> list[Result]:
    return list(islice(found, at_most))
