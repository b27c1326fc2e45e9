"""State stores to test, one of each adapter."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.contract.state_harness import BRIEF, LONG, Harness, memory_harness, redis_harness


@pytest.fixture(params=["memory", "redis"])
async def harness(request: pytest.FixtureRequest, redis_prefix: str) -> AsyncIterator[Harness]:
    """Nothing expires during a test."""
    if request.param == "memory":
        async with memory_harness(LONG) as made:
            yield made
    else:
        async with redis_harness(request.getfixturevalue("redis_url"), redis_prefix, LONG) as made:
            yield made


@pytest.fixture(params=["memory", "redis"])
async def brief(request: pytest.FixtureRequest, redis_prefix: str) -> AsyncIterator[Harness]:
    """Claims, queue marks and leases expire after some tenths of a second."""
    if request.param == "memory":
        async with memory_harness(BRIEF) as made:
            yield made
    else:
        async with redis_harness(request.getfixturevalue("redis_url"), redis_prefix, BRIEF) as made:
            yield made
