"""Reading pieces of files without holding up the event loop."""

from __future__ import annotations

import asyncio
import errno
import os

_NO_QUICK_WAY = (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


async def read_piece(descriptor: int, offset: int, length: int) -> memoryview:
    """`length` bytes at `offset`; fewer only at the end of the file. OSError if the disk fails.

    What lies in the page cache is read at once; what does not is read in a thread.
    """
    buffer = bytearray(length)
    view = memoryview(buffer)
    got = _read_cached(descriptor, view, offset)
    if got < length:
        got += await asyncio.to_thread(_read_rest, descriptor, view[got:], offset + got)
    return view[:got]


def _read_cached(descriptor: int, view: memoryview, offset: int) -> int:
    try:
        return os.preadv(descriptor, [view], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in _NO_QUICK_WAY:
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
