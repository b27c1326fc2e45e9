"""Reading pieces of files without holding up the event loop."""

from __future__ import annotations

import asyncio
import errno
import os
from concurrent.futures import ThreadPoolExecutor

_PROBE_STRIDE = 64 * 1024
_PROBE_BUFFER = (bytearray(1),)
MAX_PEEK = 4096
_PEEK_BUFFER = memoryview(bytearray(MAX_PEEK))
"""One for the process: the loop's thread alone uses it, and nothing is awaited meanwhile."""
_COLD_READ_POOL = ThreadPoolExecutor(max_workers=16, thread_name_prefix="cold-read")
"""Not the loop's own threads: those hash and scan for seconds, and a hit would wait for them. None is started before it
is needed."""
_NOWAIT_ERRNOS = (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


async def read_chunk(descriptor: int, offset: int, length: int) -> memoryview:
    """`length` bytes at `offset`; fewer only at the end of the file. OSError if the disk fails.

    What lies in the page cache is read at once; what does not is read in a thread.
    """
    buffer = bytearray(length)
    view = memoryview(buffer)
    got = _read_cached(descriptor, view, offset)
    if got < length:
        loop = asyncio.get_running_loop()
        got += await loop.run_in_executor(_COLD_READ_POOL, _read_rest, descriptor, view[got:], offset + got)
    return view[:got]


def read_cached(descriptor: int, offset: int, length: int) -> bytes:
    """As much from `offset` as lies in the page cache, at most `length` bytes. OSError if the disk fails."""
    buffer = bytearray(length)
    return bytes(memoryview(buffer)[: _read_cached(descriptor, memoryview(buffer), offset)])


def peek_cached(descriptor: int, offset: int, length: int) -> memoryview | None:
    """Exactly these bytes, at most MAX_PEEK, if all of them lie in the page cache. They are good until the next
    call: to be sent or copied at once."""
    view = _PEEK_BUFFER[:length]
    if not length:
        return view
    try:
        return view if os.preadv(descriptor, (view,), offset, os.RWF_NOWAIT) == length else None
    except OSError:
        return None  # not in memory, or the disk fails: whoever reads it in earnest finds out


def is_cached(descriptor: int, offset: int, length: int, *, first_resident: bool = False) -> bool:
    """Whether these bytes seem to lie in the page cache: looks at one byte in each _PROBE_STRIDE, and at the last. The
    first one is passed over if it is known to (`first_resident`).

    The kernel reads ahead in larger steps and drops in larger steps, so that a hole in between is rare, and costs
    one read from disk.
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
