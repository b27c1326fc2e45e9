"""Calls of the volume, in a thread, that are never left running behind the caller's back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from itertools import islice
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")


async def file_call(function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
    """Run in a thread. When cancelled, wait for its end before giving in: whoever cleans up finds files at rest."""
    call = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        while not call.done():
            await _settled(call)
        if not call.cancelled():
            call.exception()  # seen; the cancellation is what the caller gets
        raise


async def _settled(call: asyncio.Future[Result]) -> None:
    try:
        await asyncio.wait({call})
    except asyncio.CancelledError:
        return  # a second cancellation changes nothing: the thread cannot be stopped


async def next_chunk(found: Iterable[Result], at_most: int) -> list[Result]:
    """Up to `at_most` more of a scan, read in a thread; empty at its end."""
    return await file_call(_take, found, at_most)


def _take(found: Iterable[Result], at_most: int) -> list[Result]:
    return list(islice(found, at_most))
