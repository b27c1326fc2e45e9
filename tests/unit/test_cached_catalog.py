"""The catalog cache: freshness, stale answers, bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from distributor_node.shared.adapters.catalogs.cached import CachedCatalog, CacheLimits
from distributor_node.shared.domain.errors import CatalogUnavailable, ObjectUnavailable, QueryRejected
from distributor_node.shared.domain.objects import Assignment, MediaObject, ObjectId
from distributor_node.shared.ports.catalog import CatalogStatus, LookupAnswers

ONE, TWO, THREE = ObjectId("1"), ObjectId("2"), ObjectId("3")
FIRST = MediaObject(ONE, 1, sources=("https://one.example/1",))
SECOND = MediaObject(TWO, 2, sources=("https://one.example/2",))
LIMITS = CacheLimits(
    positive_ttl=100,
    negative_ttl=10,
    max_in_flight=2,
    wait=0.05,
    query_timeout=0.2,
    max_entries=3,
    outage_pause=5,
)


REJECTED_WORKER = 990


class ScriptedCatalog:
    """A far catalog: `held` keeps questions waiting, `down` makes them fail."""

    def __init__(self) -> None:
        self.known = {ONE: FIRST, TWO: SECOND}
        self.asked: list[ObjectId] = []
        self.batches: list[list[ObjectId]] = []
        self.batch_size = 1
        self.in_flight = 0
        self.max_in_flight = 0
        self.down = False
        self.buckets: Sequence[str] = ("0:1",)
        self.indescribable: set[ObjectId] = set()
        self.closed = False
        self.bucket_questions = 0
        self.answering = asyncio.Event()
        self.answering.set()
        self.question_came = asyncio.Event()

    @property
    def can_list(self) -> bool:
        return True

    @property
    def public_url(self) -> str:
        return ""

    async def open(self) -> None: ...

    async def close(self) -> None:
        self.closed = True

    def can_have(self, object_id: ObjectId) -> bool:
        return object_id.isdigit()

    async def look_up(self, object_id: ObjectId, client: str | None = None) -> MediaObject | None:
        return (await self.look_up_batch((object_id,)))[object_id]

    async def look_up_batch(self, object_ids: Sequence[ObjectId]) -> LookupAnswers:
        self.asked += object_ids
        self.batches.append(list(object_ids))
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        self.question_came.set()
        try:
            await self.answering.wait()
        finally:
            self.in_flight -= 1
        if self.down:
            raise CatalogUnavailable("down")
        if self.indescribable.intersection(object_ids):
            raise ObjectUnavailable("500")
        return {object_id: self.known.get(object_id) for object_id in object_ids}

    async def forget(self, outdated: MediaObject) -> None: ...

    async def forget_object(self, object_id: ObjectId) -> None: ...

    @property
    def lookups_fail(self) -> bool:
        return False

    def sources_of(self, object_id: ObjectId) -> Sequence[str]:
        return ()

    async def list_objects(self, assignment: Assignment) -> AsyncIterator[Sequence[MediaObject]]:
        yield tuple(item for item in self.known.values() if assignment.covers(item))

    async def bucket_ids(self, worker_id: int | None = None) -> Sequence[str]:
        self.bucket_questions += 1
        if worker_id == REJECTED_WORKER:
            raise QueryRejected("unknown type")
        self.question_came.set()
        await self.answering.wait()
        if self.down:
            raise CatalogUnavailable("down")
        return self.buckets

    async def source_bases(self) -> Sequence[str]:
        return ()

    async def status(self) -> CatalogStatus:
        return CatalogStatus()

    async def chain_head(self) -> int | None:
        return None


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def inner() -> ScriptedCatalog:
    return ScriptedCatalog()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def catalog(inner: ScriptedCatalog, clock: Clock) -> AsyncIterator[CachedCatalog]:
    catalog = CachedCatalog(inner, LIMITS, clock)
    await catalog.open()
    yield catalog
    await catalog.close()
    assert inner.closed
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_answers_are_cached_for_their_ttl(
    catalog: CachedCatalog, inner: ScriptedCatalog, clock: Clock
) -> None:
    for now, questions in [(0, 1), (99, 1), (100, 2)]:
        clock.now = now
        assert await catalog.look_up(ONE) == FIRST
        assert inner.asked.count(ONE) == questions
    for now, questions in [(200, 1), (209, 1), (210, 2)]:
        clock.now = now
        assert await catalog.look_up(THREE) is None
        assert inner.asked.count(THREE) == questions


@pytest.mark.parametrize("changed", [{"accepted": False}, {"sources": ()}], ids=["not accepted", "no source"])
async def test_an_unavailable_object_is_retried_soon(
    catalog: CachedCatalog, inner: ScriptedCatalog, clock: Clock, changed: dict[str, Any]
) -> None:
    inner.known[ONE] = replace(FIRST, **changed)
    assert await catalog.look_up(ONE) == inner.known[ONE]
    inner.known[ONE] = FIRST
    clock.now = LIMITS.negative_ttl
    assert await catalog.look_up(ONE) == FIRST


async def test_a_slow_catalog_does_not_delay_known_objects(inner: ScriptedCatalog, clock: Clock) -> None:
    catalog = CachedCatalog(inner, replace(LIMITS, wait=5, stale_wait=0.02), clock)
    assert await catalog.look_up(ONE) == FIRST
    assert await catalog.look_up(THREE) is None
    clock.now = 1000
    inner.answering.clear()
    inner.known = {ONE: replace(FIRST, size=7), THREE: MediaObject(THREE, 3)}
    assert await catalog.look_up(ONE) == FIRST
    appeared = asyncio.create_task(catalog.look_up(THREE))
    await asyncio.sleep(0.05)
    inner.answering.set()
    assert await appeared == MediaObject(THREE, 3)
    assert await catalog.look_up(ONE) == replace(FIRST, size=7)
    assert inner.asked.count(ONE) == 2
    await catalog.close()


async def test_concurrent_lookups_share_one_request(catalog: CachedCatalog, inner: ScriptedCatalog) -> None:
    inner.answering.clear()
    async with asyncio.TaskGroup() as askers:
        tasks = [askers.create_task(catalog.look_up(ONE)) for _ in range(50)]
        await inner.question_came.wait()
        inner.answering.set()
    assert {task.result() for task in tasks} == {FIRST}
    assert inner.asked == [ONE]


async def test_a_cancelled_caller_does_not_affect_the_others(
    catalog: CachedCatalog, inner: ScriptedCatalog
) -> None:
    inner.answering.clear()
    first, second = asyncio.create_task(catalog.look_up(ONE)), asyncio.create_task(catalog.look_up(ONE))
    await inner.question_came.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    inner.answering.set()
    assert await second == FIRST
    assert inner.asked == [ONE]


async def test_a_lookup_outlives_its_callers_and_is_cached(
    catalog: CachedCatalog, inner: ScriptedCatalog
) -> None:
    inner.answering.clear()
    asker = asyncio.create_task(catalog.look_up(ONE))
    await inner.question_came.wait()
    asker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asker
    inner.answering.set()
    assert await catalog.look_up(ONE) == FIRST
    assert inner.asked == [ONE]


async def test_a_lookup_without_callers_may_fail_silently(
    catalog: CachedCatalog, inner: ScriptedCatalog
) -> None:
    inner.answering.clear()
    inner.down = True
    asker = asyncio.create_task(catalog.look_up(ONE))
    await inner.question_came.wait()
    asker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asker
    inner.answering.set()
    with pytest.raises(CatalogUnavailable):
        await catalog.look_up(ONE)


async def test_closing_ends_the_lookups_in_progress(catalog: CachedCatalog, inner: ScriptedCatalog) -> None:
    inner.answering.clear()
    asker = asyncio.create_task(catalog.look_up(ONE))
    await inner.question_came.wait()
    await catalog.close()
    with pytest.raises(CatalogUnavailable):
        await asker


async def test_a_lookup_waits_for_slot_and_answer_within_a_bound(
    catalog: CachedCatalog, inner: ScriptedCatalog
) -> None:
    inner.answering.clear()
    waiting = [catalog.look_up(ObjectId(str(number)), "a") for number in range(1, 6)]
    async with asyncio.timeout(60):
        found = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(outcome, CatalogUnavailable) for outcome in found)
    assert inner.max_in_flight == 2
    inner.answering.set()
    assert await catalog.look_up(THREE) is None
    assert await catalog.look_up(ONE) == FIRST


async def test_a_freed_slot_is_used(catalog: CachedCatalog, inner: ScriptedCatalog) -> None:
    inner.answering.clear()
    waiting = [asyncio.create_task(catalog.look_up(object_id)) for object_id in (ONE, TWO, THREE)]
    await inner.question_came.wait()
    inner.answering.set()
    assert await asyncio.gather(*waiting) == [FIRST, SECOND, None]
    assert inner.max_in_flight == 2


async def test_the_last_good_answer_is_given_while_the_catalog_is_down(
    catalog: CachedCatalog, inner: ScriptedCatalog, clock: Clock
) -> None:
    await catalog.look_up(ONE)
    await catalog.look_up(THREE)
    inner.down = True
    clock.now = 1_000_000
    assert await catalog.look_up(ONE) == FIRST
    assert await catalog.look_up(THREE) is None
    with pytest.raises(CatalogUnavailable):
        await catalog.look_up(TWO)


async def test_an_outage_is_probed_only_now_and_then(
    catalog: CachedCatalog, inner: ScriptedCatalog, clock: Clock
) -> None:
    await catalog.look_up(ONE)
    inner.down = True
    for now, questions in [(200, 2), (204, 2), (205, 3)]:
        clock.now = now
        assert await catalog.look_up(ONE) == FIRST
        assert len(inner.asked) == questions
    inner.down = False
    clock.now = 211
    inner.known[ONE] = replace(inner.known[ONE], size=7)
    assert await catalog.look_up(ONE) == replace(FIRST, size=7)


async def test_the_least_recently_requested_is_dropped(
    catalog: CachedCatalog, inner: ScriptedCatalog
) -> None:
    for object_id in (ONE, TWO, THREE, ONE, ObjectId("4")):
        await catalog.look_up(object_id)
    await catalog.look_up(ONE)
    await catalog.look_up(TWO)
    assert inner.asked == [ONE, TWO, THREE, "4", TWO]


async def test_lists_and_buckets_are_the_inner_catalogs(catalog: CachedCatalog) -> None:
    assert await catalog.bucket_ids() == ("0:1",)
    assert [len(batch) async for batch in catalog.list_objects(Assignment())] == [2]


async def test_many_bucket_requests_make_one_catalog_call(
    catalog: CachedCatalog, inner: ScriptedCatalog, clock: Clock
) -> None:
    inner.answering.clear()
    asking = [asyncio.create_task(catalog.bucket_ids()) for _ in range(50)]
    await inner.question_came.wait()
    asking.pop().cancel()
    inner.answering.set()
    assert set(await asyncio.gather(*asking)) == {("0:1",)}
    assert inner.bucket_questions == 1
    clock.now = LIMITS.buckets_ttl
    await catalog.bucket_ids()
    assert inner.bucket_questions == 2


@pytest.mark.parametrize("hanging", [True, False])
async def test_a_failure_to_list_buckets_is_remembered_for_a_while(
    catalog: CachedCatalog, inner: ScriptedCatalog, clock: Clock, hanging: bool
) -> None:
    inner.down = True
    if hanging:
        inner.answering.clear()
    for _ in range(3):
        with pytest.raises(CatalogUnavailable):
            await catalog.bucket_ids()
    assert inner.bucket_questions == 1
    inner.down = False
    inner.answering.set()
    clock.now = LIMITS.outage_pause
    assert await catalog.bucket_ids() == ("0:1",)


async def test_a_rejected_query_of_a_workers_buckets_stays_one(
    catalog: CachedCatalog, inner: ScriptedCatalog
) -> None:
    for _ in range(3):
        with pytest.raises(QueryRejected, match="unknown type"):
            await catalog.bucket_ids(REJECTED_WORKER)
    assert inner.bucket_questions == 1
    assert await catalog.bucket_ids() == ("0:1",), "of all buckets, nothing is known from that"


async def test_closing_the_catalog_ends_the_bucket_request(inner: ScriptedCatalog) -> None:
    catalog = CachedCatalog(inner, replace(LIMITS, wait=60))
    inner.answering.clear()
    asking = asyncio.create_task(catalog.bucket_ids())
    await inner.question_came.wait()
    await catalog.close()
    with pytest.raises(CatalogUnavailable, match="being closed"):
        await asking


async def test_an_outdated_answer_is_asked_for_again_and_kept_for_outages(
    catalog: CachedCatalog, inner: ScriptedCatalog
) -> None:
    assert await catalog.look_up(ONE) == FIRST
    await catalog.forget(FIRST)
    inner.down = True
    assert await catalog.look_up(ONE) == FIRST
    assert inner.asked.count(ONE) == 2
    inner.down = False
    inner.known[ONE] = newer = replace(FIRST, size=7)
    catalog._down_until = float("-inf")  # the outage is over
    assert await catalog.look_up(ONE) == newer
    await catalog.forget(FIRST)
    assert await catalog.look_up(ONE) == newer
    assert inner.asked.count(ONE) == 3, "what is newer is not outdated"


@pytest.mark.parametrize("known", [True, False])
async def test_an_object_that_is_forgotten_is_asked_for_again(
    catalog: CachedCatalog, inner: ScriptedCatalog, known: bool
) -> None:
    """Whatever the answer was: the object may have come into being since."""
    inner.known = {ONE: FIRST} if known else {}
    await catalog.look_up(ONE)
    await catalog.forget_object(TWO)
    await catalog.look_up(ONE)
    assert inner.asked == [ONE]
    await catalog.forget_object(ONE)
    await catalog.look_up(ONE)
    assert inner.asked == [ONE, ONE]


async def test_an_object_that_must_not_be_stored_is_asked_for_again_soon(
    catalog: CachedCatalog, inner: ScriptedCatalog, clock: Clock
) -> None:
    inner.known[ONE] = replace(FIRST, not_stored="no-store")
    for now, questions in [(0, 1), (LIMITS.negative_ttl - 1, 1), (LIMITS.negative_ttl, 2)]:
        clock.now = now
        await catalog.look_up(ONE)
        assert len(inner.asked) == questions


class ScriptedOrigin(ScriptedCatalog):
    """Asks by the path that an id was made from."""

    def can_have(self, object_id: ObjectId) -> bool:
        return True

    async def look_up_batch(self, object_ids: Sequence[ObjectId]) -> LookupAnswers:
        if any(object_id.path == object_id for object_id in object_ids):
            raise ObjectUnavailable("the digest does not tell the path")
        return await super().look_up_batch(object_ids)


async def test_a_look_up_by_a_digest_alone_does_not_fail_for_those_who_know_the_path() -> None:
    """An operator lists pinned objects by what the store knows of them, and a client asks for one of them."""
    film = ObjectId.parse_path("films/one.mp4")
    inner = ScriptedOrigin()
    inner.known[film] = MediaObject(film, 1, sources=("https://one.example/films/one.mp4",))
    catalog = CachedCatalog(inner, LIMITS, Clock())
    by_digest = asyncio.create_task(catalog.look_up(ObjectId(str(film))))
    await asyncio.sleep(0)
    assert await catalog.look_up(film, "a") == inner.known[film]
    with pytest.raises(ObjectUnavailable):
        await by_digest
    assert await catalog.look_up(ObjectId(str(film))) == inner.known[film], "it is known by now"
    await catalog.close()


class TestFailingLookups:
    """What readiness and the node's page say without asking."""

    @staticmethod
    async def fail(catalog: CachedCatalog, inner: ScriptedCatalog, times: int) -> None:
        inner.down = True
        for _ in range(times):
            with pytest.raises(CatalogUnavailable):
                await catalog.look_up(ONE)
        inner.down = False

    async def test_one_failure_is_told_for_the_pause_only(
        self, catalog: CachedCatalog, inner: ScriptedCatalog, clock: Clock
    ) -> None:
        await self.fail(catalog, inner, 1)
        assert catalog.lookups_fail
        clock.now = LIMITS.outage_pause
        assert not catalog.lookups_fail

    async def test_several_in_a_row_are_told_until_a_lookup_succeeds(
        self, catalog: CachedCatalog, inner: ScriptedCatalog, clock: Clock
    ) -> None:
        await self.fail(catalog, inner, 3)
        clock.now = 1000 * LIMITS.outage_pause
        assert catalog.lookups_fail
        assert await catalog.look_up(ONE) == FIRST
        assert not catalog.lookups_fail

    async def test_failures_with_an_answer_between_are_no_outage(
        self, catalog: CachedCatalog, inner: ScriptedCatalog, clock: Clock
    ) -> None:
        await self.fail(catalog, inner, 2)
        assert await catalog.look_up(TWO) == SECOND
        await self.fail(catalog, inner, 2)
        clock.now = LIMITS.outage_pause
        assert not catalog.lookups_fail

    async def test_a_list_of_buckets_says_that_the_server_replies(
        self, catalog: CachedCatalog, inner: ScriptedCatalog, clock: Clock
    ) -> None:
        await self.fail(catalog, inner, 3)
        clock.now = LIMITS.outage_pause
        assert catalog.lookups_fail
        assert await catalog.bucket_ids() == ("0:1",)
        assert not catalog.lookups_fail

    async def test_a_catalog_without_buckets_says_nothing_by_that(
        self, inner: ScriptedCatalog, clock: Clock
    ) -> None:
        inner.buckets = ()
        catalog = CachedCatalog(inner, LIMITS, clock)
        await self.fail(catalog, inner, 3)
        clock.now = LIMITS.outage_pause
        assert await catalog.bucket_ids() == ()
        assert catalog.lookups_fail

    async def test_an_object_that_cannot_be_described_is_no_outage(
        self, catalog: CachedCatalog, inner: ScriptedCatalog
    ) -> None:
        inner.indescribable.add(ONE)
        for _ in range(3):
            with pytest.raises(ObjectUnavailable):
                await catalog.look_up(ONE)
        assert not catalog.lookups_fail
