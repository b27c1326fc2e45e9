"""Putting the fast lane together."""

from __future__ import annotations

from services.api.assets.hot import MOST_OPEN, HotObjects
from services.api.context import ApiContext
from services.api.fast_lane.descriptors import raise_descriptor_limit
from services.api.fast_lane.lane import FastLane

_SHARE_OF_DESCRIPTORS = 4


def build_fast_lane(context: ApiContext) -> FastLane | None:
    """None where it is turned off. Run its objects' `run`, and `close` it after the last connection."""
    settings = context.settings
    if not settings.public_api.fast_lane:
        return None
    most_open = min(MOST_OPEN, raise_descriptor_limit() // _SHARE_OF_DESCRIPTORS)
    objects = HotObjects(context.volume, settings.public_api.memory_cache, most_open)
    return FastLane(objects, context.accesses, logs_hits=settings.log.hits)
