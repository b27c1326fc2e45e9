"""File reads that do not block the event loop: from the page cache at once (RWF_NOWAIT), else in a thread."""

from __future__ import annotations

import asyncio
import errno
import os
from concurrent.futures import ThreadPoolExecutor

_PROBE_STRIDE = 64 * 1024
_PROBE_BUFFER = (bytearray(1),)
MAX_PEEK = 4096
_PEEK_BUFFER = memoryview(bytearray(MAX_PEEK))
"""One per process. Only the loop's thread uses it, and never across an await."""
_COLD_READ_POOL = ThreadPoolExecutor(max_workers=16, thread_name_prefix="cold-read")
"""A separate pool, so that cold reads of hits do not queue behind hashing in the default executor. Threads start
lazily."""
_NOWAIT_ERRNOS = (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


async def read_chunk(descriptor: int, offset: int, length: int) -> memoryview:
    """Read `length` bytes at `offset`, fewer only at the end of the file. Raises OSError if the disk fails.

    Bytes in the page cache are read at once, the others in a thread.
    """
    buffer = bytearray(length)
    view = memoryview(buffer)
    got = _read_cached(descriptor, view, offset)
    if got < length:
        loop = asyncio.get_running_loop()
        got += await loop.run_in_executor(_COLD_READ_POOL, _read_rest, descriptor, view[got:], offset + got)
    return view[:got]


def read_cached(descriptor: int, offset: int, length: int) -> bytes:
    """Read up to `length` bytes at `offset`, as far as they are in the page cache. Raises OSError if the disk fails."""
    buffer = bytearray(length)
    return bytes(memoryview(buffer)[: _read_cached(descriptor, memoryview(buffer), offset)])


def peek_cached(descriptor: int, offset: int, length: int) -> memoryview | None:
    """Return exactly these bytes, at most MAX_PEEK, or None if they are not all in the page cache.

    The next call overwrites them: send or copy them at once.
    """
    view = _PEEK_BUFFER[:length]
    if not length:
        return view
    try:
        return view if os.preadv(descriptor, (view,), offset, os.RWF_NOWAIT) == length else None
    except OSError:
        return None  # not in memory, or the disk fails; the read that follows tells which


def is_cached(descriptor: int, offset: int, length: int, *, first_resident: bool = False) -> bool:
    """Whether these bytes seem to be in the page cache.

    Probes one byte in each _PROBE_STRIDE and the last one. `first_resident`: the first byte is known to be there. The
    kernel reads ahead and evicts in larger steps, so a hole between two probes is rare. It costs one read from disk.
    """
    last = offset + length - 1
    try:
        for position in (
            *range(offset + _PROBE_STRIDE if first_resident else offset, last, _PROBE_STRIDE),
            last,
        ):
            if os.preadv(descriptor, _PROBE_BUFFER, position, os.RWF_NOWAIT) == 0:
                return False
    except OSError:
        return False
    return True


def _read_cached(descriptor: int, view: memoryview, offset: int) -> int:
    try:
        return os.preadv(descriptor, [view], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in _NOWAIT_ERRNOS:
            return 0
        raise


def _read_rest(descriptor: int, view: memoryview, offset: int) -> int:
    got = 0
    while got < len(view):
        count = os.preadv(descriptor, [view[got:]], offset + got)
        if count == 0:
            break
        got += count
    return got
