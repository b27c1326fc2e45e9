"""Partial downloads: one writer, many followers, in any number of processes."""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import suppress
from dataclasses import dataclass, replace

from distributor_node.shared.adapters.volume.layout import (
    INCOMING,
    INCOMING_RECORD_SUFFIX,
    OBJECTS,
    PART_SUFFIX,
    RECORDS,
    Directories,
    map_os_errors,
    shard,
)
from distributor_node.shared.adapters.volume.records import (
    atomic_write,
    encode_record,
    overwrite,
    unlink_if_exists,
)
from distributor_node.shared.domain.errors import VolumeError, VolumeFull
from distributor_node.shared.domain.objects import ObjectId, StoredRecord

_UNVERIFIED_MODE, _VERIFIED_MODE = 0o640, 0o644
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


class PartialHeld(VolumeError):
    """Another process, stopped or slow but alive, still has the partial file open for writing."""


class PartialFile:
    """The partial file of one object, open for writing; the exclusive lock on it is ours.

    Made by Volume.open_partial_for_writing."""

    def __init__(self, directories: Directories, record: StoredRecord) -> None:
        self._directories = directories
        self._incoming = -1
        self.record = record
        self._name = record.object_id + PART_SUFFIX
        self._sidecar_name = record.object_id + INCOMING_RECORD_SUFFIX
        self._descriptor = -1
        self._sidecar_stale = False

    def open(self, *, write_sidecar: bool) -> None:
        """Create or take over the file; if `write_sidecar`, note what it will be.

        PartialHeld if another writer is alive."""
        with map_os_errors(f"open the partial file of {self.record.object_id}"):
            # Our own: the volume may be replaced, and its directories forgotten, before the end of a long download
            self._incoming = os.dup(self._directories.descriptor(INCOMING))
            try:
                self._descriptor = self._open_locked(os.O_CREAT)
                if not write_sidecar:
                    return
                # Before the first byte: whoever finds the partial file must be able to tell how large it may grow.
                # Not synced, since a client waits: after a power cut a sidecar that is gone or torn is none, and what
                # lies there is then not resumed.
                atomic_write(self._sidecar_name, encode_record(self.record), self._incoming, durable=False)
            except BaseException:
                self.close()
                raise

    def _open_locked(self, create: int) -> int:
        while True:
            descriptor = os.open(self._name, _OPEN | create, _UNVERIFIED_MODE, dir_fd=self._incoming)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(descriptor, self._name, self._incoming):
                    os.fchmod(descriptor, _UNVERIFIED_MODE)
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                raise PartialHeld(
                    f"the partial file of {self.record.object_id} is held by another writer"
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # replaced between opening and locking: take the new one

    @property
    def size(self) -> int:
        """Bytes on disk now."""
        return os.fstat(self._descriptor).st_size

    def check_free_space(self) -> None:
        """VolumeFull if the device has no room for the rest: found out now, it tears no answer that has begun."""
        with map_os_errors(f"ask for room for {self.record.object_id}"):
            device = os.fstatvfs(self._descriptor)
        missing = self.record.size - self.size - device.f_bavail * device.f_frsize
        if missing > 0:
            raise VolumeFull(f"{missing} bytes too few are free for {self.record.object_id}")

    def read(self, offset: int, length: int) -> bytes:
        with map_os_errors(f"read the partial file of {self.record.object_id}"):
            return os.pread(self._descriptor, length, offset)

    def set_media_type(self, media_type: str) -> None:
        """What the source says that the object is; noted with the next write, before its bytes."""
        if media_type != self.record.media_type:
            self.record = replace(self.record, media_type=media_type)
            self._sidecar_stale = True

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """All of `data` at `offset`; VolumeFull if the device is full."""
        with map_os_errors(f"write the partial file of {self.record.object_id}"):
            if self._sidecar_stale:
                overwrite(self._sidecar_name, encode_record(self.record), self._incoming)
                self._sidecar_stale = False
            view = memoryview(data)
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                offset += written
                view = view[written:]

    def restart(self) -> None:
        """Begin again with an empty file that is another file: followers of the old one see that it is gone.

        The old one is emptied, so that its bytes are free although followers may have it open.
        """
        with map_os_errors(f"start the partial file of {self.record.object_id} over"):
            unlink_if_exists(self._name, self._incoming)
            os.ftruncate(self._descriptor, 0)
            old, self._descriptor = self._descriptor, self._open_locked(os.O_CREAT | os.O_EXCL)
            os.close(old)

    def mark_verified(self) -> None:
        """Let followers send the last bytes: the hash (or size) has passed.

        Nothing is written any more, so the exclusive lock becomes a shared one, which keeps other writers and removals
        off all the same, and which followers can share from now on: once this writer lets go, theirs is there.
        """
        with map_os_errors(f"mark the partial file of {self.record.object_id}"):
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # the kernel lets go of the one before it takes the other
                raise PartialHeld(f"another took the partial file of {self.record.object_id}") from None
            os.fchmod(self._descriptor, _VERIFIED_MODE)

    def publish(self, record: StoredRecord) -> None:
        """Make it a complete object: sync, write its record, one rename, sync the directories. Blocks for the disk."""
        object_id, number = record.object_id, shard(record.object_id)
        with map_os_errors(f"publish {object_id}"):
            os.fsync(self._descriptor)
            atomic_write(
                object_id, encode_record(record), self._directories.descriptor(f"{RECORDS}/{number}")
            )
            self._directories.sync(f"{RECORDS}/{number}")
            objects = self._directories.descriptor(f"{OBJECTS}/{number}")
            os.rename(self._name, object_id, src_dir_fd=self._incoming, dst_dir_fd=objects)
            # It is an object now, and senders may hold it while the disk is waited for; removers still may not.
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            self._directories.sync(f"{OBJECTS}/{number}")
            unlink_if_exists(self._sidecar_name, self._incoming)

    def discard(self) -> None:
        """Remove the partial file and close it; its bytes are free when this returns. Closed, its lock given back, also
        when it cannot be removed."""
        try:
            with map_os_errors(f"discard the partial file of {self.record.object_id}"):
                unlink_if_exists(self._name, self._incoming)
                os.ftruncate(self._descriptor, 0)
                unlink_if_exists(self._sidecar_name, self._incoming)
        finally:
            self.close()

    def close(self) -> None:
        """Close it and give the lock back; what is on disk stays."""
        for descriptor in (self._descriptor, self._incoming):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._incoming = -1


def _same_file(descriptor: int, name: str, directory: int) -> bool:
    try:
        there = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


@dataclass(frozen=True, slots=True)
class PartialState:
    """`size`: bytes that can be read; `verified`: all of it is right; `unlinked`: it was discarded or started over."""

    size: int
    verified: bool
    unlinked: bool


class PartialReader:
    """A partial file opened by a follower. It stays readable when the object becomes complete (same file)."""

    def __init__(self, object_id: ObjectId, descriptor: int) -> None:
        self.object_id = object_id
        self._descriptor = descriptor
        self._locked = False

    @property
    def descriptor(self) -> int:
        """For reading only; stays ours."""
        return self._descriptor

    def state(self) -> PartialState:
        seen = os.fstat(self._descriptor)
        verified = bool(seen.st_mode & stat.S_IROTH)
        return PartialState(
            size=seen.st_size, verified=verified, unlinked=seen.st_nlink == 0 and not verified
        )

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def lock_shared(self) -> bool:
        """Once verified: keep the object from being removed. True: it is kept. Before that the writer's lock is in the
        way."""
        if not self._locked:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return False
            self._locked = True
        return True

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
