"""Eviction policies on made-up media traces: `make bench-policies`, or `python -m benchmarks.policies [--seeds 1 2 3]`.

Prints a table, and writes it to benchmarks/results/policies.md with the picture beside it. Views are of whole objects
(`--ranges`: videos by range requests); eviction starts at the limit and goes down to 99 % of it. By default a fifth of
the million views that docs/eviction.md shows, so that it takes minutes: `--views 1000000` for all.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.traces import Parameters, Trace
from distributor_node.services.replay.run import render_chart
from distributor_node.services.replay.scenarios import CacheSize, Result, Setting
from distributor_node.shared.domain.eviction import AUTO_COST, MissCost
from distributor_node.shared.domain.eviction.simulator import Outcome, Rules, Simulation

RESULTS = Path(__file__).parent / "results"
SETTINGS = (
    Setting("lru"),
    Setting("sieve"),
    Setting("s3-fifo"),
    Setting("lru-sp"),
    Setting("gdsf-1998"),
    Setting("gdsf-64m"),
    Setting("gdsf", AUTO_COST),
    Setting("gdsf", AUTO_COST, second_view_above="auto"),
    Setting("gdsf", MissCost(fixed=0)),
)
SHARES = (0.01, 0.05, 0.10, 0.25)


def run_seed(parameters: Parameters, share: float, ranges: bool) -> tuple[str, list[Outcome]]:
    """What the trace is like, and what each setting did with it."""
    trace = Trace(parameters)
    limit = int(trace.footprint * share)
    rules = Rules.of(limit, 0.99, 1.0)
    outcomes = []
    for setting in SETTINGS:
        simulation = Simulation(setting.make_policy(limit), rules, setting.admission(rules))
        for request in trace.requests() if ranges else trace.views():
            simulation.process(request)
        outcomes.append(simulation.outcome)
    about = (
        f"Seed {parameters.seed}: {len(set(trace.objects))} objects seen, {trace.seen_once:.0%} of them once,"
        f" {trace.footprint / 1e9:.0f} GB."
    )
    return about, outcomes


def summary(name: str, share: float, outcomes: Sequence[Outcome]) -> str:
    """Means over the seeds, and how far apart the seeds are."""
    columns = [
        [outcome.object_hit_ratio for outcome in outcomes],
        [outcome.byte_hit_ratio for outcome in outcomes],
        [outcome.source_ratio for outcome in outcomes],
        [outcome.write_ratio for outcome in outcomes],
    ]
    figures = [
        f"{statistics.fmean(column):.3f} ± {(max(column) - min(column)) / 2:.3f}" for column in columns
    ]
    return f"| {share:.0%} | {name} | {' | '.join(figures)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--views", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--ranges", action="store_true", help="videos by range requests")
    arguments = parser.parse_args()
    jobs = [
        (Parameters(views=arguments.views, seed=seed), share, arguments.ranges)
        for share in arguments.shares
        for seed in arguments.seeds
    ]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as processes:
        done = list(processes.map(run_seed, *zip(*jobs, strict=True)))
    about_all = (
        f"{arguments.views} views, {Parameters.days:g} days, Zipf {Parameters.zipf}; cache in shares of all bytes"
        " seen; means over the seeds, ± half their range."
    )
    header = (
        "| cache | setting | object hit ratio | byte hit ratio | from sources / served | written / served |"
    )
    lines = [
        about_all,
        "",
        *dict.fromkeys(about for about, _ in done),
        "",
        header,
        "|---|---|---|---|---|---|",
    ]
    results = []
    for number, share in enumerate(arguments.shares):
        of_share = done[number * len(arguments.seeds) : (number + 1) * len(arguments.seeds)]
        for place, setting in enumerate(SETTINGS):
            outcomes = [outcomes[place] for _, outcomes in of_share]
            name = setting.name
            lines.append(summary(name, share, outcomes))
            results.append(Result(setting, CacheSize(max(1, int(share * 1e9)), f"{share:.0%}"), outcomes[0]))
    text = "\n".join([*lines, ""])
    print(text)
    name = "policies-ranges" if arguments.ranges else "policies"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    picture = render_chart(results, f"{arguments.views} views")
    (RESULTS / f"{name}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
