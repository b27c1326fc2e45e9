"""Responses through the published port, and how fetchers share the jobs."""

from __future__ import annotations

import asyncio

import pytest

from tests.docker.compose import samples
from tests.docker.harness import Harness
from tests.end_to_end.client import get
from tests.waiting import eventually

pytestmark = pytest.mark.docker

JOBS = [str(number) for number in range(100, 130)]


async def test_a_miss_then_a_hit(harness: Harness) -> None:
    first = await get(harness.stack.url("5"))
    assert harness.right(first, "5")
    assert (first.headers["x-cache"], first.headers["content-type"]) == ("miss", "video/mp4")
    await harness.until_hit("5")
    second = await get(harness.stack.url("5"))
    assert harness.right(second, "5")
    assert (second.headers["x-cache"], second.headers["x-data-source"]) == ("hit", "local")
    assert second.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert len(harness.requests_for("5")) == 1
    part = await get(harness.stack.url("5"), {"Range": "bytes=1000-1999"})
    assert (part.status, part.body) == (206, harness.body_of("5")[1000:2000])


def fetches(harness: Harness, index: int) -> float:
    """Objects that one fetcher has fetched."""
    counted = samples(harness.stack.metrics("fetcher", index), "distributor_fetches_total")
    return counted.get('{outcome="fetched"}', 0.0)


async def test_three_fetchers_share_thirty_jobs(harness: Harness) -> None:
    before = [fetches(harness, index) for index in (1, 2, 3)]
    harness.slow_down(1024**2)  # half a second for each object
    answers = await asyncio.gather(*(get(harness.stack.url(object_id)) for object_id in JOBS))
    assert all(harness.right(answer, object_id) for answer, object_id in zip(answers, JOBS, strict=True))
    for object_id in JOBS:
        await harness.until_hit(object_id)

    def done() -> list[float]:
        return [fetches(harness, index) - before[index - 1] for index in (1, 2, 3)]

    # An object is a hit before its job is counted.
    await eventually(lambda: sum(done()) >= len(JOBS), pause=0.5, what="all jobs are counted")
    assert sum(done()) == len(JOBS)
    assert all(part >= 3 for part in done()), done()
