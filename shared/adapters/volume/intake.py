"""Imports the files of another node's flat directory into the volume, without copying where that is possible."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import structlog

from distributor_node.shared.adapters.volume.layout import OBJECTS, Directories, map_os_errors, shard
from distributor_node.shared.adapters.volume.records import atomic_write
from distributor_node.shared.domain.objects import ObjectId

logger = structlog.get_logger()

DONE = ".import-done"
"""A file in the volume's root that exists once an import is finished. While it is missing, an import is running."""

# File names of the existing node. Other names in its directory are not imported.
_NAME = re.compile(r"[0-9]{1,20}\Z", re.ASCII)
_NO_HARD_LINK_ERRORS = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)
_READ_ONLY_ERRORS = (errno.EROFS, errno.EACCES, errno.EPERM)


class ImportResult(StrEnum):
    """What became of one file."""

    MOVED = "moved"  # it is under `objects/` now
    EXISTS = "there"  # the object was there already
    OTHER_DEVICE = "elsewhere"  # it is on another file system and has to be copied
    MISSING = "gone"  # there is no such file
    FAILED = "failed"  # it could not be imported


@dataclass(frozen=True, slots=True)
class PendingFile:
    """A file to be imported."""

    object_id: ObjectId
    size: int  # bytes
    changed_at: float  # POSIX seconds


class ImportSource:
    """The flat directory of the other node. Blocking: call from a worker thread. Raises VolumeError.

    A process that is killed at any moment leaves a file in one of the two places, or in both. The next import of the
    file completes it.
    """

    def __init__(self, root: Path, assets: Path) -> None:
        """`root`: of the volume; `assets`: the flat directory, which may be `root` itself."""
        self.assets = assets
        self._directories = Directories(root)

    def close(self) -> None:
        """Close the open directories. They open again when needed."""
        self._directories.close()

    def pending(self) -> Iterator[PendingFile]:
        """All files to be imported."""
        with map_os_errors(f"read the assets in {self.assets}"), os.scandir(self.assets) as entries:
            for entry in entries:
                if not _NAME.match(entry.name):
                    continue
                try:
                    seen = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                except OSError as error:  # one file must not keep the others waiting
                    logger.error("import_file_unreadable", object_id=entry.name, reason=str(error))
                    continue
                if stat.S_ISREG(seen.st_mode):
                    yield PendingFile(ObjectId(entry.name), seen.st_size, seen.st_mtime)

    def import_file(self, object_id: ObjectId) -> ImportResult:
        """Move one file into `objects/`. The caller writes its record, since it knows the hash."""
        source = self.assets / object_id
        with map_os_errors(f"import {object_id}"):
            target = self._directories.create_shard(f"{OBJECTS}/{shard(object_id)}")
            try:
                result = self._link(source, object_id, target)
            except FileNotFoundError:
                return ImportResult.MISSING
            if result is not ImportResult.OTHER_DEVICE:
                self._unlink_source(source)
            return result

    def _link(self, source: Path, name: str, target: int) -> ImportResult:
        """Link rather than rename where that is supported: a link never replaces an existing file."""
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
                raise  # in a read-only directory the old name stays, and the object is imported all the same

    def remove(self, object_id: ObjectId) -> None:
        """Remove a file that has been copied."""
        with map_os_errors(f"remove the copied {object_id}"):
            self._unlink_source(self.assets / object_id)

    def is_done(self) -> bool:
        """Whether the import is finished."""
        try:
            os.stat(DONE, dir_fd=self._directories.root(), follow_symlinks=False)
        except OSError:
            return False
        return True

    def mark(self, *, done: bool) -> None:
        """Record for all processes whether the import is finished."""
        with map_os_errors(f"write {DONE}"):
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
