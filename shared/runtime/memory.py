"""How the C library's allocator treats what a process frees."""

from __future__ import annotations

import ctypes
import sys

# Of <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

_OWN_MAPPING_FROM = 4 * 1024 * 1024
_GIVEN_BACK_FROM = 32 * 1024 * 1024


def keep_freed_memory() -> bool:
    """Have memory that was freed used again, instead of giving it back to the system at once: a process that moves
    gigabytes through pieces of some hundred KiB otherwise has each of their pages cleared and mapped anew, which cost a
    fetch a fifth of its CPU time. At most 32 MiB more are kept. For the whole process; False where the C library has
    no such setting (it is glibc's), and nothing is lost but speed."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    chosen = ((_MMAP_THRESHOLD, _OWN_MAPPING_FROM), (_TRIM_THRESHOLD, _GIVEN_BACK_FROM))
    return all(set_option(option, value) == 1 for option, value in chosen)
