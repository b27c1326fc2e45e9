"""The rules in force on one storage node, with the count of requests each has seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from services.demo.knobs import Behaviour, Match, Rule

_GOOD = Behaviour()


class KnobPanel:
    """Holds the rules; the first one that chooses a request decides, and no rule means good behaviour."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []
        self._counts: list[int] = []

    def add(self, behaviour: Behaviour, match: Match | None = None) -> None:
        """Append a rule; without `match` it is for all requests."""
        self._rules.append(Rule(behaviour, match or Match()))
        self._counts.append(0)

    def replace(self, rules: Iterable[Rule]) -> None:
        """Put these rules in force, with their counts at zero."""
        self._rules = list(rules)
        self._counts = [0] * len(self._rules)

    def clear(self) -> None:
        """Behave well from now on; answers under way keep the behaviour they began with."""
        self.replace([])

    def behaviour_for(self, method: str, endpoint: str, object_id: str | None, ranged: bool) -> Behaviour:
        """Count the request with every rule it fits, and return what the first choosing rule says."""
        decided: Behaviour | None = None
        for index, rule in enumerate(self._rules):
            if not rule.match.fits(method, endpoint, object_id, ranged):
                continue
            self._counts[index] += 1
            if decided is None and rule.match.chooses(self._counts[index]):
                decided = rule.behaviour
        return decided or _GOOD

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
            raise ValueError('knobs are an object {"rules": […]}')
        self.replace([Rule.from_json(rule) for rule in document["rules"]])
