"""How many files and connections this process may have open."""

from __future__ import annotations

import resource

import structlog

_WANTED = 65_536

logger = structlog.get_logger()


def raise_descriptor_limit() -> int:
    """Use what the system allows: the usual soft limit of 1024 is for programs that use select. The limit now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _WANTED
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        logger.warning("fd_limit_raise_failed", limit=soft, reason=str(error))
        return soft
    return wanted
