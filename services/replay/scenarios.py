"""What is tried on a recording: policies × settings × cache sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from distributor_node.services.replay.comparison import OTHER_POLICIES
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.domain.eviction import AUTO_COST, EvictionPolicy, MissCost, make_policy
from distributor_node.shared.domain.eviction.simulator import (
    MIN_IDLE,
    Outcome,
    Request,
    Rules,
    Simulation,
    WindowRules,
)
from distributor_node.shared.domain.space import AdmissionQuestion, Watermarks, watermarks_for
from distributor_node.shared.settings.sizes import (
    format_admission_size,
    format_miss_cost,
    format_size,
    parse_size,
)

_PROGRESS_INTERVAL = 20_000  # requests
_WINDOW = 7 * 24 * 3600.0  # seconds
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%\Z")


@dataclass(frozen=True, slots=True)
class NodeRules:
    """Rules of a node that do not depend on policy and limit: see storage, evictor and admission in the settings."""

    min_idle: float = MIN_IDLE  # seconds
    largest: int | None = None  # bytes; None here and below: derived as the node derives it
    high_watermark: float | None = None  # share of the limit
    low_watermark: float | None = None
    admission_window: float = _WINDOW  # seconds

    def at(self, limit: int, sample: float = 1.0) -> Rules:
        """Return the rules for a cache of `limit` bytes, scaled to a sample of the objects."""
        marks = watermarks_for(limit, self.largest, self.high_watermark, self.low_watermark)
        scaled = Watermarks(low=int(marks.low * sample), high=int(marks.high * sample))
        return Rules(max(1, int(limit * sample)), scaled, self.min_idle, self.largest)


@dataclass(frozen=True, slots=True)
class Setting:
    """A policy with its parameters."""

    policy: str
    cost: MissCost | None = None  # c0; None: the policy has none
    second_view_above: int | Literal["auto"] | None = None  # bytes; None: off
    window: WindowRules | None = None  # None: objects are fetched as a whole

    @property
    def name(self) -> str:
        cost = "" if self.cost is None else f" c0={format_miss_cost(self.cost)}"
        above, window = self.second_view_above, self.window
        return (
            f"{self.policy}{cost}"
            + ("" if above is None else f", second view above {format_admission_size(above)}")
            + ("" if window is None else f", window {format_size(window.ahead)}")
        )

    def admission(self, rules: Rules, window: float = _WINDOW) -> AdmissionQuestion | None:
        """What is asked about every object. `window`: seconds in which a second view has to follow the first."""
        if self.second_view_above is None:
            return None
        above = None if self.second_view_above == "auto" else self.second_view_above
        return AdmissionQuestion(0, above, rules.watermarks.low, window)

    def make_policy(self, limit: int) -> EvictionPolicy:
        """`limit`: bytes of the cache, which some of the policies that the node does not have need to know."""
        if self.policy in OTHER_POLICIES:
            return OTHER_POLICIES[self.policy](limit)
        return make_policy(self.policy, AUTO_COST if self.cost is None else self.cost)


@dataclass(frozen=True, slots=True)
class CacheSize:
    """A cache size to try."""

    limit: int  # bytes, of the real cache
    label: str  # as it was requested


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one setting with one cache size."""

    setting: Setting
    size: CacheSize
    outcome: Outcome


def settings_to_try(
    policies: Iterable[str],
    miss_costs: Sequence[MissCost],
    second_view_above: Sequence[int | Literal["auto"]],
) -> list[Setting]:
    """Return each policy without admission, gdsf with each c0, and its first c0 with each admission threshold."""
    settings: list[Setting] = []
    for policy in dict.fromkeys(policies):
        costs: Sequence[MissCost | None] = miss_costs if policy == "gdsf" else [None]
        settings += [Setting(policy, cost) for cost in costs]
        settings += [Setting(policy, costs[0], above) for above in second_view_above if policy == "gdsf"]
    return settings


def parse_cache_sizes(texts: Iterable[str], footprint: int) -> list[CacheSize]:
    """Parse sizes such as `500G`, or `5%` of `footprint`, and sort them. Raises ConfigurationError."""
    sizes = []
    for text in texts:
        percent = _PERCENT.match(text.strip())
        try:
            limit = parse_size(text) if percent is None else int(footprint * float(percent[1]) / 100)
        except ValueError as error:
            raise ConfigurationError(
                f"cache size: {error} (a percentage such as 5% is allowed too)"
            ) from error
        if limit <= 0:
            raise ConfigurationError(f"cache size: expected more than 0 bytes, got {text!r}")
        sizes.append(CacheSize(limit, text.strip()))
    return sorted(sizes, key=lambda size: size.limit)


def try_setting(
    requests: Iterable[Request],
    setting: Setting,
    rules: Rules,
    tick: Callable[[int], None],
    admission_window: float = _WINDOW,
) -> Outcome:
    """Simulate all requests. `tick`: called with the number of requests since its last call."""
    admission = setting.admission(rules, admission_window)
    simulation = Simulation(setting.make_policy(rules.limit), rules, admission, setting.window)
    seen = 0
    for request in requests:
        simulation.process(request)
        seen += 1
        if seen % _PROGRESS_INTERVAL == 0:
            tick(_PROGRESS_INTERVAL)
    tick(seen % _PROGRESS_INTERVAL)
    return simulation.outcome
