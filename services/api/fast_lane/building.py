"""Putting the fast path together."""

from __future__ import annotations

from services.api.assets.hot import MAX_OPEN_FILES, OpenObjectCache
from services.api.context import ApiContext
from services.api.fast_lane.descriptors import raise_fd_limit
from services.api.fast_lane.lane import FastPath

_FD_SHARE = 4


def build_fast_path(context: ApiContext) -> FastPath | None:
    """None where it is turned off. Run its objects' `run`, and `close` it after the last connection."""
    settings = context.settings
    if not settings.public_api.fast_lane:
        return None
    max_open_files = min(MAX_OPEN_FILES, raise_fd_limit() // _FD_SHARE)
    objects = OpenObjectCache(context.volume, settings.public_api.memory_cache, max_open_files)
    return FastPath(objects, context.accesses, log_hits=settings.log.hits)
