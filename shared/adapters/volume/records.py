"""Records of objects on the volume: small JSON files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from distributor_node.shared.adapters.volume.layout import map_os_errors
from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.objects import ContentHash, ObjectId, StoredRecord
from distributor_node.shared.domain.space import RECORD_BYTES

RECORD_VERSION = 1
_NEW_SUFFIX = ",new"  # a comma is in no object id


def encode_record(record: StoredRecord) -> bytes:
    """UTF-8 JSON of at most RECORD_BYTES; InvalidInput if it would be longer."""
    body = json.dumps(
        {
            "version": RECORD_VERSION,
            "object_id": record.object_id,
            "size": record.size,
            "etag": record.etag,
            "hash": str(record.content_hash) if record.content_hash else None,
            "media_type": record.media_type,
            "stored_at": record.stored_at,
        },
        separators=(",", ":"),
    ).encode()
    if len(body) > RECORD_BYTES:
        raise InvalidInput(f"record of {record.object_id} is longer than {RECORD_BYTES} bytes")
    return body


def decode_record(body: bytes) -> StoredRecord:
    """InvalidInput for anything that `encode_record` could not have made."""
    try:
        fields: Any = json.loads(body)
        if not isinstance(fields, dict) or fields.get("version") != RECORD_VERSION:
            raise InvalidInput("not a record of this version")
        size, stored_at = fields["size"], fields["stored_at"]
        media_type = fields["media_type"]
        texts = (fields["object_id"], fields["etag"], "" if media_type is None else media_type)
        if not (type(size) is int and size >= 0 and type(stored_at) is int):
            raise InvalidInput("record with numbers of the wrong type")
        if not all(isinstance(text, str) and text.isprintable() for text in texts):
            raise InvalidInput("record with texts of the wrong type")
        return StoredRecord(
            object_id=ObjectId.parse(fields["object_id"]),
            size=size,
            etag=fields["etag"],
            content_hash=ContentHash.parse(fields["hash"]) if fields["hash"] is not None else None,
            media_type=media_type,
            stored_at=stored_at,
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidInput(f"unreadable record: {type(error).__name__}") from error


def read_capped(name: str, directory: int) -> bytes | None:
    """At most RECORD_BYTES of a regular file; None if there is none. OSError otherwise (a link, for one)."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return None
    try:
        return os.pread(descriptor, RECORD_BYTES + 1, 0)
    finally:
        os.close(descriptor)


def atomic_write(name: str, body: bytes, directory: int, *, mode: int = 0o644, durable: bool = True) -> None:
    """Replace a file in one step: written beside it, synced if it has to outlive a power cut, then renamed."""
    new = name + _NEW_SUFFIX
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(new, flags, mode, dir_fd=directory)
    try:
        left = memoryview(body)
        while left:  # a device that is nearly full takes a part and says so, before it refuses the rest
            left = left[os.write(descriptor, left) :]
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)


def overwrite(name: str, body: bytes, directory: int) -> None:
    """Replace the content of a file where it lies, which costs a tenth of a replacement in one step. Whoever reads
    meanwhile may see a part of it: only for what is of no use torn, and read again then."""
    descriptor = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.pwrite(descriptor, body, 0)
        os.ftruncate(descriptor, len(body))
    finally:
        os.close(descriptor)


def unlink_if_exists(name: str, directory: int) -> None:
    """Unlink; a file that is gone already is fine."""
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return


# Small files at the volume's root that are replaced as a whole: what must outlive an emptied state store.

_MAX_BYTES = 16 * 1024 * 1024


def read_root_file(root: Path, name: str) -> bytes | None:
    """Blocks. None: there is none. VolumeError: disk trouble."""
    with map_os_errors(f"read {name}"):
        try:
            descriptor = os.open(root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            return file.read(_MAX_BYTES)


def write_root_file(root: Path, name: str, text: str) -> None:
    """Blocks. In one step: written and synced beside the old one, then renamed. VolumeError if that fails."""
    draft = root / f"{name},new"
    with map_os_errors(f"write {name}"):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(draft, flags, 0o644), "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(root / name)
        directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
