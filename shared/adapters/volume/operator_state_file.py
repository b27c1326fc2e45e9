"""The copy of the operator state on the volume, which an emptied or in-memory state store starts again from."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from distributor_node.shared.adapters.volume.layout import map_os_errors, open_plain, sync_directory
from distributor_node.shared.adapters.volume.records import MAX_ROOT_FILE_BYTES, atomic_write, read_capped
from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.operator_state import (
    OperatorStateSnapshot,
    decode_snapshot,
    encode_snapshot,
)

NAME = "operator.json"
_LOCK = ".operator.lock"

logger = structlog.get_logger()


def read_operator_state(root: Path) -> OperatorStateSnapshot | None:
    """The copy, or None if there is none or it is invalid (which is logged).

    Raises VolumeError if the disk fails. Blocking: call from a worker thread.
    """
    with map_os_errors(f"read {NAME}"):
        text = read_capped(root / NAME, limit=MAX_ROOT_FILE_BYTES)
    try:
        return None if text is None else decode_snapshot(text)
    except InvalidInput as error:
        logger.error("operator_state_backup_invalid", file=NAME, reason=str(error))
        return None


@contextmanager
def operator_state_lock(root: Path) -> Iterator[bool]:
    """The lock on the copy. Yields whether it could be taken; another leader may be writing. Blocking.

    Take it, ask the store whether the term goes on, write: a leader that is stopped in between keeps the lock, so it
    never overwrites the copy of its successor.
    """
    with map_os_errors(f"lock {NAME}"):
        descriptor = open_plain(root / _LOCK, os.O_RDWR | os.O_CREAT, mode=0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            for draft in root.glob(f"{NAME},*"):  # of a writer that was killed
                draft.unlink(missing_ok=True)
            yield True
    finally:
        os.close(descriptor)


def write_operator_state(root: Path, snapshot: OperatorStateSnapshot) -> None:
    """Replace the copy in one step, under `operator_state_lock`. Raises VolumeError. Blocking."""
    with map_os_errors(f"write {NAME}"):
        atomic_write(root / NAME, encode_snapshot(snapshot).encode())
        sync_directory(root)
