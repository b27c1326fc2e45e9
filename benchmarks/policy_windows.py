"""What a window saves where viewers leave early: `python -m benchmarks.policy_windows [--seeds 1 2 3]`.

Videos are watched by range requests, as much of each as a published viewing curve says. Objects are fetched as a whole,
or grow with their furthest viewer. Part of `make bench-policies`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.traces import Parameters, Trace, ViewingCurve
from distributor_node.services.replay.scenarios import Setting
from distributor_node.shared.domain.eviction import AUTO_COST
from distributor_node.shared.domain.eviction.simulator import Outcome, Rules, Simulation, WindowRules

RESULTS = Path(__file__).parent / "results"

# A third of the viewers finish, half watch less than 40 %. Vidyard, "Video in Business Benchmark Report" 2017: the
# average video keeps 37 % of its viewers to the last second. Shape after Wistia, "Does video length matter?" 2012: a
# steep fall at the beginning, few who leave later on, another fall near the end.
_THIRD_FINISHES = ViewingCurve(
    ((0, 0), (0.12, 0.02), (0.25, 0.10), (0.5, 0.40), (0.63, 0.95), (0.63, 1.0), (1, 1))
)
# Half of the viewers finish. Vidyard's report on 2022 (1,778,000 videos): 50 % finish videos of two to ten minutes.
_HALF_FINISH = ViewingCurve(((0, 0), (0.10, 0.05), (0.2, 0.2), (0.35, 0.5), (0.5, 0.95), (0.5, 1.0), (1, 1)))
# Most only look. Finamore et al., "YouTube Everywhere", IMC 2011: 60 % are watched for no more than 20 % of their
# duration. Chen et al., "A study of user behavior in online VoD services", Computer Communications 46, 2014 (540
# million sessions): about 20 % of the views are to the end, most are short.
_BROWSING = ViewingCurve(((0, 0), (0.35, 0.04), (0.6, 0.20), (0.8, 0.8), (0.8, 1.0), (1, 1)))
CURVES: Mapping[str, ViewingCurve] = {
    "a third finish": _THIRD_FINISHES,
    "half finish": _HALF_FINISH,
    "most look in": _BROWSING,
}

SHARE = 0.05
MOST_FROM_SOURCES = 0.60
"""Bytes from sources per byte served."""
HITS_WITHIN = 0.005
SETTINGS = {
    "all objects admitted": Setting("gdsf", AUTO_COST),
    "second view above auto": Setting("gdsf", AUTO_COST, "auto"),
}
GOAL_SETTING = "all objects admitted"
FETCHES: Mapping[str, WindowRules | None] = {"whole": None, "window": WindowRules()}


@dataclass(frozen=True)
class Run:
    """One curve, seed, setting and way of fetching. `mean_used` and `peak_used`: shares of the limit."""

    outcome: Outcome
    begun: float  # share of the views whose first request was a hit
    mean_used: float
    peak_used: float


Key = tuple[str, str]
"""Of SETTINGS and FETCHES."""
Column = Callable[[Run], float]

COLUMNS: Mapping[str, Column] = {
    "from sources / served": lambda run: run.outcome.source_ratio,
    "written / served": lambda run: run.outcome.write_ratio,
    "object hit ratio": lambda run: run.outcome.object_hit_ratio,
    "views begun by a hit": lambda run: run.begun,
    "byte hit ratio": lambda run: run.outcome.byte_hit_ratio,
    "mean cache": lambda run: run.mean_used,
    "peak cache": lambda run: run.peak_used,
}


def run_curve(curve: str, views: int, seed: int, share: float = SHARE) -> dict[Key, Run]:
    """Eviction starts at the limit and goes down to 99 % of it."""
    trace = Trace(Parameters(views=views, seed=seed, viewing_curve=CURVES[curve]))
    requests, limit = list(trace.requests()), int(trace.footprint * share)
    rules, runs = Rules.of(limit, 0.99, 1.0), {}
    for name, setting in SETTINGS.items():
        for fetched, window in FETCHES.items():
            simulation = Simulation(setting.make_policy(limit), rules, setting.admission(rules), window)
            begun = hits = used = peak = 0
            for request in requests:
                hit = simulation.process(request)
                if request.first == 0:
                    begun += 1
                    hits += hit
                used += simulation.used
                peak = max(peak, simulation.used)
            mean = used / len(requests) / limit
            runs[name, fetched] = Run(simulation.outcome, hits / begun, mean, peak / limit)
    return runs


def mean_of(runs: Sequence[Run], column: Column) -> float:
    return statistics.fmean(map(column, runs))


def rows(curve: str, runs: Sequence[Mapping[Key, Run]]) -> list[str]:
    """One line for each setting and way of fetching: means over the seeds."""
    lines = []
    for name in SETTINGS:
        for fetched in FETCHES:
            figures = [mean_of([one[name, fetched] for one in runs], column) for column in COLUMNS.values()]
            lines.append(
                f"| {curve} | {name} | {fetched} | {' | '.join(f'{figure:.3f}' for figure in figures)} |"
            )
    return lines


def verdicts(curve: str, runs: Sequence[Mapping[Key, Run]]) -> list[str]:
    """The goals for one curve, each with what was seen and whether it is met."""
    whole, window = ([one[GOAL_SETTING, fetched] for one in runs] for fetched in FETCHES)
    ratio = mean_of(window, COLUMNS["from sources / served"])
    behind = mean_of(whole, COLUMNS["object hit ratio"]) - mean_of(window, COLUMNS["object hit ratio"])
    return [
        (
            f"| {curve} | bytes from sources per byte served ≤ {MOST_FROM_SOURCES:.2f} | {ratio:.3f} |"
            f" {_verdict(ratio <= MOST_FROM_SOURCES)} |"
        ),
        (
            f"| {curve} | object hit ratio within {HITS_WITHIN:.3f} of whole objects | {-behind:+.4f} |"
            f" {_verdict(behind <= HITS_WITHIN)} |"
        ),
    ]


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--views", type=int, default=Parameters.views)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--share", type=float, default=SHARE)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    jobs = [(curve, arguments.views, seed, arguments.share) for curve in CURVES for seed in arguments.seeds]
    watched = ", ".join(f"{name}: {curve.mean:.0%} is watched in the mean" for name, curve in CURVES.items())
    window = WindowRules()
    lines = [
        (
            f"{arguments.views} views; cache {arguments.share:.0%} of all bytes seen; means over seeds"
            f" {', '.join(map(str, arguments.seeds))}. {watched}. Window: {window.ahead >> 20} MiB, above"
            f" {window.above >> 20} MiB."
        ),
        "",
        f"| curve | admission | fetched | {' | '.join(COLUMNS)} |",
        "|---|---|---|" + "---:|" * len(COLUMNS),
    ]
    print("\n".join(lines))
    goals = ["| curve | goal | seen | verdict |", "|---|---|---|---|"]
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as processes:
        done = list(processes.map(run_curve, *zip(*jobs, strict=True)))
    for number, curve in enumerate(CURVES):
        of_curve = done[number * len(arguments.seeds) : (number + 1) * len(arguments.seeds)]
        lines += rows(curve, of_curve)
        goals += verdicts(curve, of_curve)
    print("\n".join(lines[4:]), "", f"Goals, with {GOAL_SETTING}:", "", *goals, sep="\n")
    RESULTS.mkdir(exist_ok=True)
    text = "\n".join([*lines, "", f"Goals, with {GOAL_SETTING}:", "", *goals, ""])
    (RESULTS / "windows.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
