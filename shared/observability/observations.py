"""Observations of a histogram that were counted elsewhere, handed over many at once."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import Histogram


def bounds_of(histogram: Histogram) -> Sequence[float]:
    """Upper bounds of a histogram's buckets, in its unit; the last is infinite."""
    bounds: Sequence[float] = histogram._upper_bounds
    return bounds


def add_observations(histogram: Histogram, counts: Sequence[int], total: float) -> None:
    """How many in each bucket (not cumulated), and their sum.

    The library's own way takes one call for each observation, which a hot path cannot afford.
    """
    histogram._sum.inc(total)
    for bucket, count in zip(histogram._buckets, counts, strict=True):
        if count:
            bucket.inc(count)
