"""A source is asked for a small object while its lease is being asked for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import GeneratedContent
from distributor_node.services.fetcher import fetch
from distributor_node.services.fetcher.admission import Denied
from distributor_node.services.fetcher.download import FetchLimits
from distributor_node.services.fetcher.fetch import FetchRunner
from distributor_node.services.fetcher.fetcher import Worker
from distributor_node.services.fetcher.side_streams import MIN_SIZE
from distributor_node.services.fetcher.window import WindowLimits
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.volume import PartialFile
from distributor_node.shared.adapters.volume.layout import shard
from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.jobs import Ack, FetchJob, JobOutcome, Nack, Retry
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.ports.state_store import (
    REBUILD_DELAY,
    AlreadyStored,
    BeginResult,
    Granted,
    HeldElsewhere,
    Lease,
    NoSpace,
    NotReconciled,
)
from distributor_node.shared.runtime.threads import BUSY_CALL
from tests.counters import counted
from tests.integration.fetcher_harness import OBJECT_ID, Harness, fetcher_harness
from tests.waiting import eventually

DATA = GeneratedContent(7, 64 * 1024).read(0, 64 * 1024)
LARGE = GeneratedContent(7, MIN_SIZE).read(0, MIN_SIZE)


class SlowStore(MemoryStateStore):
    """A lease takes until `may_begin` is set."""

    may_begin: asyncio.Event
    asked = 0

    async def begin(
        self, object_id: ObjectId, size: int, worker: str, claim: int = 0, trace: str = ""
    ) -> BeginResult:
        self.asked += 1
        await self.may_begin.wait()
        return await super().begin(object_id, size, worker, claim, trace)


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    async with fetcher_harness(tmp_path, [DATA, DATA], state_kind=SlowStore) as ready:
        store_of(ready).may_begin = asyncio.Event()
        ready.disk.keep_short_calls_in_loop()
        yield ready


def store_of(harness: Harness) -> SlowStore:
    assert isinstance(harness.state, SlowStore)
    return harness.state


def begun(
    harness: Harness, job: FetchJob | None = None, worker: Worker | None = None
) -> asyncio.Task[JobOutcome]:
    worker = worker or harness.worker()
    return asyncio.create_task(worker.handle(job or harness.job(harness.wanted(DATA))))


async def asked_before_its_lease(
    harness: Harness, job: FetchJob | None = None, worker: Worker | None = None
) -> bool:
    """Whether a source is asked before the lease is granted. The fetch is carried out in any case."""
    store = store_of(harness)
    store.may_begin.clear()
    asked_before, requests_before = store.asked, [len(node.requests) for node in harness.nodes]

    async def was_asked() -> bool:
        return [len(node.requests) for node in harness.nodes] != requests_before

    async def waits() -> bool:
        return store.asked > asked_before

    running = begun(harness, job, worker)
    await eventually(waits)
    await asyncio.sleep(0.1)  # what does not happen cannot be waited for
    asked = await was_asked()
    store.may_begin.set()
    assert await running == Ack("fetched")
    return asked


async def test_the_source_is_asked_while_the_lease_is_asked_for(harness: Harness) -> None:
    assert await asked_before_its_lease(harness)
    assert harness.stored() == DATA
    assert [len(node.requests) for node in harness.nodes] == [1, 0]


async def test_another_source_takes_over_as_usual(harness: Harness) -> None:
    harness.nodes[0].faults.add(Fault(status=500), Match(nth=1))
    assert await asked_before_its_lease(harness)
    assert harness.stored() == DATA


async def test_corrupt_bytes_are_read_again_from_another_source(harness: Harness) -> None:
    harness.nodes[0].faults.add(Fault(flip_byte_at=5))
    assert await asked_before_its_lease(harness)
    assert harness.stored() == DATA
    assert [len(node.requests) for node in harness.nodes] == [1, 1]


async def test_sources_that_all_fail_end_the_fetch_as_usual(harness: Harness) -> None:
    for node in harness.nodes:
        node.faults.add(Fault(status=404))
    running = begun(harness)
    store_of(harness).may_begin.set()
    assert isinstance(await running, Retry)
    assert harness.partial_size() is None


async def test_not_for_a_job_that_was_tried_before(harness: Harness) -> None:
    job = harness.job(harness.wanted(DATA))
    assert not await asked_before_its_lease(harness, replace(job, attempt=2))


async def test_not_for_a_warming(harness: Harness) -> None:
    job = harness.job(harness.wanted(DATA))
    assert not await asked_before_its_lease(harness, replace(job, low_priority=True))


async def test_not_without_a_hash_whose_response_may_be_refused(harness: Harness) -> None:
    job = harness.job(harness.wanted(DATA, hashed=False))
    assert not await asked_before_its_lease(harness, job)


async def test_not_for_an_object_that_may_have_side_streams(tmp_path: Path) -> None:
    async with fetcher_harness(tmp_path, [LARGE], state_kind=SlowStore) as harness:
        store_of(harness).may_begin = asyncio.Event()
        harness.disk.keep_short_calls_in_loop()
        assert not await asked_before_its_lease(harness, harness.job(harness.wanted(LARGE)))


@pytest.mark.parametrize("place", ["incoming/7.part", f"objects/{shard('7')}/7"])
async def test_not_where_the_volume_has_a_file(harness: Harness, place: str) -> None:
    file = harness.volume.root / place
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"old")
    assert not await asked_before_its_lease(harness)
    assert harness.stored() == DATA


async def test_not_where_the_disk_has_threads_for_short_calls(harness: Harness) -> None:
    ended = threading.Event()
    hanging = asyncio.create_task(harness.disk.run(ended.wait, 30))
    await asyncio.sleep(2 * BUSY_CALL)
    assert not await asked_before_its_lease(harness)
    ended.set()
    await hanging


async def test_a_refused_lease_ends_the_request(harness: Harness) -> None:
    """The fetch that gets the lease later has a request of its own."""
    harness.nodes[0].faults.add(Fault(hang_after=10), Match(first=1))
    store = store_of(harness)
    held = await MemoryStateStore.begin(store, OBJECT_ID, len(DATA), "another")
    assert isinstance(held, Granted)
    running = begun(harness)

    async def asked() -> bool:
        return len(harness.nodes[0].requests) == 1

    async def ended() -> bool:
        return harness.nodes[0].requests[0].finished

    await eventually(asked)
    store.may_begin.set()
    await eventually(ended)
    assert not running.done()
    await store.release(held.lease)
    assert await running == Ack("fetched")
    assert harness.stored() == DATA
    assert [len(node.requests) for node in harness.nodes] == [2, 0]


@pytest.mark.parametrize(
    ("refusal", "lasts"),
    [
        (NoSpace(1), True),
        (NotReconciled(), True),
        (StateStoreUnavailable("down"), True),
        (HeldElsewhere(1.0), False),
        (AlreadyStored(1), False),
    ],
)
async def test_after_a_refusal_that_others_will_get_no_source_is_asked_early_for_a_while(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, refusal: Denied | StateStoreUnavailable, lasts: bool
) -> None:
    monkeypatch.setattr(fetch, "_REFUSAL_MEMORY", 0.3)
    runner = FetchRunner(
        harness.state, harness.volume, harness.failover_reader, harness.disk, harness.times, FetchLimits()
    )
    job = harness.job(harness.wanted(DATA))
    early = runner.ask_early(job, None)
    assert early is not None
    await runner.give_up_early(early, refusal)
    assert await asks(runner, job) is not lasts

    async def asks_again() -> bool:
        return await asks(runner, job)

    await eventually(asks_again)


async def test_not_where_a_window_asks_for_parts(harness: Harness) -> None:
    for above, asked in ((len(DATA) - 1, False), (len(DATA), True)):
        window = WindowLimits(window=64 * 1024, above=above, near=0, viewer_timeout=30)
        runner = FetchRunner(
            harness.state,
            harness.volume,
            harness.failover_reader,
            harness.disk,
            harness.times,
            FetchLimits(window=window),
        )
        assert await asks(runner, harness.job(harness.wanted(DATA))) is asked


async def asks(runner: FetchRunner, job: FetchJob) -> bool:
    early = runner.ask_early(job, None)
    if early is not None:
        await early.close()
    return early is not None


async def test_the_wait_for_the_lease_is_not_the_sources(harness: Harness) -> None:
    before = counted("distributor_phase_seconds_sum", phase="source_first_byte")
    assert await asked_before_its_lease(harness)  # 0.1 s and more before the lease is granted
    assert counted("distributor_phase_seconds_sum", phase="source_first_byte") - before < 0.1


async def test_a_cancelled_job_leaves_no_request_behind(harness: Harness) -> None:
    harness.nodes[0].faults.add(Fault(hang_before_headers=True))
    running = begun(harness)

    async def asked() -> bool:
        return len(harness.nodes[0].requests) == 1

    await eventually(asked)
    running.cancel()
    assert await running == Nack()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "early-request"]


class CountingStore(MemoryStateStore):
    """`grant_takes`: seconds from the request of a lease to its grant."""

    renewals = 0
    grant_takes = 0.0

    async def begin(
        self, object_id: ObjectId, size: int, worker: str, claim: int = 0, trace: str = ""
    ) -> BeginResult:
        await asyncio.sleep(self.grant_takes)
        return await super().begin(object_id, size, worker, claim, trace)

    async def renew(self, lease: Lease, source: str | None = None) -> bool:
        self.renewals += 1
        return await super().renew(lease, source)


@pytest.mark.parametrize(("grant_takes", "renewals"), [(0.0, 0), (2 * REBUILD_DELAY, 1)])
async def test_a_lease_is_renewed_before_the_first_byte_unless_the_file_was_there_at_once(
    tmp_path: Path, grant_takes: float, renewals: int
) -> None:
    """A rebuild of the index has looked at the partial files when the lease was that old, at the earliest."""
    async with fetcher_harness(tmp_path, [DATA], state_kind=CountingStore) as harness:
        store = harness.state
        assert isinstance(store, CountingStore)
        store.grant_takes = grant_takes
        assert await harness.worker().handle(harness.job(harness.wanted(DATA))) == Ack("fetched")
        assert store.renewals == renewals


@pytest.mark.parametrize("left", [False, True])
async def test_a_file_that_is_there_is_opened_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    """It may have to be emptied or synced, which takes a disk long. A new one is opened in the loop."""
    opened: list[bool] = []
    open_file = PartialFile.open

    def note(file: PartialFile, *, write_sidecar: bool = True, empty: bool = False) -> None:
        opened.append(threading.current_thread() is threading.main_thread())
        open_file(file, write_sidecar=write_sidecar, empty=empty)

    async with fetcher_harness(tmp_path, [DATA]) as harness:
        harness.disk.keep_short_calls_in_loop()
        if left:
            (tmp_path / "incoming" / f"{OBJECT_ID}.part").write_bytes(b"old")
        monkeypatch.setattr(PartialFile, "open", note)
        assert await harness.worker().handle(harness.job(harness.wanted(DATA))) == Ack("fetched")
        assert harness.stored() == DATA
    assert opened == [not left]
