"""The trend: `history.jsonl` has a line of ratios for each run. Figures of different machines compare badly."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.figures import Measurement, ratio_of

FILE = Path(__file__).with_name("history.jsonl")
_FACTS = ("CPU", "mitigations", "kernel", "python", "python build", "load before the run")


def line(
    facts: Mapping[str, str],
    commit: str,
    base: str,
    measured: Sequence[Measurement],
    wanted: Sequence[tuple[str, str, str]],
) -> dict[str, object]:
    """`wanted`: figure, subject and other contender of each ratio. `base`: what the run compares with."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for case in dict.fromkeys(each.case for each in measured):
        of_case = [each for each in measured if each.case == case]
        for figure, subject, other in wanted:
            found = ratio_of(of_case, figure, subject, other)
            if found is not None:
                three = [round(value, 3) for value in (found.median, found.least, found.greatest)]
                ratios.setdefault(case, {})[f"{figure}, {subject} to {other}"] = three
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit,
        "base": base,
        "machine": {name: facts[name] for name in _FACTS if name in facts},
        "ratios": ratios,
    }


def add(
    facts: Mapping[str, str],
    base: str,
    measured: Sequence[Measurement],
    wanted: Sequence[tuple[str, str, str]],
    file: Path = FILE,
) -> None:
    """Append a line. Each ratio is [median, least, greatest] of the rounds."""
    commit = subprocess.run(
        ["git", "-C", str(FILE.parent), "describe", "--always", "--dirty"],
        capture_output=True, text=True, timeout=10, check=False,
    ).stdout.strip()  # fmt: skip
    with file.open("a") as lines:
        lines.write(json.dumps(line(facts, commit, base, measured, wanted)) + "\n")
