"""Waiting for what runs in a thread: nothing stops it, so nobody goes on before it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

Params = ParamSpec("Params")
Result = TypeVar("Result")


class ThreadCall(Protocol):
    """Runs a call that blocks in some thread, and waits for it as `result_uncancellable` does."""

    async def __call__(
        self, call: Callable[Params, Result], /, *args: Params.args, **kwargs: Params.kwargs
    ) -> Result: ...


async def wait_uncancellable(work: asyncio.Future[Any]) -> None:
    """Wait for its end through any number of cancellations; one is raised after it. What `work` raised is not."""
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not work.cancelled():
            work.exception()  # seen: the cancellation is what counts now
        raise cancelled


async def result_uncancellable(work: asyncio.Future[Result]) -> Result:
    """Its result. A cancellation is raised only after it has ended: no file is ever closed, and no reservation given
    back, under a call that still runs, and whoever cleans up finds files at rest."""
    await wait_uncancellable(work)
    return work.result()
