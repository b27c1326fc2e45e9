"""The objects of a demo storage node: in memory, in files, or generated.

Generated objects may be large. They are computed, never stored, and any byte range costs no more than a copy.
"""

from __future__ import annotations

import os
import random
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from pathlib import Path
from typing import Protocol

BLOCK_SIZE = 64 * 1024
_HEADER = struct.Struct("<QQ")
_TAIL_SIZE = BLOCK_SIZE - _HEADER.size
_STRIDE = 7919  # a prime: the noise begins at another place in each block


@lru_cache(maxsize=16)
def _noise(seed: int) -> memoryview:
    """Return the noise of one block twice, so that each rotation is one contiguous slice."""
    once = random.Random(seed).randbytes(_TAIL_SIZE)
    return memoryview(once + once)


class GeneratedContent:
    """The bytes of a generated object. Equal (seed, size) make equal bytes on every machine.

    The content is a sequence of 64 KiB blocks. A block has a header of 16 bytes (seed and block index, each a 64-bit
    little-endian integer) and 65,520 bytes of noise, rotated by the index. So a block that is lost, repeated or moved
    always changes the hash.
    """

    __slots__ = ("seed", "size")

    def __init__(self, seed: int, size: int) -> None:
        """`size` in bytes."""
        if size < 0 or not 0 <= seed < 2**64:
            raise ValueError(
                f"generated object: expected 0 <= seed < 2^64 and size >= 0, got {seed=} {size=}"
            )
        self.seed = seed
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes [offset, offset + length), up to the object's end."""
        end = min(self.size, offset + length)
        if offset >= end:
            return b""
        noise = _noise(self.seed)
        parts: list[bytes | memoryview] = []
        for index in range(offset // BLOCK_SIZE, (end - 1) // BLOCK_SIZE + 1):
            shift = index * _STRIDE % _TAIL_SIZE
            parts.append(_HEADER.pack(self.seed, index))
            parts.append(noise[shift : shift + _TAIL_SIZE])
        blocks = b"".join(parts)
        skip = offset % BLOCK_SIZE
        return blocks if skip == 0 and end - offset == len(blocks) else blocks[skip : skip + end - offset]


MEDIA_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".webp": "image/webp",
    ".svg": "image/svg+xml",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".ogg": "audio/ogg",
    ".vtt": "text/vtt",
}
# One fixed time for all: the validators must not depend on when the files were checked out.
MODIFIED_AT = 1_700_000_000
MIB = 1024 * 1024

_MEDIA_NAME = re.compile(r"(?P<id>[0-9]+)-(?P<stem>[A-Za-z0-9_-]+)(?P<suffix>\.[a-z0-9]+)")


class Content(Protocol):
    """Random access to the bytes of one object."""

    @property
    def size(self) -> int:
        """Length in bytes."""

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes [offset, offset + length), up to the end of the content."""


@dataclass(frozen=True, slots=True)
class BytesContent:
    """Content held in memory."""

    data: bytes

    @property
    def size(self) -> int:
        """Length in bytes."""
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes [offset, offset + length), up to the end of the content."""
        return self.data[offset : offset + length]


@dataclass(frozen=True, slots=True)
class FileContent:
    """Content of a file that does not change while it is served."""

    path: Path
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes [offset, offset + length), up to the end of the content. Raises OSError."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(descriptor, max(0, min(length, self.size - offset)), offset)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class DemoObject:
    """One object of the demo, with the fields of its manifest entry."""

    object_id: str
    content: Content
    media_type: str = "application/octet-stream"
    name: str = ""
    bucket: str = "0:1"
    own_etag: str | None = (
        None  # with its quotes, as an origin sends it; None: the storage node's weak one; "": none
    )
    modified_at: int | None = MODIFIED_AT  # POSIX seconds; None: no Last-Modified
    cache_control: str | None = "public, max-age=0"  # as GETs state it; None: they state none
    held: bool = True  # False: the catalog lists it, but it has not been uploaded yet

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.content.size

    @property
    def etag(self) -> str:
        """The validator: by default a storage node's weak one, of size and time, not the bytes. Empty: none."""
        return f'W/"{self.size:x}-{MODIFIED_AT:x}"' if self.own_etag is None else self.own_etag

    @property
    def validators(self) -> tuple[tuple[str, str], ...]:
        """The headers ETag and Last-Modified, an HTTP date (RFC 9110 section 5.6.7)."""
        modified = "" if self.modified_at is None else formatdate(self.modified_at, usegmt=True)
        return tuple(
            (name, value) for name, value in (("Last-Modified", modified), ("ETag", self.etag)) if value
        )


def origin_object(
    object_id: str,
    data: bytes,
    etag: str = "",
    modified_at: int | None = None,
    media_type: str = "video/mp4",
    cache_control: str | None = None,
) -> DemoObject:
    """Return an object of an HTTP origin, which also tells HEAD its validators. Without arguments it has none."""
    return DemoObject(
        object_id,
        BytesContent(data),
        media_type,
        own_etag=etag,
        modified_at=modified_at,
        cache_control=cache_control,
    )


def bytes_object(object_id: str, data: bytes, media_type: str = "application/octet-stream") -> DemoObject:
    """Return an object that is in memory."""
    return DemoObject(object_id, BytesContent(data), media_type)


def generated_object(object_id: str, size: int, seed: int | None = None) -> DemoObject:
    """Return a generated object of `size` bytes. The default seed is the number of the id."""
    return DemoObject(object_id, GeneratedContent(int(object_id) if seed is None else seed, size))


def media_objects(directory: Path) -> list[DemoObject]:
    """Return the files of a directory named `<object id>-<name>.<extension>`, sorted by id.

    Raises ValueError for two files with the same id, and for an extension without a known media type.
    """
    found: dict[str, DemoObject] = {}
    for path in directory.iterdir():
        match = _MEDIA_NAME.fullmatch(path.name)
        if match is None:
            continue
        object_id = match["id"]
        if object_id in found:
            raise ValueError(f"{path}: object id {object_id} is used twice in {directory}")
        if match["suffix"] not in MEDIA_TYPES:
            raise ValueError(f"{path}: no media type known for {match['suffix']}")
        content = FileContent(path, path.stat().st_size)
        found[object_id] = DemoObject(object_id, content, MEDIA_TYPES[match["suffix"]], match["stem"])
    return sorted(found.values(), key=lambda item: int(item.object_id))


def extra_objects() -> list[DemoObject]:
    """Return the generated objects: two large ones, one in another bucket, and one that is not uploaded yet."""
    return [
        DemoObject("64", GeneratedContent(64, 64 * MIB), name="64 MiB generated"),
        DemoObject("1024", GeneratedContent(1024, 1024 * MIB), name="1 GiB generated"),
        DemoObject("900", GeneratedContent(900, 65_536), name="In a bucket of another node", bucket="9:9"),
        DemoObject("901", GeneratedContent(901, 65_536), name="Announced, not uploaded yet", held=False),
    ]


def demo_objects(directory: Path) -> list[DemoObject]:
    """Return all objects of the demo's manifest: the media files of the directory and the generated objects."""
    return media_objects(directory) + extra_objects()


def held_by_node(objects: Iterable[DemoObject]) -> dict[str, DemoObject]:
    """Return the uploaded objects by id."""
    return {item.object_id: item for item in objects if item.held}
