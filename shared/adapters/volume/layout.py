"""Paths on the volume, and open directories that cannot be swapped for symbolic links."""

from __future__ import annotations

import errno
import math
import os
import stat
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from distributor_node.shared.domain.errors import TooManyOpenFiles, VolumeError, VolumeFull
from distributor_node.shared.observability.logging import OncePerKey
from distributor_node.shared.observability.metrics import FOREIGN_OPENED

OBJECTS, RECORDS, INCOMING, TRASH = "objects", "records", "incoming", "leaving"
TOP_DIRECTORIES = (OBJECTS, RECORDS, INCOMING, TRASH)
SHARDS = tuple(f"{number:02x}" for number in range(256))
PART_SUFFIX, INCOMING_RECORD_SUFFIX = ".part", ".json"

PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Flags of every open of a file: a link is refused, and a FIFO or device keeps no thread waiting."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
DIRECTORY_MODE = 0o755
_IDLE_TTL = 30.0  # seconds without use after which a shard's descriptor is forgotten
_RETIRED_TTL = 60.0  # seconds until a forgotten descriptor is closed: another thread may be about to use it

logger = structlog.get_logger()


def shard(object_id: str) -> str:
    """The two hex digits of the directory that holds the object. Spreads any kind of ids evenly."""
    return SHARDS[zlib.crc32(object_id.encode()) & 0xFF]


def object_path(object_id: str) -> str:
    """The path of a complete object below `objects/`. It needs no quoting in a URL."""
    return f"{shard(object_id)}/{object_id}"


def trashed_id(name: str) -> str:
    """The object id in the name of a file in `leaving/`: `<id>`, or `<id>,<inode>` beside an older file."""
    return name.partition(",")[0]


LOCAL_FILE_SYSTEMS = frozenset(
    {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}
)
"""Those that do not wait for another machine, as the kernel names them."""


def file_system_of(descriptor: int) -> str | None:
    """The type of the file system that an open file or directory is on, as in proc(5). None if /proc does not say."""
    try:
        facts = Path(f"/proc/self/fdinfo/{descriptor}").read_text("ascii")
        mounts = os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines()
    except OSError:
        return None
    mount = next((line.split()[1] for line in facts.splitlines() if line.startswith("mnt_id:")), None)
    for line in mounts:
        about, _, kind = line.partition(" - ")
        if mount is not None and about.split(" ", 1)[0] == mount:
            return kind.split(" ", 1)[0]
    return None


class ForeignFile(OSError):
    """A name on the volume leads to a link, a directory, a FIFO, a socket or a device. The node makes none of these."""


# What an open says of a name that is no plain file: ELOOP of a link, EISDIR of a directory that is opened for writing,
# ENXIO of a socket, and of a FIFO that is opened for writing.
FOREIGN_ERRORS = (errno.ELOOP, errno.EISDIR, errno.ENXIO)


def open_plain(name: str | Path, flags: int, directory: int | None = None, mode: int = 0o644) -> int:
    """Open a regular file, and look at the descriptor before it is used. Does not block on anything else.

    Raises ForeignFile if the name is that of something else, and OSError.
    """
    try:
        descriptor = os.open(name, flags | PLAIN, mode, dir_fd=directory)
    except OSError as error:
        if error.errno in FOREIGN_ERRORS:
            raise _foreign(name) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _foreign(name)
    return descriptor


def _foreign(name: str | Path) -> ForeignFile:
    return ForeignFile(errno.EINVAL, f"expected a regular file at {Path(name).name}")


@contextmanager
def map_os_errors(action: str) -> Iterator[None]:
    """Turn OSError into VolumeFull (no space, quota exceeded), TooManyOpenFiles or VolumeError (any other cause).

    `action` begins the message: what the volume was doing.
    """
    try:
        yield
    except OSError as error:
        raise as_volume_error(action, error) from error


def as_volume_error(action: str, error: OSError) -> VolumeError:
    """Return the error to raise for a failed operation. `action` begins its message."""
    kind: type[VolumeError] = VolumeError
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        kind = VolumeFull
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        kind = TooManyOpenFiles
    return kind(f"{action}: {error.strerror or error}")


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable. Raises OSError. Blocking: call from a worker thread."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Directories:
    """Open directories of the volume, by their path below its root. Descriptors are opened when first needed, and those
    of shards are forgotten when they are not used.

    A directory is opened without following links, so a directory that is replaced by a link leads nowhere.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[str, int] = {}
        self._used: set[str] = set()  # shards, since the last look at idle ones
        self._idle_since = time.monotonic()
        self._retired: list[tuple[float, int]] = []  # when it was forgotten, descriptor
        self._was_whole = False
        self.replacements = 0  # how often `revalidate` found other directories than before
        self._revalidating = threading.Lock()
        self._foreign = OncePerKey()

    def report_foreign(self, path: str) -> None:
        """Count and log that a name below the root is not that of a plain file. It is left alone, and says nothing."""
        FOREIGN_OPENED.inc()
        if self._foreign.is_due(path):
            logger.warning("foreign_file_ignored", path=path, expected="a regular file")

    def create(self) -> None:
        """Make the root and the directories in it. Raises VolumeError if the volume cannot be written.

        Shards are made when first written to: see `create_shard`.
        """
        with map_os_errors(f"prepare the volume {self._root}"):
            self._root.mkdir(parents=True, exist_ok=True)
            for name in TOP_DIRECTORIES:
                (self._root / name).mkdir(mode=DIRECTORY_MODE, exist_ok=True)

    def root(self) -> int:
        """Descriptor of the volume's root. It stays owned by this instance."""
        known = self._open.get("")
        if known is None:
            known = self._keep("", os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        return known

    def descriptor(self, path: str) -> int:
        """Descriptor of a directory such as `objects/3f`. It stays owned by this instance.

        Raises OSError if the directory is a link, or missing: FileNotFoundError for a shard means that nothing was ever
        stored in it.
        """
        self._used.add(path)
        known = self._open.get(path)
        if known is not None:
            return known
        parent, _, name = path.rpartition("/")
        above = self.descriptor(parent) if parent else self.root()
        return self._keep(path, os.open(name, _DIRECTORY, dir_fd=above))

    def existing(self, path: str) -> int | None:
        """As `descriptor`, but None for a shard that was never made.

        In a removed or unmounted directory every shard is missing. That must not read as "no objects", so it raises.
        """
        try:
            return self.descriptor(path)
        except FileNotFoundError:
            parent = path.rpartition("/")[0]
            if not parent or os.fstat(self.descriptor(parent)).st_nlink == 0:
                raise
            return None

    def create_shard(self, path: str) -> int:
        """Descriptor of a shard such as `objects/3f`, which is made if it is missing. Raises OSError.

        The new directory entry is synced, because objects in the shard have to outlive a power cut.
        """
        try:
            return self.descriptor(path)
        except FileNotFoundError:
            parent, _, name = path.rpartition("/")
            above = self.descriptor(parent)
        # Race: 1. we find no shard; 2. another process makes it; 3. we make it. Then both sync, and both use it.
        with suppress(FileExistsError):
            os.mkdir(name, DIRECTORY_MODE, dir_fd=above)
        os.fsync(above)
        return self.descriptor(path)

    def _keep(self, path: str, opened: int) -> int:
        """Remember a descriptor. Of two threads that opened one directory at once, the second closes its own."""
        kept = self._open.setdefault(path, opened)
        if kept != opened:
            os.close(opened)
        return kept

    @contextmanager
    def entries(self, path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        """Scan a directory such as `objects/3f`. A shard that was never made is empty. Raises OSError.

        Each scan has its own descriptor. Duplicates of one descriptor (`os.scandir` of a descriptor makes one) share
        the read position of the directory, so two scans at once would each see a part of the names.
        """
        own = self._open_again(path)
        if own is None:
            yield iter(())
            return
        try:
            with os.scandir(own) as entries:
                yield entries
        finally:
            os.close(own)

    def _open_again(self, path: str) -> int | None:
        """As `existing`, but a new descriptor for the caller to close."""
        parent, _, name = path.rpartition("/")
        above = self.descriptor(parent) if parent else self.root()
        try:
            return os.open(name, _DIRECTORY, dir_fd=above)
        except FileNotFoundError:
            if not parent or os.fstat(above).st_nlink == 0:
                raise
            return None

    def revalidate(self) -> bool:
        """Forget descriptors of directories that are no longer what their path leads to. False: there is no volume.

        Forgotten descriptors are closed after _RETIRED_TTL, because another thread may be about to use one.
        """
        with self._revalidating:
            self._close_retired(time.monotonic() - _RETIRED_TTL)
            self._retire_idle(time.monotonic())
            try:
                stale = self._is_stale()
            except OSError:
                self._retire()
                return False
            if stale:
                self._retire()
            return True

    def _is_stale(self) -> bool:
        """Whether a path leads to another directory than the open descriptor.

        Raises OSError if there is no volume: no root, or a root without the directories that were in it before (the
        bare mount point of a volume that was unmounted).
        """
        stale = not _is_same(self._root.stat(), os.fstat(self.root()))
        for name in TOP_DIRECTORIES:
            try:
                below = (self._root / name).lstat()
            except FileNotFoundError:
                if self._was_whole:
                    raise
                return stale
            kept = self._open.get(name)
            stale = stale or (kept is not None and not _is_same(below, os.fstat(kept)))
        self._was_whole = True
        # Of a copy, because other threads open directories at the same time
        return stale or any(os.fstat(descriptor).st_nlink == 0 for descriptor in list(self._open.values()))

    def _retire(self) -> None:
        retired, self._open = self._open, {}
        self.replacements += bool(retired)
        now = time.monotonic()
        self._retired.extend((now, descriptor) for descriptor in retired.values())

    def _retire_idle(self, now: float) -> None:
        """Forget shards that nothing has used for _IDLE_TTL, so that a node at rest holds few descriptors."""
        if now - self._idle_since < _IDLE_TTL:
            return
        self._idle_since = now
        used, self._used = self._used, set()
        for path in [path for path in list(self._open) if "/" in path and path not in used]:
            descriptor = self._open.pop(path, None)  # None: `close` was called just now
            if descriptor is not None:
                self._retired.append((now, descriptor))

    def _close_retired(self, before: float) -> None:
        kept = []
        for retired_at, descriptor in self._retired:
            if retired_at <= before:
                os.close(descriptor)
            else:
                kept.append((retired_at, descriptor))
        self._retired = kept

    def close(self) -> None:
        """Close all descriptors. They open again when needed."""
        self._retire()
        self._close_retired(math.inf)


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def unlink_if_exists(name: str, directory: int) -> None:
    """Remove a file. A missing file is not an error."""
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return
