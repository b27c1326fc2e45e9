"""The copy of the operator's orders on the volume: what an emptied state store, or one in memory, begins with again."""

from __future__ import annotations

from pathlib import Path

import structlog

from shared.adapters.volume.small_files import read_small, write_small
from shared.domain.errors import InvalidInput
from shared.domain.orders import KeptOrders, decode_kept, encode_kept

NAME = "operator.json"

logger = structlog.get_logger()


def read_orders(root: Path) -> KeptOrders | None:
    """Blocks. None: there is no copy, or none that can be read (which is logged). VolumeError: disk trouble."""
    text = read_small(root, NAME)
    try:
        return None if text is None else decode_kept(text)
    except InvalidInput as error:
        logger.error("orders_file_unreadable", file=NAME, reason=str(error))
        return None


def write_orders(root: Path, kept: KeptOrders) -> None:
    """Blocks; in one step. VolumeError if that fails."""
    write_small(root, NAME, encode_kept(kept))
