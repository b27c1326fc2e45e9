"""How many files and connections this process may have open."""

from __future__ import annotations

import resource

import structlog

_TARGET_FD_LIMIT = 65_536

logger = structlog.get_logger()


def raise_fd_limit() -> int:
    """Use what the system allows: the usual soft limit of 1024 is for programs that use select. The limit now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = _TARGET_FD_LIMIT if hard == resource.RLIM_INFINITY else min(hard, _TARGET_FD_LIMIT)
    if soft == resource.RLIM_INFINITY or soft >= target:
        return _TARGET_FD_LIMIT
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    except (OSError, ValueError) as error:
        logger.warning("fd_limit_raise_failed", limit=soft, reason=str(error))
        return soft
    return target
