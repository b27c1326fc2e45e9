"""Requests for many objects, and the events that the services log about them."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from distributor_node.services.demo.objects import DemoObject
from tests.chaos.harness import ChaosHarness
from tests.end_to_end.client import Answer, get
from tests.end_to_end.stack import ServiceProcess


def is_correct(answer: Answer, item: DemoObject) -> bool:
    """A whole answer, with the right bytes."""
    return (answer.status, answer.complete) == (200, True) and answer.body == item.content.read(0, item.size)


async def get_correct(chaos: ChaosHarness, item: DemoObject, timeout: float = 60.0) -> Answer:
    """One GET that must end well."""
    answer = await get(chaos.stack.url(item.object_id), timeout=timeout)
    assert is_correct(answer, item), (item.object_id, answer.status, answer.complete, answer.body[:200])
    return answer


async def get_all(chaos: ChaosHarness, items: Sequence[DemoObject], at_once: int = 6) -> list[Answer]:
    """One GET for each, a few at a time; all must end well."""
    free = asyncio.Semaphore(at_once)

    async def ask(item: DemoObject) -> Answer:
        async with free:
            return await get_correct(chaos, item)

    return await asyncio.gather(*(ask(item) for item in items))


async def cache_all(chaos: ChaosHarness, items: Sequence[DemoObject], timeout: float = 120.0) -> float:
    """Ask until each is a hit; every answer on the way must be right. Seconds that took."""
    began = time.monotonic()
    left = list(items)
    while left:
        answers = await get_all(chaos, left)
        left = [
            item for item, answer in zip(left, answers, strict=True) if answer.headers["x-cache"] != "hit"
        ]
        assert time.monotonic() - began < timeout, f"never hits: {[item.object_id for item in left]}"
        if left:
            await asyncio.sleep(0.3)
    return time.monotonic() - began


async def get_until_complete(chaos: ChaosHarness, item: DemoObject, retry_errors_for: float = 0.0) -> int:
    """GETs until one is whole; each must be right, or cut short of its end (or, for `retry_errors_for` seconds, a 502
    or 504: failures are remembered for a moment). How many were cut."""
    deadline = time.monotonic() + retry_errors_for
    cuts = 0
    while cuts < 4:
        answer = await get(chaos.stack.url(item.object_id), timeout=60)
        if answer.status in (502, 504) and time.monotonic() < deadline:
            await asyncio.sleep(0.5)
            continue
        if answer.complete:
            assert is_correct(answer, item), (item.object_id, answer.status, answer.body[:200])
            return cuts
        cuts += 1
    raise AssertionError(f"{item.object_id}: cut each time")


def events(process: ServiceProcess, name: str) -> Iterator[dict[str, Any]]:
    """The log's events of that name."""
    for line in process.log.read_text(errors="replace").splitlines():
        if f'"{name}"' in line:
            event = json.loads(line)
            if event.get("event") == name:
                yield event


def completed_downloads(chaos: ChaosHarness) -> Counter[str]:
    """How many complete downloads there were of each object."""
    return Counter(
        event["object_id"]
        for process in chaos.stack.of("fetcher")
        for event in events(process, "job_ended")
        if event["outcome"].startswith("fetched")
    )


async def metric(process: ServiceProcess, name: str, *labels: str) -> float:
    """The sum of a metric's samples that have all these labels (as `name="value"`)."""
    text = (await get(f"{process.health_url}/metrics")).body.decode()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith((name + "{", name + " ")) and all(label in line for label in labels)
    )
