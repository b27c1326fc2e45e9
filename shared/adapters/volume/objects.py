"""Complete objects, opened for sending."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from distributor_node.shared.adapters.volume.layout import (
    OBJECTS,
    RECORDS,
    TRASH,
    Directories,
    map_os_errors,
    shard,
)
from distributor_node.shared.adapters.volume.records import unlink_if_exists
from distributor_node.shared.domain.objects import ObjectId, StoredRecord

FileIdentity = tuple[int, int, int, int]
"""Device, inode, size, time of the last change of content: another file under the same name differs in one of them."""


def identity_of(seen: os.stat_result) -> FileIdentity:
    return (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns)


@dataclass(slots=True)
class OpenObject:
    """An open complete object and its record. `close` it; `lock_shared` it when sending takes longer than a moment.

    One open object may serve several sends at once: holds are counted, the shared lock is on while there is one.
    """

    record: StoredRecord
    descriptor: int
    _lock_count: int = field(default=0)

    def lock_shared(self) -> bool:
        """Keep the object from being removed until `unlock`. False: it is being removed at this moment.

        On a file system without locks True: there nothing can be locked for removal either.
        """
        if self._lock_count == 0:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                self._lock_count += 1
                return True
            if os.fstat(self.descriptor).st_nlink == 0:
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)
                return False
        self._lock_count += 1
        return True

    def unlock(self) -> None:
        self._lock_count -= 1
        if self._lock_count == 0:
            with suppress(OSError):
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def identity(self) -> FileIdentity:
        """Of the file that is open, whatever lies under its name now."""
        return identity_of(os.fstat(self.descriptor))

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer only at the end of the file. OSError if the disk fails."""
        return os.pread(self.descriptor, length, offset)

    def close(self) -> None:
        """Close the descriptor, and with it every hold."""
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


# Removing complete objects without pulling them from under anybody who sends them.


class RemovalState(StrEnum):
    """READY: locked, nobody sends it. IN_USE: somebody does. ABSENT: no file there."""

    READY = "ready"
    IN_USE = "in_use"
    ABSENT = "absent"


class Removal:
    """The intent to remove one object: `begin` takes the lock, then `unlink`, then `close` (or only `close`).

    The lock is held from before the state store is told until after the file is gone: a process that is stopped in
    between keeps others from storing a new file under the name, which it would remove when it goes on.
    """

    def __init__(self, directories: Directories, object_id: ObjectId, *, truncates: bool) -> None:
        """`truncates`: whether a file that is unlinked is cut to nothing, too."""
        self._truncates = truncates
        self._directories = directories
        self._object_id = object_id
        self._descriptor = -1
        self._place = ""

    def begin(self) -> RemovalState:
        """Look in `leaving/` first (an earlier removal found it in use), then in `objects/`."""
        with map_os_errors(f"lock {self._object_id} for removal"):
            for place in (TRASH, f"{OBJECTS}/{shard(self._object_id)}"):
                state = self._lock(place)
                if state is not RemovalState.ABSENT:
                    return state
        return RemovalState.ABSENT

    def _lock(self, place: str) -> RemovalState:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(self._object_id, flags, dir_fd=self._directories.descriptor(place))
        except OSError as error:
            # A link is none of ours, and leads nowhere: the next object of this name takes its place
            if error.errno in (errno.ENOENT, errno.ELOOP):
                return RemovalState.ABSENT
            raise
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
        """Remove the locked file and its record; the bytes are free when this returns. Where it does not empty the file
        they are once nobody has it open, and readers without a lock finish undisturbed."""
        with map_os_errors(f"remove {self._object_id}"):
            unlink_if_exists(self._object_id, self._directories.descriptor(self._place))
            if self._place != TRASH:
                number = shard(self._object_id)
                unlink_if_exists(self._object_id, self._directories.descriptor(f"{RECORDS}/{number}"))
            # Whoever sends it would hold a lock. An open file that nobody sends must not keep the bytes
            if self._truncates and os.fstat(self._descriptor).st_nlink == 0:
                os.ftruncate(self._descriptor, 0)

    def rename_to_trash(self) -> None:
        """Take an object that is being sent out of sight: new requests miss it, its bytes still count.

        Call again `begin` and `unlink` later, until nobody sends it any more.
        """
        number = shard(self._object_id)
        with map_os_errors(f"set {self._object_id} aside"):
            os.rename(
                self._object_id,
                self._object_id,
                src_dir_fd=self._directories.descriptor(f"{OBJECTS}/{number}"),
                dst_dir_fd=self._directories.descriptor(TRASH),
            )
            unlink_if_exists(self._object_id, self._directories.descriptor(f"{RECORDS}/{number}"))

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
