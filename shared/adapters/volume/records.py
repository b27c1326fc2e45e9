"""Records on the volume: their JSON, the state of the file that each describes, and how small files are written."""

from __future__ import annotations

import json
import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distributor_node.shared.adapters.volume.layout import open_plain
from distributor_node.shared.domain.conditionals import NO_VALIDATORS, Validators, etag_or_none, is_http_date
from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.extents import Extents
from distributor_node.shared.domain.http_caching import decode_freshness, encode_freshness
from distributor_node.shared.domain.media_types import media_type_or_none
from distributor_node.shared.domain.objects import MAX_SIZE, ContentHash, ObjectId, StoredRecord
from distributor_node.shared.domain.space import RECORD_BYTES

RECORD_VERSION = 1
_NO_ETAG = '""'
_SECONDS = "POSIX seconds of the years 1 to 9999"
_NEW_SUFFIX = ",new"  # of drafts: a comma is in no object id


# Records written by the version before have no state of their file. Versions before ignore the field.


@dataclass(frozen=True, slots=True)
class FileState:
    """What the file system says of an object's file: other bytes in it change at least one of these."""

    inode: int
    size: int
    modified_ns: int
    changed_ns: int = (
        0  # 0: not known; the rename that publishes the file sets it, after the record is written
    )

    @classmethod
    def of(cls, seen: os.stat_result) -> FileState:
        return cls(seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)

    def is_kept_by(self, now: FileState, *, can_verify: bool) -> bool:
        """Whether the file seems to have the bytes that it had.

        Not `can_verify`: there is no hash to tell whether it has. Then a new inode or change time is no reason to drop
        it: copying a volume, or a change of owner or mode, makes these.
        """
        if (self.size, self.modified_ns) != (now.size, now.modified_ns):
            return False
        return not can_verify or (self.inode == now.inode and self.changed_ns in (0, now.changed_ns))

    def __str__(self) -> str:
        """Of the same length whether or not the change time is known, so that it can be filled in."""
        return f"{self.inode} {self.size} {self.modified_ns} {self.changed_ns:019d}"

    @classmethod
    def parse(cls, text: object) -> FileState | None:
        """Read what `str` wrote. None: there is none, or it is malformed."""
        match = _FILE_STATE.fullmatch(text) if isinstance(text, str) else None
        return None if match is None else cls(*map(int, match.groups()))


_FILE_STATE = re.compile(r"([0-9]{1,20}) ([0-9]{1,19}) (-?[0-9]{1,20}) ([0-9]{19,20})", re.ASCII)


def encode_record(record: StoredRecord, file: FileState | None = None, extents: str | None = None) -> bytes:
    """UTF-8 JSON of at most RECORD_BYTES. `file`: the state of the object's file. `extents`: of a sparse partial file.

    The object's name, and then the state of its file, are left out where it would be longer. Raises InvalidInput if
    that is not enough.
    """
    fields = {
        "version": RECORD_VERSION,
        "object_id": record.object_id,
        "size": record.size,
        "etag": record.etag or _NO_ETAG,
        "hash": str(record.content_hash) if record.content_hash else None,
        "media_type": record.media_type,
        "stored_at": record.stored_at,
        "last_modified": record.validators.last_modified,
        **encode_freshness(record.freshness),
        **({"growing": True} if record.growing else {}),
        **({} if extents is None else {"extents": extents}),
    }
    state = {} if file is None else {"file": str(file)}
    body = _to_json({**fields, **state} if record.name is None else {**fields, **state, "name": record.name})
    if len(body) > RECORD_BYTES and record.name is not None:
        body = _to_json({**fields, **state})  # the object is saved under its id
    if len(body) > RECORD_BYTES:
        body = _to_json(fields)
    if len(body) > RECORD_BYTES:
        raise InvalidInput(
            f"record of {record.object_id}: expected at most {RECORD_BYTES} bytes, got {len(body)}"
        )
    return body


def _to_json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")


def decode_record(body: bytes) -> StoredRecord:
    """Raises InvalidInput for anything that `encode_record` could not have written."""
    return decode_stored(body)[0]


def decode_stored(body: bytes) -> tuple[StoredRecord, FileState | None]:
    """As `decode_record`, with the state that the object's file had. None: the version before wrote the record."""
    try:
        fields: Any = json.loads(body)
        if not isinstance(fields, dict) or fields.get("version") != RECORD_VERSION:
            raise InvalidInput(f"record: expected a JSON object with version {RECORD_VERSION}")
        size, stored_at = fields["size"], fields["stored_at"]
        media_type = fields["media_type"]
        if not (media_type is None or _is_media_type(media_type)):
            raise InvalidInput(
                f"record: media_type: expected type/subtype or null, got {repr(media_type)[:40]}"
            )
        texts = (fields["object_id"], fields["etag"], "" if fields["hash"] is None else fields["hash"])
        if not (type(size) is int and 0 <= size <= MAX_SIZE):
            raise InvalidInput(f"record: size: expected 0 to {MAX_SIZE}, got {repr(size)[:40]}")
        if not is_http_date(stored_at):
            raise InvalidInput(f"record: stored_at: expected {_SECONDS}, got {repr(stored_at)[:40]}")
        if not all(isinstance(text, str) and text.isprintable() for text in texts):
            raise InvalidInput("record: expected printable strings object_id, etag, hash")
        name = fields.get("name")
        if not isinstance(name, str | None):
            raise InvalidInput(f"record: name: expected a string or null, got {repr(name)[:40]}")
        content_hash = ContentHash.parse(fields["hash"]) if fields["hash"] is not None else None
        record = StoredRecord(
            object_id=ObjectId.parse(fields["object_id"]),
            size=size,
            etag=fields["etag"] if content_hash is not None else None,
            content_hash=content_hash,
            media_type=media_type,
            stored_at=stored_at,
            name=name,
            freshness=decode_freshness(fields),
            growing=fields.get("growing") is True,
        ).with_validators(_read_validators(fields, content_hash))
        return record, FileState.parse(fields.get("file"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidInput(f"record: unreadable: {type(error).__name__}") from error


def encode_extents(extents: Extents, inode: int) -> str:
    """The text for `encode_record`. `inode`: of the file that has these bytes."""
    return f"{inode}:{extents.encode()}"


def decode_extents(body: bytes, inode: int, size: int) -> Extents | None:
    """What the sidecar of a sparse partial file says is there. None: it says nothing of the file with this inode."""
    try:
        fields: Any = json.loads(body)
        named, _, text = fields["extents"].partition(":")
        return Extents.decode(text, size) if named == str(inode) else None
    except (InvalidInput, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_media_type(value: object) -> bool:
    return isinstance(value, str) and media_type_or_none(value) == value


def _read_validators(fields: dict[str, Any], content_hash: ContentHash | None) -> Validators:
    """Of a record without hash from an earlier release, none: its tag was made up from id and size."""
    if "last_modified" not in fields:
        return NO_VALIDATORS
    modified = fields["last_modified"]
    if not (modified is None or is_http_date(modified)):
        raise InvalidInput(f"record: last_modified: expected {_SECONDS}, or null, got {repr(modified)[:40]}")
    own = content_hash is None and fields["etag"] != _NO_ETAG
    return Validators(etag_or_none(fields["etag"]) if own else None, modified)


MAX_ROOT_FILE_BYTES = 16 * 1024 * 1024
"""Read limit for the small files in the volume's root."""


def is_draft(name: str) -> bool:
    """Whether a file is a draft of `atomic_write`, which a process that was killed has left."""
    return name.endswith(_NEW_SUFFIX)


# Small files. `directory` is the descriptor of the directory that holds the file; None if `name` is a whole path.


def read_capped(
    name: str | Path, directory: int | None = None, *, limit: int = RECORD_BYTES + 1
) -> bytes | None:
    """Up to `limit` bytes of a regular file, or None if there is no such file.

    Raises ForeignFile for anything else, a link for example, and OSError.
    """
    try:
        descriptor = open_plain(name, os.O_RDONLY, directory)
    except FileNotFoundError:
        return None
    try:
        return os.pread(descriptor, limit, 0)
    finally:
        os.close(descriptor)


def atomic_write(
    name: str | Path, body: bytes, directory: int | None = None, *, mode: int = 0o644, durable: bool = True
) -> None:
    """Replace a file in one step: write a new file beside it, sync that if `durable`, rename it. Raises OSError.

    The directory is not synced: the caller does that if the new content has to outlive a power cut.
    """
    # A draft of its own: two processes that write the same file at once must not write into one draft
    new = f"{name},{secrets.token_hex(4)}{_NEW_SUFFIX}"
    descriptor = open_plain(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, directory, mode)
    try:
        try:
            left = memoryview(body)
            while left:  # a device that is nearly full writes a part first, and refuses the rest
                left = left[os.write(descriptor, left) :]
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with suppress(OSError):
            os.unlink(new, dir_fd=directory)
        raise


def overwrite(name: str, body: bytes, directory: int) -> None:
    """Replace the content of a file in place, at a tenth of the cost of `atomic_write`. Raises OSError.

    A reader may see a part of the new content. Use it only where readers detect that and read again.
    """
    descriptor = open_plain(name, os.O_WRONLY, directory)
    try:
        os.pwrite(descriptor, body, 0)
        os.ftruncate(descriptor, len(body))
    finally:
        os.close(descriptor)


def seal_record(record: StoredRecord, file: FileState, directory: int) -> None:
    """Fill in the change time of the object's file in its record, in place. Raises OSError.

    A record that another process has replaced stays as it is. A torn write, or a power cut, leaves another time there
    at worst: then the file is hashed again.
    """
    known, sealed = encode_record(record, replace(file, changed_ns=0)), encode_record(record, file)
    if known != sealed and read_capped(record.object_id, directory) == known:
        overwrite(record.object_id, sealed, directory)
