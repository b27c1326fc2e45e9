"""Second-hit admission: objects that are not admitted are proxied."""

from __future__ import annotations

import time
from pathlib import Path

from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import VIEW_WINDOW
from distributor_node.shared.ports.state_store import IndexEntry
from tests.counters import counted
from tests.integration.assets_harness import LIMIT, MIB, AssetsHarness, assets_harness

SIZE = MIB + 7


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


def kept_out() -> float:
    return counted("distributor_admission_rejected_total")


async def fill(harness: AssetsHarness) -> None:
    """Something else would have to go now."""
    term = await harness.context.state.lead("evictor", 600)
    assert term is not None
    assert await harness.context.state.adopt(term, IndexEntry(ObjectId("filler"), LIMIT - 2 * MIB, 1, 1.0))


async def proxied(harness: AssetsHarness, object_id: str) -> None:
    answer = await harness.get(object_id)
    assert (answer.status, answer.body, answer.headers["x-cache"]) == (200, harness.data[object_id], "miss")


async def test_under_pressure_the_first_view_is_proxied_and_the_second_fetched(tmp_path: Path) -> None:
    clock, before = Clock(), kept_out()
    admission = {"above_size": MIB}
    async with assets_harness(tmp_path, admission=admission, clock=clock, first_byte_wait=0.1) as harness:
        harness.add("1", SIZE)
        harness.add("2", MIB)
        await fill(harness)
        await proxied(harness, "1")
        clock.now += VIEW_WINDOW - 1
        await proxied(harness, "1")  # the same view
        assert (await harness.jobs(), kept_out() - before) == (0, 2)
        await proxied(harness, "2")
        assert await harness.jobs() == 1  # small enough
        clock.now += 2
        await proxied(harness, "1")
        assert (await harness.jobs(), kept_out() - before) == (2, 2)


async def test_with_room_left_the_first_request_is_fetched(tmp_path: Path) -> None:
    before = kept_out()
    async with assets_harness(tmp_path, admission={"above_size": MIB}, first_byte_wait=0.1) as harness:
        harness.add("1", SIZE)
        await proxied(harness, "1")
        assert (await harness.jobs(), kept_out() - before) == (1, 0)
