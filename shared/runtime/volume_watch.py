"""A volume that is replaced or unmounted while a service runs is noticed, and its return."""

from __future__ import annotations

import asyncio

import structlog

from shared.adapters.volume import Volume
from shared.domain.errors import VolumeError

WATCH_INTERVAL = 2.0

logger = structlog.get_logger()


async def watch_volume(volume: Volume, seconds: float = WATCH_INTERVAL) -> None:
    """Look again and again, until cancelled: what is read or written from then on is the volume that is there now."""
    present, replacements = True, volume.replacements
    while True:
        try:
            await asyncio.to_thread(volume.check)
        except VolumeError as error:
            if present:
                logger.error("volume_unavailable", reason=str(error))
            present = False
        else:
            if not present or volume.replacements != replacements:
                logger.warning("volume_replaced", volume=str(volume.root))
            present, replacements = True, volume.replacements
        await asyncio.sleep(seconds)
