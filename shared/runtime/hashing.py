"""Reading a file through, slice by slice, to know its hash: a stop waits for one slice, not for the file."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from functools import partial

from shared.domain.errors import VolumeError
from shared.domain.objects import ContentHash, Hasher
from shared.runtime.threads import ThreadCall

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
