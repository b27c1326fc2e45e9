"""Records of objects on the volume, and small files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from distributor_node.shared.adapters.volume.layout import open_plain
from distributor_node.shared.domain.conditionals import is_http_date
from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.http_caching import decode_freshness, encode_freshness
from distributor_node.shared.domain.media_types import media_type_or_none
from distributor_node.shared.domain.objects import MAX_SIZE, ContentHash, ObjectId, StoredRecord
from distributor_node.shared.domain.space import RECORD_BYTES
from distributor_node.shared.domain.version import NO_VALIDATORS, Validators, etag_or_none

RECORD_VERSION = 1
_NO_ETAG = '""'
_SECONDS = "POSIX seconds of the years 1 to 9999"
_NEW_SUFFIX = ",new"  # of drafts: a comma is in no object id


def encode_record(record: StoredRecord) -> bytes:
    """UTF-8 JSON of at most RECORD_BYTES. Raises InvalidInput if it would be longer without the object's name."""
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
    }
    body = _to_json(fields if record.name is None else {**fields, "name": record.name})
    if len(body) > RECORD_BYTES and record.name is not None:
        body = _to_json(fields)  # the object is saved under its id
    if len(body) > RECORD_BYTES:
        raise InvalidInput(
            f"record of {record.object_id}: expected at most {RECORD_BYTES} bytes, got {len(body)}"
        )
    return body


def _to_json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")


def decode_record(body: bytes) -> StoredRecord:
    """Raises InvalidInput for anything that `encode_record` could not have written."""
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
        return StoredRecord(
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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidInput(f"record: unreadable: {type(error).__name__}") from error


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


def unlink_if_exists(name: str, directory: int) -> None:
    """Remove a file. A missing file is not an error."""
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return
