"""Requests for objects whose fetch cannot begin: the first one finds out, the others are proxied at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from distributor_node.services.api import fetch_capacity
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.ports.state_store import WorkerReport
from tests.integration.assets_harness import KIB, AssetsHarness, assets_harness
from tests.waiting import eventually

IDS = [str(number) for number in range(1, 101)]
WAIT = 1.0


def vain_waits(reason: str) -> float:
    return REGISTRY.get_sample_value("distributor_vain_waits_total", {"reason": reason}) or 0.0


class Counted:
    """How many requests have waited in vain, or have not waited for a reason, since it was made."""

    def __init__(self) -> None:
        self._before = {reason: vain_waits(reason) for reason in self._reasons()}

    def _reasons(self) -> tuple[str, ...]:
        return ("waited", "no_worker", "busy", "not_begun", "not_consumed")

    def __call__(self) -> dict[str, int]:
        now = {reason: int(vain_waits(reason) - before) for reason, before in self._before.items()}
        return {reason: count for reason, count in now.items() if count}


async def assert_proxied(harness: AssetsHarness, object_id: str, cache: str = "miss") -> None:
    answer = await harness.get(object_id)
    assert answer.status == 200
    assert answer.body == harness.data[object_id]
    assert (answer.headers["x-cache"], answer.headers["x-data-source"]) == (cache, "external")


async def test_without_a_worker_no_request_waits_and_every_job_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_capacity, "START_GRACE", 0.0)
    async with assets_harness(tmp_path, workers=0, first_byte_wait=WAIT) as harness:
        await harness.context.fetch_capacity.refresh()
        counted = Counted()
        for object_id in IDS:
            harness.add(object_id, 8 * KIB)
            await assert_proxied(harness, object_id)
        assert counted() == {"no_worker": len(IDS)}
        await eventually(lambda: _has_jobs(harness, len(IDS)))


async def test_after_a_worker_was_killed_one_request_waits_and_a_hundred_do_not(tmp_path: Path) -> None:
    """Its heartbeat has not expired, so it seems to be alive."""
    async with assets_harness(tmp_path, first_byte_wait=WAIT) as harness:
        await harness.context.fetch_capacity.refresh()
        await asyncio.sleep(0.1)  # the last heartbeat is older than the first request
        counted = Counted()
        harness.add("1000", 8 * KIB)
        await assert_proxied(harness, "1000")
        assert counted() == {"waited": 1}
        for object_id in IDS:
            harness.add(object_id, 8 * KIB)
            await assert_proxied(harness, object_id)
        assert counted() == {"waited": 1, "not_consumed": len(IDS)}
        await assert_proxied(harness, "1000", "pending")
        assert counted() == {"waited": 1, "not_consumed": len(IDS), "not_begun": 1}


async def test_the_time_of_the_look_up_counts_for_the_wait(tmp_path: Path) -> None:
    """No fetch begins. The first request has waited for its look-up, the second has come later."""
    async with assets_harness(tmp_path, first_byte_wait=3.0) as harness:
        for object_id in ("1", "2"):
            harness.add(object_id, 8 * KIB)
        harness.catalog.delay = 1.5
        first = asyncio.create_task(harness.get("1"))
        await asyncio.sleep(0.75)
        harness.catalog.delay = 0.0
        second = asyncio.create_task(harness.get("2"))
        await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
        assert (first.done(), second.done()) == (True, False)
        for answer in (await first, await second):
            assert answer.headers["x-data-source"] == "external"


async def test_once_a_job_has_begun_requests_wait_again(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, first_byte_wait=WAIT) as harness:
        await harness.context.fetch_capacity.refresh()
        await asyncio.sleep(0.1)
        harness.add("1", 200 * KIB)
        data = harness.add("2", 200 * KIB)
        await assert_proxied(harness, "1")
        fetch = await harness.begin("1", 100 * KIB)
        answer = asyncio.create_task(harness.get("1"))
        await eventually(lambda: harness.context.fetch_events.waiting > 0)
        await fetch.complete()
        assert (await answer).headers["x-data-source"] == "local"
        counted = Counted()
        waiting = asyncio.create_task(harness.get("2"))
        await eventually(lambda: _has_jobs(harness, 2))
        await (await harness.begin("2")).complete()
        assert (await waiting).body == data
        assert (await waiting).headers["x-data-source"] == "local"
        assert counted() == {}


async def test_while_every_slot_is_taken_and_jobs_wait_no_request_waits(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, first_byte_wait=WAIT) as harness:
        report = WorkerReport("worker-1", 8, 8, waiting=3, longest_wait=4.0)
        await harness.context.state.report_worker(report, 3600)
        await harness.context.fetch_capacity.refresh()
        counted = Counted()
        harness.add("1", 8 * KIB)
        await assert_proxied(harness, "1")
        await assert_proxied(harness, "1", "pending")
        assert counted() == {"busy": 2}
        # Where a worker has begun, its file is followed whatever the slots are.
        fetch = await harness.begin("1", 8 * KIB)
        fetch.verify()
        assert (await harness.get("1")).headers["x-data-source"] == "local"
        await fetch.complete()


async def test_a_request_that_waits_learns_that_the_last_worker_has_gone(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, first_byte_wait=10.0) as harness:
        await harness.context.fetch_capacity.refresh()
        counted = Counted()
        harness.add("1", 8 * KIB)
        waiting = asyncio.create_task(harness.get("1"))
        await eventually(harness.has_job)
        await harness.context.state.withdraw_worker("worker-1")
        assert (await waiting).headers["x-data-source"] == "external"
        assert counted() == {"no_worker": 1}


async def test_without_the_state_store_nothing_waits(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, state_down=True, first_byte_wait=10.0) as harness:
        counted = Counted()
        for object_id in IDS[:20]:
            harness.add(object_id, 8 * KIB)
            answer = await harness.get(object_id)
            assert (answer.status, answer.headers["x-data-source"]) == (200, "external")
        assert counted() == {}
        assert harness.context.fetch_capacity.workers_alive is None


async def _has_jobs(harness: AssetsHarness, number: int) -> bool:
    return await harness.jobs() >= number


async def test_objects_that_are_read_or_waited_for_are_reported_as_viewed(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, first_byte_wait=10.0) as harness:
        one, two, three = map(ObjectId, "123")
        for object_id in (one, two, three):
            harness.add(object_id, 200 * KIB)
        waiting = asyncio.create_task(harness.get("1"))
        fetch = await harness.begin("2", 200 * KIB)
        fetch.verify()
        assert (await harness.get("2")).status == 200
        await eventually(lambda: harness.context.fetch_events.waiting > 0)
        await harness.context.viewers.report()
        first = await harness.context.state.last_viewed([one, two, three])
        assert [age is not None for age in first] == [True, True, False]
        await asyncio.sleep(0.05)
        await harness.context.viewers.report()
        again = await harness.context.state.last_viewed([one, two])
        assert again[0] is not None
        assert again[1] is not None
        assert again[0] < again[1], "the first is waited for, the second was read a while ago"
        await fetch.complete()
        await (await harness.begin("1")).complete()
        assert (await waiting).status == 200
