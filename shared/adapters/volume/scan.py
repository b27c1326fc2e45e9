"""Scans of the volume, for reconciliation and repair."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from distributor_node.shared.adapters.volume.layout import (
    INCOMING,
    INCOMING_RECORD_SUFFIX,
    OBJECTS,
    PART_SUFFIX,
    RECORDS,
    SHARDS,
    TRASH,
    Directories,
    shard,
    trashed_id,
)
from distributor_node.shared.adapters.volume.partial import held_by
from distributor_node.shared.adapters.volume.records import is_draft
from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.objects import ObjectId


@dataclass(frozen=True, slots=True)
class FoundObject:
    """A file under `objects/` or `leaving/`."""

    object_id: ObjectId
    size: int  # bytes
    changed_at: float  # POSIX seconds
    in_trash: bool = False  # under `leaving/`


@dataclass(frozen=True, slots=True)
class FoundPartial:
    """A partial file."""

    object_id: ObjectId
    size: int  # bytes up to the last one that was written
    changed_at: float  # POSIX seconds: when it last grew
    held: int  # bytes that it takes, without its holes


@dataclass(frozen=True, slots=True)
class TrashedFile:
    """A file under `leaving/`."""

    object_id: ObjectId
    name: str
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class UnknownFile:
    """A file that no service of the node made: a link, a directory, a name that is not an object's."""

    path: str


@dataclass(frozen=True, slots=True)
class UnreadableFile(UnknownFile):
    """A file, or a directory of files, that the disk does not tell anything of."""

    reason: str


# Every scan raises OSError if the volume cannot be read. Files that vanish during a scan are skipped. Where a single
# file or shard is unreadable, `scan_objects` and `scan_partials` say so and go on.

_FAULTS = (errno.EIO, errno.EACCES, errno.EUCLEAN, errno.EBADMSG)


def scan_objects(directories: Directories) -> Iterator[FoundObject | UnknownFile]:
    """All complete objects, and those in `leaving/`."""
    for place in (TRASH, *(f"{OBJECTS}/{number}" for number in SHARDS)):
        try:
            yield from _scan_place(directories, place)
        except OSError as error:
            if error.errno not in _FAULTS or place == TRASH:
                raise
            yield UnreadableFile(place, str(error))


def _scan_place(directories: Directories, place: str) -> Iterator[FoundObject | UnknownFile]:
    for name, seen in _files(directories, place):
        object_id = _object_id(trashed_id(name) if place == TRASH else name)
        if isinstance(seen, OSError):
            yield UnreadableFile(f"{place}/{name}", str(seen))
        elif seen is None or object_id is None or (place != TRASH and place[-2:] != shard(object_id)):
            yield UnknownFile(f"{place}/{name}")
        else:
            yield FoundObject(object_id, seen.st_size, seen.st_mtime, in_trash=place == TRASH)


def scan_trash(directories: Directories) -> Iterator[TrashedFile]:
    """The files in `leaving/`."""
    for name, seen in _files(directories, TRASH):
        object_id = _object_id(trashed_id(name))
        if isinstance(seen, os.stat_result) and object_id is not None:
            yield TrashedFile(object_id, name, seen.st_size)


def scan_partials(directories: Directories) -> Iterator[FoundPartial | UnknownFile]:
    """All partial files."""
    for name, seen in _files(directories, INCOMING):
        if isinstance(seen, OSError):
            yield UnreadableFile(f"{INCOMING}/{name}", str(seen))
            continue
        if seen is not None and (name.endswith(INCOMING_RECORD_SUFFIX) or is_draft(name)):
            continue
        object_id = _object_id(name.removesuffix(PART_SUFFIX)) if name.endswith(PART_SUFFIX) else None
        if seen is None or object_id is None:
            yield UnknownFile(f"{INCOMING}/{name}")
        else:
            yield FoundPartial(object_id, seen.st_size, seen.st_mtime, held_by(seen))


def scan_orphan_records(directories: Directories, older_than: float) -> Iterator[tuple[str, str]]:
    """(directory, name) of records whose object or partial file is missing, and of unfinished writes of records.

    Only records that last changed before `older_than` (POSIX seconds).
    """
    for number in SHARDS:
        for name, seen in _files(directories, f"{RECORDS}/{number}"):
            if not isinstance(seen, os.stat_result) or seen.st_mtime >= older_than:
                continue
            # Looked up for each record: another process may make the shard while this one is scanned
            if not _exists(name, directories.existing(f"{OBJECTS}/{number}")):
                yield f"{RECORDS}/{number}", name
    incoming = directories.descriptor(INCOMING)
    for name, seen in _files(directories, INCOMING):
        if not isinstance(seen, os.stat_result) or seen.st_mtime >= older_than or name.endswith(PART_SUFFIX):
            continue
        part = name.removesuffix(INCOMING_RECORD_SUFFIX) + PART_SUFFIX
        if is_draft(name) or (name.endswith(INCOMING_RECORD_SUFFIX) and not _exists(part, incoming)):
            yield INCOMING, name


def scan_unrecorded(directories: Directories) -> Iterator[FoundObject]:
    """Complete objects without a record file.

    The objects are listed before the records. A record is written before its object appears, so an object that is
    stored during the scan is never listed without its record.
    """
    for number in SHARDS:
        objects = list(_files(directories, f"{OBJECTS}/{number}"))
        with directories.entries(f"{RECORDS}/{number}") as entries:
            recorded = {entry.name for entry in entries}
        for name, seen in objects:
            object_id = _object_id(name)
            if (
                isinstance(seen, os.stat_result)
                and object_id is not None
                and name not in recorded
                and number == shard(name)
            ):
                yield FoundObject(object_id, seen.st_size, seen.st_mtime)


def _files(directories: Directories, place: str) -> Iterator[tuple[str, os.stat_result | OSError | None]]:
    """Name of each entry, with its state if it is a regular file, or the fault of the disk."""
    with directories.entries(place) as entries:
        for entry in entries:
            try:
                seen = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError as error:
                yield entry.name, error
                continue
            yield entry.name, seen if stat.S_ISREG(seen.st_mode) else None


def _object_id(name: str) -> ObjectId | None:
    try:
        return ObjectId.parse(name)
    except InvalidInput:
        return None


def _exists(name: str, directory: int | None) -> bool:
    """`directory`: None if the directory does not exist."""
    if directory is None:
        return False
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
