"""Pure decisions of the evictor, its periodic runner and its id set."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributor_node.services.evictor.assignment import implausible_reason
from distributor_node.services.evictor.integrity import Verdict, judge_size
from distributor_node.services.evictor.leader_election import MAX_BACKOFF, MIN_BACKOFF, run_periodically
from distributor_node.shared.domain.errors import ConfigurationError, StateStoreUnavailable
from distributor_node.shared.domain.eviction import POLICY_NAMES, PolicyEntry, make_policy
from distributor_node.shared.domain.objects import CompactIdSet, MediaObject, ObjectId
from distributor_node.shared.domain.space import (
    DeviceSpace,
    EvictionReason,
    Usage,
    Watermarks,
    fitting_requests,
    footprint,
)
from distributor_node.shared.runtime.threads import run_blocking
from distributor_node.shared.waiting import Backoff

bytes_ = st.integers(0, 10**15)


@given(bytes_, bytes_, bytes_, bytes_, bytes_)
def test_eviction_frees_the_requested_space(
    used: int, reserved: int, wanted: int, limit: int, device_free: int
) -> None:
    usage = Usage(limit=limit, used=used, reserved=reserved, objects=1, fetches=0, reconciled=True)
    marks = Watermarks(low=limit // 2, high=limit * 9 // 10)
    evicted = marks.to_evict(usage, wanted, device_free)
    left = used + reserved - evicted
    assert evicted >= 0
    assert left <= marks.high
    assert limit - left >= wanted
    assert device_free + evicted >= wanted
    if used + reserved <= marks.high and wanted <= min(usage.free, device_free):
        assert evicted == 0


@pytest.mark.parametrize(
    ("requests", "available", "fitting"),
    [
        ((), 10, 0),
        ((70,), 69, 0),
        ((70,), 70, 70),
        ((70, 5, 20), 30, 25),
        ((70, 5, 20), 95, 95),
        ((5,), -1, 0),
    ],
)
def test_a_large_request_that_does_not_fit_keeps_no_smaller_one_waiting(
    requests: tuple[int, ...], available: int, fitting: int
) -> None:
    assert fitting_requests(requests, available) == fitting


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 100)), max_size=30),
    st.integers(0, 100),
    st.integers(0, 10**10),
)
def test_evictable_is_what_the_victims_sum_up_to(
    name: str, objects: list[tuple[int, int]], min_idle: int, wanted: int
) -> None:
    policy, spared = make_policy(name), {ObjectId("0"), ObjectId("1")}
    for number, (size, last_access) in enumerate(objects):
        policy.add(PolicyEntry(ObjectId(str(number)), size, 1, last_access))
    policy.remove(ObjectId("2"))
    victims = policy.victims(10**12, 100.0, min_idle=min_idle, spared=spared)
    total = sum(footprint(victim.size) for victim in victims)
    assert policy.evictable(10**12, 100.0, min_idle=min_idle, spared=spared) == total
    enough = policy.evictable(wanted, 100.0, min_idle=min_idle, spared=spared)
    assert min(wanted, total) <= enough <= total


@pytest.mark.parametrize(
    ("used", "wanted", "device_free", "reason"),
    [
        (95, 0, 1000, EvictionReason.HIGH_WATERMARK),
        (95, 10, 1000, EvictionReason.HIGH_WATERMARK),
        (80, 30, 1000, EvictionReason.SPACE_REQUESTED),
        (95, 60, 1000, EvictionReason.SPACE_REQUESTED),
        (20, 30, 10, EvictionReason.DEVICE_FULL),
        (80, 30, 15, EvictionReason.DEVICE_FULL),
    ],
)
def test_the_larger_demand_is_the_reason_to_evict(
    used: int, wanted: int, device_free: int, reason: EvictionReason
) -> None:
    usage = Usage(limit=100, used=used, reserved=0, objects=1, fetches=0, reconciled=True)
    marks = Watermarks(low=50, high=90)
    assert marks.to_evict(usage, wanted, device_free) > 0
    assert marks.reason_to_evict(usage, wanted, device_free) is reason


@pytest.mark.parametrize(
    ("files", "free", "objects"),
    [
        (None, None, 0),  # made as needed
        (100_000, 1000, 0),
        (100_000, 999, 501),
        (100_000, 0, 1000),
        (10_000_000, 1000, 0),
        (5000, 99, 51),
        (160, 32, 0),
        (160, 31, 17),
    ],
)
def test_objects_to_evict_for_inodes(files: int | None, free: int | None, objects: int) -> None:
    assert DeviceSpace(0, free, files).objects_to_evict() == objects


@pytest.mark.parametrize(
    ("held", "listed", "to_drop", "believed"),
    [
        (0, 0, 0, True),
        (10, 0, 10, False),
        (10, 10, 0, True),
        (10, 100, 5, True),
        (10, 100, 6, False),
        (1, 1, 1, False),
        (3, 2, 1, True),
    ],
)
def test_implausible_lists(held: int, listed: int, to_drop: int, believed: bool) -> None:
    assert (implausible_reason(held, listed, to_drop) is None) is believed


def test_a_file_without_a_record_is_judged_by_its_size() -> None:
    one = ObjectId("one")
    assert judge_size(None, 5) is Verdict.UNKNOWN
    assert judge_size(MediaObject(one, None), 5) is Verdict.UNKNOWN
    assert judge_size(MediaObject(one, 5), 5) is Verdict.CONFIRMED
    assert judge_size(MediaObject(one, 6), 5) is Verdict.MISMATCH


def test_compact_set_contains_what_was_added() -> None:
    known = CompactIdSet()
    assert ObjectId("0") not in known
    known.update(ObjectId(f"{number}") for number in range(1000))
    assert all(ObjectId(f"{number}") in known for number in range(1000))
    known.update([ObjectId("late")])
    assert ObjectId("late") in known
    assert "never" not in known
    assert len(known) == 1001


def test_pauses_after_errors_grow_and_are_bounded() -> None:
    backoff = Backoff(MIN_BACKOFF, MAX_BACKOFF, jitter=False)
    delays = [backoff.next_delay() for _ in range(40)]
    assert delays == sorted(delays)
    assert (delays[0], delays[-1]) == (MIN_BACKOFF, MAX_BACKOFF)


async def test_work_goes_on_after_an_error_worth_retrying() -> None:
    seen: list[Exception] = []
    calls = 0

    async def step() -> float | None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise StateStoreUnavailable("away")
        return 0.0 if calls < 4 else None

    await run_periodically("test", step, on_error=seen.append)
    assert calls == 4
    assert [type(error) for error in seen] == [StateStoreUnavailable]


async def test_an_internal_error_is_not_swallowed() -> None:
    async def step() -> float:
        raise ConfigurationError("wrong")

    with pytest.raises(ConfigurationError):
        await run_periodically("test", step)


async def test_an_event_shortens_the_wait() -> None:
    wake, calls = asyncio.Event(), 0

    async def step() -> float | None:
        nonlocal calls
        calls += 1
        return 3600.0 if calls == 1 else None

    working = asyncio.create_task(run_periodically("test", step, wake))
    await asyncio.sleep(0)
    wake.set()
    async with asyncio.timeout(60):
        await working
    assert calls == 2


async def test_a_cancelled_file_call_is_waited_for() -> None:
    begun, ended = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        time.sleep(0.2)
        ended.set()

    call = asyncio.create_task(run_blocking(slow))
    await asyncio.to_thread(begun.wait)
    call.cancel()
    await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert ended.is_set()
