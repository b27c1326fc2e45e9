"""Look-ups on their way to a catalog: batches, the queue in front of it, and whose fault a failure is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from distributor_node.shared.adapters.catalogs.batches import RateLimit
from distributor_node.shared.adapters.catalogs.cached import CachedCatalog, CacheLimits
from distributor_node.shared.adapters.catalogs.shared_answers import SharedCatalog, SharedCatalogTtls
from distributor_node.shared.adapters.volume.known_ids import KnownIds, KnownIdsDraft
from distributor_node.shared.domain.errors import CatalogUnavailable, LookupRefused
from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.ports.catalog import CacheLookup, SharedCatalogCache
from distributor_node.shared.waiting import cancel_and_wait
from tests.unit.test_cached_catalog import Clock, ScriptedCatalog
from tests.waiting import eventually

LIMITS = CacheLimits(positive_ttl=100, negative_ttl=5, max_in_flight=1, wait=0.5, query_timeout=20)


def ids(start: int, count: int) -> list[ObjectId]:
    return [ObjectId(str(number)) for number in range(start, start + count)]


def known(object_id: ObjectId) -> MediaObject:
    return MediaObject(object_id, 1, sources=(f"https://one.example/{object_id}",))


@pytest.fixture
def inner() -> ScriptedCatalog:
    inner = ScriptedCatalog()
    inner.batch_size = 10
    inner.known = {object_id: known(object_id) for object_id in ids(1, 200)}
    return inner


@pytest.fixture
async def catalog(inner: ScriptedCatalog) -> AsyncIterator[CachedCatalog]:
    catalog = CachedCatalog(inner, LIMITS, Clock())
    yield catalog
    await catalog.close()


async def refused(waiting: asyncio.Task[MediaObject | None]) -> str:
    with pytest.raises(LookupRefused) as error:
        await waiting
    return error.value.reason


def ask(catalog: CachedCatalog, object_id: ObjectId, client: str = "a") -> asyncio.Task[MediaObject | None]:
    return asyncio.create_task(catalog.look_up(object_id, client))


async def blocked(catalog: CachedCatalog, inner: ScriptedCatalog) -> asyncio.Task[MediaObject | None]:
    """Occupy the only place for a query."""
    inner.answering.clear()
    inner.question_came.clear()
    first = ask(catalog, ObjectId("200"))
    await inner.question_came.wait()
    return first


async def test_a_page_of_objects_is_a_few_queries(inner: ScriptedCatalog) -> None:
    inner.batch_size = 50
    catalog = CachedCatalog(inner, replace(LIMITS, max_in_flight=16, max_rate=20), Clock())
    found = await asyncio.gather(*(catalog.look_up(object_id, "a") for object_id in ids(1, 100)))
    assert found == [known(object_id) for object_id in ids(1, 100)]
    assert len(inner.asked) == 100
    assert len(inner.batches) <= 5
    await catalog.close()


class CountingCache:
    """A shared cache that holds nothing, and is quicker than the next request comes."""

    def __init__(self) -> None:
        self.reads, self.is_open, self.fails = 0, True, False
        self.answering = asyncio.Event()
        self.answering.set()

    async def close(self) -> None:
        self.is_open = False

    async def get_or_lock(
        self, object_ids: Sequence[ObjectId], owner: str, seconds: float
    ) -> Sequence[CacheLookup]:
        assert self.is_open
        self.reads += 1
        await self.answering.wait()
        if self.fails:
            raise ValueError("not as expected")
        return [CacheLookup(None, owns_lock=True)] * len(object_ids)


async def test_a_crowd_shares_reads_of_the_shared_cache_although_each_request_has_its_own_turn() -> None:
    cache = CountingCache()
    shared = SharedCatalog(cast("SharedCatalogCache", cache), SharedCatalogTtls(lock_ttl=1.0))
    began = time.monotonic()
    reading = []
    for object_id in ids(1, 100):
        reading.append(asyncio.create_task(shared.get_or_lock(object_id)))
        for _ in range(5):
            await asyncio.sleep(0)
    await asyncio.gather(*reading)
    spacing = 0.004  # the loop's clock may wake a task a little early
    assert cache.reads <= 2 + (time.monotonic() - began) / spacing
    assert cache.reads < 100


async def test_a_look_up_that_has_ended_is_not_read_and_nothing_is_read_after_the_close() -> None:
    """It would lock the object for a process that does not ask for it."""
    cache = CountingCache()
    shared = SharedCatalog(cast("SharedCatalogCache", cache), SharedCatalogTtls(lock_ttl=1.0))
    first, second = ids(1, 2)
    await shared.get_or_lock(first)
    waiting = asyncio.create_task(shared.get_or_lock(second))
    await asyncio.sleep(0)
    reading = [task for task in asyncio.all_tasks() if task.get_name() == "catalog-cache-get"]
    await cancel_and_wait(waiting)
    await shared.close()
    await asyncio.gather(*reading)
    assert cache.reads == 1


async def test_a_read_that_fails_unexpectedly_keeps_no_one_waiting() -> None:
    cache = CountingCache()
    cache.fails = True
    cache.answering.clear()
    shared = SharedCatalog(cast("SharedCatalogCache", cache), SharedCatalogTtls(lock_ttl=1.0))
    first, second = ids(1, 2)
    reading = asyncio.create_task(shared.get_or_lock(first))
    await eventually(lambda: cache.reads)
    late = asyncio.create_task(shared.get_or_lock(second))
    await asyncio.sleep(0)
    cache.answering.set()
    async with asyncio.timeout(10):
        assert (await reading).owns_lock
        assert (await late).owns_lock


async def test_a_query_outlives_the_wait_of_its_clients_and_its_answer_is_kept(
    catalog: CachedCatalog, inner: ScriptedCatalog
) -> None:
    first = await blocked(catalog, inner)
    with pytest.raises(CatalogUnavailable, match="did not answer within") as error:
        await first
    assert not isinstance(error.value, LookupRefused)
    inner.answering.set()
    await asyncio.sleep(0.05)
    assert await catalog.look_up(ObjectId("200"), "a") == known(ObjectId("200"))
    assert inner.asked == ["200"]


async def test_an_object_whose_query_hangs_is_asked_for_again(inner: ScriptedCatalog) -> None:
    catalog = CachedCatalog(inner, replace(LIMITS, max_in_flight=2), Clock())
    first = await blocked(catalog, inner)
    with pytest.raises(CatalogUnavailable):
        await first
    inner.question_came.clear()
    second = ask(catalog, ObjectId("200"))
    await inner.question_came.wait()
    assert inner.asked == ["200", "200"]
    third = ask(catalog, ObjectId("200"), "b")
    inner.answering.set()
    assert await second == await third == known(ObjectId("200"))
    assert inner.asked == ["200", "200"]
    await catalog.close()


async def test_a_look_up_without_a_turn_is_refused_and_never_sent(
    catalog: CachedCatalog, inner: ScriptedCatalog
) -> None:
    await blocked(catalog, inner)
    assert await refused(ask(catalog, ObjectId("1"))) == "no_turn"
    inner.answering.set()
    assert await catalog.look_up(ObjectId("2"), "a") == known(ObjectId("2"))
    assert "1" not in inner.asked


async def test_the_queue_is_no_outage(catalog: CachedCatalog, inner: ScriptedCatalog) -> None:
    inner.known = {}
    stale = ObjectId("100")
    assert await catalog.look_up(stale, "a") is None
    await blocked(catalog, inner)
    assert await refused(ask(catalog, ObjectId("1"))) == "no_turn"
    inner.answering.set()
    # In an outage, the stale answer would be returned without a query.
    inner.known = {stale: known(stale)}
    catalog._clock.now = 1000  # type: ignore[attr-defined]
    assert await catalog.look_up(stale, "a") == known(stale)


async def test_too_long_a_queue_refuses_at_once_and_the_newest_are_served(inner: ScriptedCatalog) -> None:
    catalog = CachedCatalog(inner, replace(LIMITS, wait=20, max_rate=1), Clock())
    inner.batch_size = 3
    first = await blocked(catalog, inner)
    waiting = [ask(catalog, object_id) for object_id in ids(1, 150)]
    async with asyncio.timeout(10):
        while not waiting[0].done():  # noqa: ASYNC110 — decided within the event loop, no event says so
            await asyncio.sleep(0.01)
    assert await refused(waiting[0]) == "queue_full"
    assert not waiting[-1].done()
    inner.answering.set()
    assert await first is not None
    assert await waiting[-1] == known(ObjectId("150"))
    assert inner.batches[1] == ["150", "149", "148"]
    await catalog.close()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_one_client_cannot_crowd_others_out(catalog: CachedCatalog, inner: ScriptedCatalog) -> None:
    await blocked(catalog, inner)
    one = ask(catalog, ObjectId("199"), "b")
    await asyncio.sleep(0)
    flood = [ask(catalog, object_id, "flood") for object_id in ids(1, 150)]
    await asyncio.sleep(0.05)
    inner.answering.set()
    assert await one == known(ObjectId("199"))
    assert "199" in inner.batches[1]
    await asyncio.gather(*flood, return_exceptions=True)


async def test_objects_seen_before_go_first(inner: ScriptedCatalog) -> None:
    clock = Clock()
    catalog = CachedCatalog(inner, replace(LIMITS, stale_wait=0.5), clock)
    assert await catalog.look_up(ObjectId("1"), "a") is not None
    clock.now = 1000
    await blocked(catalog, inner)
    seen = ask(catalog, ObjectId("1"), "flood")
    flood = [ask(catalog, object_id, f"client {object_id}") for object_id in ids(2, 30)]
    await asyncio.sleep(0.05)
    inner.answering.set()
    assert await seen is not None
    assert inner.batches[2][0] == "1"
    await asyncio.gather(*flood)
    await catalog.close()


async def test_a_late_client_waits_as_long_as_the_first(
    catalog: CachedCatalog, inner: ScriptedCatalog
) -> None:
    await blocked(catalog, inner)
    first = ask(catalog, ObjectId("1"))
    await asyncio.sleep(0.3)
    late = ask(catalog, ObjectId("1"), "b")
    assert await refused(first) == "no_turn"
    assert not late.done()
    inner.answering.set()
    assert await late == known(ObjectId("1"))


async def test_a_failed_query_is_an_outage_for_all_its_objects(inner: ScriptedCatalog) -> None:
    catalog = CachedCatalog(inner, LIMITS, Clock())
    inner.down = True
    failed = await asyncio.gather(
        *(catalog.look_up(object_id, "a") for object_id in ids(1, 5)), return_exceptions=True
    )
    assert {str(error) for error in failed} == {"down"}
    assert len(inner.batches) == 1
    await catalog.close()


async def test_an_unknown_id_is_asked_for_less_and_less(inner: ScriptedCatalog) -> None:
    clock = Clock()
    catalog = CachedCatalog(inner, LIMITS, clock)
    asked_at = []
    for second in range(300):
        clock.now = float(second)
        before = len(inner.asked)
        assert await catalog.look_up(ObjectId("404"), "a") is None
        if len(inner.asked) > before:
            asked_at.append(second)
    assert asked_at == [0, 5, 15, 35, 75, 135, 195, 255]
    # After a pause it counts as new.
    clock.now = 1000.0
    await catalog.look_up(ObjectId("404"), "a")
    clock.now = 1005.0
    inner.known[ObjectId("404")] = known(ObjectId("404"))
    assert await catalog.look_up(ObjectId("404"), "a") == known(ObjectId("404"))
    await catalog.close()


async def test_an_object_that_is_known_soon_after_a_404_is_served_within_5_seconds(
    inner: ScriptedCatalog,
) -> None:
    clock = Clock()
    catalog = CachedCatalog(inner, LIMITS, clock)
    assert await catalog.look_up(ObjectId("404"), "a") is None
    inner.known[ObjectId("404")] = replace(known(ObjectId("404")), accepted=False)
    clock.now = 5.0
    announced = await catalog.look_up(ObjectId("404"), "a")
    assert announced is not None
    assert not announced.accepted
    inner.known[ObjectId("404")] = known(ObjectId("404"))
    for now in (6.0, 7.9):
        clock.now = now
        assert await catalog.look_up(ObjectId("404"), "a") == announced
    clock.now = 8.0
    assert await catalog.look_up(ObjectId("404"), "a") == known(ObjectId("404"))
    await catalog.close()


async def test_an_id_that_the_catalog_cannot_have_costs_no_query(
    catalog: CachedCatalog, inner: ScriptedCatalog
) -> None:
    assert not catalog.can_have(ObjectId("xyzzy"))
    assert await catalog.look_up(ObjectId("xyzzy"), "a") is None
    assert inner.asked == []


@pytest.mark.parametrize("rate", [1, 10, 20, 333])
def test_the_rate_holds_in_every_second(rate: int) -> None:
    limit, now, sent = RateLimit(rate), 100.0, list[float]()
    while len(sent) < 5 * rate + 5:
        now = max(now, limit.next_at(reserved=len(sent) % 3 == 0))
        limit.spend(now)
        sent.append(now)
    assert all(sent[start + rate] >= sent[start] + 1 for start in range(len(sent) - rate))


@pytest.mark.parametrize("rate", [5, 10, 20, 100])
def test_one_query_is_reserved_for_objects_that_were_seen_before(rate: int) -> None:
    limit, now = RateLimit(rate), 100.0
    for _ in range(3 * rate):
        now = max(now, limit.next_at(reserved=False))
        limit.spend(now)
    assert limit.next_at(reserved=False) > now
    assert limit.next_at(reserved=True) < limit.next_at(reserved=False)
    if rate >= 10:
        assert limit.next_at(reserved=True) <= now + 1e-6


async def test_what_the_list_has_named_goes_before_made_up_ids(
    inner: ScriptedCatalog, tmp_path: Path
) -> None:
    draft = KnownIdsDraft()
    draft.update(ids(1, 3))
    draft.write(tmp_path)
    catalog = CachedCatalog(inner, LIMITS, Clock(), known_ids=KnownIds(tmp_path))
    await catalog.open()
    first = await blocked(catalog, inner)
    waiting = [ask(catalog, object_id, "stranger") for object_id in [*ids(1, 3), *ids(1000, 20)]]
    await asyncio.sleep(0)
    inner.answering.set()
    await asyncio.gather(first, *waiting)
    assert set(ids(1, 3)) <= set(inner.batches[1])
    await catalog.close()


@pytest.fixture
async def paced(inner: ScriptedCatalog, tmp_path: Path) -> AsyncIterator[CachedCatalog]:
    """A catalog that is asked for a batch of ten unseen objects, and then for none in ten seconds. 1 to 3 are known."""
    draft = KnownIdsDraft()
    draft.update(ids(1, 3))
    draft.write(tmp_path)
    limits = replace(LIMITS, max_in_flight=4, wait=5, max_unseen_rate=1)
    catalog = CachedCatalog(inner, limits, Clock(), known_ids=KnownIds(tmp_path))
    await catalog.open()
    yield catalog
    await catalog.close()


async def test_unseen_ids_wait_for_their_turn_and_known_ones_are_asked_for_alone(
    paced: CachedCatalog, inner: ScriptedCatalog
) -> None:
    strangers = [ask(paced, object_id, "stranger") for object_id in ids(1000, 20)]
    assert await strangers[0] is None
    for object_id in ids(1, 3):
        assert await paced.look_up(object_id, "viewer") is not None
    assert [len(batch) for batch in inner.batches] == [10, 1, 1, 1]
    assert inner.batches[1:] == [["1"], ["2"], ["3"]]
    assert sum(not stranger.done() for stranger in strangers) == 10
    await paced.close()
    await asyncio.gather(*strangers, return_exceptions=True)


async def test_unseen_ids_that_cannot_have_their_turn_in_time_are_refused_at_once(
    paced: CachedCatalog, inner: ScriptedCatalog
) -> None:
    """Five could be sent within the wait. At least a batch may wait, and one for each query under way."""
    strangers = [ask(paced, object_id, "stranger") for object_id in ids(1000, 40)]
    assert await strangers[0] is None
    await asyncio.sleep(0.05)
    refusals = [await refused(stranger) for stranger in strangers if stranger.done() and stranger.exception()]
    assert refusals == ["queue_full"] * len(refusals)
    assert len(refusals) == 40 - 10 - 14
    assert sum(not stranger.done() for stranger in strangers) == 14
    assert len(inner.batches) == 1
    await paced.close()
    await asyncio.gather(*strangers, return_exceptions=True)
