"""Heartbeats of the fetchers, and objects with viewers, for both adapters of the state store."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distributor_node.shared.adapters.state_memory import tables as records_in_memory
from distributor_node.shared.adapters.state_redis import store as records_on_redis
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import VIEW_WINDOW, Followed, Viewer
from distributor_node.shared.ports import state_store
from distributor_node.shared.ports.state_store import (
    FOLLOWER_MEMORY,
    FetchPhase,
    Granted,
    WorkerReport,
)
from tests.contract.state_harness import ONE, THREE, TWO, Harness

FIRST = WorkerReport("worker-1", slots=8, running=3, waiting=0, longest_wait=0.0)
SECOND = WorkerReport("worker-2", 4, 4, 7, 2.5, full_sources=("node.example:443", "10.0.0.1:80"), spare=2**40)


async def reports(harness: Harness) -> list[WorkerReport]:
    return [replace(report, age=0.0) for report in await harness.other.workers()]


class TestHeartbeats:
    async def test_there_is_none_at_first(self, harness: Harness) -> None:
        assert await reports(harness) == []

    async def test_another_process_reads_the_latest_of_each_worker(self, harness: Harness) -> None:
        await harness.store.report_worker(SECOND, 60)
        await harness.store.report_worker(FIRST, 60)
        assert await reports(harness) == [FIRST, SECOND]
        await harness.store.report_worker(replace(FIRST, running=8), 60)
        assert await reports(harness) == [replace(FIRST, running=8), SECOND]

    async def test_its_age_is_told(self, harness: Harness) -> None:
        await harness.store.report_worker(FIRST, 60)

        async def older() -> bool:
            [report] = await harness.other.workers()
            return report.age >= 0.1

        await harness.until(older)

    async def test_one_that_is_not_renewed_expires(self, harness: Harness) -> None:
        await harness.store.report_worker(FIRST, 0.2)
        await harness.store.report_worker(SECOND, 60)

        async def only_the_second() -> bool:
            return await reports(harness) == [SECOND]

        await harness.until(only_the_second)

    async def test_a_worker_that_ends_withdraws_its_own(self, harness: Harness) -> None:
        await harness.store.report_worker(FIRST, 60)
        await harness.store.report_worker(SECOND, 60)
        await harness.store.withdraw_worker("worker-1")
        await harness.store.withdraw_worker("worker-9")
        assert await reports(harness) == [SECOND]


class TestViewers:
    async def test_nobody_has_viewed_an_unknown_object(self, harness: Harness) -> None:
        assert list(await harness.store.last_viewed([ONE, TWO])) == [None, None]
        assert list(await harness.store.last_viewed([])) == []

    async def test_another_process_reads_the_age_of_each_in_the_order_asked(self, harness: Harness) -> None:
        await harness.store.record_viewers([ONE])
        await harness.advance_clock(0.3)
        await harness.store.record_viewers([TWO])
        two, unknown, one = await harness.other.last_viewed([TWO, THREE, ONE])
        assert unknown is None
        assert one is not None
        assert two is not None
        assert one - two >= 0.25

    async def test_a_viewer_that_returns_counts_from_then(self, harness: Harness) -> None:
        await harness.store.record_viewers([ONE, TWO])
        await harness.advance_clock(0.3)
        await harness.store.record_viewers([ONE])
        one, two = await harness.other.last_viewed([ONE, TWO])
        assert one is not None
        assert two is not None
        assert one < two

    async def test_no_object_does_nothing(self, harness: Harness) -> None:
        before = await harness.dump()
        await harness.store.record_viewers([])
        assert await harness.dump() == before

    async def test_only_so_many_objects_are_remembered(self, harness: Harness) -> None:
        await harness.store.record_viewers([ONE])
        await harness.advance_clock(0.05)
        others = [ObjectId(str(number)) for number in range(1000, 1000 + state_store.MAX_VIEWED)]
        for start in range(0, len(others), 1000):
            await harness.store.record_viewers(others[start : start + 1000])
        assert list(await harness.store.last_viewed([ONE])) == [None]
        assert None not in await harness.store.last_viewed(others[-1000:])


class TestWanted:
    async def test_an_object_that_nothing_waits_for_has_no_positions(self, harness: Harness) -> None:
        assert [list(found) for found in await harness.store.wanted_positions([ONE, TWO])] == [[], []]
        assert list(await harness.store.wanted_positions([])) == []

    async def test_another_process_reads_those_of_each_object_in_the_order_asked(
        self, harness: Harness
    ) -> None:
        await harness.store.record_wanted(ONE, [5_000_000_000_000, 7])
        await harness.other.record_wanted(ONE, [70, 7])
        await harness.store.record_wanted(TWO, [0])
        found = await harness.other.wanted_positions([TWO, THREE, ONE])
        assert [list(positions) for positions in found] == [[0], [], [7, 70, 5_000_000_000_000]]

    async def test_any_number_of_objects_can_be_asked_for(self, harness: Harness) -> None:
        await harness.store.record_wanted(THREE, [3])
        found = await harness.store.wanted_positions([ONE] * 30 + [THREE])
        assert [list(positions) for positions in found] == [[]] * 30 + [[3]]

    async def test_they_are_forgotten_soon_unless_they_are_wanted_again(self, harness: Harness) -> None:
        await harness.store.record_wanted(ONE, [1, 2])
        await harness.advance_clock(state_store.WANTED_MEMORY * 0.7)
        await harness.store.record_wanted(ONE, [2])
        await harness.advance_clock(state_store.WANTED_MEMORY * 0.5)
        assert [list(found) for found in await harness.store.wanted_positions([ONE])] == [[2]]
        await harness.advance_clock(state_store.WANTED_MEMORY)
        assert [list(found) for found in await harness.store.wanted_positions([ONE])] == [[]]

    async def test_the_latest_ones_of_an_object_are_remembered(self, harness: Harness) -> None:
        await harness.store.record_wanted(TWO, [9])
        await harness.store.record_wanted(ONE, [1])
        await harness.advance_clock(0.05)
        await harness.store.record_wanted(ONE, range(1000, 1000 + state_store.MAX_WANTED))
        found = await harness.store.wanted_positions([ONE, TWO])
        assert list(found[0]) == list(range(1000, 1000 + state_store.MAX_WANTED))
        assert list(found[1]) == [9]

    async def test_no_position_does_nothing(self, harness: Harness) -> None:
        before = await harness.dump()
        await harness.store.record_wanted(ONE, [])
        assert await harness.dump() == before


class TestQueued:
    async def test_usage_counts_jobs_that_have_not_begun(self, harness: Harness) -> None:
        await harness.reconciled()
        for object_id in (ONE, TWO):
            assert (await harness.store.claim(object_id, "api")).won
            await harness.store.mark_queued(object_id, "api")
        assert (await harness.store.claim(THREE, "api")).won
        usage = await harness.other.usage()
        assert (usage.queued, usage.fetches) == (2, 0)
        await harness.begin_fetch(ONE, 100)
        usage = await harness.other.usage()
        assert (usage.queued, usage.fetches) == (1, 1)


async def contents(harness: Harness) -> dict[str, str]:
    return {report.process: report.content for report in await harness.other.process_reports()}


class TestReports:
    async def test_another_process_reads_the_latest_of_each(self, harness: Harness) -> None:
        assert await contents(harness) == {}
        await harness.store.report_process("b", '{"kind": "fetcher"}', 60)
        await harness.store.report_process("a", "{}", 60)
        await harness.store.report_process("a", '{"text": "ä \\n"}', 60)
        assert list((await contents(harness)).items()) == [
            ("a", '{"text": "ä \\n"}'), ("b", '{"kind": "fetcher"}'),
        ]  # fmt: skip

    async def test_its_age_is_told(self, harness: Harness) -> None:
        await harness.store.report_process("a", "{}", 60)

        async def older() -> bool:
            [report] = await harness.other.process_reports()
            return 0.1 <= report.age < 60

        await harness.until(older)

    async def test_one_that_is_not_renewed_expires(self, harness: Harness) -> None:
        await harness.store.report_process("a", "{}", 0.2)
        await harness.store.report_process("b", "{}", 60)

        async def only_the_second() -> bool:
            return list(await contents(harness)) == ["b"]

        await harness.until(only_the_second)

    async def test_a_process_that_ends_withdraws_its_own(self, harness: Harness) -> None:
        await harness.store.report_process("a", "{}", 60)
        await harness.store.report_process("b", "{}", 60)
        await harness.store.withdraw_process("a")
        await harness.store.withdraw_process("c")
        assert list(await contents(harness)) == ["b"]

    async def test_processes_learn_that_a_page_is_open_until_it_is_not(self, harness: Harness) -> None:
        assert not await harness.store.report_process("a", "{}", 60)
        await harness.other.watch_reports(0.3)
        assert await harness.store.report_process("a", "{}", 60)

        async def unwatched() -> bool:
            return not await harness.store.report_process("a", "{}", 60)

        await harness.until(unwatched)

    async def test_workers_and_reports_are_kept_apart(self, harness: Harness) -> None:
        await harness.store.report_worker(FIRST, 60)
        await harness.store.report_process("a", "{}", 60)
        assert await reports(harness) == [FIRST]
        assert list(await contents(harness)) == ["a"]


HERE, THERE = Viewer(0, 5_000_000_000), Viewer(700, 900)


async def viewers_of(harness: Harness, object_id: ObjectId = ONE) -> set[Viewer]:
    return set((await harness.other.followers(object_id)).viewers)


class TestFollowers:
    async def test_each_process_tells_of_its_own(self, harness: Harness) -> None:
        await harness.store.claim(ONE, "api-1")
        assert not (await harness.other.followers(ONE)).told
        await harness.store.record_followers("api-1", [Followed(ONE, (HERE,))])
        await harness.store.record_followers("api-2", [Followed(ONE, (THERE, THERE)), Followed(TWO)])
        found = await harness.other.followers(ONE)
        assert (found.told, found.untold, found.whole, found.views) == (True, False, False, 0)
        assert sorted(found.viewers, key=lambda viewer: viewer.first) == [HERE, THERE, THERE]
        await harness.store.record_followers("api-1", [Followed(ONE)])
        assert await viewers_of(harness) == {THERE}
        assert await viewers_of(harness, TWO) == set()

    async def test_they_stay_with_the_fetch_and_end_with_it(self, harness: Harness) -> None:
        await harness.reconciled()
        claim = await harness.store.claim(ONE, "api-1")
        await harness.store.record_followers("api-1", [Followed(ONE, (HERE,), requested=True)])
        await harness.store.mark_queued(ONE, "api-1")
        granted = await harness.store.begin(ONE, 1000, "worker-1", claim.serial)
        assert isinstance(granted, Granted)
        assert await harness.store.renew(granted.lease, "http://node.example")
        assert await viewers_of(harness) == {HERE}
        await harness.store.park(granted.lease)
        assert (await harness.store.claim(ONE, "api-2")).won
        lease = await harness.begin_fetch(ONE, 1000)
        found = await harness.other.followers(ONE)
        assert (set(found.viewers), found.views) == ({HERE}, 1)
        await harness.store.release(lease)
        found = await harness.other.followers(ONE)
        assert (found.viewers, found.views, found.told) == ((), 0, False)

    async def test_a_report_does_not_prolong_what_has_expired(self, brief: Harness) -> None:
        await brief.store.claim(ONE, "api-1")
        await brief.store.mark_queued(ONE, "api-1")
        await brief.until_phase(ONE, None)
        await brief.store.record_followers("api-1", [Followed(ONE, (HERE,))])
        assert await brief.phase(ONE) is None
        await brief.reconciled()
        lease = await brief.begin_fetch(TWO, 1000)
        await brief.until_phase(TWO, FetchPhase.PARKED)
        await brief.store.record_followers("api-1", [Followed(TWO, (HERE,))])
        assert await brief.phase(TWO) is FetchPhase.PARKED
        assert await brief.store.renew(lease)
        assert await brief.phase(TWO) is FetchPhase.FETCHING

    async def test_a_process_that_has_ended_is_forgotten(
        self, harness: Harness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for adapter in (records_in_memory, records_on_redis):
            monkeypatch.setattr(adapter, "FOLLOWER_MEMORY", 0.2)
        await harness.store.claim(ONE, "api-1")
        await harness.store.record_followers("api-1", [Followed(ONE, (HERE,))])

        async def gone() -> bool:
            return await viewers_of(harness) == set()

        await harness.until(gone)
        await harness.store.record_followers("api-2", [Followed(ONE, (THERE,))])
        assert await viewers_of(harness) == {THERE}

    async def test_requests_of_one_view_count_once(
        self, harness: Harness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def request(process: str) -> int:
            await harness.store.record_followers(process, [Followed(ONE, (HERE,), requested=True)])
            return (await harness.other.followers(ONE)).views

        await harness.store.claim(ONE, "api-1")
        assert [await request("api-1"), await request("api-2"), await request("api-1")] == [1, 1, 1]
        for adapter in (records_in_memory, records_on_redis):
            monkeypatch.setattr(adapter, "VIEW_WINDOW", 0.2)
        await harness.advance_clock(0.3)
        await harness.store.record_followers("api-1", [Followed(ONE, (HERE,))])
        assert (await harness.other.followers(ONE)).views == 1
        assert await request("api-2") == 2
        assert VIEW_WINDOW == 300

    async def test_a_process_that_does_not_tell_is_noticed(self, harness: Harness) -> None:
        await harness.store.claim(ONE, "api-1")
        await harness.store.record_followers("api-1", [Followed(ONE, (HERE,))])
        await harness.advance_clock(0.05)
        await harness.store.record_viewers([ONE, TWO])
        assert (await harness.other.followers(ONE)).untold
        assert (await harness.other.followers(TWO)).untold
        await harness.advance_clock(0.05)
        await harness.store.record_followers("api-1", [Followed(ONE, (HERE,))])
        assert not (await harness.other.followers(ONE)).untold
        [age] = await harness.store.last_viewed([ONE])
        assert age is not None
        assert age < FOLLOWER_MEMORY

    async def test_what_is_ordered_or_pinned_is_wanted_whole(self, harness: Harness) -> None:
        for object_id in (ONE, TWO):
            await harness.store.claim(object_id, "api-1")
        await harness.store.order_whole(ONE)
        await harness.store.order_whole(THREE)
        await harness.store.change_pins(pin=[TWO])
        await harness.store.record_followers("api-1", [Followed(ONE, (HERE,)), Followed(TWO, (HERE,))])
        assert (await harness.other.followers(ONE)).whole
        assert (await harness.other.followers(TWO)).whole
        await harness.store.change_pins(unpin=[TWO])
        assert not (await harness.other.followers(TWO)).whole
        assert await harness.phase(THREE) is None
