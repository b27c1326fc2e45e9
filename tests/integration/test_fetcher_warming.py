"""Warming jobs are fetched where there is room. Nothing is evicted for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distributor_node.services.fetcher.admission import Admission, AdmissionRules
from distributor_node.services.fetcher.fetch import FetchRunner
from distributor_node.services.fetcher.fetcher import FailureRecorder, Worker
from distributor_node.shared.domain.jobs import Ack, FetchJob
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import FetchPhase, Granted
from tests.integration.fetcher_harness import OBJECT_ID, RETRIES, Harness, fetcher_harness

DATA = b"warm" * 5000
LIMIT = 10 * footprint(len(DATA))


def worker(harness: Harness, warm_below: int) -> Worker:
    rules = AdmissionRules(LIMIT, 0.3, 15.0, warm_below)
    return Worker(
        Admission(harness.state, harness.volume, harness.disk, rules, "worker-1"),
        FetchRunner(harness.state, harness.volume, harness.failover_reader, harness.disk, harness.times),
        FailureRecorder(harness.state, RETRIES, failure_memory=60.0),
    )


def job(harness: Harness) -> FetchJob:
    return replace(harness.job(harness.wanted(DATA)), low_priority=True)


async def occupied(harness: Harness, size: int) -> None:
    assert isinstance(await harness.state.begin(ObjectId("other"), size, "worker-2"), Granted)


async def test_with_room_it_is_fetched(tmp_path: Path) -> None:
    async with fetcher_harness(tmp_path, [DATA], limit=LIMIT) as harness:
        assert await worker(harness, footprint(len(DATA))).handle(job(harness)) == Ack("fetched")
        assert harness.stored() == DATA


async def test_above_the_watermark_warming_is_skipped_and_its_claim_ends(tmp_path: Path) -> None:
    async with fetcher_harness(tmp_path, [DATA], limit=LIMIT) as harness:
        await occupied(harness, 100)
        await harness.state.claim(OBJECT_ID, "api-1")
        await harness.state.mark_queued(OBJECT_ID, "api-1")
        below = footprint(100) + footprint(len(DATA)) - 1
        assert await worker(harness, below).handle(job(harness)) == Ack("no_room_to_warm")
        assert (await harness.state.find(OBJECT_ID)).fetch is None
        assert sum(await harness.state.space_requests()) == 0
        # A job of a client is fetched.
        assert await worker(harness, below).handle(replace(job(harness), low_priority=False)) == Ack(
            "fetched"
        )


async def test_without_space_nothing_is_evicted_for_it(tmp_path: Path) -> None:
    async with fetcher_harness(tmp_path, [DATA], limit=LIMIT) as harness:
        await occupied(harness, LIMIT - footprint(0) - 100)
        assert await worker(harness, 2 * LIMIT).handle(job(harness)) == Ack("no_room_to_warm")
        assert sum(await harness.state.space_requests()) == 0


async def test_a_fetch_of_another_worker_is_left_alone(tmp_path: Path) -> None:
    async with fetcher_harness(tmp_path, [DATA], limit=LIMIT, lease=0.4) as harness:
        await harness.state.begin(OBJECT_ID, len(DATA), "worker-2")
        assert await worker(harness, 0).handle(job(harness)) == Ack("no_room_to_warm")
        fetch = (await harness.state.find(OBJECT_ID)).fetch
        assert fetch is not None
        assert fetch.phase is FetchPhase.FETCHING
