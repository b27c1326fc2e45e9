"""How the C library's allocator treats what a process frees. glibc's alone can be told; elsewhere nothing is lost but
speed and memory.

To set either of its thresholds also ends glibc's habit of raising them by what is freed.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping

# Of <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

_MIB = 1024 * 1024


def retain_freed_memory() -> bool:
    """Have memory that was freed used again, instead of giving it back to the system at once: a process that moves
    gigabytes through pieces of some hundred KiB otherwise has each of their pages cleared and mapped anew, which cost a
    fetch a fifth of its CPU time. At most 32 MiB more are kept. For the whole process; False where that cannot be
    had."""
    return _set_options({_MMAP_THRESHOLD: 4 * _MIB, _TRIM_THRESHOLD: 32 * _MIB})


def mmap_large_blocks() -> bool:
    """Have every block of a MiB and more mapped by itself: it then grows without being copied, and goes back to the
    system when it is freed. The columns of a million objects otherwise leave holes behind as they grow, 27 bytes an
    object. For the whole process; False where that cannot be had."""
    return _set_options({_MMAP_THRESHOLD: _MIB})


def _set_options(chosen: Mapping[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(set_option(option, value) == 1 for option, value in chosen.items())
