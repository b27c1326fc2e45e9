"""An HTTP origin whose objects change, for long: no answer and no file joins two versions, and the limit holds."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from distributor_node.services.demo.storage_node import StorageNode
from tests.end_to_end.changing_origin import read_changing_objects
from tests.end_to_end.stack import Stack
from tests.end_to_end.test_changing_origin import origin_settings
from tests.end_to_end.test_http_caching import SIZE, read_while_replaced, tag
from tests.end_to_end.test_versions import Site
from tests.volume_size import bytes_on_volume

pytestmark = pytest.mark.chaos
STEPS = 10_000
LIMIT = 4_000_000


@pytest.fixture
async def site(tmp_path: Path, redis_url: str, amqp_url: str) -> AsyncIterator[Site]:
    stack = Stack(tmp_path, redis_url, amqp_url, f"chaos-{uuid.uuid4().hex[:8]}")
    async with StorageNode([]).run() as origin:
        stack.environment |= origin_settings(origin)
        stack.environment["DISTRIBUTOR_STORAGE__LIMIT"] = str(LIMIT)
        try:
            yield Site(stack, origin)
        finally:
            stack.kill_all()


async def test_ten_thousand_requests_while_objects_change(site: Site) -> None:
    await site.stack.up(fetchers=2, workers=2)
    seed = int(os.environ.get("CHAOS_SEED", "11"))
    assert await read_changing_objects(site.stack, site.origin, seed=seed, steps=STEPS) == []


async def test_an_object_that_is_replaced_every_second_for_half_a_minute(site: Site) -> None:
    await site.stack.up(fetchers=2, workers=2)
    largest = 0

    async def watch() -> None:
        nonlocal largest
        while True:
            largest = max(largest, await asyncio.to_thread(bytes_on_volume, site.stack.volume))
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    answers = await read_while_replaced(site, readers=20, versions=30, every=1.0)
    watching.cancel()
    complete = [answer for answer in answers if answer.complete]
    assert len(complete) > 200
    refused = [(answer.status, answer.body[:200]) for answer in complete if answer.status != 200]
    assert refused == []
    assert all(answer.headers["etag"] == tag(answer.body) for answer in complete)
    assert len({answer.headers["etag"] for answer in complete}) > 15
    assert SIZE <= largest <= LIMIT
