"""Goals for the measurements, as data, and their verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from benchmarks.figures import Measurement, figure_of, ratio_of
from benchmarks.hostile import HOSTILE_CASES, LOADED, QUIET
from benchmarks.misses import DIRECT
from benchmarks.peers import AGING, CACHE, OURS, TRACED, UNWATCHED, WATCHED
from benchmarks.throughput import CURL, CURL_SYNCED, ONE_FETCHER, THREE_FETCHERS

MILLION = "1,000,000 objects"


class Measure(StrEnum):
    """How subject and peer are held against each other: subject ÷ peer or subject - peer, in the median of the rounds
    (of the two medians for a difference); or the subject alone."""

    RATIO = "ratio"
    DIFFERENCE = "difference"
    ALONE = "alone"


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of what has to be shown. `figure` of `subject`, and of `peer` unless it stands alone, is to be at least
    (or at most) `bound`, in the figure's unit if it is no ratio."""

    case: str
    title: str
    figure: str
    bound: float
    at_least: bool = True
    subject: str = OURS
    peer: str = ""
    measure: Measure = Measure.RATIO

    @property
    def wanted(self) -> str:
        sign = "≥" if self.at_least else "≤"
        match self.measure:
            case Measure.RATIO:
                return f"{sign} {self.bound:g} × {self.peer}"
            case Measure.DIFFERENCE:
                return f"{sign} {self.peer} + {self.bound:g}"
        return f"{sign} {self.bound:g}"


def _alone(case: str, title: str, figure: str, bound: float, subject: str) -> Goal:
    return Goal(case, title, figure, bound, at_least=False, subject=subject, measure=Measure.ALONE)


RATE, BYTES, P99 = "requests_per_second", "megabytes_per_second", "p99_ms"

GOALS = (
    Goal("hit-64k", "random 64 KiB hits", RATE, 0.9, peer=CACHE),
    Goal("hit-4k", "random 4 KiB hits", RATE, 0.9, peer=CACHE),
    Goal("hot-64k", "one hot 64 KiB object", RATE, 1.0, peer=CACHE),
    Goal("hit-64m", "64 MiB hits, 8 connections", BYTES, 1.0, peer=CACHE),
    Goal("range-1g", "64 KiB ranges in a 1 GiB object", RATE, 0.9, peer=CACHE),
    Goal("not-modified", "304 (0.8 with the fast path compiled)", RATE, 0.6, peer=CACHE),
    Goal("head", "HEAD, CPU time", "cpu_us_per_request", 1.3, at_least=False, peer=CACHE),
    Goal("connections-1000", "1,000 connections, 64 KiB", P99, 1.5, at_least=False, peer=CACHE),
    _alone("connections-1000", "1,000 connections: memory of the worker", "rss_mb", 200, OURS),
    Goal("origin-4k", "fresh objects of an HTTP origin", RATE, 0.95, subject=AGING, peer=OURS),
    Goal("traced-4k", "hits with every request traced", RATE, 0.8, subject=TRACED, peer=OURS),
    Goal("traced-miss", "misses with every request traced", "misses_per_second", 0.95, subject=TRACED, peer=OURS),
    Goal("pages", "hits with 20 pages of the node open", RATE, 0.97, subject=WATCHED, peer=UNWATCHED),
    Goal("two-workers", "two workers against one", RATE, 1.6, subject=f"{OURS}, 2 workers", peer=OURS),
    Goal(
        "miss-64k", "miss of 64 KiB, first byte", "first_byte_ms", 5.0,
        at_least=False, peer=DIRECT, measure=Measure.DIFFERENCE,
    ),
    Goal("miss-64m", "miss of 64 MiB, total", "total_ms", 1.3, at_least=False, peer=CACHE),
    Goal("fetch", "1 GiB by one fetcher", BYTES, 0.6, subject=ONE_FETCHER, peer=CURL),
    Goal("fetch", "1 GiB by one fetcher, beside curl and sync", BYTES, 1.0, subject=ONE_FETCHER, peer=CURL_SYNCED),
    Goal("fetch-three", "three objects by three fetchers", BYTES, 1.6, subject=THREE_FETCHERS, peer=ONE_FETCHER),
    *(
        Goal(case.name, case.title, P99, 3.0, at_least=False, subject=LOADED, peer=QUIET)
        for case in HOSTILE_CASES.values()
    ),
    _alone("scale-store", "Redis for each cached object", "redis_bytes_per_object", 300, MILLION),
    _alone("scale-evictor", "10^6 objects: reconcile", "adopting_reconcile_s", 120, MILLION),
    _alone("scale-evictor", "10^6 objects: evictor's peak memory", "rss_peak_mb", 500, MILLION),
    _alone("scale-api", "10^6 objects: /status", "status_p50_ms", 5, MILLION),
    _alone(
        "scale-api", "10^6 objects: median hit while reconciling ÷ in quiet", "hit_reconciling_ratio", 1.1, MILLION
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal and what was seen; `value` None: not measured. `invalid`: why the case's figures do not count, if so."""

    goal: Goal
    value: float | None
    invalid: str = ""

    @property
    def met(self) -> bool:
        return not self.invalid and self.value is not None and self._excess >= 0

    @property
    def _excess(self) -> float:
        """Share of the bound by which it is better than need be; negative: worse."""
        excess = (self.value or 0.0) / self.goal.bound - 1
        return excess if self.goal.at_least else -excess

    @property
    def text(self) -> str:
        if self.invalid:
            return "**does not count**"
        if self.value is None:
            return "not measured"
        return "met" if self.met else f"**missed by {-self._excess:.0%}**"


def verdicts(
    measurements: Sequence[Measurement],
    cases: Collection[str],
    failures: Mapping[str, str],
    goals: Iterable[Goal] = GOALS,
) -> list[Verdict]:
    """Of all goals of these cases. `failures`: what went wrong in a case, by its name."""
    return [
        Verdict(
            goal,
            _value(goal, [each for each in measurements if each.case == goal.case]),
            failures.get(goal.case, ""),
        )
        for goal in goals
        if goal.case in cases
    ]


def _value(goal: Goal, measured: Sequence[Measurement]) -> float | None:
    if goal.measure is Measure.RATIO:
        seen = ratio_of(measured, goal.figure, goal.subject, goal.peer)
        return None if seen is None else seen.median
    own = figure_of(measured, goal.figure, goal.subject)
    if goal.measure is Measure.ALONE:
        return statistics.median(own.values()) if own else None
    other = figure_of(measured, goal.figure, goal.peer)
    return statistics.median(own.values()) - statistics.median(other.values()) if own and other else None
