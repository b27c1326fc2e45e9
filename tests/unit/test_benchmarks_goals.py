"""Goals of the benchmarks, their verdicts, and cases whose results are invalid."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from benchmarks.__main__ import options_of, parse
from benchmarks.cases import HIT_CASES, RANGE_BYTES, HitCase, check_bytes
from benchmarks.dataset import groups
from benchmarks.figures import Case, Measurement
from benchmarks.goals import GOALS, Goal, Measure, verdicts
from benchmarks.report import Report
from benchmarks.run import CASE_NAMES, HARNESS_CASES

RATE = "requests_per_second"
SCALE_CASES = {"scale-store", "scale-evictor", "scale-api"}


def rounds(case: str, contender: str, figure: str, *values: float) -> list[Measurement]:
    return [Measurement(case, contender, number, {figure: value}) for number, value in enumerate(values)]


def seen(goal: Goal, measured: list[Measurement]) -> tuple[float | None, bool, str]:
    (verdict,) = verdicts(measured, {goal.case}, {}, [goal])
    return verdict.value, verdict.met, verdict.text


def test_a_ratio_is_taken_within_rounds() -> None:
    goal = Goal("hit", "a hit", RATE, 0.9, peer="nginx")
    both = rounds("hit", "ours", RATE, 10, 40, 9) + rounds("hit", "nginx", RATE, 10, 20, 10)
    assert seen(goal, both) == (1.0, True, "met")
    assert goal.wanted == "≥ 0.9 × nginx"
    slower = rounds("hit", "ours", RATE, 45) + rounds("hit", "nginx", RATE, 100)
    assert seen(goal, slower) == (0.45, False, "**missed by 50%**")


def test_a_difference_is_that_of_medians() -> None:
    goal = Goal("miss", "a miss", "ms", 10.0, at_least=False, peer="direct", measure=Measure.DIFFERENCE)
    assert seen(goal, rounds("miss", "ours", "ms", 9, 12, 99) + rounds("miss", "direct", "ms", 1, 2, 3)) == (
        10.0, True, "met",
    )  # fmt: skip
    assert seen(goal, rounds("miss", "ours", "ms", 27) + rounds("miss", "direct", "ms", 2))[2] == (
        "**missed by 150%**"
    )
    assert goal.wanted == "≤ direct + 10"


def test_standalone_and_unmeasured_figures() -> None:
    goal = Goal("scale", "memory", "rss_mb", 500, at_least=False, measure=Measure.ALONE)
    assert seen(goal, rounds("scale", "ours", "rss_mb", 400)) == (400, True, "met")
    assert seen(goal, rounds("scale", "another", "rss_mb", 400)) == (None, False, "not measured")


def test_every_goal_is_of_a_case_that_there_is() -> None:
    assert {goal.case for goal in GOALS} - SCALE_CASES <= set(CASE_NAMES)


def test_goals_stand_in_the_report_in_both_forms() -> None:
    report = Report({})
    case = next(each.case for each in HIT_CASES if each.name == "hit-64k")
    report.add(case, rounds("hit-64k", "ours", RATE, 3) + rounds("hit-64k", "nginx proxy_cache", RATE, 4))
    assert (
        "| random 64 KiB hits | requests/s | ≥ 0.9 × nginx proxy_cache | 0.75 | **missed by 17%** |"
        in report.to_markdown()
    )
    (goal,) = json.loads(report.to_json())["goals"]
    assert (goal["case"], goal["bound"], goal["seen"], goal["met"]) == ("hit-64k", 0.9, 0.75, False)


@pytest.mark.parametrize("failing", ["errors", "an exception"])
def test_a_case_with_errors_does_not_count(failing: str) -> None:
    case = Case("hit-64k", "hits", RATE, "ours")

    def measured() -> Iterator[Measurement]:
        yield Measurement("hit-64k", "ours", 0, {RATE: 9, "errors": float(failing == "errors")})
        yield Measurement("hit-64k", "nginx proxy_cache", 0, {RATE: 3, "errors": 0})
        if failing == "an exception":
            raise RuntimeError("ours: no such answer")

    report = Report({})
    report.add(case, measured())
    assert list(report.failures) == ["hit-64k"]
    (verdict,) = report.verdicts()
    assert (verdict.value, verdict.met, verdict.text) == (3.0, False, "**does not count**")
    assert report.to_markdown().startswith("**FAILED, does not count: hit-64k: ")
    assert json.loads(report.to_json())["failures"] == report.failures


def case_of(name: str) -> HitCase:
    return next(case for case in HIT_CASES if case.name == name)


@pytest.mark.parametrize(
    ("name", "answers", "received"),
    [
        ("hit-64k", 1000, 1000 * 65_536 - 1),  # something was short
        ("not-modified", 1000, 1000 * 65_900),  # 200 in place of 304
        ("head", 1000, 1000 * 65_536),  # a body
        ("range-1g", 10, 10 * 2**28),  # all of the object
        ("hit-4k", 0, 0),
    ],
)
def test_unexpected_responses_are_noticed(name: str, answers: int, received: int) -> None:
    case = case_of(name)
    with pytest.raises(RuntimeError, match=f"{received} bytes in {answers} answers"):
        check_bytes(case, groups(quick=True, new={})[case.group], answers, received)


@pytest.mark.parametrize(
    ("name", "each"), [("hit-64k", 65_536), ("not-modified", 0), ("head", 0), ("range-1g", RANGE_BYTES)]
)
@pytest.mark.parametrize("head", [0, 300])
def test_answers_as_asked_for_pass(name: str, each: int, head: int) -> None:
    case = case_of(name)
    group = groups(quick=True, new={})[case.group]
    check_bytes(case, group, 1000, 1000 * (each + head))
    check_bytes(case, group, 1000, 1000 * (each + head) + 63 * each)  # some are cut off at the end
    check_bytes(case, group, 0, max(each, 1))  # none had ended


def test_the_harness_is_checked_where_nginx_can_stand_in() -> None:
    assert options_of(parse(["--check-harness"])).cases == HARNESS_CASES
    assert options_of(parse(["--check-harness", "--case", "hit-64k"])).cases == ["hit-64k"]
    for name in ("miss-64k", "fetch", "two-workers"):
        with pytest.raises(SystemExit):
            parse(["--check-harness", "--case", "hit-64k", "--case", name])
