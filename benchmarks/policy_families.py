"""How far the node's default is from the best of each column, on every family: `python -m benchmarks.policy_families`.

For each family and cache size: the best object hit ratio and the best byte hit ratio among the other
policies, each with its policy, and how far the node's own is behind. A negative gap: it is ahead. At the end it says
which of the goals are met. Part of `make bench-policies`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.traces import FAMILIES, Trace
from distributor_node.services.replay.scenarios import Setting
from distributor_node.shared.domain.eviction.simulator import Outcome, Rules, Simulation

RESULTS = Path(__file__).parent / "results"
OURS = "gdsf"
OTHERS = ("lru", "sieve", "s3-fifo", "arc", "w-tinylfu", "gdsf-1998")
FORMER = "gdsf-64m"
SETTINGS = (*(Setting(name) for name in (*OTHERS, FORMER)), Setting(OURS, second_view_above="auto"))
"""Ours as the node is by default, with second-hit admission."""
SHARES = (0.01, 0.05, 0.10, 0.25)
WITHIN_OBJECTS, WITHIN_BYTES, WITHIN_FORMER = 0.01, 0.03, 0.005
SHARE_WITHIN, MEAN_OBJECT_GAP, MEAN_BYTE_GAP = 0.70, 0.005, 0.022


@dataclass(frozen=True)
class Cell:
    """One family with one cache size: outcomes by policy."""

    family: str
    share: float
    outcomes: Mapping[str, Outcome]

    @property
    def best_objects(self) -> str:
        return max(OTHERS, key=lambda name: self.outcomes[name].object_hit_ratio)

    @property
    def best_bytes(self) -> str:
        return max(OTHERS, key=lambda name: self.outcomes[name].byte_hit_ratio)

    @property
    def object_gap(self) -> float:
        return self.outcomes[self.best_objects].object_hit_ratio - self.outcomes[OURS].object_hit_ratio

    @property
    def byte_gap(self) -> float:
        return self.outcomes[self.best_bytes].byte_hit_ratio - self.outcomes[OURS].byte_hit_ratio

    @property
    def within(self) -> bool:
        return self.object_gap <= WITHIN_OBJECTS and self.byte_gap <= WITHIN_BYTES

    @property
    def behind_former(self) -> float:
        """In objects, behind c0 = 64 MiB without memory."""
        return self.outcomes[FORMER].object_hit_ratio - self.outcomes[OURS].object_hit_ratio

    def line(self) -> str:
        best_objects, best_bytes = self.best_objects, self.best_bytes
        ours, former = self.outcomes[OURS], self.outcomes[FORMER]
        figures = [
            f"{self.outcomes[best_objects].object_hit_ratio:.3f} {best_objects}",
            f"{self.outcomes[best_bytes].byte_hit_ratio:.3f} {best_bytes}",
            f"{former.object_hit_ratio:.3f}/{former.byte_hit_ratio:.3f}",
            f"{ours.object_hit_ratio:.3f}/{ours.byte_hit_ratio:.3f}",
            f"{self.object_gap:+.3f}/{self.byte_gap:+.3f}",
            "yes" if self.within else "no",
        ]
        return f"| {self.family} | {self.share:.0%} | {' | '.join(figures)} |"


def run_family(family: str, views: int, share: float, seed: int) -> Cell:
    """Views are of whole objects; eviction starts at the limit and goes down to 99 % of it."""
    trace = Trace(replace(FAMILIES[family], views=views, seed=seed))
    limit = int(trace.footprint * share)
    rules = Rules.of(limit, 0.99, 1.0)
    outcomes = {}
    for setting in SETTINGS:
        simulation = Simulation(setting.make_policy(limit), rules, setting.admission(rules))
        for request in trace.views():
            simulation.process(request)
        outcomes[setting.policy] = simulation.outcome
    return Cell(family, share, outcomes)


def summary(cells: Sequence[Cell]) -> list[str]:
    """One line for each goal, and whether it is met. A gap where it is ahead counts as 0."""
    within = sum(cell.within for cell in cells)
    object_gap = statistics.fmean(max(0.0, cell.object_gap) for cell in cells)
    byte_gap = statistics.fmean(max(0.0, cell.byte_gap) for cell in cells)
    worst = max(cell.behind_former for cell in cells)
    behind = sum(cell.behind_former > WITHIN_FORMER for cell in cells)
    return [
        (
            f"{_verdict(within >= SHARE_WITHIN * len(cells))}: {within} of {len(cells)} cells"
            f" ({within / len(cells):.0%}) are within {WITHIN_OBJECTS:.0%} of the best in objects and"
            f" {WITHIN_BYTES:.0%} in bytes (goal: at least {SHARE_WITHIN:.0%})."
        ),
        (
            f"{_verdict(object_gap <= MEAN_OBJECT_GAP)}: mean gap in objects {object_gap:.4f} (goal: at most"
            f" {MEAN_OBJECT_GAP})."
        ),
        f"{_verdict(byte_gap <= MEAN_BYTE_GAP)}: mean gap in bytes {byte_gap:.4f} (goal: at most {MEAN_BYTE_GAP}).",
        (
            f"{_verdict(not behind)}: {behind} cells are behind c0 = 64 MiB in objects by more than {WITHIN_FORMER}"
            f" (goal: none), most {worst:+.4f}."
        ),
    ]


def _verdict(met: bool) -> str:
    return "met" if met else "NOT MET"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--views", type=int, default=100_000)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    jobs = [
        (family, arguments.views, share, arguments.seed) for family in arguments.families for share in SHARES
    ]
    lines = [
        f"{arguments.views} views each, seed {arguments.seed}; caches in shares of all bytes seen.",
        "",
        "| traces | cache | best objects | best bytes | 64 MiB | ours | behind the best | within |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    cells = []
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as processes:
        for cell in processes.map(run_family, *zip(*jobs, strict=True)):
            cells.append(cell)
            print(cell.line(), flush=True)
    goals = "\n".join(f"- {line}" for line in summary(cells))
    print(f"\n{goals}\n")
    RESULTS.mkdir(exist_ok=True)
    text = "\n".join([*lines, *(cell.line() for cell in cells), "", goals, ""])
    (RESULTS / "families.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
