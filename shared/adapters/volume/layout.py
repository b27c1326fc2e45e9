"""Where things lie on the volume, and directories that cannot be swapped for links."""

from __future__ import annotations

import errno
import math
import os
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distributor_node.shared.domain.errors import VolumeError, VolumeFull

OBJECTS, RECORDS, INCOMING, TRASH = "objects", "records", "incoming", "leaving"
TOP_DIRECTORIES = (OBJECTS, RECORDS, INCOMING, TRASH)
SHARDS = tuple(f"{number:02x}" for number in range(256))
PART_SUFFIX, INCOMING_RECORD_SUFFIX = ".part", ".json"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
DIRECTORY_MODE = 0o755
_RETIRED_TTL = 60.0


def shard(object_id: str) -> str:
    """The two hex digits of the directory an object lies in: spreads any kind of ids evenly."""
    return SHARDS[zlib.crc32(object_id.encode()) & 0xFF]


def object_path(object_id: str) -> str:
    """Where a complete object lies, below `objects/`. Nothing in it needs quoting in a URL."""
    return f"{shard(object_id)}/{object_id}"


@contextmanager
def map_os_errors(action: str) -> Iterator[None]:
    """Turn operating system errors into the volume's own, with what was being done."""
    try:
        yield
    except OSError as error:
        kind = VolumeFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else VolumeError
        raise kind(f"{action}: {error.strerror or error}") from error


class Directories:
    """Open directories of the volume, by their path below its root.

    They are opened once without following links, so that a directory replaced by a link leads nowhere; `revalidate`
    notices when the volume itself has been replaced or unmounted: `replacements` counts how often it has.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[str, int] = {}
        self._retired: list[tuple[float, int]] = []
        self._was_whole = False
        self.replacements = 0
        self._revalidating = threading.Lock()

    def create(self) -> None:
        """Make all directories; VolumeError if the volume cannot be written."""
        with map_os_errors(f"prepare the volume {self._root}"):
            self._root.mkdir(parents=True, exist_ok=True)
            for name in TOP_DIRECTORIES:
                (self._root / name).mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            for name in (OBJECTS, RECORDS):
                for number in SHARDS:
                    (self._root / name / number).mkdir(mode=DIRECTORY_MODE, exist_ok=True)

    def descriptor(self, path: str) -> int:
        """Descriptor of a directory such as `objects/3f`; stays ours. OSError if it is missing or a link."""
        known = self._open.get(path)
        if known is not None:
            return known
        parent, _, name = path.rpartition("/")
        above = self.descriptor(parent) if parent else self.root()
        opened = self._open[path] = os.open(name, _DIRECTORY, dir_fd=above)
        return opened

    @contextmanager
    def entries(self, path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        """Scan a directory such as `objects/3f`, independent of every other scan. OSError if it cannot be read.

        The scan has a descriptor of its own: duplicates of one descriptor (os.scandir and os.listdir of a descriptor
        make one) share the directory's read position, so two scans at once would each see a part of the names.
        """
        own = os.open(".", _DIRECTORY, dir_fd=self.descriptor(path))
        try:
            with os.scandir(own) as entries:
                yield entries
        finally:
            os.close(own)

    def root(self) -> int:
        known = self._open.get("")
        if known is None:
            known = self._open[""] = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return known

    def revalidate(self) -> bool:
        """Forget descriptors of directories that are no longer what their path leads to; False: no volume there.

        Forgotten ones are closed a while later only: another thread may be about to use one.
        """
        with self._revalidating:
            self._close_retired(time.monotonic() - _RETIRED_TTL)
            try:
                stale = self._is_stale()
            except OSError:
                self._retire()
                return False
            if stale:
                self._retire()
            return True

    def _is_stale(self) -> bool:
        """OSError if there is no volume: no root, or none of the directories in it that were there before (the bare
        mount point of a volume that has gone)."""
        stale = not _is_same(self._root.stat(), os.fstat(self.root()))
        for name in TOP_DIRECTORIES:
            try:
                below = (self._root / name).lstat()
            except FileNotFoundError:
                if self._was_whole:
                    raise
                return stale
            kept = self._open.get(name)
            stale = stale or (kept is not None and not _is_same(below, os.fstat(kept)))
        self._was_whole = True
        # A copy: other threads open directories meanwhile
        return stale or any(os.fstat(descriptor).st_nlink == 0 for descriptor in list(self._open.values()))

    def _retire(self) -> None:
        retired, self._open = self._open, {}
        self.replacements += bool(retired)
        now = time.monotonic()
        self._retired.extend((now, descriptor) for descriptor in retired.values())

    def _close_retired(self, before: float) -> None:
        kept = []
        for retired_at, descriptor in self._retired:
            if retired_at <= before:
                os.close(descriptor)
            else:
                kept.append((retired_at, descriptor))
        self._retired = kept

    def close(self) -> None:
        """Close all; they open again when needed."""
        self._retire()
        self._close_retired(math.inf)

    def sync(self, path: str) -> None:
        """Make the directory's own entries durable."""
        os.fsync(self.descriptor(path))


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
