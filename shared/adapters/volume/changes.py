"""Changes of files under `objects/`, told by the kernel (inotify), so that what is open need not be looked at again."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator

import structlog

from distributor_node.shared.adapters.volume.layout import OBJECTS, Directories, shard

# linux/magic.h. On these, whoever changes a file does it through this kernel. Network, FUSE and overlay file systems
# change without an event.
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


class ChangeWatch:
    """Watches the shards of `objects/` that it is asked to. Not safe to use from several threads.

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
        number = shard(object_id)
        covered = self._watched.get(number)
        if covered is None:
            covered = self._watch(number)
        return covered

    def _watch(self, number: str) -> bool:
        try:
            folder = self._directories.descriptor(f"{OBJECTS}/{number}")
        except OSError:
            return False  # not made yet: asked again
        try:
            if self._type_of(folder) not in _LOCAL_FILE_SYSTEMS:
                self._watched[number] = False
                return False
            path = f"/proc/self/fd/{folder}".encode()  # the open directory, whatever has its name now
            if self._libc.inotify_add_watch(self.descriptor, path, _WATCHED | _ONLY_DIRECTORY) < 0:
                raise _last_error("inotify_add_watch")
        except OSError as error:
            if True not in self._watched.values():
                logger.warning("volume_not_watched", reason=str(error))
            self._watched[number] = False
            return False
        self._watched[number] = True
        return True

    def _type_of(self, descriptor: int) -> int:
        buffer = ctypes.create_string_buffer(_STATFS_BYTES)
        if self._libc.fstatfs(descriptor, buffer) < 0:
            raise _last_error("fstatfs")
        return ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF

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
