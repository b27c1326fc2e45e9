"""Sources are asked in the catalog's order, the failing and the slow ones later."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.adapters.sources.health import HealthBook
from shared.domain.source_order import SourceHealth, order

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


def test_much_slower_sources_go_behind_but_before_failed_ones() -> None:
    health = {
        "a": SourceHealth(mean_first_byte=2.0),
        "b:81": SourceHealth(1, 100.0),
        "c": SourceHealth(mean_first_byte=0.2),
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
            st.none() | st.floats(0, 1e6),
        ),
    ),
    st.floats(0, 1e9),
)
def test_no_source_is_lost_or_invented(
    sources: list[str], health: dict[str, SourceHealth], now: float
) -> None:
    ordered = order(sources, health, now)
    assert sorted(ordered) == sorted(set(sources))


def test_the_book_forgives_after_a_success() -> None:
    now = 10.0
    book = HealthBook(clock=lambda: now)
    book.record_failure(A)
    assert book.best_first([A, B]) == (B, A)
    book.record_success(A)
    assert book.best_first([A, B]) == (A, B)


def test_the_book_takes_a_mean_of_first_bytes() -> None:
    book = HealthBook(clock=lambda: 0.0)
    book.record_first_byte(B, 0.1)
    book.record_first_byte(B, 0.5)
    assert book.best_first([B, A]) == (B, A), "one slow answer among quick ones changes nothing"
    for _ in range(30):
        book.record_first_byte(B, 3.0)
    assert book.best_first([B, A]) == (A, B)
