"""Scenarios that do not depend on the mode of the assignment, on the joystream catalog by buckets."""

from __future__ import annotations

import pytest

from tests.end_to_end.test_joystream import JoystreamHarness, harness
from tests.end_to_end.test_one_get import (
    never_passes_the_limit,
    test_a_truncated_file_is_no_hit_and_is_repaired,
    test_an_object_larger_than_the_limit_is_proxied_and_evicts_nothing,
    test_odd_ranges_of_a_hit,
    test_the_first_byte_arrives_while_the_source_is_still_sending,
)

__all__ = [
    "harness",
    "test_a_truncated_file_is_no_hit_and_is_repaired",
    "test_an_object_larger_than_the_limit_is_proxied_and_evicts_nothing",
    "test_odd_ranges_of_a_hit",
    "test_the_first_byte_arrives_while_the_source_is_still_sending",
]

pytestmark = [pytest.mark.parametrize("harness", ["buckets"], indirect=True)]


async def test_the_storage_limit_is_not_exceeded_with_buckets(harness: JoystreamHarness) -> None:
    await never_passes_the_limit(harness, seconds=8, least_asked=20)
