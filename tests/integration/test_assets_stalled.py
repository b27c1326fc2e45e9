"""Responses that follow a fetch which stalls: they go on from a source, and return to the file once it catches up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from distributor_node.services.demo.faults import Fault
from tests.integration.assets_harness import KIB, MIB, AssetsHarness, ManualFetch, assets_harness
from tests.integration.test_assets_pending import Client, ask
from tests.waiting import eventually

SIZE = 3 * MIB
STALL = 0.4


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[AssetsHarness]:
    async with assets_harness(
        tmp_path, first_byte_wait=3.0, far_range_distance=256 * KIB, stalled_fetch_wait=STALL
    ) as running:
        running.add("1", SIZE)
        yield running


def bridged(end: str) -> float:
    return REGISTRY.get_sample_value("distributor_stalled_fetches_bridged_total", {"end": end}) or 0.0


async def follow(
    harness: AssetsHarness, written: int, headers: str = ""
) -> tuple[ManualFetch, Client, bytes]:
    """A client has got all that a fetch has written, and the fetch writes no more."""
    fetch = await harness.begin("1", written=written)
    client = await ask(harness, "1", headers)
    await client.read_head()
    return fetch, client, await client.take(written)


async def test_a_stalled_fetch_is_completed_from_a_source(harness: AssetsHarness) -> None:
    before = bridged("complete")
    fetch, client, body = await follow(harness, MIB)
    body += await client.rest()
    assert body == harness.data["1"]
    assert [record.range for record in harness.node.requests] == [f"bytes={MIB}-{SIZE - 1}"]
    assert bridged("complete") == before + 1
    await fetch.complete()


async def test_the_source_of_the_stalled_fetch_is_asked_last(harness: AssetsHarness) -> None:
    fetch = await harness.begin("1", written=MIB)
    await harness.context.state.renew(fetch.lease, harness.node.object_url("1"))
    client = await ask(harness, "1")
    await client.read_head()
    assert await client.take(MIB) + await client.rest() == harness.data["1"]
    assert (len(harness.node.requests), len(harness.second.requests)) == (0, 1)
    await fetch.complete()


async def test_a_response_returns_to_the_file_when_that_has_caught_up(harness: AssetsHarness) -> None:
    before = bridged("caught_up")
    harness.node.faults.add(Fault(hang_after=100 * KIB))
    fetch, client, body = await follow(harness, MIB)
    body += await client.take(100 * KIB - 1)  # from the source, which then hangs
    fetch.write_to(2 * MIB)
    body += await client.take(MIB - 100 * KIB)
    fetch.write_to(SIZE)
    fetch.verify()
    body += await client.rest()
    assert body == harness.data["1"]
    assert bridged("caught_up") == before + 1
    assert [len(node.requests) for node in (harness.node, harness.second)] == [1, 0]
    await fetch.complete()


async def test_the_end_is_held_back_after_the_return(harness: AssetsHarness) -> None:
    harness.node.faults.add(Fault(hang_after=100 * KIB))
    fetch, client, body = await follow(harness, MIB)
    body += await client.take(100 * KIB - 1)
    fetch.write_to(SIZE)
    body += await client.take(SIZE - len(body) - 64 * KIB)
    assert await client.silent()
    fetch.verify()
    assert body + await client.rest() == harness.data["1"]
    await fetch.complete()


async def test_wrong_bytes_of_the_source_never_complete_a_response(harness: AssetsHarness) -> None:
    for node in (harness.node, harness.second):
        node.faults.add(Fault(flip_byte_at=MIB + 10, hang_after=100 * KIB))
    fetch, client, body = await follow(harness, MIB)
    body += await client.take(100 * KIB - 1)
    fetch.write_to(SIZE)
    fetch.verify()
    body += await client.rest()
    assert len(body) < 2 * MIB
    await fetch.complete()


async def test_wrong_bytes_of_the_source_do_not_reach_the_end(harness: AssetsHarness) -> None:
    for node in (harness.node, harness.second):
        node.faults.add(Fault(flip_byte_at=MIB + 10))
    fetch, client, body = await follow(harness, MIB)
    body += await client.rest()
    assert len(body) <= SIZE - 64 * KIB
    await fetch.complete()


async def test_when_every_source_fails_the_response_waits_for_the_file(harness: AssetsHarness) -> None:
    for node in (harness.node, harness.second):
        node.faults.add(Fault(status=404))
    fetch, client, body = await follow(harness, MIB)
    await eventually(lambda: harness.second.requests)
    await fetch.complete()
    assert body + await client.rest() == harness.data["1"]


async def test_a_range_within_the_object_is_bridged_too(harness: AssetsHarness) -> None:
    first, last = MIB - 1000, 2 * MIB
    fetch = await harness.begin("1", written=MIB)
    answer = await harness.get("1", {"Range": f"bytes={first}-{last}"})
    assert answer.body == harness.data["1"][first : last + 1]
    assert (answer.status, answer.headers["x-data-source"]) == (206, "local")
    assert [record.range for record in harness.node.requests] == [f"bytes={MIB}-{last}"]
    await fetch.complete()


async def test_a_file_that_was_emptied_is_not_returned_to(harness: AssetsHarness) -> None:
    """What was sent from it may be wrong, although it is right again."""
    harness.node.faults.add(Fault(bytes_per_second=4 * MIB))
    fetch = await harness.begin("1", written=0)
    right, fetch.data = fetch.data, b"?" + fetch.data[1:]
    fetch.write_to(MIB)
    client = await ask(harness, "1")
    await client.read_head()
    body = await client.take(MIB)
    await eventually(lambda: harness.node.requests)
    fetch.partial.restart()
    fetch.data, fetch.written = right, 0
    await fetch.complete()
    body += await client.rest()
    assert len(body) < SIZE


async def test_a_range_ahead_of_a_slow_fetch_is_not_waited_for(tmp_path: Path) -> None:
    """1.5 MB ahead is near by distance, and far at the rate of the fetch."""
    async with assets_harness(
        tmp_path, first_byte_wait=10.0, far_range_wait=0.5, stalled_fetch_wait=60.0
    ) as harness:
        harness.add("1", SIZE)
        fetch = await harness.begin("1", written=MIB)
        answer = await harness.get("1", {"Range": f"bytes={2 * MIB + 500_000}-"})
        assert (answer.status, answer.headers["x-data-source"]) == (206, "external")
        assert answer.body == harness.data["1"][2 * MIB + 500_000 :]
        await fetch.complete()
