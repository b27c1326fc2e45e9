"""The last hour and day of the node's page: counters added up over processes, samples, quantiles."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributor_node.services.api.dashboard.history import (
    MINUTES,
    SAMPLES,
    STEP,
    WIDTH,
    CounterSum,
    History,
    counted_by,
    quantile,
)
from distributor_node.shared.observability.metrics import FIRST_BYTE_BOUNDS
from distributor_node.shared.runtime.process_reports import Counted, ReportContent, ReportedProcess

BUCKETS = len(FIRST_BYTE_BOUNDS) + 1


def process(name: str, hits: float = 0, *, started: float = -1000.0, **counted: Any) -> ReportedProcess:
    content = ReportContent(
        kind="api", host="host", process=1, started=started, interval=1.0,
        counted=Counted(**{"requests": {"hit": hits}, **counted}),
    )  # fmt: skip
    return ReportedProcess(name, 0.0, content)


class TestCounters:
    def test_a_process_counts_from_the_second_reading_on(self) -> None:
        counters = CounterSum()
        assert counters.advance([process("a", 100)], now=10)[0] == 0
        assert counters.advance([process("a", 107)], now=20)[0] == 7

    def test_processes_add_up(self) -> None:
        counters = CounterSum()
        counters.advance([process("a", 100), process("b", 5)], now=10)
        assert counters.advance([process("a", 101), process("b", 8)], now=20)[0] == 4

    def test_a_process_that_has_started_since_counts_from_zero(self) -> None:
        counters = CounterSum()
        counters.advance([process("a", 100)], now=10)
        later = [
            process("a", 100),
            process("b", 9, started=15),
            process("late", 3, started=5),
            process("old", 50, started=-5),
        ]
        assert counters.advance(later, now=20)[0] == 9 + 3

    def test_a_report_that_is_missing_once_does_not_count_twice(self) -> None:
        counters = CounterSum()
        counters.advance([process("a", 100, started=5)], now=1)
        counters.advance([], now=10)
        assert counters.advance([process("a", 103, started=5)], now=20)[0] == 3

    def test_counters_never_shrink(self) -> None:
        counters = CounterSum()
        counters.advance([process("a", 100)], now=10)
        assert counters.advance([process("a", 3)], now=20)[0] == 0

    def test_what_another_version_counts_differently_counts_nothing(self) -> None:
        assert counted_by(process("a", first_byte=[1.0, 2.0], requests={"other": 7.0})) == [0.0] * WIDTH

    def test_each_counter_has_its_place(self) -> None:
        buckets = [0.0] * BUCKETS
        buckets[3] = 2
        counted = counted_by(
            process(
                "a", 1, sent={"local": 5, "external": 6}, fetched=7, evictions={"space": 2, "purged": 1},
                evicted_bytes=9, first_byte=buckets,
            )
        )  # fmt: skip
        assert counted[:9] == [1, 0, 0, 0, 5, 6, 7, 3, 9]
        assert counted[9:] == buckets


def sample(hits: float) -> list[float]:
    return [hits, *[0.0] * (WIDTH - 1)]


class TestHistory:
    def test_nothing_was_seen_at_first(self) -> None:
        history = History()
        assert history.as_json()["hit"] == []
        assert {total["seconds"] for total in history.totals().values()} == {0.0}
        assert history.totals()["day"]["hit"] == 0

    def test_minute_hour_and_day_are_sums(self) -> None:
        history = History()
        for number in range(7):
            history.add(sample(10 ** (number % 2)), now=STEP * number)
        totals = history.totals()
        assert totals["minute"]["hit"] == 3 * 1 + 3 * 10
        assert totals["hour"]["hit"] == totals["day"]["hit"] == 4 * 1 + 3 * 10
        assert (totals["minute"]["seconds"], totals["hour"]["seconds"]) == (60, 70)

    def test_the_hour_and_the_day_end(self) -> None:
        history = History()
        history.add(sample(1000), now=0)
        for number in range(SAMPLES):
            history.add(sample(1), now=number)
        assert len(history.as_json()["hit"]) == SAMPLES
        assert history.totals()["hour"]["hit"] == SAMPLES
        assert history.totals()["day"]["hit"] == SAMPLES + 1000
        for number in range(MINUTES * 6):
            history.add(sample(1), now=number)
        assert history.totals()["day"]["hit"] == pytest.approx(MINUTES * 6, abs=6)
        assert history.totals()["day"]["seconds"] == 24 * 3600

    def test_columns_are_in_order_of_time(self) -> None:
        history = History()
        for number in range(SAMPLES + 5):
            history.add(sample(number), now=number)
        shown = history.as_json()
        assert shown["hit"] == list(range(5, SAMPLES + 5))
        assert shown["p50"] == [None] * SAMPLES
        assert shown["ends"] == SAMPLES + 4


class TestQuantile:
    def test_none_without_observations(self) -> None:
        assert quantile([0.0] * BUCKETS, 0.5) is None

    def test_within_a_bucket_it_is_interpolated(self) -> None:
        counts = [0.0] * BUCKETS
        counts[1] = 10  # 1 to 2.5 ms
        assert quantile(counts, 0.5) == pytest.approx(0.00175)

    def test_beyond_the_last_bound(self) -> None:
        assert quantile([*[0.0] * (BUCKETS - 1), 3.0], 0.5) == FIRST_BYTE_BOUNDS[-1]

    @given(st.lists(st.integers(0, 50), min_size=BUCKETS, max_size=BUCKETS), st.floats(0.01, 0.99))
    def test_it_lies_in_the_bucket_of_that_observation(self, counts: list[int], share: float) -> None:
        found = quantile(counts, share)
        observations = [place for place, count in enumerate(counts) for _ in range(count)]
        if not observations:
            assert found is None
            return
        place = observations[min(len(observations) - 1, int(share * len(observations)))]
        earlier = observations[max(0, int(share * len(observations)) - 1)]
        assert found is not None
        assert found >= (FIRST_BYTE_BOUNDS[earlier - 1] if earlier else 0.0) - 1e-5
        assert found <= FIRST_BYTE_BOUNDS[min(place, BUCKETS - 2)] + 1e-5
