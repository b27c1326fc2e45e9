"""No client joins two versions under one strong tag, and no stored file is a mixture. Longer in `make test-chaos`."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from distributor_node.services.demo.storage_node import StorageNode
from tests.end_to_end.changing_origin import read_changing_objects
from tests.end_to_end.stack import Stack

pytestmark = pytest.mark.timeout(240)
STEPS = 300


def origin_settings(origin: StorageNode) -> dict[str, str]:
    return {
        "DISTRIBUTOR_CATALOG__KIND": "origin",
        "DISTRIBUTOR_CATALOG__ORIGIN": origin.object_url("{id}"),
        "DISTRIBUTOR_FETCH__LEASE": "3",
        "DISTRIBUTOR_FETCH__LEASE_RENEWAL": "1",
    }


@pytest.mark.parametrize("seed", [1, 2])
async def test_an_origin_that_changes_at_random_moments(tmp_path: Path, seed: int) -> None:
    stack = Stack(tmp_path, "memory://", "memory://", "alone")
    async with StorageNode([]).run() as origin:
        stack.environment |= origin_settings(origin)
        try:
            await stack.add("standalone").healthy()
            assert await read_changing_objects(stack, origin, seed=seed, steps=STEPS) == []
        finally:
            stack.kill_all()


async def test_the_same_with_several_processes_and_fetchers_that_are_killed(
    tmp_path: Path, redis_url: str, amqp_url: str
) -> None:
    stack = Stack(tmp_path, redis_url, amqp_url, f"e2e-{uuid.uuid4().hex[:8]}")
    async with StorageNode([]).run() as origin:
        stack.environment |= origin_settings(origin)
        try:
            await stack.up(fetchers=2, workers=2)
            assert await read_changing_objects(stack, origin, seed=3, steps=STEPS) == []
        finally:
            stack.kill_all()
