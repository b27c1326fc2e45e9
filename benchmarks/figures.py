"""Measurements and what follows from them: medians, and ratios taken pair by pair within a round."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison. Ratios are `subject` to each other contender, of the figure called `headline`."""

    name: str
    title: str
    headline: str
    subject: str
    higher_is_better: bool = True


@dataclass(frozen=True, slots=True)
class Measurement:
    """One contender in one round of one case. The names of figures end in their units."""

    case: str
    contender: str
    round: int
    figures: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Subject ÷ contender: the median of the rounds, the least and the greatest."""

    median: float
    least: float
    greatest: float


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all are not above; 0 of none."""
    if not values:
        return 0.0
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


@dataclass(frozen=True, slots=True)
class GoalRow:
    """One measured case with its goal, as a row of a table."""

    case: str
    result: str
    goal: str
    met: bool


def rotated(items: Sequence[Item], number: int) -> Sequence[Item]:
    """Another one is first in each round."""
    turn = number % len(items)
    return [*items[turn:], *items[:turn]]


def contenders(measurements: Iterable[Measurement]) -> list[str]:
    """In order of appearance."""
    return list(dict.fromkeys(each.contender for each in measurements))


def medians(measurements: Sequence[Measurement], contender: str) -> dict[str, float]:
    """Each figure's median over the rounds of one contender."""
    rounds = [each.figures for each in measurements if each.contender == contender]
    names = dict.fromkeys(name for figures in rounds for name in figures)
    return {name: statistics.median(figures[name] for figures in rounds if name in figures) for name in names}


def ratio(measurements: Sequence[Measurement], case: Case, contender: str) -> Ratio | None:
    """Of the case's headline. None if the two were in no round together."""
    return ratio_of(measurements, case.headline, case.subject, contender)


def ratio_of(measurements: Sequence[Measurement], figure: str, subject: str, other: str) -> Ratio | None:
    """Of one figure of one case, round by round. None if the two were in no round together."""
    ours, theirs = figure_of(measurements, figure, subject), figure_of(measurements, figure, other)
    found = [ours[number] / theirs[number] for number in ours if theirs.get(number)]
    return Ratio(statistics.median(found), min(found), max(found)) if found else None


def figure_of(measurements: Iterable[Measurement], figure: str, contender: str) -> dict[int, float]:
    """By round."""
    return {
        each.round: each.figures[figure]
        for each in measurements
        if each.contender == contender and figure in each.figures
    }
