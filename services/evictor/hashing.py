"""Reading a file through, slowly enough not to disturb, to know its hash."""

from __future__ import annotations

import asyncio
import os
import time

from services.evictor.file_calls import file_call
from shared.domain.errors import VolumeError
from shared.domain.objects import ContentHash, Hasher

_CHUNK = 1024**2


async def hash_file(descriptor: int, expected: ContentHash, rate: int) -> ContentHash:
    """The hash, of `expected`'s algorithm, of a whole file, read at `rate` bytes a second (0: as fast as it comes).

    VolumeError if the disk cannot read it.
    """
    hasher = expected.hasher()
    offset, begun = 0, time.monotonic()
    chunk = min(_CHUNK, max(rate, 4096)) if rate else _CHUNK
    while read := await file_call(_hash_chunk, descriptor, offset, chunk, hasher):
        offset += read
        if rate:
            await asyncio.sleep(max(0.0, begun + offset / rate - time.monotonic()))
    return ContentHash(expected.algorithm, hasher.digest())


def _hash_chunk(descriptor: int, offset: int, length: int, hasher: Hasher) -> int:
    try:
        data = os.pread(descriptor, length, offset)
        hasher.update(data)
        # What is read here is not worth a place in the page cache
        os.posix_fadvise(descriptor, offset, len(data), os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise VolumeError(f"read at {offset}: {error.strerror}") from error
    return len(data)
