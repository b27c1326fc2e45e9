"""Files of another node's flat directory, taken into the volume without copying where that can be."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from distributor_node.shared.adapters.volume.layout import OBJECTS, Directories, map_os_errors, shard
from distributor_node.shared.adapters.volume.records import atomic_write
from distributor_node.shared.domain.objects import ObjectId

DONE = ".import-done"
"""Written to the volume when an import has been looked through; while it is missing, one is under way."""

# As the existing node names them; anything else in the directory is none of ours.
_NAME = re.compile(r"[0-9]{1,20}\Z", re.ASCII)
_NO_HARD_LINK_ERRORS = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)
_READ_ONLY_ERRORS = (errno.EROFS, errno.EACCES, errno.EPERM)


class ImportResult(StrEnum):
    """MOVED: it is under `objects/` now. EXISTS: so it was already. OTHER_DEVICE: it lies on another file system, and
    has to be copied. MISSING: there is no such file. FAILED: it cannot be taken in."""

    MOVED = "moved"
    EXISTS = "there"
    OTHER_DEVICE = "elsewhere"
    MISSING = "gone"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class PendingFile:
    """A file to be taken in: its id, bytes, and POSIX time of its last change."""

    object_id: ObjectId
    size: int
    changed_at: float


class ImportSource:
    """`assets` may be the volume's own root. All calls block; `close` in between lets go of the directories. Stopped
    at any moment, a file lies in one of the two places, or in both for the next call to see to."""

    def __init__(self, root: Path, assets: Path) -> None:
        self.assets = assets
        self._directories = Directories(root)

    def close(self) -> None:
        self._directories.close()

    def pending(self) -> Iterator[PendingFile]:
        """All files to be taken in. VolumeError if the directory cannot be read."""
        with map_os_errors(f"read the assets in {self.assets}"), os.scandir(self.assets) as entries:
            for entry in entries:
                if not _NAME.match(entry.name):
                    continue
                try:
                    seen = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(seen.st_mode):
                    yield PendingFile(ObjectId(entry.name), seen.st_size, seen.st_mtime)

    def import_file(self, object_id: ObjectId) -> ImportResult:
        """Move one file. It gets no record: whoever knows what it must be writes that."""
        source = self.assets / object_id
        target = self._directories.descriptor(f"{OBJECTS}/{shard(object_id)}")
        with map_os_errors(f"take in {object_id}"):
            try:
                result = self._link(source, object_id, target)
            except FileNotFoundError:
                return ImportResult.MISSING
            if result is not ImportResult.OTHER_DEVICE:
                self._unlink_source(source)
            return result

    def _link(self, source: Path, name: str, target: int) -> ImportResult:
        """A link first: unlike a renaming it never replaces what is there."""
        try:
            os.link(source, name, dst_dir_fd=target, follow_symlinks=False)
        except FileExistsError:
            return ImportResult.EXISTS
        except OSError as error:
            if error.errno == errno.EXDEV:
                return ImportResult.OTHER_DEVICE
            if error.errno not in _NO_HARD_LINK_ERRORS:
                raise
            if _exists(name, target):
                return ImportResult.EXISTS
            os.rename(source, name, dst_dir_fd=target)
        return ImportResult.MOVED

    def _unlink_source(self, source: Path) -> None:
        try:
            source.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in _READ_ONLY_ERRORS:
                raise  # a directory that cannot be written keeps its names; the object is here all the same

    def remove(self, object_id: ObjectId) -> None:
        """The file has been copied."""
        with map_os_errors(f"remove the copied {object_id}"):
            self._unlink_source(self.assets / object_id)

    def is_done(self) -> bool:
        """Whether the import has been looked through."""
        try:
            os.stat(DONE, dir_fd=self._directories.root(), follow_symlinks=False)
        except OSError:
            return False
        return True

    def mark(self, *, done: bool) -> None:
        """Note for all processes whether an import is under way."""
        with map_os_errors("note the state of the import"):
            root = self._directories.root()
            if done:
                atomic_write(DONE, b"", root)
            elif self.is_done():
                os.unlink(DONE, dir_fd=root)


def _exists(name: str, directory: int) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
