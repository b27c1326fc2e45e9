"""Complete objects: opened for sending, watched for changes, and removed without truncating a response.

The kernel tells of changed files (inotify), so that what is open need not be looked at again.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import structlog

from distributor_node.shared.adapters.volume.layout import (
    INCOMING,
    OBJECTS,
    PART_SUFFIX,
    RECORDS,
    TRASH,
    Directories,
    ForeignFile,
    map_os_errors,
    open_plain,
    shard,
    unlink_if_exists,
)
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.objects import ObjectId, StoredRecord

# linux/magic.h. On these, every change of a file goes through this kernel. Files on network, FUSE and overlay file
# systems can change without an event.
_LOCAL_FILE_SYSTEMS = frozenset(
    (
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # XFS
        0x9123683E,  # btrfs
        0x01021994,  # tmpfs
        0xF2F52010,  # F2FS
        0x2FC12FC1,  # ZFS
        0xCA451A4E,  # bcachefs
    )
)
_STATFS_BYTES = 256  # more than any struct statfs; its first word is the type

# linux/inotify.h
_MODIFY, _ATTRIB, _CLOSE_WRITE = 0x2, 0x4, 0x8
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF = 0x400, 0x800
_UNMOUNT, _OVERFLOW, _IGNORED = 0x2000, 0x4000, 0x8000
_ONLY_DIRECTORY = 0x1000000
_WATCHED = (
    _MODIFY | _ATTRIB | _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF
)
_LOST = _DELETE_SELF | _MOVE_SELF | _UNMOUNT | _OVERFLOW | _IGNORED
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, bytes of the name
_READ_BYTES = 64 * 1024

logger = structlog.get_logger()

FileIdentity = tuple[int, int, int, int, int, int]
"""Device, inode, size, times of modification and change, number of names: another file under the same name, and other
bytes in the same file, differ in one of them."""


def identity_of(seen: os.stat_result) -> FileIdentity:
    return (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_nlink)


@dataclass(slots=True)
class OpenObject:
    """An open complete object and its record. Close it after use."""

    record: StoredRecord
    descriptor: int

    def lock_shared(self) -> bool:
        """Keep the object from being removed until `close`. False: it is being removed at this moment.

        Needed when sending takes longer than a moment. Returns True on a file system without locks: there no process
        can lock the object for removal either.
        """
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
        if os.fstat(self.descriptor).st_nlink == 0:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            return False
        return True

    def identity(self) -> FileIdentity:
        """The identity of the open file, whichever file has its name now."""
        return identity_of(os.fstat(self.descriptor))

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer only at the end of the file. Raises OSError if the disk fails."""
        return os.pread(self.descriptor, length, offset)

    def close(self) -> None:
        """Close the descriptor, which releases the lock."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


# Telling whether an object is being sent.

_KERNEL_LOCKS = Path("/proc/locks")
_SHARED_FLOCK = re.compile(r"FLOCK\s+\S+\s+READ\s+-?\d+\s+([0-9a-f]+):([0-9a-f]+):(\d+)\s")


def has_shared_lock(seen: os.stat_result) -> bool:
    """Whether a process holds a shared lock on this file, as senders do. OSError if the kernel does not tell.

    It reads the kernel's table: to try an exclusive lock would make a sender believe that the object is being removed.
    The table shows the processes of our own PID namespace (container) only.
    """
    device = (os.major(seen.st_dev), os.minor(seen.st_dev))
    with _KERNEL_LOCKS.open(encoding="ascii") as table:
        for line in table:
            found = _SHARED_FLOCK.search(line)
            if found is None or int(found[3]) != seen.st_ino:
                continue
            # stat and the table name different devices for a btrfs subvolume; those of stat have major number 0
            if device[0] == 0 or device == (int(found[1], 16), int(found[2], 16)):
                return True
    return False


class RemovalState(StrEnum):
    """What `Removal.begin` found."""

    READY = "ready"  # locked: no process sends it
    IN_USE = "in_use"  # a process sends it
    ABSENT = "absent"  # there is no such file


class Removal:
    """The removal of one object: `begin` takes the lock, then `unlink`, then `close` (or only `close`).

    The lock is held from before the state store is told until after the file is gone. Otherwise a removal that is
    suspended in between could continue later and remove a new file that was stored under the same name.
    """

    def __init__(self, directories: Directories, object_id: ObjectId, *, truncates: bool) -> None:
        """`truncates`: whether `unlink` also empties the file."""
        self._truncates = truncates
        self._directories = directories
        self._object_id = object_id
        self._descriptor = -1
        self._place = ""

    def begin(self) -> RemovalState:
        """Lock the file in `leaving/` (an earlier removal found it in use) or else in `objects/`."""
        with map_os_errors(f"lock {self._object_id} for removal"):
            for place in (TRASH, f"{OBJECTS}/{shard(self._object_id)}"):
                state = self._lock(place)
                if state is not RemovalState.ABSENT:
                    return state
        return RemovalState.ABSENT

    def _lock(self, place: str) -> RemovalState:
        try:
            descriptor = open_plain(self._object_id, os.O_RDWR, self._directories.descriptor(place))
        except FileNotFoundError:
            return RemovalState.ABSENT
        except ForeignFile:
            # Not made by us. The next object of this name replaces it.
            self._directories.report_foreign(f"{place}/{self._object_id}")
            return RemovalState.ABSENT
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            linked = os.fstat(descriptor).st_nlink > 0
        except BlockingIOError:
            os.close(descriptor)
            return RemovalState.IN_USE
        except BaseException:
            os.close(descriptor)
            raise
        if not linked:
            os.close(descriptor)
            return RemovalState.ABSENT
        self._descriptor, self._place = descriptor, place
        return RemovalState.READY

    def unlink(self) -> None:
        """Remove the locked file and its record. Raises VolumeError.

        The bytes are free when this returns. Without `truncates` they are free once no process has the file open, and
        readers that hold no lock finish undisturbed.
        """
        with map_os_errors(f"remove {self._object_id}"):
            unlink_if_exists(self._object_id, self._directories.descriptor(self._place))
            if self._place != TRASH:
                self._unlink_record()
            # A sender would hold a lock. A descriptor that is open without one must not keep the bytes on the disk.
            if self._truncates and os.fstat(self._descriptor).st_nlink == 0:
                os.ftruncate(self._descriptor, 0)

    def rename_to_trash(self, expected: FileIdentity | None = None) -> None:
        """Hide an object that is being sent: new requests miss it, and its bytes still count as used.

        `expected`: identity of the file that is meant; a process that was stopped must not hide a newer one of that
        name. Call `begin` and `unlink` again later, until no process sends it. Raises VolumeError.
        """
        with map_os_errors(f"move {self._object_id} to {TRASH}/"):
            objects = self._directories.descriptor(f"{OBJECTS}/{shard(self._object_id)}")
            trash = self._directories.descriptor(TRASH)
            seen = stat_or_none(self._object_id, objects)
            if expected is not None and seen is not None and identity_of(seen)[:2] != expected[:2]:
                raise VolumeError(f"move {self._object_id} to {TRASH}/: another file has its name now")
            os.rename(self._object_id, self._trash_name(objects, trash), src_dir_fd=objects, dst_dir_fd=trash)
            self._unlink_record()

    def _trash_name(self, objects: int, trash: int) -> str:
        """Never that of a file that is there: its bytes count while it is sent, and are found by its name."""
        if stat_or_none(self._object_id, trash) is None:
            return self._object_id
        seen = stat_or_none(self._object_id, objects)
        return self._object_id if seen is None else f"{self._object_id},{seen.st_ino}"

    def _unlink_record(self) -> None:
        with suppress(FileNotFoundError):  # neither the record nor its shard has to exist
            os.unlink(
                self._object_id, dir_fd=self._directories.descriptor(f"{RECORDS}/{shard(self._object_id)}")
            )

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def stat_or_none(name: str, directory: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def unlink_trashed(directories: Directories, name: str, *, truncates: bool) -> bool:
    """Remove a file in `leaving/` unless a process sends it. Returns whether it is gone. Raises OSError."""
    trash = directories.descriptor(TRASH)
    try:
        descriptor = open_plain(name, os.O_RDWR, trash)
    except (FileNotFoundError, ForeignFile):
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlink_if_exists(name, trash)
        if truncates and os.fstat(descriptor).st_nlink == 0:
            os.ftruncate(descriptor, 0)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def is_on_local_file_system(descriptor: int) -> bool:
    """Whether all that happens to an open file or directory goes through this kernel. Raises OSError."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if ctypes.CDLL(None, use_errno=True).fstatfs(descriptor, buffer) < 0:
        raise _last_error("fstatfs")
    return ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF in _LOCAL_FILE_SYSTEMS


class ChangeWatch:
    """Watches the shards of `objects/` that it is asked to, or the partial files. Not safe to use from several threads.

    The kernel says nothing of a file that is written through a shared mapping, or through a hard link in another
    directory: look at files now and then all the same.
    """

    def __init__(self, directories: Directories) -> None:
        """Raises OSError if the kernel has no inotify, or its limit of instances is reached."""
        self._directories = directories
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.descriptor < 0:
            raise _last_error("inotify_init1")
        self._watched: dict[str, bool] = {}

    def covers(self, object_id: str) -> bool:
        """Whether changes of this object's file will be told from now on. Look at the file after this call."""
        return self._watch(f"{OBJECTS}/{shard(object_id)}", _WATCHED)

    def covers_partials(self) -> bool:
        """Whether `read_partials` will tell of partial files from now on."""
        return self._watch(INCOMING, _ATTRIB | _DELETE_SELF | _MOVE_SELF)

    def _watch(self, place: str, events: int) -> bool:
        covered = self._watched.get(place)
        if covered is not None:
            return covered
        try:
            folder = self._directories.descriptor(place)
        except OSError:
            return False  # not made yet: asked again
        try:
            if not is_on_local_file_system(folder):
                self._watched[place] = False
                return False
            path = f"/proc/self/fd/{folder}".encode()  # the open directory, whatever has its name now
            if self._libc.inotify_add_watch(self.descriptor, path, events | _ONLY_DIRECTORY) < 0:
                raise _last_error("inotify_add_watch")
        except OSError as error:
            if True not in self._watched.values():
                logger.warning("volume_not_watched", reason=str(error))
            self._watched[place] = False
            return False
        self._watched[place] = True
        return True

    def read(self) -> set[str] | None:
        """The names of files that have changed, or that a process has opened for writing and closed, as one that
        removes an object does. None: events were lost, or a directory: anything may have changed, and nothing is
        watched any more. `close` this watch, and make another one.
        """
        names: set[str] = set()
        while True:
            try:
                events = os.read(self.descriptor, _READ_BYTES)
            except BlockingIOError:
                return names
            except OSError:
                return None
            for mask, name in _parse(events):
                if mask & _LOST:
                    return None
                names.add(name)
            if len(events) < _READ_BYTES // 2:
                return names

    def read_partials(self) -> set[str] | None:
        """The ids of objects whose partial files have got their first bytes, have been verified, or have become
        sparse. None: as `read`."""
        names = self.read()
        if names is None:
            return None
        return {name.removesuffix(PART_SUFFIX) for name in names if name.endswith(PART_SUFFIX)}

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        self._watched.clear()


def _parse(events: bytes) -> Iterator[tuple[int, str]]:
    position = 0
    while position < len(events):
        _, mask, _, length = _EVENT.unpack_from(events, position)
        position += _EVENT.size
        yield mask, os.fsdecode(events[position : position + length].rstrip(b"\0"))
        position += length


def _last_error(call: str) -> OSError:
    number = ctypes.get_errno() or errno.EIO
    return OSError(number, f"{call}: {os.strerror(number)}")
