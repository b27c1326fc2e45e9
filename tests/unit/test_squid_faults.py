"""The test squid's faults, as values and as JSON."""

from __future__ import annotations

import pytest

from distributor_node.services.demo.squid import SquidFaults


def test_faults_survive_json() -> None:
    faults = SquidFaults(
        latency=1.5, nulls=("type",), operations=("DataObject",), spare=2, schema="deprecated_only"
    )
    told = faults.to_json()
    assert SquidFaults.from_json({**told, "nulls": list(told["nulls"])}) == faults
    assert SquidFaults.from_json({}) == SquidFaults()


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
def test_invalid_faults_are_rejected(document: object) -> None:
    with pytest.raises(ValueError):
        SquidFaults.from_json(document)
