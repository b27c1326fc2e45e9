"""Range headers mean what RFC 9110 section 14 says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributor_node.shared.domain.conditionals import (
    ByteRange,
    Unsatisfiable,
    parse_content_range,
    parse_range,
)
from distributor_node.shared.domain.errors import InvalidInput

WHOLE = None
NOTHING = Unsatisfiable(100)


@pytest.mark.parametrize(
    ("header", "meaning"),
    [
        (None, WHOLE),
        ("bytes=0-0", ByteRange(0, 0)),
        ("bytes=0-99", ByteRange(0, 99)),
        ("bytes=10-19", ByteRange(10, 19)),
        ("bytes=10-", ByteRange(10, 99)),
        ("bytes=99-", ByteRange(99, 99)),
        ("bytes=90-1000", ByteRange(90, 99)),
        ("bytes=0-99999999999999999999999", ByteRange(0, 99)),
        ("bytes=-1", ByteRange(99, 99)),
        ("bytes=-100", ByteRange(0, 99)),
        ("bytes=-5000", ByteRange(0, 99)),
        ("BYTES=0-1", ByteRange(0, 1)),
        ("bytes= 0-1 ", ByteRange(0, 1)),
        ("bytes=,0-1,", ByteRange(0, 1)),
        ("bytes=100-", NOTHING),
        ("bytes=100-200", NOTHING),
        ("bytes=-0", NOTHING),
        ("bytes=100-50", WHOLE),
        ("bytes=20-10", WHOLE),
        ("bytes=0-1,5-6", WHOLE),
        ("bytes=0-1,100-200", WHOLE),
        ("bytes=", WHOLE),
        ("bytes=-", WHOLE),
        ("bytes", WHOLE),
        ("", WHOLE),
        ("bytes=a-b", WHOLE),
        ("bytes=0 - 1", WHOLE),
        ("bytes=+0-1", WHOLE),
        ("bytes=0-1-2", WHOLE),
        ("bytes=1.0-2", WHOLE),
        ("bytes=٠-١", WHOLE),
        ("bytes=0-1\n", WHOLE),
        ("octets=0-1", WHOLE),
        ("bytes =0-1", WHOLE),
        ("bytes\t=0-1", WHOLE),
        (" bytes=0-1", WHOLE),
        ("0-1", WHOLE),
        ("bytes=0-" + "9" * 41, WHOLE),
        ("bytes=" + "9" * 5000 + "-", WHOLE),
        ("bytes=" + "," * 5000 + "0-1", WHOLE),
    ],
)
def test_a_range_of_a_hundred_bytes(header: str | None, meaning: ByteRange | Unsatisfiable | None) -> None:
    assert parse_range(header, 100) == meaning


@pytest.mark.parametrize(
    ("header", "meaning"),
    [
        (None, WHOLE),
        ("bytes=0-", Unsatisfiable(0)),
        ("bytes=0-0", Unsatisfiable(0)),
        ("bytes=-0", Unsatisfiable(0)),
        ("bytes=-5", WHOLE),
    ],
)
def test_a_range_of_an_empty_object(header: str | None, meaning: Unsatisfiable | None) -> None:
    assert parse_range(header, 0) == meaning


@given(st.text() | st.text("bytes=0123456789-, ").map("bytes=".__add__), st.integers(0, 10**12))
def test_any_text_gives_the_whole_or_a_range_within_it(header: str, size: int) -> None:
    meaning = parse_range(header, size)
    if isinstance(meaning, ByteRange):
        assert 0 <= meaning.first <= meaning.last < size


@given(st.integers(0, 10**12), st.integers(0, 10**12), st.integers(0, 10**12))
def test_a_range_keeps_its_beginning_and_is_clamped_to_the_object(first: int, length: int, size: int) -> None:
    meaning = parse_range(f"bytes={first}-{first + length}", size)
    if first >= size:
        assert meaning == Unsatisfiable(size)
    else:
        assert meaning == ByteRange(first, min(first + length, size - 1))


@given(st.integers(0, 10**12), st.integers(0, 10**12), st.integers(1, 10**12))
def test_a_range_survives_being_sent_and_answered(first: int, length: int, beyond: int) -> None:
    byte_range = ByteRange(first, first + length)
    size = byte_range.last + beyond
    assert parse_range(str(byte_range), size) == byte_range
    assert parse_content_range(byte_range.content_range(size)) == (byte_range, size)


@pytest.mark.parametrize(("first", "last"), [(-1, 0), (5, 4)])
def test_impossible_ranges_are_refused(first: int, last: int) -> None:
    with pytest.raises(InvalidInput):
        ByteRange(first, last)


def test_lengths_count_both_ends() -> None:
    assert ByteRange(10, 10).length == 1
    assert ByteRange(0, 99).length == 100


@pytest.mark.parametrize(
    ("header", "meaning"),
    [
        ("bytes 0-9/100", (ByteRange(0, 9), 100)),
        ("bytes 0-9/*", (ByteRange(0, 9), None)),
        ("bytes 9-0/100", None),
        ("bytes 0-100/100", None),
        ("bytes */100", None),
        ("bytes=0-9/100", None),
        ("", None),
    ],
)
def test_content_ranges(header: str, meaning: tuple[ByteRange, int | None] | None) -> None:
    assert parse_content_range(header) == meaning


def test_an_unsatisfiable_range_tells_the_size() -> None:
    assert Unsatisfiable(1234).content_range == "bytes */1234"
