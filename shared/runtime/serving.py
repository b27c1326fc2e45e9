"""A service that serves until it is told to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def run_until(stop_requested: asyncio.Event, serving: Coroutine[Any, Any, None], name: str) -> None:
    """Run `serving` until `stop_requested`, then cancel it and wait for its end. Raises what it raised by itself."""
    task = asyncio.create_task(serving, name=f"{name}-serve")
    stop = asyncio.create_task(stop_requested.wait(), name=f"{name}-stop")
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.cancel()
        task.cancel()
        await asyncio.wait({task, stop})
    if not task.cancelled():
        task.result()
