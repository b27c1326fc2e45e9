"""Calls of the volume, in a thread, that are never left running behind the caller's back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from itertools import islice
from typing import ParamSpec, TypeVar

from shared.runtime.threads import result_uncancellable

Params = ParamSpec("Params")
Result = TypeVar("Result")


async def run_blocking(
    call: Callable[Params, Result], /, *args: Params.args, **kwargs: Params.kwargs
) -> Result:
    """Run in a thread. When cancelled, wait for its end before giving in: whoever cleans up finds files at rest.

    What the call returns is lost then: one that opens something leaves it where the caller can find it."""
    return await result_uncancellable(asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs)))


async def next_chunk(found: Iterable[Result], at_most: int) -> list[Result]:
    """Up to `at_most` more of a scan, read in a thread; empty at its end."""
    return await run_blocking(_take, found, at_most)


def _take(found: Iterable[Result], at_most: int) -> list[Result]:
    return list(islice(found, at_most))
