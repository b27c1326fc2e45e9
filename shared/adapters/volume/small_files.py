"""Small files at the volume's root that are replaced as a whole: what must outlive an emptied state store."""

from __future__ import annotations

import os
from pathlib import Path

from shared.adapters.volume.layout import map_os_errors

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
