"""Where short calls at the disk run: in the event loop while the disk is quick, in threads otherwise."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import pytest

from distributor_node.shared.runtime import threads
from distributor_node.shared.runtime.threads import BlockingPool


@pytest.fixture
async def pool() -> AsyncIterator[BlockingPool]:
    made = BlockingPool(1)
    yield made
    await made.close()


def is_in_loop() -> bool:
    return threading.current_thread() is threading.main_thread()


async def test_short_calls_have_threads_unless_the_loop_is_given_to_them(pool: BlockingPool) -> None:
    assert not await pool.run_short(is_in_loop)
    pool.keep_short_calls_in_loop()
    assert await pool.run_short(is_in_loop)
    assert not await pool.run(is_in_loop)


async def test_after_a_slow_call_they_have_threads_for_a_while(
    pool: BlockingPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "SLOW_PAUSE", 0.5)
    pool.keep_short_calls_in_loop()
    await pool.run_short(time.sleep, 2 * threads.SLOW_CALL)
    assert not await pool.run_short(is_in_loop)
    await asyncio.sleep(0.6)
    assert await pool.run_short(is_in_loop)


async def test_a_slow_call_that_fails_counts_as_well(pool: BlockingPool) -> None:
    def fail() -> None:
        time.sleep(2 * threads.SLOW_CALL)
        raise OSError("the disk is broken")

    pool.keep_short_calls_in_loop()
    with pytest.raises(OSError, match="broken"):
        await pool.run_short(fail)
    assert not await pool.run_short(is_in_loop)


async def test_while_a_call_in_a_thread_does_not_end_they_have_threads(pool: BlockingPool) -> None:
    pool.keep_short_calls_in_loop()
    ended = threading.Event()
    other = BlockingPool(2)
    other.keep_short_calls_in_loop()
    hanging = asyncio.create_task(other.run(ended.wait, 30))
    await asyncio.sleep(0)
    assert await other.run_short(is_in_loop)
    await asyncio.sleep(2 * threads.BUSY_CALL)
    assert not await other.run_short(is_in_loop)
    assert await pool.run_short(is_in_loop)
    ended.set()
    await hanging
    assert await other.run_short(is_in_loop)
    await other.close()
