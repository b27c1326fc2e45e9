"""Work that is done again and again, with patience while something it needs is away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from shared.domain.errors import DistributorError

MIN_BACKOFF, MAX_BACKOFF = 0.25, 3.0
_LOG_EVERY_NTH = 20

logger = structlog.get_logger()


async def wait_event(wake: asyncio.Event | None, seconds: float) -> None:
    """Until woken, at most `seconds`; the wake-up is used up."""
    if wake is None:
        await asyncio.sleep(seconds)
        return
    try:
        async with asyncio.timeout(seconds):
            await wake.wait()
    except TimeoutError:
        return
    wake.clear()


async def run_periodically(
    name: str,
    step: Callable[[], Awaitable[float | None]],
    wake: asyncio.Event | None = None,
    on_error: Callable[[DistributorError], None] | None = None,
) -> None:
    """Do `step` until it returns None, else again after as many seconds as it returns (`wake` shortens them).

    An error worth retrying (state store, catalog or volume away) only makes the pauses longer, wake-ups or not, up to
    MAX_BACKOFF, and is told to `on_error`; any other is a fault of ours and passes through.
    """
    failures = 0
    while True:
        try:
            pause = await step()
        except DistributorError as error:
            if not error.worth_retrying:
                raise
            failures += 1
            if on_error is not None:
                on_error(error)
            if failures % _LOG_EVERY_NTH == 1:
                logger.warning("evictor_task_backing_off", task=name, failures=failures, reason=str(error))
            await asyncio.sleep(backoff(failures))
            continue
        if failures:
            logger.info("evictor_task_recovered", task=name, failures=failures)
            failures = 0
        if pause is None:
            return
        await wait_event(wake, pause)


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(MAX_BACKOFF, MIN_BACKOFF * 2.0 ** min(failures - 1, 16))
