"""Partial downloads: one writer and many followers of each, in any number of processes.

A partial file is the beginning of its object, and its size says how much of it is there. Before bytes beyond the first
gap are written, it is marked as sparse. From then on its size says nothing: the extents in its sidecar do.

1. The writer syncs what it has written, names it in the sidecar, syncs that, and marks the file.
2. Only then it writes beyond the first gap. Without a mark, the size that was read before is right.
3. Each new version of the sidecar names only bytes that were synced before. What it does not name is fetched again.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import stat
import struct
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace

from distributor_node.shared.adapters.volume.layout import (
    INCOMING,
    INCOMING_RECORD_SUFFIX,
    OBJECTS,
    PART_SUFFIX,
    RECORDS,
    Directories,
    ForeignFile,
    map_os_errors,
    open_plain,
    shard,
    unlink_if_exists,
)
from distributor_node.shared.adapters.volume.records import (
    FileState,
    atomic_write,
    decode_extents,
    encode_extents,
    encode_record,
    overwrite,
    read_capped,
    seal_record,
)
from distributor_node.shared.domain.conditionals import Validators
from distributor_node.shared.domain.errors import InvalidInput, VolumeError, VolumeFull
from distributor_node.shared.domain.extents import MAX_EXTENTS, Extents
from distributor_node.shared.domain.http_caching import Freshness
from distributor_node.shared.domain.objects import ObjectId, StoredRecord

_UNVERIFIED_MODE, _VERIFIED_MODE = 0o640, 0o644
_SPARSE = stat.S_IXUSR
"""The mode bit of a sparse file that is not verified yet."""

_FILES_OF_A_FETCH = 6
"""The partial file, its sidecar, the record, a draft of one of these, and two shards that may have to be made."""

_PROBED = 1024 * 1024  # bytes of the hole that is tried out

_MAX_REPLACED = 100
"""Times that one open finds another file than it has just opened. More is no race with another writer."""


_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Return sync_file_range(2), which Python's os does not have; None where libc does not either."""
    try:
        found = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    call: Callable[[int, int, int, int], int] = found
    return call


_sync_file_range = _find_sync_file_range()


class PartialHeld(VolumeError):
    """Another writer still has the partial file open. Its process is alive, perhaps suspended or slow.

    Or, where a removal spares them: a follower reads it.
    """


class PartialFile:
    """The partial file of one object, open for writing and exclusively locked.

    Made by Volume.open_partial_for_writing. Every method raises VolumeError if the disk fails.
    """

    def __init__(self, directories: Directories, record: StoredRecord) -> None:
        self._directories = directories
        self._incoming = -1
        self.record = record
        self._name = record.object_id + PART_SUFFIX
        self._sidecar_name = record.object_id + INCOMING_RECORD_SUFFIX
        self._descriptor = -1
        self._sidecar_stale = False
        self._lock = threading.Lock()  # of sidecar and mode: several threads write a sparse file
        self._extents: Extents | None = None  # None: the file is not sparse

    def open(self, *, write_sidecar: bool = True, empty: bool = False) -> None:
        """Create the file or take over an abandoned one, and write its sidecar if `write_sidecar`.

        `empty`: the bytes that are there are of another version. They are dropped before the sidecar is written: after
        a crash, a new sidecar beside old bytes would be taken for one content.

        Raises PartialHeld if another writer has the file open.
        """
        with map_os_errors(f"open the partial file of {self.record.object_id}"):
            # A descriptor of our own: Directories closes its descriptors when the volume is replaced, which may happen
            # before the end of a long download.
            self._incoming = os.dup(self._directories.descriptor(INCOMING))
            try:
                self._check_target()
                self._check_free_files()
                self._descriptor = self._open_locked(os.O_CREAT)
                seen = os.fstat(self._descriptor)
                if empty and (seen.st_size or seen.st_mode & _SPARSE):
                    self.restart()
                    seen = os.fstat(self._descriptor)
                if not write_sidecar:
                    return
                if seen.st_mode & _SPARSE:
                    self._extents = self._read_extents(seen.st_ino)
                # Before the first byte, so that a process that finds the partial file knows how large it may grow.
                # Not synced, because a client waits. If a power cut tears or loses the sidecar, the partial file is
                # not resumed.
                durable = self._extents is not None
                atomic_write(self._sidecar_name, self._encoded(), self._incoming, durable=durable)
            except BaseException:
                self.close()
                raise

    def open_verified(self) -> bool:
        """Open a file that another writer has verified and not published, under a shared lock: followers may hold one.

        False if there is none, if it has another size than its record, or if it is locked for writing or removal.
        """
        with map_os_errors(f"open the verified file of {self.record.object_id}"):
            self._incoming = os.dup(self._directories.descriptor(INCOMING))
            try:
                self._descriptor = open_plain(self._name, os.O_RDWR, self._incoming)
                fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                seen = os.fstat(self._descriptor)
                if (
                    seen.st_mode & stat.S_IROTH
                    and seen.st_size == self.record.size
                    and _same_file(self._descriptor, self._name, self._incoming)
                ):
                    return True
            except (FileNotFoundError, BlockingIOError, ForeignFile):
                pass
            except BaseException:
                self.close()
                raise
            self.close()
            return False

    def _check_free_files(self) -> None:
        """Raise VolumeFull if the device has too few inodes for the files of a fetch, before any of them is made."""
        device = os.fstatvfs(self._incoming)
        if device.f_files and device.f_favail < _FILES_OF_A_FETCH:
            raise VolumeFull(
                f"no inodes for {self.record.object_id}: expected {_FILES_OF_A_FETCH} free, got {device.f_favail}"
            )

    def _check_target(self) -> None:
        """Raise VolumeError for a directory at the object's place: the file could not be published after the download.

        A link or a FIFO is replaced by the object.
        """
        place = f"{OBJECTS}/{shard(self.record.object_id)}"
        folder = self._directories.existing(place)
        try:
            seen = (
                None
                if folder is None
                else os.stat(self.record.object_id, dir_fd=folder, follow_symlinks=False)
            )
        except FileNotFoundError:
            return
        if seen is not None and stat.S_ISDIR(seen.st_mode):
            raise VolumeError(f"{place}/{self.record.object_id}: expected a file, got a directory")

    def _open_locked(self, create: int) -> int:
        for _ in range(_MAX_REPLACED):
            descriptor = open_plain(self._name, os.O_RDWR | create, self._incoming, _UNVERIFIED_MODE)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(descriptor, self._name, self._incoming):
                    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
                    if mode != (wanted := _UNVERIFIED_MODE | (mode & _SPARSE)):
                        os.fchmod(descriptor, wanted)
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                raise PartialHeld(
                    f"the partial file of {self.record.object_id} is held by another writer"
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # the file was replaced between opening and locking: open the new one
        raise VolumeError(f"the partial file of {self.record.object_id} is replaced again and again")

    def _read_extents(self, inode: int) -> Extents:
        """What an earlier writer has named. Nothing, if its sidecar cannot be read or is that of another file."""
        body = read_capped(self._sidecar_name, self._incoming)
        found = None if body is None else decode_extents(body, inode, self.record.size)
        return found or Extents()

    @property
    def size(self) -> int:
        """Bytes that are there from the first one on. Of a sparse file, those that its sidecar names."""
        return os.fstat(self._descriptor).st_size if self._extents is None else self._extents.prefix

    @property
    def extents(self) -> Extents:
        """All that is there, likewise."""
        return Extents.of((0, self.size)) if self._extents is None else self._extents

    @property
    def total(self) -> int:
        """Bytes that are there, likewise."""
        return self.size if self._extents is None else self._extents.total

    @property
    def held(self) -> int:
        """Bytes that the file takes, also those that are not named. Valid until the next write.

        What a fetch keeps reserved when it is parked. Sync the file first.
        """
        return held_by(os.fstat(self._descriptor), self.total)

    @property
    def is_sparse(self) -> bool:
        """Whether bytes beyond the first gap may be written."""
        return self._extents is not None

    @property
    def may_wait_for_sync(self) -> bool:
        """Whether a write may have to wait for another thread, which syncs the extents that it names."""
        return self.is_sparse or self._lock.locked()

    def make_sparse(self, written: int) -> None:
        """Let bytes beyond the first gap be written. `written`: bytes from the first one on. Blocking, as it syncs."""
        with map_os_errors(f"make the partial file of {self.record.object_id} sparse"):
            self._name_extents(Extents.of((0, written)))
            os.fsync(self._incoming)
            with self._lock:
                # Race: 1. this begins; 2. the main stream writes the last byte, and another thread verifies all.
                if not self.is_verified:
                    os.fchmod(self._descriptor, _UNVERIFIED_MODE | _SPARSE)

    def name_extents(self, written: Extents) -> None:
        """Let followers, and the next writer, believe what is `written`. Blocking, as it syncs."""
        with map_os_errors(f"name the extents of {self.record.object_id}"):
            self._name_extents(written)

    def _name_extents(self, written: Extents) -> None:
        os.fdatasync(self._descriptor)
        with self._lock:
            before, self._extents = self._extents, written.in_blocks(self.record.size)
            try:
                atomic_write(self._sidecar_name, self._encoded(), self._incoming)
            except BaseException:
                self._extents = before
                raise
            self._sidecar_stale = False

    def _encoded(self) -> bytes:
        """The sidecar. Of a sparse file, with as many extents as there is room for."""
        if self._extents is None:
            return encode_record(self.record)
        inode, at_most = os.fstat(self._descriptor).st_ino, MAX_EXTENTS
        while True:
            self._extents = self._extents.in_blocks(self.record.size, at_most)
            try:
                return encode_record(self.record, extents=encode_extents(self._extents, inode))
            except InvalidInput:
                if not at_most:
                    raise
            at_most = min(at_most - 1, len(self._extents) - 1)

    @property
    def is_verified(self) -> bool:
        """Whether followers may send all of it."""
        return bool(os.fstat(self._descriptor).st_mode & stat.S_IROTH)

    def check_free_space(self) -> None:
        """Raise VolumeFull if the device has no room for the rest, before any response has begun."""
        with map_os_errors(f"read the free space for {self.record.object_id}"):
            device = os.fstatvfs(self._descriptor)
        missing = self.record.size - self.total - device.f_bavail * device.f_frsize
        if missing > 0:
            raise VolumeFull(f"no space for {self.record.object_id}: {missing} more free bytes needed")

    def read(self, offset: int, length: int) -> bytes:
        with map_os_errors(f"read the partial file of {self.record.object_id}"):
            return os.pread(self._descriptor, length, offset)

    def set_media_type(self, media_type: str) -> None:
        """Record the media type that the source reports. The next write updates the sidecar before its bytes."""
        self._update_record(replace(self.record, media_type=media_type))

    def set_version(self, validators: Validators, freshness: Freshness | None) -> None:
        """Record the version that the source sends, likewise. Call it while the file is empty."""
        self._update_record(replace(self.record.with_validators(validators), freshness=freshness))

    def set_size(self, size: int, *, growing: bool) -> None:
        """Record how many bytes are reserved, likewise, or the length once it is known (not `growing`)."""
        self._update_record(replace(self.record, size=size, growing=growing))

    def sync(self) -> None:
        """Make what was written survive a power cut. Blocking: it waits for the disk several times."""
        with map_os_errors(f"sync the partial file of {self.record.object_id}"):
            os.fdatasync(self._descriptor)
            self._update_sidecar()
            sidecar = os.open(self._sidecar_name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._incoming)
            try:
                os.fdatasync(sidecar)
            finally:
                os.close(sidecar)
            os.fsync(self._incoming)

    def write_sidecar(self) -> None:
        """Write what has been recorded. Needed only if no byte follows."""
        with map_os_errors(f"write the sidecar of {self.record.object_id}"):
            self._update_sidecar()

    def _update_sidecar(self) -> None:
        if not self._sidecar_stale:
            return
        with self._lock:
            if self._extents is None:
                overwrite(self._sidecar_name, encode_record(self.record), self._incoming)
            else:
                atomic_write(self._sidecar_name, self._encoded(), self._incoming)
            self._sidecar_stale = False

    def _update_record(self, record: StoredRecord) -> None:
        if record != self.record:
            self.record = record
            self._sidecar_stale = True

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data` at `offset`. Raises VolumeFull if the device is full."""
        with map_os_errors(f"write the partial file of {self.record.object_id}"):
            self._update_sidecar()
            view = memoryview(data)
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                offset += written
                view = view[written:]

    def wake_followers(self) -> None:
        """Wake the processes of this kernel that wait for bytes: it tells them of a mode that is set, the same one too.

        A hint: nothing is raised. Followers of a sparse file see only what is named, and that is announced. Blocking.
        """
        if self.is_sparse or not self._lock.acquire(blocking=False):
            return
        try:
            with suppress(OSError):
                os.fchmod(self._descriptor, stat.S_IMODE(os.fstat(self._descriptor).st_mode))
        finally:
            self._lock.release()

    def start_writeback(self, first: int, end: int) -> None:
        """Have the kernel write bytes `first` to `end` (exclusive) to the disk, without waiting for it.

        A hint, which does nothing where the kernel or the file system knows none. Durable are the bytes only after a
        sync. Blocking while the disk's queue is full.
        """
        if _sync_file_range is not None:
            _sync_file_range(self._descriptor, first, end - first, _SYNC_FILE_RANGE_WRITE)

    def restart(self) -> None:
        """Start again with a new, empty file. Followers of the old file see that it was unlinked.

        The old file is truncated, so that its bytes are free although followers may have it open.
        """
        with map_os_errors(f"restart the partial file of {self.record.object_id}"):
            unlink_if_exists(self._name, self._incoming)
            os.ftruncate(self._descriptor, 0)
            old, self._descriptor = self._descriptor, self._open_locked(os.O_CREAT | os.O_EXCL)
            os.close(old)
            self._extents = None  # the sidecar's are those of the old file

    def mark_verified(self) -> None:
        """Let followers send the last bytes: the hash (or the size) is correct.

        The exclusive lock becomes a shared one, because nothing is written any more. It still keeps other writers and
        removals away. Followers can take a shared lock from now on, so theirs is in place when this one is released.
        """
        with map_os_errors(f"mark the partial file of {self.record.object_id} as verified"):
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # the kernel releases the old lock before it takes the new one
                raise PartialHeld(
                    f"the partial file of {self.record.object_id} was locked by another writer"
                ) from None
            with self._lock:
                os.fchmod(self._descriptor, _VERIFIED_MODE)

    def publish(self, record: StoredRecord) -> None:
        """Make it a complete object: sync it, write its record, rename it, sync the directories.

        Blocking: it waits for the disk several times.
        """
        object_id, number = record.object_id, shard(record.object_id)
        with map_os_errors(f"publish {object_id}"):
            os.fsync(self._descriptor)
            records = self._directories.create_shard(f"{RECORDS}/{number}")
            state = replace(FileState.of(os.fstat(self._descriptor)), changed_ns=0)
            atomic_write(object_id, encode_record(record, state), records)
            os.fsync(records)
            objects = self._directories.create_shard(f"{OBJECTS}/{number}")
            try:
                os.rename(self._name, object_id, src_dir_fd=self._incoming, dst_dir_fd=objects)
            except FileNotFoundError:
                # Race: 1. its writer verifies the file and is stopped; 2. another one publishes it; 3. both are here
                if not _same_file(self._descriptor, object_id, objects):
                    raise
            # It is an object now. Senders may lock it while we wait for the disk; removals still may not.
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.fsync(objects)
            unlink_if_exists(self._sidecar_name, self._incoming)
            # Not synced: without its change time, the file is known by inode, size and modification time.
            with suppress(OSError):
                seal_record(record, FileState.of(os.fstat(self._descriptor)), records)

    def discard(self, *, unless_read: bool = False) -> None:
        """Remove the partial file and close it. Its bytes are free when this returns.

        If it cannot be removed, it is closed and unlocked all the same. Raises PartialHeld if followers send it: they
        trust a verified file to stay whole. `unless_read`: or if they have it open at all.
        """
        try:
            with map_os_errors(f"discard the partial file of {self.record.object_id}"):
                if unless_read and not _lock_readers(self._descriptor, fcntl.F_WRLCK):
                    raise PartialHeld(f"the partial file of {self.record.object_id} is being read")
                if self.is_verified and not self._take_back():
                    return
                unlink_if_exists(self._name, self._incoming)
                os.ftruncate(self._descriptor, 0)
                unlink_if_exists(self._sidecar_name, self._incoming)
        finally:
            self.close()

    def _take_back(self) -> bool:
        """Lock the verified file for removal. False if it has been published, or removed."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PartialHeld(f"the verified file of {self.record.object_id} is being sent") from None
        return _same_file(self._descriptor, self._name, self._incoming)

    def close(self) -> None:
        """Close the file, which releases the lock. The file stays on the disk."""
        for descriptor in (self._descriptor, self._incoming):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._incoming = -1


# Followers of a file that is not verified hold a lock of their own kind, an open file description lock. It is apart
# from the writer's lock (flock), so that the file can be resumed while they read it. A removal that spares them takes
# the opposite one:
#
# 1. A follower opens the file; 2. a removal locks it; 3. the follower finds it locked, and no partial file.
# 1. A removal locks the file; 2. a follower opens it; 3. it is unlinked and unlocked; 4. the follower locks it, and
#    finds it unlinked.
#
# A network file system may keep both kinds as one. There the writer's lock would keep all followers away, so no such
# lock is taken (see `locks_are_apart`).

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, first byte, length (0: all), process (0)


def _lock_readers(descriptor: int, kind: int) -> bool:
    """Lock for reading or removing, until it is closed. False if the opposite lock is held."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except BlockingIOError:
        return False
    except OSError:
        return True  # the file system knows no such locks
    return True


def locks_are_apart(directory: int) -> bool:
    """Whether the followers' kind of lock can be held beside the writer's. Raises OSError."""
    # Processes of different containers may have the same id
    name = f".lock-probe-{os.getpid()}-{secrets.token_hex(4)}"
    descriptors = [open_plain(name, os.O_RDWR | os.O_CREAT, directory, 0o600) for _ in range(2)]
    try:
        fcntl.flock(descriptors[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _lock_readers(descriptors[1], fcntl.F_RDLCK)
    except BlockingIOError:
        return False
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        unlink_if_exists(name, directory)


def held_by(seen: os.stat_result, named: int = 0) -> int:
    """Bytes that a partial file takes. `named`: those that can be read of it.

    A file with holes takes its blocks, other ones their size: so are objects counted.
    """
    if not seen.st_mode & _SPARSE:
        return seen.st_size
    return max(named, min(seen.st_size, seen.st_blocks * 512))


def measure_partial(object_id: ObjectId, directories: Directories) -> int | None:
    """Return the bytes that a partial file takes, None if there is none. Raises PartialHeld if it has a writer.

    Nothing is written, and no writer can begin during the measurement. The caller holds the fetch's lease, or a writer
    may begin between the measurement and its use.
    """
    name = object_id + PART_SUFFIX
    with map_os_errors(f"measure the partial file of {object_id}"):
        incoming = directories.descriptor(INCOMING)
        try:
            descriptor = open_plain(name, os.O_RDWR, incoming)
        except FileNotFoundError:
            return None
        with closing(PartialReader(object_id, descriptor, directories)) as reader:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PartialHeld(f"the partial file of {object_id} is held by a writer") from None
            if not _same_file(descriptor, name, incoming):
                return None
            os.fdatasync(descriptor)  # some file systems take space only then
            return held_by(os.fstat(descriptor), reader.state().total)


def _same_file(descriptor: int, name: str, directory: int) -> bool:
    try:
        there = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


@dataclass(frozen=True, slots=True)
class PartialState:
    """What a follower sees of a partial file."""

    size: int  # bytes that can be read from the first one on
    verified: bool  # the whole file is there and correct
    unlinked: bool  # it was discarded or restarted
    extents: Extents | None = None  # of a sparse file: all that can be read

    def end_from(self, position: int) -> int:
        """Return the end (exclusive) of the bytes from `position` on that can be read. `position` itself: none can."""
        return max(position, self.size) if self.extents is None else self.extents.end_at(position)

    def nearest_end(self, position: int) -> int:
        """Return where the bytes end that begin at or before `position`: how far a stream has come towards it."""
        return self.size if self.extents is None else self.extents.nearest_end(position)

    def progress(self, position: int) -> int:
        """Return what grows when bytes arrive that a response at `position` waits for."""
        return self.size if self.extents is None else self.extents.end_at(position)

    @property
    def total(self) -> int:
        """Bytes that can be read."""
        return self.size if self.extents is None else self.extents.total


class PartialReader:
    """A partial file opened by a follower. It stays readable when the object becomes complete, being the same file."""

    def __init__(self, object_id: ObjectId, descriptor: int, directories: Directories) -> None:
        self.object_id = object_id
        self._descriptor = descriptor
        self._directories = directories
        self._locked = False
        self._extents = Extents()  # as far as they were ever named: while the file is linked they only grow

    @property
    def descriptor(self) -> int:
        """For reading only. It stays owned by this instance."""
        return self._descriptor

    def keep(self) -> bool:
        """Keep the file from being evicted until `close`. False if it is being removed."""
        return _lock_readers(self._descriptor, fcntl.F_RDLCK)

    def state(self) -> PartialState:
        seen = os.fstat(self._descriptor)
        if not seen.st_mode & _SPARSE:
            # The kernel reads mode and size one after the other: without a mark now, the size was right.
            now = os.fstat(self._descriptor)
            seen = now if now.st_mode & _SPARSE else seen
        verified = bool(seen.st_mode & stat.S_IROTH)
        unlinked = seen.st_nlink == 0 and not verified
        if not seen.st_mode & _SPARSE:
            return PartialState(size=seen.st_size, verified=verified, unlinked=unlinked)
        self._update_extents(seen)
        return PartialState(self._extents.prefix, verified, unlinked, self._extents)

    def _update_extents(self, seen: os.stat_result) -> None:
        """Read what is named now. A sidecar that is gone, or that of another file, changes nothing."""
        name = self.object_id + INCOMING_RECORD_SUFFIX
        try:
            body = read_capped(name, self._directories.descriptor(INCOMING))
        except OSError:
            return
        # Without a size the file's own does: no extent ends beyond it.
        found = None if body is None else decode_extents(body, seen.st_ino, seen.st_size)
        if found is not None:
            self._extents = found

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def lock_shared(self) -> bool:
        """Keep the object from being removed until `close`. False before verification, while the writer excludes it."""
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


def has_holes(directory: int) -> bool:
    """Whether a file that was written far on takes no space before that. Raises OSError."""
    name = f".hole-probe-{os.getpid()}"
    descriptor = open_plain(name, os.O_RDWR | os.O_CREAT, directory, 0o600)
    try:
        os.pwrite(descriptor, b"x", _PROBED)
        os.fsync(descriptor)  # some file systems take space only then
        return os.fstat(descriptor).st_blocks * 512 < _PROBED
    finally:
        os.close(descriptor)
        unlink_if_exists(name, directory)
