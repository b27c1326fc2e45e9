"""Fixtures of several files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.evictor_harness import EvictorHarness, evictor_harness


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.servers)])
async def harness(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EvictorHarness]:
    """An evictor's surroundings, over each of the two state stores. Files with another harness replace it."""
    redis = None
    if request.param == "redis":
        redis = (request.getfixturevalue("redis_url"), request.getfixturevalue("redis_prefix"))
    async with evictor_harness(tmp_path, redis) as made:
        yield made
