"""Faults are checked when they are made, survive JSON, and act on the requests their rule names."""

from __future__ import annotations

import json
from typing import Any

import pytest

from distributor_node.services.demo.faults import Fault, FaultRegistry, Match, Rule

RULES = [
    Rule(Fault(latency_before_headers=0.5, cut_after=10, headers=(("ETag", None), ("X-A", "b")))),
    Rule(
        Fault(content_length_delta=-3, body_delta=2),
        Match(object_id="7", method="GET", ranged=True, nth=2),
    ),
    Rule(Fault(status=503), Match(endpoint="version", first=1, after=0)),
]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_survives_json(rule: Rule) -> None:
    assert Rule.from_json(json.loads(json.dumps(rule.to_json()))) == rule


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "rule: expected an object"),
        ({"match": {}}, "rule: expected an object"),
        ({"fault": {}, "extra": 1}, "a rule has no extra"),
        ({"fault": []}, "fault must be an object"),
        ({"fault": {"speed": 1}}, "fault has no speed"),
        ({"fault": {"cut_after": "10"}}, "cut_after must be int or null"),
        ({"fault": {"cut_after": True}}, "cut_after must be int or null"),
        ({"fault": {"cut_after": -1}}, "cut_after must be at least 0"),
        ({"fault": {"latency_before_body": -0.1}}, "latency_before_body must be at least 0"),
        ({"fault": {"latency_before_body": float("nan")}}, "latency_before_body must be at least 0"),
        ({"fault": {"bytes_per_second": 0}}, "bytes_per_second must be at least 1"),
        ({"fault": {"gzip": 1}}, "gzip must be bool"),
        ({"fault": {"status": 99}}, "status must be at least 100"),
        ({"fault": {"status": 600}}, "status must be at most 599"),
        ({"fault": {"status": 500, "redirect_to": "http://a/"}}, "redirect_to needs a status of 3xx"),
        ({"fault": {"headers": ["a"]}}, "headers must be an object"),
        ({"fault": {"headers": {"a": 1}}}, "the value of header a must be text"),
        ({"fault": {"headers": {"a": "b\r\nc: d"}}}, "line break"),
        ({"fault": {}, "match": {"object_id": 7}}, "object_id must be str or null"),
        ({"fault": {}, "match": {"method": "POST"}}, "method must be GET or HEAD"),
        ({"fault": {}, "match": {"endpoint": "assets"}}, "endpoint must be files or version"),
        ({"fault": {}, "match": {"nth": 0}}, "nth must be at least 1"),
    ],
)
def test_an_invalid_rule_is_rejected_with_the_reason(document: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule.from_json(document)


def test_seconds_may_be_whole_numbers() -> None:
    assert Rule.from_json({"fault": {"latency_before_body": 2}}).fault.latency_before_body == 2


def _statuses(panel: FaultRegistry, *requests: tuple[str, str | None]) -> list[int | None]:
    return [panel.fault_for(method, "files", object_id, False).status for method, object_id in requests]


def test_the_first_rule_that_selects_a_request_decides() -> None:
    panel = FaultRegistry()
    panel.add(Fault(status=500), Match(object_id="1"))
    panel.add(Fault(status=503))
    assert _statuses(panel, ("GET", "1"), ("GET", "2"), ("HEAD", None)) == [500, 503, 503]
    panel.clear()
    assert _statuses(panel, ("GET", "1")) == [None]


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        (Match(nth=2), [None, 500, None, None]),
        (Match(first=2), [500, 500, None, None]),
        (Match(after=2), [None, None, 500, 500]),
        (Match(first=3, after=1), [None, 500, 500, None]),
    ],
)
def test_a_rule_counts_the_requests_that_fit(match: Match, expected: list[int | None]) -> None:
    panel = FaultRegistry()
    panel.add(Fault(status=500), match)
    assert _statuses(panel, *[("GET", "1")] * 4) == expected


def test_requests_that_do_not_match_are_not_counted() -> None:
    panel = FaultRegistry()
    panel.add(Fault(status=500), Match(object_id="1", method="GET", nth=2))
    wanted = _statuses(panel, ("GET", "1"), ("HEAD", "1"), ("GET", "2"), ("GET", "1"))
    assert wanted == [None, None, None, 500]
    assert panel.to_json()["rules"][0]["seen"] == 2


def test_the_registry_survives_json_and_an_invalid_document_changes_nothing() -> None:
    panel = FaultRegistry()
    panel.replace(RULES)
    other = FaultRegistry()
    other.replace_from_json(json.loads(json.dumps(panel.to_json())))
    assert other.to_json() == panel.to_json()
    with pytest.raises(ValueError, match="fault has no x"):
        other.replace_from_json({"rules": [{"fault": {"x": 1}}]})
    with pytest.raises(ValueError, match="faults: expected an object"):
        other.replace_from_json([])
    assert other.to_json() == panel.to_json()
