"""Writes results as Markdown, JSON and SVG."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from subprocess import SubprocessError

from benchmarks.chart import bar_chart
from benchmarks.figures import Case, Measurement, contenders, medians, ratio
from benchmarks.goals import Verdict, verdicts

_MEASUREMENT_ERRORS = (RuntimeError, OSError, SubprocessError)
_HEADINGS = {
    "requests_per_second": "requests/s",
    "megabytes_per_second": "MB/s",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "cpu_us_per_request": "CPU µs/request",
    "rss_mb": "RSS MB",
    "first_byte_ms": "first byte ms",
    "total_ms": "total ms",
    "median_client_ms": "median client ms",
    "last_client_ms": "last client ms",
    "source_requests": "requests at source",
    "slowest_ms": "slowest ms",
    "cpu_s_per_gb": "CPU s/GB",
}


@dataclass(slots=True)
class Report:
    """All that one run has seen; may be shown at any time. `failures`: by the names of the cases whose figures do not
    count, what went wrong. `goals_apply`: it is our node that was measured."""

    facts: Mapping[str, str]
    cases: list[Case] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    goals_apply: bool = True

    def add(self, case: Case, measured: Iterable[Measurement]) -> None:
        """An error of a contender, answered or not, fails the case; so does a measurement that could not be made."""
        self.cases.append(case)
        try:
            self.measurements.extend(measured)
        except _MEASUREMENT_ERRORS as error:
            self.failures[case.name] = f"{type(error).__name__}: {error}"
        self.note_errors(case)

    def note_errors(self, case: Case) -> None:
        """Look at the errors that were counted."""
        for contender in contenders(self.of(case)):
            of_contender = (each for each in self.of(case) if each.contender == contender)
            if errors := sum(each.figures.get("errors", 0) for each in of_contender):
                self.failures.setdefault(case.name, f"{contender}: {errors:.0f} errors")

    def of(self, case: Case) -> list[Measurement]:
        return [each for each in self.measurements if each.case == case.name]

    def to_markdown(self) -> str:
        facts = [f"- {name}: {value}" for name, value in self.facts.items()]
        parts = ["\n".join(facts), *map(self.table, self.cases), self.goal_table()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def table(self, case: Case) -> str:
        """Of one case; what went wrong in it first."""
        failure = self.failures.get(case.name)
        warning = f"**FAILED, does not count: {case.name}: {failure}**" if failure else ""
        return "\n\n".join(part for part in (warning, case_table(case, self.of(case))) if part)

    def verdicts(self) -> list[Verdict]:
        if not self.goals_apply:
            return []
        return verdicts(self.measurements, {case.name for case in self.cases}, self.failures)

    def goal_table(self) -> str:
        """All goals of the cases of this run, as Markdown."""
        rows = [
            f"| {each.goal.title} | {heading(each.goal.figure)} | {each.goal.wanted} |"
            f" {'' if each.value is None else number(each.value)} | {each.text} |"
            for each in self.verdicts()
        ]
        head = ["**goals**", "", "| | figure | goal | seen | |", "|---|---|---|---|---|"]
        return "\n".join([*head, *rows]) if rows else ""

    def to_json(self) -> str:
        document = {
            "facts": self.facts,
            "cases": [asdict(case) for case in self.cases],
            "measurements": [asdict(each) for each in self.measurements],
            "failures": self.failures,
            "goals": [{**asdict(each.goal), "seen": each.value, "met": each.met} for each in self.verdicts()],
        }
        return json.dumps(document, indent=1, ensure_ascii=False)

    def to_svg(self) -> str:
        """How the subject stands to every other contender, case by case."""
        rows = []
        for case in (case for case in self.cases if case.headline):
            found = [(other, ratio(self.of(case), case, other)) for other in contenders(self.of(case))]
            bars = [
                (other, seen.median) for other, seen in found if seen is not None and other != case.subject
            ]
            better = "higher is better" if case.higher_is_better else "lower is better"
            rows.append((f"{case.title}: {heading(case.headline)}, {better}", bars))
        return bar_chart("Ours ÷ others", rows)


def case_table(case: Case, measured: Sequence[Measurement]) -> str:
    """One case as a Markdown table: a row for each contender, medians of all rounds."""
    if not measured:
        return ""
    names = list(dict.fromkeys(name for each in measured for name in each.figures))
    shown = [name for name in names if name != "errors" or any(each.figures.get(name) for each in measured)]
    rounds = len({each.round for each in measured})
    compared = f"{case.subject} ÷ this, {heading(case.headline)}" if case.headline else ""
    lines = [
        f"**{case.name}**: {case.title} (medians of {rounds} rounds)"
        if rounds > 1
        else f"**{case.name}**: {case.title}",
        "",
    ]
    columns = [*map(heading, shown), *([compared] if compared else [])]
    lines.append("| | " + " | ".join(columns) + " |")
    lines.append("|---" * (len(columns) + 1) + "|")
    for contender in contenders(measured):
        figures = medians(measured, contender)
        cells = [number(figures[name]) if name in figures else "" for name in shown]
        if compared:
            cells.append(_ratio_cell(case, measured, contender))
        lines.append(f"| {contender} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio_cell(case: Case, measured: Sequence[Measurement], contender: str) -> str:
    seen = ratio(measured, case, contender)
    if contender == case.subject or seen is None:
        return ""
    return f"{seen.median:.2f} ({seen.least:.2f}–{seen.greatest:.2f})"


def heading(name: str) -> str:
    return _HEADINGS.get(name, name.replace("_", " "))


def number(value: float) -> str:
    """Three digits that count, thousands with commas."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def write_results(report: Report, folder: Path, name: str) -> list[Path]:
    """`<name>-<time>.md`, `.json`, `.svg`; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    written = []
    for suffix, text in (("md", report.to_markdown()), ("json", report.to_json()), ("svg", report.to_svg())):
        path = folder / f"{stem}.{suffix}"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written
