"""State stores to test, one of each adapter."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.contract.state_world import BRIEF, LONG, World, memory_world, redis_world


@pytest.fixture(params=["memory", "redis"])
async def world(request: pytest.FixtureRequest, redis_prefix: str) -> AsyncIterator[World]:
    """Nothing runs out by itself during a test."""
    if request.param == "memory":
        async with memory_world(LONG) as made:
            yield made
    else:
        async with redis_world(request.getfixturevalue("redis_url"), redis_prefix, LONG) as made:
            yield made


@pytest.fixture(params=["memory", "redis"])
async def brief(request: pytest.FixtureRequest, redis_prefix: str) -> AsyncIterator[World]:
    """Claims, marks and leases run out after some tenths of a second."""
    if request.param == "memory":
        async with memory_world(BRIEF) as made:
            yield made
    else:
        async with redis_world(request.getfixturevalue("redis_url"), redis_prefix, BRIEF) as made:
            yield made
