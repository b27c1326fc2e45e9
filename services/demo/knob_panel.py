"""The rules in force on one storage node, with the count of requests each has seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from services.demo.knobs import Fault, Match, Rule

_NO_FAULT = Fault()


class FaultRegistry:
    """Holds the rules; the first one that chooses a request decides, and no rule means no fault."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []
        self._counts: list[int] = []

    def add(self, fault: Fault, match: Match | None = None) -> None:
        """Append a rule; without `match` it is for all requests."""
        self._rules.append(Rule(fault, match or Match()))
        self._counts.append(0)

    def replace(self, rules: Iterable[Rule]) -> None:
        """Put these rules in force, with their counts at zero."""
        self._rules = list(rules)
        self._counts = [0] * len(self._rules)

    def clear(self) -> None:
        """Behave well from now on; answers under way keep the fault they began with."""
        self.replace([])

    def fault_for(self, method: str, endpoint: str, object_id: str | None, ranged: bool) -> Fault:
        """Count the request with every rule it fits, and return what the first choosing rule says."""
        decided: Fault | None = None
        for index, rule in enumerate(self._rules):
            if not rule.match.matches(method, endpoint, object_id, ranged):
                continue
            self._counts[index] += 1
            if decided is None and rule.match.selects(self._counts[index]):
                decided = rule.fault
        return decided or _NO_FAULT

    def to_json(self) -> dict[str, Any]:
        """The rules as JSON, each with `seen`, the number of requests that fitted it."""
        counted = zip(self._rules, self._counts, strict=True)
        return {"rules": [rule.to_json() | {"seen": seen} for rule, seen in counted]}

    def replace_from_json(self, document: object) -> None:
        """Put the rules of `{"rules": […]}` in force; ValueError, and no change, if one is wrong."""
        if (
            not isinstance(document, dict)
            or set(document) != {"rules"}
            or not isinstance(document["rules"], list)
        ):
            raise ValueError('faults are an object {"rules": […]}')
        self.replace([Rule.from_json(rule) for rule in document["rules"]])
