"""Waits for conditions that no event announces: a file system, another process, a broker's counters.

The limits only end a test that would otherwise hang. They are generous on purpose: a busy machine is slow, not wrong.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

_T = TypeVar("_T")

DEFAULT_LIMIT = 60.0
"""Seconds; a fifth of the time that one test may take by default."""


async def eventually(
    condition: Callable[[], Awaitable[object] | object],
    seconds: float = DEFAULT_LIMIT,
    *,
    pause: float = 0.01,
    what: str = "",
) -> None:
    """Return once the condition's value, awaited if need be, is true. Raises AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return
        assert time.monotonic() < deadline, _message(condition, seconds, what)
        await asyncio.sleep(pause)


def poll(
    condition: Callable[[], _T | None], seconds: float = 60.0, *, pause: float = 0.5, what: str = ""
) -> _T:
    """The condition's first true value, waited for without an event loop. Raises AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        if found := condition():
            return found
        assert time.monotonic() < deadline, _message(condition, seconds, what)
        time.sleep(pause)


def _message(condition: Callable[[], object], seconds: float, what: str) -> str:
    return f"not within {seconds} s: {what or getattr(condition, '__qualname__', condition)}"
