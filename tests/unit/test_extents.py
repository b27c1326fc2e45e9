"""Extents against a model: a set of bytes. And a partial file's life: writes, syncs, crashes and resumes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.extents import BLOCK, MAX_EXTENTS, Extents

SIZE = 40 * BLOCK + 123
RANGES = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE))


def bytes_of(extents: Extents) -> set[int]:
    return {position for extent in extents for position in range(extent.first, extent.end)}


SMALL = st.tuples(st.integers(0, 60), st.integers(0, 60))


@given(st.lists(SMALL, max_size=12), st.integers(0, 70), st.integers(0, 70))
def test_as_a_set_of_bytes(ranges: list[tuple[int, int]], position: int, other: int) -> None:
    extents, model = Extents(), set[int]()
    for first, end in ranges:
        extents = extents.adding(first, end)
        model |= set(range(first, end))
    assert extents == Extents.of(*ranges)
    assert bytes_of(extents) == model
    assert extents.total == len(model)
    for one, following in zip(extents.extents, extents.extents[1:], strict=False):
        assert one.first < one.end < following.first
    end = position
    while end in model:
        end += 1
    assert extents.end_at(position) == end
    assert extents.prefix == next(number for number in range(100) if number not in model)
    assert extents.contains(position, other) == all(number in model for number in range(position, other))
    missing = {number for number in range(64) if number not in model}
    assert {number for gap in extents.gaps(64) for number in range(gap.first, gap.end)} == missing
    gap = extents.gap_at(position, 64)
    beyond = sorted(number for number in missing if number >= position)
    assert (gap.first if gap else None) == (beyond[0] if beyond else None)
    if gap is not None:
        assert gap.end == 64 or gap.end in model


@given(st.lists(RANGES, max_size=30), st.integers(1, MAX_EXTENTS))
def test_a_record_names_nothing_that_is_not_there(ranges: list[tuple[int, int]], at_most: int) -> None:
    extents = Extents.of(*ranges)
    named = extents.in_blocks(SIZE, at_most)
    assert len(named) <= at_most
    assert all(extents.contains(extent.first, extent.end) for extent in named)
    assert Extents.decode(named.encode(), SIZE) == named
    if len(extents) <= at_most:
        assert extents.total - named.total <= 2 * BLOCK * len(extents)


def test_the_first_extent_and_the_longest_are_named() -> None:
    extents = Extents.of((0, BLOCK), (2 * BLOCK, 3 * BLOCK), (4 * BLOCK, 7 * BLOCK), (8 * BLOCK, 10 * BLOCK))
    assert extents.in_blocks(SIZE, 2) == Extents.of((0, BLOCK), (4 * BLOCK, 7 * BLOCK))
    assert Extents.of((0, SIZE)).in_blocks(SIZE) == Extents.of((0, SIZE))
    assert Extents.of((0, SIZE)).encode() == f"0-{40 + 1:x}"


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "0-0",
        "5-3",
        "0-1,1-2",
        "0-4,2-6",
        "4-6,0-2",
        "0-2a",
        "x-y",
        "0-1,",
        "-1-2",
        "0-1 ",
        "00000000000000-1",
    ],
)
def test_what_no_record_says_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="extents"):
        Extents.decode(text, SIZE)


def test_too_many_are_refused() -> None:
    text = ",".join(f"{2 * number:x}-{2 * number + 1:x}" for number in range(MAX_EXTENTS + 1))
    with pytest.raises(InvalidInput, match="extents"):
        Extents.decode(text, 1000 * BLOCK)


def bits_of(extents: Extents) -> int:
    """The same set as a number with a bit for each byte: here it has hundreds of thousands."""
    return sum((1 << extent.end) - (1 << extent.first) for extent in extents)


@dataclass
class ModelFile:
    """A partial file as a crash leaves it: bytes are synced, or perhaps lost; the record is replaced in one step."""

    cached: int = 0  # written, synced or not; a bit for each byte
    synced: int = 0
    record: str = ""  # as synced

    def crash(self, survivors: int) -> None:
        """`survivors`: of what was not synced, it may be anything."""
        self.cached = self.synced = self.synced | (self.cached & survivors)


STEPS = st.one_of(
    st.tuples(st.just("write"), RANGES),
    st.tuples(st.just("record"), st.just(())),
    st.tuples(st.just("sync, then crash"), st.just(())),
    st.tuples(st.just("crash"), st.sets(st.integers(0, SIZE // BLOCK), max_size=10)),
)


@settings(max_examples=200)
@given(st.lists(STEPS, max_size=25))
def test_no_byte_is_believed_that_was_not_written_and_synced(steps: list[tuple[str, object]]) -> None:
    """The order of a writer: sync the data, then the record that names it. It may die between any two steps."""
    file, written = ModelFile(), Extents()
    for step, argument in steps:
        if step == "write":
            assert isinstance(argument, tuple)
            first, end = argument
            file.cached |= bits_of(Extents.of((first, end))) if first < end else 0
            written = written.adding(first, end)
        elif step == "record":
            file.synced |= file.cached
            file.record = written.in_blocks(SIZE).encode()
        elif step == "sync, then crash":
            file.synced |= file.cached
            written = Extents.decode(file.record, SIZE)
        else:
            assert isinstance(argument, set)
            file.crash(sum(((1 << BLOCK) - 1) << (block * BLOCK) for block in argument))
            written = Extents.decode(file.record, SIZE)
        assert not bits_of(Extents.decode(file.record, SIZE)) & ~file.synced
        assert not bits_of(written) & ~file.cached
