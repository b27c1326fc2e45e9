"""The test squid's knobs, as values and as JSON."""

from __future__ import annotations

import pytest

from services.demo.squid import SquidKnobs


def test_knobs_survive_json() -> None:
    knobs = SquidKnobs(latency=1.5, nulls=("type",), operations=("DataObject",), spare=2, schema="oldest")
    told = knobs.to_json()
    assert SquidKnobs.from_json({**told, "nulls": list(told["nulls"])}) == knobs
    assert SquidKnobs.from_json({}) == SquidKnobs()


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"latencyy": 1},
        {"latency": -1},
        {"latency": True},
        {"status": 5},
        {"huge": "much"},
        {"nulls": ["size"]},
        {"nulls": "type"},
        {"schema": "newest"},
        {"missing_bags": [1]},
    ],
)
def test_knobs_that_make_no_sense_are_refused(document: object) -> None:
    with pytest.raises(ValueError):
        SquidKnobs.from_json(document)
