"""Sources are tried in the order of the catalog, failing and slow ones later."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distributor_node.shared.adapters.sources.health import SourceHealthRegistry
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.source_order import RateSampler, SourceHealth, SourceStatsDelta, order
from distributor_node.shared.ports.source_stats import CorruptedCopy, SharedSources

A, B, C = "http://a/1", "http://b:81/1", "https://c/1"


def test_the_catalogs_order_without_history() -> None:
    assert order([B, A, C], {}, now=0.0) == (B, A, C)


def test_each_source_once() -> None:
    assert order([B, A, B], {}, now=0.0) == (B, A)


def test_a_failed_source_goes_last_until_its_penalty_ends() -> None:
    health = {"a": SourceHealth(failures=1, last_failure_at=100.0)}
    assert order([A, B, C], health, now=101.0) == (B, C, A)
    assert order([A, B, C], health, now=102.0) == (A, B, C)


def test_penalties_double_and_are_bounded() -> None:
    ends = [SourceHealth(failures=count).penalty_ends for count in (1, 2, 3, 4)]
    assert ends == [2.0, 4.0, 8.0, 16.0]
    assert SourceHealth(failures=10**6).penalty_ends == 300.0


def test_among_failed_ones_the_first_to_recover_comes_first() -> None:
    health = {"a": SourceHealth(5, 100.0), "b:81": SourceHealth(1, 100.0), "c": SourceHealth(2, 100.0)}
    assert order([A, B, C], health, now=101.0) == (B, C, A)


def test_much_slower_sources_rank_below_others_but_above_failed_ones() -> None:
    health = {
        "a": SourceHealth(first_bytes=(2.0,)),
        "b:81": SourceHealth(1, 100.0),
        "c": SourceHealth(first_bytes=(0.2,)),
    }
    assert order([A, B, C], health, now=100.0) == (C, A, B)


@given(
    st.lists(st.sampled_from([A, B, C]), max_size=5),
    st.dictionaries(
        st.sampled_from(["a", "b:81", "c"]),
        st.builds(
            SourceHealth,
            st.integers(0, 10**9),
            st.floats(0, 1e9),
            st.lists(st.floats(0, 1e6), max_size=10).map(tuple),
            st.none() | st.floats(0, 1e9),
        ),
    ),
    st.floats(0, 1e9),
)
def test_no_source_is_lost_or_invented(
    sources: list[str], health: dict[str, SourceHealth], now: float
) -> None:
    ordered = order(sources, health, now)
    assert sorted(ordered) == sorted(set(sources))


def test_of_fast_sources_the_fastest_comes_first() -> None:
    health = {
        "a": SourceHealth(first_bytes=(0.2,)),
        "b:81": SourceHealth(first_bytes=(0.05,)),
        "c": SourceHealth(first_bytes=(0.012, 0.008)),
    }
    assert order([A, B, C], health, now=0.0) == (C, B, A)


def test_a_slowdown_is_seen_in_two_answers() -> None:
    slowing = SourceHealth(first_bytes=(0.01,) * 10)
    steady = SourceHealth(first_bytes=(0.02,) * 10)
    for _ in range(2):
        slowing = SourceStatsDelta(SourceHealth(first_bytes=(0.2,))).apply_to(slowing)
    assert order([A, B], {"a": slowing, "b:81": steady}, now=0.0) == (B, A)


def test_a_modest_slowdown_is_seen_in_two_answers_too() -> None:
    slowing, steady = SourceHealth(first_bytes=(0.01,) * 10), SourceHealth(first_bytes=(0.05,) * 10)
    for _ in range(2):
        assert order([A, B], {"a": slowing, "b:81": steady}, now=0.0) == (A, B)
        slowing = SourceStatsDelta(SourceHealth(first_bytes=(0.1,))).apply_to(slowing)
    assert order([A, B], {"a": slowing, "b:81": steady}, now=0.0) == (B, A)


def test_two_quick_answers_do_not_make_up_for_eight_slow_ones() -> None:
    health = {
        "a": SourceHealth(first_bytes=(0.2,) * 8 + (0.01,) * 2),
        "b:81": SourceHealth(first_bytes=(0.05,) * 10),
    }
    assert order([A, B], health, now=0.0) == (B, A)


def test_an_unreachable_source_ranks_last_until_it_recovers() -> None:
    unreached = SourceStatsDelta(SourceHealth(unreachable_at=100.0)).apply_to(
        SourceHealth(first_bytes=(0.001,))
    )
    assert order([A, B], {"a": unreached}, now=160.0) == (B, A)
    reached = SourceStatsDelta(SourceHealth(first_bytes=(0.001,)), reached=True).apply_to(unreached)
    assert order([A, B], {"a": reached}, now=160.0) == (A, B)


NEWS = st.builds(
    SourceStatsDelta,
    st.builds(
        SourceHealth,
        st.integers(0, 3),
        st.floats(0, 100),
        st.lists(st.floats(0, 1), max_size=12).map(tuple),
        st.none() | st.floats(0, 100),
    ),
    st.booleans(),
    st.booleans(),
)


@given(NEWS, NEWS, NEWS)
def test_batched_events_equal_single_ones(
    first: SourceStatsDelta, second: SourceStatsDelta, third: SourceStatsDelta
) -> None:
    one_by_one = third.apply_to(second.apply_to(first.apply_to(SourceHealth())))
    assert first.followed_by(second).followed_by(third).apply_to(SourceHealth()) == one_by_one
    assert first.followed_by(second.followed_by(third)).apply_to(SourceHealth()) == one_by_one


def test_a_corrupt_copy_is_skipped_for_its_object_only() -> None:
    now = 10.0
    registry = SourceHealthRegistry(clock=lambda: now, corrupted_memory=60.0)
    registry.record_corrupted(ObjectId("1"), A)
    assert registry.best_first([A, B], ObjectId("1")) == (B,)
    assert registry.best_first([A, B], ObjectId("2")) == (A, B)
    now = 70.0
    assert registry.best_first([A, B], ObjectId("1")) == (A, B)


def test_the_only_copy_is_asked_again_after_seconds_that_double() -> None:
    now, one = 10.0, ObjectId("1")
    registry = SourceHealthRegistry(clock=lambda: now, corrupted_memory=600.0)
    waited = []
    for _ in range(9):
        registry.record_corrupted(one, A)
        assert registry.best_first([A], one) == ()
        assert registry.best_first([A, B], one) == (B,), "another copy is preferred"
        began = now
        while not registry.best_first([A], one):
            now += 0.5
        waited.append(now - began)
        assert registry.best_first([A, B], one) == (B,) or now - began >= 600
    assert waited == [5, 10, 20, 40, 80, 160, 320, 600, 5], "after a whole memory the count begins again"


def test_another_process_learns_of_the_only_copy_and_counts_its_failures() -> None:
    now, one = 10.0, ObjectId("1")
    registry = SourceHealthRegistry(clock=lambda: now, corrupted_memory=600.0)

    def share(seconds_left: float) -> None:
        registry.merge(SharedSources({}, (CorruptedCopy(one, "a", seconds_left),)))

    share(600)
    assert registry.best_first([A], one) == ()
    now += 5
    share(595)
    assert registry.best_first([A], one) == (A,)
    share(600)  # another process has asked, and got wrong bytes once more
    now += 5
    share(595)
    assert registry.best_first([A], one) == ()
    now += 5
    share(590)
    assert registry.best_first([A], one) == (A,)


def test_unflushed_accesses_are_kept_in_order() -> None:
    registry = SourceHealthRegistry(clock=lambda: 0.0)
    registry.record_first_byte(A, 0.1)
    registry.record_failure(A)
    deltas, _ = registry.take_delta()
    assert list(deltas) == ["a"]
    registry.record_success(A)
    assert registry.health_of("a") == SourceHealth(first_bytes=(0.1,)), "nothing is forgotten"
    registry.restore()
    assert registry.health_of("a") == SourceHealth(first_bytes=(0.1,))
    deltas, _ = registry.take_delta()
    assert deltas["a"].apply_to(SourceHealth(failures=3)) == SourceHealth(first_bytes=(0.1,))


def test_a_corrupt_copy_found_during_a_sync_is_sent_in_the_next_one() -> None:
    registry = SourceHealthRegistry(clock=lambda: 0.0)
    registry.record_corrupted(ObjectId("1"), A)
    _, taken = registry.take_delta()
    assert [copy.object_id for copy in taken] == ["1"]
    registry.record_corrupted(ObjectId("2"), A)
    registry.merge(SharedSources({}, ()))
    _, taken = registry.take_delta()
    assert [copy.object_id for copy in taken] == ["2"]
    registry.restore()
    registry.record_corrupted(ObjectId("3"), A)
    _, taken = registry.take_delta()
    assert [copy.object_id for copy in taken] == ["2", "3"]


def test_the_registry_clears_penalties_after_a_success() -> None:
    now = 10.0
    registry = SourceHealthRegistry(clock=lambda: now)
    registry.record_failure(A)
    assert registry.best_first([A, B]) == (B, A)
    registry.record_success(A)
    assert registry.best_first([A, B]) == (A, B)


def test_the_registry_averages_first_byte_times() -> None:
    registry = SourceHealthRegistry(clock=lambda: 0.0)
    registry.record_first_byte(B, 0.1)
    registry.record_first_byte(B, 0.5)
    assert registry.best_first([B, A]) == (B, A), "one slow answer among quick ones changes nothing"
    for _ in range(30):
        registry.record_first_byte(B, 3.0)
    assert registry.best_first([B, A]) == (A, B)


class TestRateSampler:
    @staticmethod
    def outpaced_after(rate: int, best_other: float, left: int = 10**9, step: float = 0.1) -> float | None:
        """Seconds until the source counts as outpaced; None: never in a minute."""
        sampler = RateSampler()
        for number in range(1, round(60 / step) + 1):
            sample = sampler.add(step, round(rate * step))
            if sample is not None and sampler.is_outpaced(sample, best_other, left):
                return number * step
        return None

    def test_below_half_of_the_best_other_rate_for_three_seconds(self) -> None:
        after = self.outpaced_after(9_000, 1_000_000)
        assert after is not None
        assert 3.0 <= after <= 4.5

    def test_half_of_it_is_enough(self) -> None:
        assert self.outpaced_after(500_000, 999_000) is None
        assert self.outpaced_after(9_000, 0.0) is None

    def test_a_download_that_ends_soon_is_left_alone(self) -> None:
        assert self.outpaced_after(9_000, 1_000_000, left=20_000) is None

    def test_a_slow_moment_is_forgiven(self) -> None:
        sampler = RateSampler()
        found = []
        for rate in (9_000, 9_000, 900_000) * 5:
            sample = sampler.add(1.0, rate)
            assert sample == rate
            found.append(sampler.is_outpaced(sample, 1_000_000, 10**9))
        assert not any(found)

    def test_waiting_alone_counts(self) -> None:
        sampler = RateSampler()
        assert sampler.add(0.0, 10_000_000) is None
        assert sampler.mean == 10_000_000 / 0.05

    def test_few_bytes_tell_nothing(self) -> None:
        sampler = RateSampler()
        sampler.add(0.5, 1_000)
        assert sampler.mean is None


def test_rates_rank_sources_while_they_are_recent() -> None:
    now = 10.0
    registry = SourceHealthRegistry(clock=lambda: now)
    assert registry.best_first([A, B]) == (A, B)
    registry.record_rate(A, 9_000)
    assert registry.best_first([A, B]) == (B, A), "one of unknown rate is worth a try"
    registry.record_rate(B, 15_000)
    assert registry.best_first([A, B]) == (A, B), "less than twice as fast"
    for _ in range(5):
        registry.record_rate(B, 1_000_000)
    assert registry.best_first([A, B]) == (B, A)
    registry.record_failure(B)
    assert registry.best_first([A, B]) == (A, B), "fast ones that fail come last"
    now += 120
    assert registry.rate_of(A) is None
