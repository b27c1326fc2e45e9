"""Containers are killed, restarted and removed while clients send requests."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.docker.harness import KILLED, NOTES, Harness, Traffic
from tests.end_to_end.client import Answer, get
from tests.waiting import eventually

pytestmark = pytest.mark.docker

MIB = 1024**2


@pytest.fixture(scope="module", autouse=True)
def _room_for_all(harness: Harness) -> None:
    """From here on nothing has to be evicted: what was cached stays a hit."""
    harness.stack.settings["STORAGE_LIMIT"] = "2G"
    harness.stack.up()


async def test_a_killed_fetchers_download_is_resumed(harness: Harness) -> None:
    harness.slow_down(4 * MIB, KILLED)
    before = len(harness.requests_for(KILLED))
    assert await harness.cache_result(KILLED) == "miss"
    asked = asyncio.create_task(get(harness.stack.url(KILLED), timeout=120))
    await _until_sent(harness, KILLED, before, 12 * MIB)
    await asyncio.to_thread(harness.stack.compose, "kill", "--signal", "KILL", "fetcher")
    killed = time.monotonic()
    await asyncio.to_thread(harness.stack.up, "--no-recreate")
    answer = await asked
    assert harness.right(answer, KILLED)
    await harness.until_hit(KILLED)
    ranges = [
        record["range"] for record in harness.requests_for(KILLED)[before:] if record["method"] == "GET"
    ]
    assert ranges[0] is None
    assert any(asked_for and not asked_for.startswith("bytes=0-") for asked_for in ranges[1:]), ranges
    NOTES.append(f"client served {time.monotonic() - killed:.1f} s after the kill; ranges {ranges}")


async def _until_sent(harness: Harness, object_id: str, skip: int, size: int) -> None:
    def sent() -> int:
        return sum(record["bytes_sent"] for record in harness.requests_for(object_id)[skip:])

    await eventually(lambda: sent() >= size, pause=0.1)


@pytest.mark.parametrize(
    ("service", "objects"),
    [("rabbitmq", range(130, 140)), ("redis", range(140, 150))],
    ids=["rabbitmq", "redis"],
)
async def test_a_server_is_restarted_during_traffic(harness: Harness, service: str, objects: range) -> None:
    await harness.cached(["1"])
    misses = [str(number) for number in objects]
    answers: dict[str, Answer] = {}
    async with Traffic(harness.stack.url("1"), harness.body_of("1")) as hits:
        restarting = asyncio.create_task(asyncio.to_thread(harness.stack.compose, "restart", service))
        for object_id in misses[:-1]:
            answers[object_id] = await get(harness.stack.url(object_id), timeout=60)
            await asyncio.sleep(0.7)
        await restarting
        await asyncio.to_thread(harness.stack.until_healthy, service)
        back = time.monotonic()
        last = misses[-1]
        answers[last] = await get(harness.stack.url(last), timeout=60)
        # An object of its own: one that was requested during the outage may be cached by now.
        await _fetched_again(harness, last, 30)
        recovered = time.monotonic() - back
    assert hits.failures == []
    assert hits.asked > 100
    wrong = {
        object_id: answer.status
        for object_id, answer in answers.items()
        if not harness.right(answer, object_id)
    }
    assert wrong == {}
    assert recovered < 30
    slowest = max(answer.first_byte_after for answer in answers.values())
    NOTES.append(
        f"{service}: {hits.asked} hits, slowest {hits.slowest:.2f} s; misses' first byte {slowest:.2f} s at most;"
    )
    NOTES.append(f"fetching again {recovered:.1f} s after the restart")


async def _fetched_again(harness: Harness, object_id: str, timeout: float) -> None:
    """Ask as a client does, now and then, until the object is cached."""

    async def is_hit() -> bool:
        return (await get(harness.stack.url(object_id))).headers["x-cache"] == "hit"

    await eventually(is_hit, timeout, pause=0.5, what=f"{object_id} is a hit after the restart")


async def test_after_down_and_up_every_cached_object_is_a_hit(harness: Harness) -> None:
    await harness.cached(["1", "2", "3"])
    cached = [object_id for object_id in harness.objects if await harness.cache_result(object_id) == "hit"]
    assert len(cached) >= 10
    await asyncio.to_thread(harness.stack.down)
    assert harness.stack.compose("ps", "--quiet", "--all") == ""
    await asyncio.to_thread(harness.stack.up)
    for object_id in cached:
        answer = await get(harness.stack.url(object_id))
        assert answer.headers["x-cache"] == "hit", object_id
        assert harness.right(answer, object_id)
