"""Responses through the published port, and how fetchers share the jobs."""

from __future__ import annotations

import asyncio
import json
from typing import Any

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


async def test_a_stop_by_an_operator_fails_no_probe_and_outlives_a_restart(harness: Harness) -> None:
    """Docker, as Kubernetes, would end a node whose probe fails, and `start-api` could not reach it any more."""
    await harness.cached(["5"])
    page = await get(f"http://127.0.0.1:{harness.stack.ports['API_PORT']}/metrics")
    assert page.status == 404  # they are not for the internet
    await asyncio.to_thread(harness.stack.exec, "api", "distributor", "operator", "stop-api")
    await asyncio.to_thread(harness.stack.compose, "restart", "--timeout", "40", "api")
    await asyncio.to_thread(harness.stack.until_healthy, "api")
    code, readiness = await asyncio.to_thread(probe, harness, "/readyz")
    assert (code, readiness["problems"]) == (503, ["stopped by an operator"])
    assert "distributor_storage_limit_bytes" in await asyncio.to_thread(harness.stack.metrics, "api")
    assert await harness.cache_result("5") is None
    await asyncio.to_thread(harness.stack.exec, "api", "distributor", "operator", "start-api")
    await harness.until_hit("5")
    assert (await asyncio.to_thread(probe, harness, "/readyz"))[0] == 200


def probe(harness: Harness, path: str) -> tuple[int, dict[str, Any]]:
    """Status and body of a probe of the API, as it is asked inside its container."""
    script = (
        "import http.client as h; c = h.HTTPConnection('127.0.0.1', 9463, timeout=9);"
        f"c.request('GET', '{path}'); r = c.getresponse(); print(r.status, r.read().decode())"
    )
    code, body = harness.stack.exec("api", "python3", "-c", script).split(" ", 1)
    return int(code), json.loads(body)


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
