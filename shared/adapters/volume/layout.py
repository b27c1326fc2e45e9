"""Where things lie on the volume, and directories that cannot be swapped for links."""

from __future__ import annotations

import errno
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.domain.errors import VolumeError, VolumeFull

OBJECTS, RECORDS, INCOMING, LEAVING = "objects", "records", "incoming", "leaving"
FANS = tuple(f"{number:02x}" for number in range(256))
PART_SUFFIX, INCOMING_RECORD_SUFFIX = ".part", ".json"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
DIRECTORY_MODE = 0o755


def fan(object_id: str) -> str:
    """The two hex digits of the directory an object lies in: spreads any kind of ids evenly."""
    return FANS[zlib.crc32(object_id.encode()) & 0xFF]


def object_place(object_id: str) -> str:
    """Where a complete object lies, below `objects/`. Nothing in it needs quoting in a URL."""
    return f"{fan(object_id)}/{object_id}"


@contextmanager
def translated(action: str) -> Iterator[None]:
    """Turn operating system errors into the volume's own, with what was being done."""
    try:
        yield
    except OSError as error:
        kind = VolumeFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else VolumeError
        raise kind(f"{action}: {error.strerror or error}") from error


class Directories:
    """Open directories of the volume, by their path below its root.

    They are opened once without following links, so that a directory replaced by a link leads nowhere; `revalidate`
    notices when the volume itself has been replaced or unmounted.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[str, int] = {}
        self._retired: list[int] = []
        self._revalidating = threading.Lock()

    def create(self) -> None:
        """Make all directories; VolumeError if the volume cannot be written."""
        with translated(f"prepare the volume {self._root}"):
            self._root.mkdir(parents=True, exist_ok=True)
            for name in (OBJECTS, RECORDS, INCOMING, LEAVING):
                (self._root / name).mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            for name in (OBJECTS, RECORDS):
                for number in FANS:
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

    def root(self) -> int:
        known = self._open.get("")
        if known is None:
            known = self._open[""] = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return known

    def revalidate(self) -> bool:
        """Forget descriptors of directories that are no longer what their path leads to; False: no volume there.

        Forgotten ones are closed at the next call only: another thread may be about to use one.
        """
        with self._revalidating:
            return self._revalidate()

    def _revalidate(self) -> bool:
        self._close_retired()
        try:
            now = self._root.stat()
            held = os.fstat(self.root())
            stale = (now.st_dev, now.st_ino) != (held.st_dev, held.st_ino)
            if not stale:
                for path in [path for path in list(self._open) if path and "/" not in path]:
                    below = os.stat(path, dir_fd=self.root(), follow_symlinks=False)
                    kept = os.fstat(self._open[path])
                    stale = stale or (below.st_dev, below.st_ino) != (kept.st_dev, kept.st_ino)
                stale = stale or any(
                    # A copy: other threads open directories meanwhile
                    os.fstat(descriptor).st_nlink == 0
                    for descriptor in list(self._open.values())
                )
        except OSError:
            self._retire()
            return False
        if stale:
            self._retire()
        return True

    def _retire(self) -> None:
        retired, self._open = self._open, {}
        self._retired.extend(retired.values())

    def _close_retired(self) -> None:
        while self._retired:
            os.close(self._retired.pop())

    def close(self) -> None:
        """Close all; they open again when needed."""
        self._retire()
        self._close_retired()

    def sync(self, path: str) -> None:
        """Make the directory's own entries durable."""
        os.fsync(self.descriptor(path))
