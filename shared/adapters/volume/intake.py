"""Imports the files of another node's flat directory into the volume, without copying where that is possible."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import structlog

from distributor_node.shared.adapters.volume.layout import (
    OBJECTS,
    Directories,
    map_os_errors,
    open_plain,
    shard,
)
from distributor_node.shared.adapters.volume.records import atomic_write
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.objects import CompactIdSet, ObjectId

logger = structlog.get_logger()

DONE = ".import-done"
"""A file in the volume's root that exists once an import is finished. While it is missing, an import is running."""

EXCLUDED = ".import-excluded"
"""A file in the volume's root: ids that are not imported, one per line. They were imported before and their names stay
in the directory of the other node, or the operator has purged them."""

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
    EXCLUDED = "excluded"  # it was imported before, or purged
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
        self._excluded = ExcludedIds(self._directories)

    def close(self) -> None:
        """Close the open directories. They open again when needed."""
        self._directories.close()
        self._excluded = ExcludedIds(self._directories)

    def pending(self) -> Iterator[PendingFile]:
        """All files to be imported."""
        excluded = ExcludedIds(self._directories)  # its own: a scan is not under the lock
        with map_os_errors(f"read {EXCLUDED}"):
            excluded.read()
        with map_os_errors(f"read the assets in {self.assets}"), os.scandir(self.assets) as entries:
            for entry in entries:
                if not _NAME.match(entry.name) or ObjectId(entry.name) in excluded:
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
        with map_os_errors(f"import {object_id}"), self._excluded.locked() as excluded:
            if object_id in excluded:
                return ImportResult.EXCLUDED
            target = self._directories.create_shard(f"{OBJECTS}/{shard(object_id)}")
            try:
                result = self._link(source, object_id, target)
            except FileNotFoundError:
                return ImportResult.MISSING
            if result is not ImportResult.OTHER_DEVICE:
                self._unlink_source(object_id)
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

    def _unlink_source(self, object_id: ObjectId) -> None:
        """Remove the name of an imported file, under the lock. In a read-only directory it stays, so that it is
        excluded from then on."""
        try:
            (self.assets / object_id).unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in _READ_ONLY_ERRORS:
                raise
            self._excluded.append(object_id)

    def remove(self, object_id: ObjectId) -> None:
        """Remove a file that has been copied."""
        with map_os_errors(f"remove the copied {object_id}"), self._excluded.locked():
            self._unlink_source(object_id)

    def exclude(self, object_id: ObjectId) -> None:
        """Never import this object. Call it before the object is removed: an import that has begun is over then."""
        if not _NAME.match(object_id):
            return
        with map_os_errors(f"write {EXCLUDED}"), self._excluded.locked() as excluded:
            if object_id not in excluded:
                excluded.append(object_id)
            excluded.sync()

    def is_excluded(self, object_id: ObjectId) -> bool:
        """Whether the object is not to be imported, as of now."""
        with map_os_errors(f"read {EXCLUDED}"), self._excluded.locked() as excluded:
            return object_id in excluded

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


_LOCK_TIMEOUT, _LOCK_RETRY_INTERVAL = 2.0, 0.02  # seconds
_READ_BYTES = 1024 * 1024
_MAX_RECENT = 10_000


class ExcludedIds:
    """The ids in the file `.import-excluded`, which is only appended to. Raises OSError.

    Race: 1. the import looks an id up; 2. the operator purges the object, which is not on the volume; 3. the import
    links its file. So all three steps are taken under the lock of the file, by former leaders too.
    """

    def __init__(self, directories: Directories) -> None:
        self._directories = directories
        self._identity: tuple[int, int] | None = None  # of the file that was read
        self._read_up_to = 0  # bytes
        self._known, self._recent = CompactIdSet(), set[ObjectId]()
        self._locked = -1  # descriptor of the file, under the lock

    def __contains__(self, object_id: ObjectId) -> bool:
        return object_id in self._recent or object_id in self._known

    @contextmanager
    def locked(self) -> Iterator[ExcludedIds]:
        """Take the lock, and read what others have added. VolumeError if a process holds the lock for long: it may
        have been stopped."""
        with map_os_errors(f"open {EXCLUDED}"):
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            descriptor = open_plain(EXCLUDED, flags, self._directories.root())
        try:
            _lock(descriptor)
            self._read_new(descriptor)
            self._locked = descriptor
            yield self
        finally:
            self._locked = -1
            os.close(descriptor)

    def read(self) -> None:
        """Read the file as it is now."""
        with self.locked():
            return

    def append(self, object_id: ObjectId) -> None:
        """Add an id, under the lock."""
        line = f"{object_id}\n".encode()
        if os.write(self._locked, line) < len(line):  # the rest is cut off when the file is read again
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._read_up_to += len(line)
        self._recent.add(object_id)
        if len(self._recent) > _MAX_RECENT:
            self._known.update(self._recent)
            self._recent.clear()

    def sync(self) -> None:
        """Make the ids outlive a power cut, under the lock."""
        os.fsync(self._locked)
        os.fsync(self._directories.root())

    def _read_new(self, descriptor: int) -> None:
        seen = os.fstat(descriptor)
        if self._identity != (seen.st_dev, seen.st_ino) or seen.st_size < self._read_up_to:
            self._identity, self._read_up_to = (seen.st_dev, seen.st_ino), 0
            self._known, self._recent = CompactIdSet(), set()
        while self._read_up_to < seen.st_size:
            lines = os.pread(descriptor, _READ_BYTES, self._read_up_to)
            whole = lines.rfind(b"\n") + 1
            if not whole:  # a process was killed while it wrote this line
                os.ftruncate(descriptor, self._read_up_to)
                return
            names = lines[:whole].decode("ascii", "replace").split()
            self._known.update(ObjectId(name) for name in names)
            self._read_up_to += whole


def _lock(descriptor: int) -> None:
    """Lock a file, for a bounded time. Two threads of one process exclude each other, as each opens the file."""
    deadline = time.monotonic() + _LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise VolumeError(f"{EXCLUDED}: expected a free lock, another process holds it") from None
            time.sleep(_LOCK_RETRY_INTERVAL)


def _exists(name: str, directory: int) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
