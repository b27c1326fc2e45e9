"""`Volume`: every operation of the services on the shared directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import structlog

from distributor_node.shared.adapters.volume import scan
from distributor_node.shared.adapters.volume.layout import (
    FOREIGN_ERRORS,
    INCOMING,
    INCOMING_RECORD_SUFFIX,
    LOCAL_FILE_SYSTEMS,
    OBJECTS,
    PART_SUFFIX,
    PLAIN,
    RECORDS,
    TRASH,
    Directories,
    ForeignFile,
    as_volume_error,
    file_system_of,
    map_os_errors,
    object_path,
    open_plain,
    shard,
    unlink_if_exists,
)
from distributor_node.shared.adapters.volume.objects import (
    ChangeWatch,
    FileIdentity,
    OpenObject,
    Removal,
    has_shared_lock,
    identity_of,
    is_on_local_file_system,
    stat_or_none,
    unlink_trashed,
)
from distributor_node.shared.adapters.volume.partial import (
    PartialFile,
    PartialReader,
    has_holes,
    locks_are_apart,
    measure_partial,
)
from distributor_node.shared.adapters.volume.records import (
    FileState,
    atomic_write,
    decode_stored,
    encode_record,
    read_capped,
    seal_record,
)
from distributor_node.shared.domain.errors import InvalidInput, VolumeError
from distributor_node.shared.domain.formats import FORMAT, check_format
from distributor_node.shared.domain.objects import ObjectId, StoredRecord, path_of
from distributor_node.shared.domain.space import DeviceSpace
from distributor_node.shared.observability.logging import OncePerKey
from distributor_node.shared.observability.metrics import FILES_CHANGED, VOLUME_READ_ERRORS

_OPEN_NOT_OWNED = os.O_RDONLY | PLAIN
_OPEN = _OPEN_NOT_OWNED | os.O_NOATIME
_STANDALONE_LOCK = ".standalone"
_FORMAT_FILE = ".format"  # a dot begins no object id

logger = structlog.get_logger()


class Volume:
    """The directory that the services share. The package docstring describes its layout.

    Safe to use from several threads. Call `prepare` before writing. Reading needs no preparation and works on a
    read-only mount. All methods block, and raise VolumeError if the disk fails.
    """

    def __init__(self, root: Path, record_cache: int = 100_000, *, accel_redirect: bool = False) -> None:
        """`record_cache`: number of records kept in memory. `accel_redirect`: a server in front of ours also sends
        objects, and holds no lock on them."""
        self.root = root
        self._accel_redirect = accel_redirect
        self._locks_are_apart: bool | None = None  # None: not tried out yet
        self._directories = Directories(root)
        self._records: OrderedDict[str, tuple[tuple[int, int, int, int], StoredRecord]] = OrderedDict()
        self._record_cache = record_cache
        self._read_errors, self._changed = OncePerKey(), OncePerKey()

    def prepare(self) -> None:
        """Create the directories. Raises VolumeError, with the reason, if the volume cannot be written."""
        self._directories.create()
        self._check_format()
        probe = f".write-probe-{os.getpid()}"
        with map_os_errors(f"write to the volume {self.root}"):
            os.close(open_plain(probe, os.O_WRONLY | os.O_CREAT, self._directories.root(), 0o600))
            os.unlink(probe, dir_fd=self._directories.root())
            if read_capped(_FORMAT_FILE, self._directories.root()) is None:
                text = json.dumps({"format": FORMAT}) + "\n"
                atomic_write(_FORMAT_FILE, text.encode(), self._directories.root())

    def has_holes(self) -> bool:
        """Whether the file system takes no space for bytes that were not written: partial files may be sparse then."""
        with map_os_errors(f"try out a sparse file on the volume {self.root}"):
            return has_holes(self._directories.root())

    def is_on_local_disk(self) -> bool:
        """Whether the volume's file system is one that does not wait for another machine."""
        with map_os_errors(f"look at the file system of {self.root}"):
            return file_system_of(self._directories.root()) in LOCAL_FILE_SYSTEMS

    def _check_format(self) -> None:
        """Raise VolumeError if another version has written the volume in a format that this one does not read."""
        with map_os_errors(f"read {_FORMAT_FILE} of the volume {self.root}"):
            text = read_capped(_FORMAT_FILE, self._directories.root())
        try:
            check_format(json.loads(text or b"{}"), f"volume {self.root}")
        except InvalidInput as error:
            raise VolumeError(str(error)) from error
        except (ValueError, RecursionError) as error:
            raise VolumeError(f"volume {self.root}: expected JSON in {_FORMAT_FILE}") from error

    def lock_standalone(self) -> Callable[[], None]:
        """Lock the volume against other standalone nodes, which count used bytes in their own memory only.

        Returns the function that unlocks it. The end of the process unlocks it too. Raises VolumeError if another node
        holds the lock.
        """
        with map_os_errors(f"lock the volume {self.root}"):
            flags = os.O_RDWR | os.O_CREAT
            descriptor = open_plain(_STANDALONE_LOCK, flags, self._directories.root(), 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise VolumeError(f"the volume {self.root} is in use by another standalone node") from error
        return lambda: os.close(descriptor)

    @property
    def replacements(self) -> int:
        """How often `check` found other directories than before. A change invalidates all that was cached of them."""
        return self._directories.replacements

    def check(self) -> None:
        """Detect a volume that was replaced or unmounted. Raises VolumeError if there is none.

        Cheap. Call it before each piece of work, and every few seconds.
        """
        if not self._directories.revalidate():
            raise VolumeError(f"the volume {self.root} is missing")

    def device_space(self) -> DeviceSpace:
        """What is free on the device behind the volume. The storage limit does not matter here."""
        with map_os_errors(f"read the free space of {self.root}"):
            device = os.fstatvfs(self._directories.root())
        free = device.f_bavail * device.f_frsize
        # Without a number of inodes (btrfs, for example) they are made as needed
        return DeviceSpace(free, device.f_favail, device.f_files) if device.f_files else DeviceSpace(free)

    def close(self) -> None:
        """Close the open directories. They open again when needed."""
        self._directories.close()

    def report_read_error(self, object_id: ObjectId, error: VolumeError) -> None:
        """Count that an object could not be read and was proxied. The log says it once for each object."""
        VOLUME_READ_ERRORS.inc()
        if self._read_errors.is_due(object_id):
            logger.error("volume_read_failed", object_id=object_id, reason=str(error))

    # Complete objects

    def open_object(self, object_id: ObjectId) -> OpenObject | None:
        """The complete object. None if it is missing, or does not match its record (truncated, a link, no record), or
        its file has changed since its bytes were verified.

        On None the caller requests a fetch. The fetcher hashes a changed file again, and replaces whatever is wrong.
        """
        directory = f"{OBJECTS}/{shard(object_id)}"
        try:
            folder = self._directories.descriptor(directory)
            try:
                descriptor = os.open(object_id, _OPEN, dir_fd=folder)
            except PermissionError:  # O_NOATIME is for the owner only
                descriptor = os.open(object_id, _OPEN_NOT_OWNED, dir_fd=folder)
        except OSError as error:
            self._require_missing(f"{directory}/{object_id}", error)
            return None
        try:
            record = self._record_of(object_id, os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        if record is None:
            os.close(descriptor)
            return None
        return OpenObject(record, descriptor)

    def _record_of(self, object_id: ObjectId, seen: os.stat_result) -> StoredRecord | None:
        if not stat.S_ISREG(seen.st_mode):
            self._directories.report_foreign(f"{OBJECTS}/{object_path(object_id)}")
            return None
        if seen.st_nlink == 0:
            return None
        identity = (seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
        known = self._records.get(object_id)
        if known is not None and known[0] == identity:
            return known[1]
        record = self._unchanged_record(object_id, FileState(*identity))
        if record is None:
            return None
        self._records[object_id] = (identity, record)
        if len(self._records) > self._record_cache:
            self._records.popitem(last=False)
        return record

    def _unchanged_record(self, object_id: ObjectId, now: FileState) -> StoredRecord | None:
        """The record, if it says that the file has the bytes that were verified."""
        found = self.read_stored(object_id)
        for _ in range(2):  # the first read may have met the write of `seal_record`
            if found is None or found[0].size != now.size:
                return None
            record, known = found
            if known is None or known.is_kept_by(now, can_verify=record.content_hash is not None):
                return record
            found = self.read_stored(object_id)
        FILES_CHANGED.inc()
        if self._changed.is_due(object_id):
            logger.warning("object_file_changed", object_id=object_id, found=str(now))
        return None

    def complete_record(self, object_id: ObjectId) -> StoredRecord | None:
        """The record of a complete object, or None where `open_object` returns None."""
        found = self.open_object(object_id)
        if found is None:
            return None
        found.close()
        return found.record

    def identity_of(self, object_id: ObjectId) -> FileIdentity | None:
        """The identity of the file that has this object's name under `objects/`. None if none is readable."""
        try:
            folder = self._directories.descriptor(f"{OBJECTS}/{shard(object_id)}")
            return identity_of(os.stat(object_id, dir_fd=folder, follow_symlinks=False))
        except OSError:
            return None

    def watch_changes(self) -> ChangeWatch | None:
        """A watch of the files under `objects/`. None: the kernel offers none. The caller closes it."""
        try:
            return ChangeWatch(self._directories)
        except (OSError, AttributeError) as error:
            logger.warning("volume_not_watched", reason=str(error))
            return None

    def watch_partials(self) -> ChangeWatch | None:
        """A watch of the partial files, likewise."""
        watch = self.watch_changes()
        if watch is not None and not watch.covers_partials():
            watch.close()
            return None
        return watch

    def read_record(self, object_id: ObjectId) -> StoredRecord | None:
        """The record of an object, or None if there is none or it is invalid."""
        found = self.read_stored(object_id)
        return None if found is None else found[0]

    def read_stored(self, object_id: ObjectId) -> tuple[StoredRecord, FileState | None] | None:
        """As `read_record`, with the state of the object's file when its bytes were verified, if it is known."""
        place = f"{RECORDS}/{shard(object_id)}"
        try:
            body = read_capped(object_id, self._directories.descriptor(place))
        except OSError as error:
            self._require_missing(f"{place}/{object_id}", error)
            return None
        return _stored(body, object_id)

    def paths_of(self, object_ids: Iterable[ObjectId]) -> dict[ObjectId, str]:
        """Return the paths that ids are the digests of, as far as the ids, their records or the sidecars of their
        partial files tell them."""
        paths: dict[ObjectId, str] = {}
        for object_id in object_ids:
            if not object_id.is_digest:
                continue
            with suppress(VolumeError):
                path = path_of(object_id, None) or path_of(
                    object_id, self.read_record(object_id) or self.partial_record(object_id)
                )
                if path is not None:
                    paths[object_id] = path
        return paths

    def _require_missing(self, path: str, error: OSError) -> None:
        """Raise VolumeError unless there is no file of this name, or something else than a plain file."""
        if isinstance(error, ForeignFile) or error.errno in FOREIGN_ERRORS:
            self._directories.report_foreign(path)
        elif error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise as_volume_error(f"open {path}", error) from error

    def find_object(self, object_id: ObjectId) -> scan.FoundObject | None:
        """The regular file under `objects/`, or None if there is none. Its record is not read."""
        with map_os_errors(f"stat {object_id}"):
            folder = self._directories.existing(f"{OBJECTS}/{shard(object_id)}")
            if folder is None:
                return None
            try:
                seen = os.stat(object_id, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                return None
        if not stat.S_ISREG(seen.st_mode):
            return None
        return scan.FoundObject(object_id, seen.st_size, seen.st_mtime)

    def open_raw(self, object_id: ObjectId) -> int | None:
        """A descriptor of the file under `objects/`, for hashing it. Its record is not read. The caller closes it."""
        place = f"{OBJECTS}/{shard(object_id)}"
        try:
            return open_plain(object_id, os.O_RDONLY, self._directories.descriptor(place))
        except OSError as error:
            self._require_missing(f"{place}/{object_id}", error)
            return None

    def write_record(self, record: StoredRecord, verified: FileState | None = None) -> None:
        """Write or replace the record of a complete object. `verified`: the state of its file before it was hashed.

        The identity of the object's file changes, because records are cached by that, in every process.
        Raises VolumeError if the file is not as it was verified.
        """
        object_id = record.object_id
        with map_os_errors(f"write the record of {object_id}"):
            records = self._directories.create_shard(f"{RECORDS}/{shard(object_id)}")
            objects = self._directories.existing(f"{OBJECTS}/{shard(object_id)}")
            seen = None if objects is None else stat_or_none(object_id, objects)
            if verified is not None and (seen is None or FileState.of(seen) != verified):
                raise VolumeError(f"{object_id}: its file has changed while it was verified")
            if seen is None or objects is None:
                atomic_write(object_id, encode_record(record), records)
                return
            marked = FileState(seen.st_ino, seen.st_size, seen.st_mtime_ns + 1000)
            # The record first: with the new identity, another process must not find and keep the old record.
            atomic_write(object_id, encode_record(record, marked), records)
            with suppress(FileNotFoundError, PermissionError):
                times = (seen.st_atime_ns, marked.modified_ns)
                os.utime(object_id, ns=times, dir_fd=objects, follow_symlinks=False)
            now = stat_or_none(object_id, objects)
            if now is None or (now.st_ino, now.st_size) != (marked.inode, marked.size):
                return  # it was replaced, and its new file has its own record
            if now.st_mtime_ns == marked.modified_ns:
                seal_record(record, FileState.of(now), records)
            elif now.st_mtime_ns == seen.st_mtime_ns or abs(now.st_mtime_ns - marked.modified_ns) < 2 * 10**9:
                # It belongs to another user, or the file system keeps coarser times
                atomic_write(object_id, encode_record(record, FileState.of(now)), records)

    # Partial files

    def open_partial(self, object_id: ObjectId) -> PartialReader | None:
        """The partial file of an object, for following: it is not evicted until it is closed. None if there is none."""
        name = object_id + PART_SUFFIX
        try:
            descriptor = open_plain(name, os.O_RDONLY, self._directories.descriptor(INCOMING))
        except OSError as error:
            self._require_missing(f"{INCOMING}/{name}", error)
            return None
        reader = PartialReader(object_id, descriptor, self._directories)
        if self._keeps_followed() and not reader.keep():
            reader.close()
            return None
        return reader

    def _keeps_followed(self) -> bool:
        """Whether followers hold a lock. Found out once."""
        if self._locks_are_apart is None:
            self._locks_are_apart = self._find_out_locks()
        return self._locks_are_apart

    def _find_out_locks(self) -> bool:
        """Try out both kinds of lock. Where no file can be made, as in an API whose mount is read-only, the type of the
        file system tells: a lock for reading needs no more."""
        try:
            root = self._directories.root()
            try:
                return locks_are_apart(root)
            except OSError:
                return is_on_local_file_system(root)
        except OSError as error:
            logger.info("followers_not_locked", reason=str(error))
            return False

    def measure_partial(self, object_id: ObjectId) -> int | None:
        """Bytes that a partial file takes, None if there is none. Raises PartialHeld if it has a writer. Blocking."""
        return measure_partial(object_id, self._directories)

    def partial_record(self, object_id: ObjectId) -> StoredRecord | None:
        """The sidecar of a partial file: the record it is going to have. None if there is no valid sidecar."""
        name = object_id + INCOMING_RECORD_SUFFIX
        try:
            body = read_capped(name, self._directories.descriptor(INCOMING))
        except OSError as error:
            self._require_missing(f"{INCOMING}/{name}", error)
            return None
        found = _stored(body, object_id)
        return None if found is None else found[0]

    def has_file(self, object_id: ObjectId) -> bool:
        """Whether there is a file under the object's name, or a partial file, whatever they hold. Blocking."""
        return self.has_partial(object_id) or self.find_object(object_id) is not None

    def has_partial(self, object_id: ObjectId) -> bool:
        """Whether there is a partial file, whatever it holds. Blocking."""
        with map_os_errors(f"look for the partial file of {object_id}"):
            try:
                os.stat(
                    object_id + PART_SUFFIX,
                    dir_fd=self._directories.descriptor(INCOMING),
                    follow_symlinks=False,
                )
            except FileNotFoundError:
                return False
        return True

    def open_partial_for_writing(
        self, expected: StoredRecord, *, write_sidecar: bool = True, empty: bool = False
    ) -> PartialFile:
        """Create the partial file of an object, or take over an abandoned one.

        Without `write_sidecar` the sidecar stays as it is: responses for the pending object are based on it. `empty`:
        the bytes that are there are of another version, and are dropped.
        Raises PartialHeld if another writer has the file open.
        """
        partial = PartialFile(self._directories, expected)
        partial.open(write_sidecar=write_sidecar, empty=empty)
        return partial

    def is_being_sent(self, object_id: ObjectId) -> bool:
        """Whether a process of this container is sending the complete object, a purged one too. VolumeError if that
        cannot be told. Blocking."""
        with map_os_errors(f"look whether {object_id} is being sent"):
            for place in (TRASH, f"{OBJECTS}/{shard(object_id)}"):
                try:
                    seen = os.stat(
                        object_id, dir_fd=self._directories.descriptor(place), follow_symlinks=False
                    )
                except FileNotFoundError:
                    continue
                if has_shared_lock(seen):
                    return True
        return False

    def open_verified_partial(self, expected: StoredRecord) -> PartialFile | None:
        """The complete file of a writer that verified it and died before publishing it, to be published.

        A follower's lock does not keep others from that. Hash it first: after a power cut the mark proves nothing.
        """
        partial = PartialFile(self._directories, expected)
        return partial if partial.open_verified() else None

    def discard_partial(self, object_id: ObjectId, size: int, *, unless_read: bool = False) -> None:
        """Remove a partial file and its sidecar. Raises PartialHeld if its writer is alive; `unless_read`: or if it has
        followers."""
        record = StoredRecord(object_id, size, '""', None, "application/octet-stream", 0)
        partial = self.open_partial_for_writing(record, write_sidecar=False)
        partial.discard(unless_read=unless_read and self._keeps_followed())

    # Removing

    def removal(self, object_id: ObjectId) -> Removal:
        """A removal of a complete object that has not begun yet; see Removal."""
        return Removal(self._directories, object_id, truncates=not self._accel_redirect)

    def sync_removal(self, object_id: ObjectId) -> None:
        """Make the removal of an object durable: a power cut must not bring a purged object back."""
        with map_os_errors(f"sync the removal of {object_id}"):
            number = shard(object_id)
            for place in (TRASH, f"{OBJECTS}/{number}", f"{RECORDS}/{number}"):
                folder = self._directories.existing(place)
                if folder is not None:
                    os.fsync(folder)

    def unlink_trashed(self, file: scan.TrashedFile) -> bool:
        """Remove a file in `leaving/`. Returns False if a process sends it."""
        with map_os_errors(f"remove {TRASH}/{file.name}"):
            return unlink_trashed(self._directories, file.name, truncates=not self._accel_redirect)

    def remove_orphan_records(self, older_than_seconds: float) -> int:
        """Remove records whose object is missing, if they are older than that. Returns how many were removed."""
        with map_os_errors("remove orphan records"):
            oldest = time.time() - older_than_seconds
            orphans = list(scan.scan_orphan_records(self._directories, oldest))
            for place, name in orphans:
                unlink_if_exists(name, self._directories.descriptor(place))
        return len(orphans)

    # Scanning

    def scan_objects(self) -> Iterator[scan.FoundObject | scan.UnknownFile]:
        """Everything under `objects/` and `leaving/`."""
        with map_os_errors("scan the objects"):
            yield from scan.scan_objects(self._directories)

    def scan_trash(self) -> Iterator[scan.TrashedFile]:
        """The files in `leaving/`."""
        with map_os_errors("scan the removed objects"):
            yield from scan.scan_trash(self._directories)

    def scan_partials(self) -> Iterator[scan.FoundPartial | scan.UnknownFile]:
        """Everything under `incoming/` except sidecars."""
        with map_os_errors("scan the partial files"):
            yield from scan.scan_partials(self._directories)

    def scan_unrecorded(self) -> Iterator[scan.FoundObject]:
        """Complete objects that have no record file, and therefore are never a hit."""
        with map_os_errors("scan for objects without a record"):
            yield from scan.scan_unrecorded(self._directories)


def _stored(body: bytes | None, object_id: ObjectId) -> tuple[StoredRecord, FileState | None] | None:
    if body is None:
        return None
    try:
        found = decode_stored(body)
    except InvalidInput:
        return None
    return found if found[0].object_id == object_id else None
