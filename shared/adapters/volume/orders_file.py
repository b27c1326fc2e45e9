"""The copy of the operator's orders on the volume: what an emptied state store, or one in memory, begins with again."""

from __future__ import annotations

import os
from pathlib import Path

import structlog

from shared.adapters.volume.layout import translated
from shared.domain.errors import InvalidInput
from shared.domain.orders import KeptOrders, decode_kept, encode_kept

NAME = "operator.json"
_LARGEST = 16 * 1024 * 1024

logger = structlog.get_logger()


def read_orders(root: Path) -> KeptOrders | None:
    """Blocks. None: there is no copy, or none that can be read (which is logged). VolumeError: disk trouble."""
    with translated(f"read {NAME}"):
        try:
            descriptor = os.open(root / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            text = file.read(_LARGEST)
    try:
        return decode_kept(text)
    except InvalidInput as error:
        logger.error("orders_file_unreadable", file=NAME, reason=str(error))
        return None


def write_orders(root: Path, kept: KeptOrders) -> None:
    """Blocks. In one step: written and synced beside the old copy, then renamed. VolumeError if that fails."""
    draft = root / f"{NAME},new"
    with translated(f"write {NAME}"):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(draft, flags, 0o644), "wb") as file:
            file.write(encode_kept(kept).encode())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(root / NAME)
        directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
