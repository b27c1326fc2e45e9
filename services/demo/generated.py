"""Large objects that are computed, never stored: any byte range at the cost of copying it."""

from __future__ import annotations

import random
import struct
from functools import lru_cache

BLOCK_SIZE = 64 * 1024
_HEADER = struct.Struct("<QQ")
_TAIL_SIZE = BLOCK_SIZE - _HEADER.size
_STRIDE = 7919  # a prime: neighbouring blocks show the noise at different places


@lru_cache(maxsize=16)
def _noise(seed: int) -> memoryview:
    """Twice the noise of one block, so that every rotation of it is one contiguous slice."""
    once = random.Random(seed).randbytes(_TAIL_SIZE)
    return memoryview(once + once)


class GeneratedContent:
    """The bytes of a generated object; equal (seed, size) give equal bytes on every machine.

    The content is a row of 64 KiB blocks. A block is 16 bytes of header (seed and block index, each a 64-bit
    little-endian integer) and 65,520 bytes of noise rotated by the index, so a block that is lost,
    repeated or moved always changes the hash.
    """

    __slots__ = ("seed", "size")

    def __init__(self, seed: int, size: int) -> None:
        """`size` in bytes."""
        if size < 0 or not 0 <= seed < 2**64:
            raise ValueError(f"a generated object needs 0 <= seed < 2^64 and size >= 0, got {seed=} {size=}")
        self.seed = seed
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length), cut at the object's end."""
        end = min(self.size, offset + length)
        if offset >= end:
            return b""
        noise = _noise(self.seed)
        pieces: list[bytes | memoryview] = []
        for index in range(offset // BLOCK_SIZE, (end - 1) // BLOCK_SIZE + 1):
            shift = index * _STRIDE % _TAIL_SIZE
            pieces.append(_HEADER.pack(self.seed, index))
            pieces.append(noise[shift : shift + _TAIL_SIZE])
        blocks = b"".join(pieces)
        skip = offset % BLOCK_SIZE
        return blocks if skip == 0 and end - offset == len(blocks) else blocks[skip : skip + end - offset]
