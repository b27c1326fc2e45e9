"""How many bytes the files of a volume hold, for tests of limits."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from distributor_node.shared.adapters.volume.layout import TOP_DIRECTORIES


def bytes_on_volume(root: Path) -> int:
    """File sizes of all objects, records and partial files, without the holes of these. Files may vanish."""
    return sum(_bytes_below(root / name) for name in TOP_DIRECTORIES)


def _bytes_below(folder: Path) -> int:
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                seen = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISDIR(seen.st_mode):
                total += _bytes_below(Path(entry.path))
            elif stat.S_ISREG(seen.st_mode):
                total += (
                    min(seen.st_size, seen.st_blocks * 512) if entry.name.endswith(".part") else seen.st_size
                )
    return total
