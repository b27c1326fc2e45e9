"""The copy of the operator state on the volume, which an emptied or in-memory state store starts again from."""

from __future__ import annotations

from pathlib import Path

import structlog

from distributor_node.shared.adapters.volume.layout import map_os_errors, sync_directory
from distributor_node.shared.adapters.volume.records import MAX_ROOT_FILE_BYTES, atomic_write, read_capped
from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.operator_state import (
    OperatorStateSnapshot,
    decode_snapshot,
    encode_snapshot,
)

NAME = "operator.json"

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


def write_operator_state(root: Path, snapshot: OperatorStateSnapshot) -> None:
    """Replace the copy in one step. Raises VolumeError. Blocking: call from a worker thread."""
    with map_os_errors(f"write {NAME}"):
        atomic_write(root / NAME, encode_snapshot(snapshot).encode())
        sync_directory(root)
