"""Generated objects: any range equals the same part of the whole, and the known hashes are true."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributor_node.services.demo.manifest import GENERATED_HASHES, content_hash
from distributor_node.services.demo.objects import BLOCK_SIZE, GeneratedContent

SIZE = 3 * BLOCK_SIZE + 777
WHOLE = GeneratedContent(5, SIZE).read(0, SIZE)


@given(offset=st.integers(0, SIZE + 10), length=st.integers(0, SIZE + 10))
def test_any_range_is_that_part_of_the_whole(offset: int, length: int) -> None:
    assert GeneratedContent(5, SIZE).read(offset, length) == WHOLE[offset : offset + length]


def test_size_seed_and_block_make_a_difference() -> None:
    assert len(WHOLE) == SIZE
    assert GeneratedContent(5, SIZE + 1).read(0, SIZE) == WHOLE
    assert GeneratedContent(6, SIZE).read(0, SIZE) != WHOLE
    blocks = {WHOLE[start + 16 : start + BLOCK_SIZE] for start in range(0, 3 * BLOCK_SIZE, BLOCK_SIZE)}
    assert len(blocks) == 3


@pytest.mark.parametrize(("seed", "size"), list(GENERATED_HASHES))
def test_known_hash_is_true(seed: int, size: int) -> None:
    assert content_hash(GeneratedContent(seed, size)) == GENERATED_HASHES[seed, size]


@pytest.mark.parametrize(("seed", "size"), [(-1, 1), (2**64, 1), (1, -1)])
def test_impossible_content_is_refused(seed: int, size: int) -> None:
    with pytest.raises(ValueError, match="generated object"):
        GeneratedContent(seed, size)
