"""The process itself: version, name, garbage collection, limit of descriptors, and what glibc does with freed memory.

Elsewhere than with glibc the functions about memory do nothing, at the cost of speed and memory. Setting either
threshold also disables glibc's dynamic thresholds, which rise with the size of freed blocks.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import socket
import sys
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import structlog

from distributor_node.shared.domain.errors import ConfigurationError

logger = structlog.get_logger()


def _installed_version() -> str:
    try:
        return version("distributor-node")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0.0.0"


VERSION = _installed_version()


def process_name() -> str:
    """Return a new name, unique across hosts and restarts, for a process that holds claims or leases."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


YOUNG_OBJECTS = 5_000
"""Objects made and not freed after which the garbage collector looks at the young ones. Python's 700 are a few dozen
requests: with 200 connections open, a twentieth of the CPU time went into looking at the same objects again."""


def exempt_startup_from_collection() -> None:
    """Let the garbage collector pass over what exists now: modules, classes, settings. Call it once all is imported.

    A full collection of these takes 85 ms of CPU, and several times as long on a busy machine. All requests wait for
    it, and it is repeated as requests leave objects behind. Young objects are looked at less often, see YOUNG_OBJECTS.
    """
    gc.collect()
    gc.freeze()
    _, *older = gc.get_threshold()
    gc.set_threshold(YOUNG_OBJECTS, *older)


# Descriptors

MIN_DESCRIPTORS = 768
"""Below this limit a node that serves from all directories of its volume has too few left for clients."""
_TARGET_DESCRIPTORS = 65_536
_MAX_RESERVE = 2048


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open descriptors to what the system allows, at most 65,536. Returns the limit.

    The usual soft limit of 1024 exists for programs that use select. Raises ConfigurationError if the limit is too low
    for a service.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = _TARGET_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _TARGET_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < target:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        except (OSError, ValueError) as error:
            logger.warning("descriptor_limit_not_raised", limit=soft, reason=str(error))
    limit = descriptor_limit()
    if limit < MIN_DESCRIPTORS:
        raise ConfigurationError(
            f"limit of open files (ulimit -n, LimitNOFILE): expected at least {MIN_DESCRIPTORS}, got {limit}"
        )
    return limit


def descriptor_limit() -> int:
    """How many descriptors this process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _TARGET_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def descriptor_ceiling() -> int:
    """How many open descriptors stop the accepting of connections. The rest, a quarter or 2048, is for work."""
    limit = descriptor_limit()
    return limit - min(limit // 4, _MAX_RESERVE)


# Of <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

_MIB = 1024 * 1024


def retain_freed_memory() -> bool:
    """Reuse freed memory instead of returning it to the system at once. Returns whether that could be set.

    A process that moves gigabytes in chunks of some hundred KiB otherwise has each page cleared and mapped again, which
    cost a fetch a fifth of its CPU time. At most 32 MiB more are kept. Applies to the whole process.
    """
    return _set_options({_MMAP_THRESHOLD: 4 * _MIB, _TRIM_THRESHOLD: 32 * _MIB})


def mmap_large_blocks() -> bool:
    """Map every block of 1 MiB or more by itself. Returns whether that could be set.

    Such a block grows without being copied, and returns to the system when it is freed. Otherwise the columns of a
    million objects leave holes as they grow: 27 bytes per object. Applies to the whole process.
    """
    return _set_options({_MMAP_THRESHOLD: _MIB})


def _set_options(chosen: Mapping[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(set_option(option, value) == 1 for option, value in chosen.items())
