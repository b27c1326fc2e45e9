"""Threads for what blocks: writing, hashing, syncing. The fetcher's own, so that nobody else's work queues behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from shared.runtime.threads import result_uncancellable

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class BlockingPool:
    """`count` threads, started when first used; `close` waits for what they do."""

    def __init__(self, count: int) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="disk")

    async def run(
        self, call: Callable[Arguments, Result], /, *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> Result:
        """The call's result. A cancellation is raised only after the call has ended: no file is ever closed, and no
        reservation given back, under a write that still runs. What the call returns is lost then: one that opens
        something leaves it where the caller can find it."""
        loop = asyncio.get_running_loop()
        return await result_uncancellable(
            loop.run_in_executor(self._executor, lambda: call(*arguments, **options))
        )

    async def close(self) -> None:
        await asyncio.to_thread(self._executor.shutdown)
