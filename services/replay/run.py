"""The whole replay: read the logs, try every setting at every size, tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from services.replay.chart import render_chart
from services.replay.reading import LinesRead, read_logs, read_sizes
from services.replay.recording import Recording
from services.replay.report import recommend, render_table
from services.replay.scenarios import Result, Setting, parse_cache_sizes, try_setting
from shared.domain.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """What the operator asked for. `sample`: share of the objects, above 0 and at most 1."""

    logs: Sequence[Path]
    cache_sizes: Sequence[str]
    settings: Sequence[Setting]
    sizes_file: Path | None = None
    sample: float = 1.0
    picture: Path | None = None


def replay(asked: ReplayRequest, progress_to: Console) -> str:
    """The report. Writes the picture, if asked. Raises ConfigurationError."""
    if not 0 < asked.sample <= 1:
        raise ConfigurationError("sample: want a share of the objects, above 0 and at most 1")
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_to, transient=True) as progress:
        recording = Recording(read_sizes(asked.sizes_file) if asked.sizes_file else None)
        counts = _read(asked, recording, progress)
        if not len(recording):
            raise ConfigurationError(
                f"no answers with objects in these logs ({counts.other} other lines, {counts.unreadable} unreadable)"
            )
        results = _try_all(asked, recording, progress)
    if asked.picture is not None:
        asked.picture.write_text(
            render_chart(results, f"Replay of {len(recording)} requests"), encoding="utf-8"
        )
    return "\n".join([*_about(recording, counts), "", render_table(results), "", recommend(results), ""])


def _read(asked: ReplayRequest, recording: Recording, progress: Progress) -> LinesRead:
    try:
        total = sum(path.stat().st_size for path in asked.logs)
    except OSError as error:
        raise ConfigurationError(f"log: {error}") from error
    task = progress.add_task("reading", total=total)
    return read_logs(asked.logs, recording, asked.sample, lambda read: progress.advance(task, read))


def _try_all(asked: ReplayRequest, recording: Recording, progress: Progress) -> list[Result]:
    sizes = parse_cache_sizes(asked.cache_sizes, int(recording.footprint / asked.sample))
    task = progress.add_task("trying", total=len(recording) * len(sizes) * len(asked.settings))
    results = []
    for size in sizes:
        for setting in asked.settings:
            progress.update(task, description=f"{size.label}, {setting.name}")
            limit = max(1, int(size.limit * asked.sample))
            outcome = try_setting(
                recording.requests(), setting, limit, lambda done: progress.advance(task, done)
            )
            results.append(Result(setting, size, outcome))
    return results


def _about(recording: Recording, counts: LinesRead) -> list[str]:
    lines = [
        f"{len(recording)} requests for {recording.objects} objects ({recording.footprint / 1024**3:.1f} GiB) in"
        f" {recording.days:.1f} days; {counts.other} other lines, {counts.unreadable} unreadable"
        + (f", {counts.not_sampled} not in the sample." if counts.not_sampled else ".")
    ]
    if recording.guessed_sizes:
        lines.append(
            f"Of {recording.guessed_sizes} objects only parts were seen: their sizes are lower bounds (--sizes helps)."
        )
    if recording.logged_hit_ratio is not None:
        lines.append(f"The log itself says: {recording.logged_hit_ratio:.1%} of requests were hits.")
    return lines
