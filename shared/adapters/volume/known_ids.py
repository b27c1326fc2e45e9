"""Which objects exist, as of the catalog's last list: a file on the volume.

The leading evictor writes it after it has read the list. Every API process reads it, so that look-ups of these ids go
before look-ups of ids that may be made up. It is no answer of the catalog: an id that it names is still looked up.

The file holds 64-bit hashes of the ids, sorted, 8 bytes each. Two ids in 10^6 share one with a probability of about
10^-7. Then a made-up id goes before other made-up ids.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

import structlog

from distributor_node.shared.adapters.volume.layout import map_os_errors, sync_directory
from distributor_node.shared.adapters.volume.records import atomic_write, read_capped
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.waiting import cancel_and_wait

NAME = "known-ids"
POLL_INTERVAL = 10.0
"""Seconds between two looks whether the file was replaced."""
MAX_IDS = 4_000_000
"""Ids beyond this number are left out: 32 MB in every process."""

_MAGIC = b"known-1\n"
_HEADER = struct.Struct("<8sQ")  # magic, number of ids

logger = structlog.get_logger()


class KnownIdsDraft:
    """Collects the ids of a list, and then replaces the file."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def update(self, object_ids: Iterable[ObjectId]) -> None:
        """Add ids; those beyond MAX_IDS are left out."""
        for object_id in object_ids:
            if len(self._hashes) < MAX_IDS:
                self._hashes.append(_hash(object_id))

    def write(self, root: Path) -> None:
        """Replace the file atomically. VolumeError if that fails. Blocking: call from a worker thread."""
        distinct = (
            value for value, _ in groupby(sorted(self._hashes))
        )  # a set would hold all of them once more
        hashes = _little_endian(array("Q", distinct))
        with map_os_errors(f"write {NAME}"):
            for draft in root.glob(f"{NAME},*"):  # of a writer that was killed
                draft.unlink(missing_ok=True)
            atomic_write(root / NAME, _HEADER.pack(_MAGIC, len(hashes)) + hashes.tobytes())
            sync_directory(root)


class KnownIds:
    """The ids in the file, in memory. Between `open` and `close` it follows the file. Without a file it is empty."""

    def __init__(self, root: Path) -> None:
        """`root`: of the volume."""
        self._path = root / NAME
        self._stamp: tuple[int, int, int] | None = None  # of the file that was read
        self._hashes: Sequence[int] = array("Q")
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Read the file, and follow it in the background. Never fails because of the volume."""
        await self.refresh()
        self._task = asyncio.create_task(self._follow(), name="known-ids")

    async def close(self) -> None:
        if self._task is not None:
            await cancel_and_wait(self._task)

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, object_id: ObjectId) -> bool:
        target = _hash(object_id)
        index = bisect_left(self._hashes, target)
        return index < len(self._hashes) and self._hashes[index] == target

    async def refresh(self) -> None:
        """Read the file if it was replaced. If it is missing, invalid or unreadable, keep what was read before."""
        try:
            await asyncio.to_thread(self._read)
        except VolumeError as error:
            logger.info("known_ids_unreadable", reason=str(error))

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL)
            await self.refresh()

    def _read(self) -> None:
        with map_os_errors(f"read {NAME}"):
            try:
                found = self._path.lstat()
            except FileNotFoundError:
                return
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            if stamp == self._stamp:
                return
            raw = read_capped(self._path, limit=_HEADER.size + 8 * MAX_IDS)
        if raw is None:
            return
        self._stamp = stamp
        hashes = _parse(raw)
        if hashes is None:
            logger.error("known_ids_invalid", file=NAME, bytes=len(raw))
        else:
            self._hashes = hashes


def _parse(raw: bytes) -> array[int] | None:
    """The hashes. None: the file is of another format or incomplete."""
    if len(raw) < _HEADER.size:
        return None
    magic, count = _HEADER.unpack_from(raw)
    if magic != _MAGIC or len(raw) != _HEADER.size + 8 * count:
        return None
    hashes = array("Q")
    hashes.frombytes(raw[_HEADER.size :])
    return _little_endian(hashes)


def _little_endian(hashes: array[int]) -> array[int]:
    """Convert between the machine's byte order and the file's, in either direction."""
    if sys.byteorder == "big":
        hashes.byteswap()
    return hashes


def _hash(object_id: ObjectId) -> int:
    """The same in every process."""
    return int.from_bytes(blake2b(object_id.encode(), digest_size=8).digest(), "little")
