"""How soon a byte of a growing file is expected."""

from __future__ import annotations

from distributor_node.services.api.assets.decision import UNVERIFIED_TAIL_BYTES, Span, bytes_missing
from distributor_node.services.api.assets.growing_file import FetchRates
from distributor_node.shared.domain.objects import ObjectId

ONE, TWO = ObjectId("1"), ObjectId("2")
SIZE = 10_000_000


class Growth:
    """A file that grows by the second, and its rates."""

    def __init__(self) -> None:
        self.now = 100.0
        self.size = 0
        self.rates = FetchRates(lambda: self.now)

    def grow(self, rate: int, seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            self.size += rate // 10
            self.rates.observe(ONE, self.size)


def test_nothing_is_expected_late_before_it_was_observed() -> None:
    growth = Growth()
    assert not growth.rates.expects_later(ONE, SIZE, 0.5)
    growth.rates.observe(ONE, 0)
    growth.grow(1000, 0.2)
    assert not growth.rates.expects_later(ONE, SIZE, 0.5)


def test_distance_divided_by_rate_decides() -> None:
    growth = Growth()
    growth.grow(1_000_000, 1.0)
    assert not growth.rates.expects_later(ONE, 490_000, 0.5)
    assert growth.rates.expects_later(ONE, 510_000, 0.5)
    assert not growth.rates.expects_later(TWO, 510_000, 0.5)


def test_the_rate_is_that_of_the_last_seconds() -> None:
    growth = Growth()
    growth.grow(10_000_000, 5.0)
    growth.grow(10_000, 5.0)
    assert growth.rates.expects_later(ONE, 100_000, 0.5)


def test_a_file_that_does_not_grow_is_given_the_whole_wait() -> None:
    growth = Growth()
    growth.grow(0, 0.4)
    assert not growth.rates.expects_later(ONE, 1, 0.5)
    growth.grow(0, 0.4)
    assert growth.rates.expects_later(ONE, 1, 0.5)


def test_a_file_that_begins_again_or_was_not_looked_at_is_unknown() -> None:
    growth = Growth()
    growth.grow(1_000, 2.0)
    growth.size = 0
    growth.rates.observe(ONE, 0)
    assert not growth.rates.expects_later(ONE, SIZE, 0.5)
    growth.grow(1_000, 2.0)
    growth.now += 60
    assert not growth.rates.expects_later(ONE, SIZE, 0.5)
    growth.rates.observe(ONE, growth.size)
    assert not growth.rates.expects_later(ONE, SIZE, 0.5)


def test_only_so_many_files_are_remembered() -> None:
    growth = Growth()
    growth.grow(1_000, 1.0)
    for number in range(1_000):
        growth.rates.observe(ObjectId(str(number + 10)), 0)
    assert not growth.rates.expects_later(ONE, SIZE, 0.5)


def test_missing_bytes_of_a_range() -> None:
    assert bytes_missing(Span(500, 599, SIZE, partial=True), 500) == 0
    assert bytes_missing(Span(500, 599, SIZE, partial=True), 400) == 101
    assert bytes_missing(Span(0, SIZE - 1, SIZE), 0) == 0
    # The last bytes are sent once the whole is verified.
    last = SIZE - UNVERIFIED_TAIL_BYTES
    assert bytes_missing(Span(last, SIZE - 1, SIZE, partial=True), 1_000) == SIZE - 1_000
    assert bytes_missing(Span(last - 1, SIZE - 1, SIZE, partial=True), 1_000) == last - 1_000
