"""The copy of the operator's orders on the volume: what an emptied state store, or one in memory, begins with again."""

from __future__ import annotations

from pathlib import Path

import structlog

from distributor_node.shared.adapters.volume.records import read_root_file, write_root_file
from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.operator_state import (
    OperatorStateSnapshot,
    decode_snapshot,
    encode_snapshot,
)

NAME = "operator.json"

logger = structlog.get_logger()


def read_operator_state(root: Path) -> OperatorStateSnapshot | None:
    """Blocks. None: there is no copy, or none that can be read (which is logged). VolumeError: disk trouble."""
    text = read_root_file(root, NAME)
    try:
        return None if text is None else decode_snapshot(text)
    except InvalidInput as error:
        logger.error("operator_state_backup_invalid", file=NAME, reason=str(error))
        return None


def write_operator_state(root: Path, snapshot: OperatorStateSnapshot) -> None:
    """Blocks; in one step. VolumeError if that fails."""
    write_root_file(root, NAME, encode_snapshot(snapshot))
