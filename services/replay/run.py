"""The replay: reads the logs, tries every setting with every cache size, and returns the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from distributor_node.services.replay.access_logs import LinesRead, Recording, read_logs, read_sizes
from distributor_node.services.replay.report import (
    describe_gap,
    describe_own,
    recommend,
    render_chart,
    render_table,
)
from distributor_node.services.replay.scenarios import (
    CacheSize,
    NodeRules,
    Result,
    Setting,
    parse_cache_sizes,
    try_setting,
)
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.settings.sizes import format_size


@dataclass(frozen=True, slots=True)
class OwnNode:
    """The operator's node, by its settings."""

    setting: Setting
    limit: int
    rules: NodeRules


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """What to replay."""

    logs: Sequence[Path]
    cache_sizes: Sequence[str]
    settings: Sequence[Setting]
    sizes_file: Path | None = None
    sample: float = 1.0  # share of the objects, above 0 and at most 1
    picture: Path | None = None
    own: OwnNode | None = None  # tried first, and its rules apply to all trials


def replay(request: ReplayRequest, progress_to: Console) -> str:
    """Return the report, and write the chart if requested. Raises ConfigurationError."""
    if not 0 < request.sample <= 1:
        raise ConfigurationError(f"sample: expected a share above 0 and at most 1, got {request.sample:g}")
    if request.picture is not None:
        _check_picture(request.picture)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_to, transient=True) as progress:
        recording = Recording(read_sizes(request.sizes_file) if request.sizes_file else None)
        counts = _read(request, recording, progress)
        if not len(recording):
            raise ConfigurationError(
                f"log: no responses with objects ({counts.other} other lines, {counts.unreadable} unreadable)"
            )
        own, results = _try_all(request, recording, progress)
    if request.picture is not None:
        request.picture.write_text(
            render_chart(results, f"Replay of {len(recording)} requests"), encoding="utf-8"
        )
    about = [*_about(recording, counts), *([describe_own(own)] if own is not None else [])]
    conclusion = [sentence for sentence in (describe_gap(results), recommend(results)) if sentence]
    return "\n".join([*about, "", render_table(results), "", *conclusion, ""])


def _check_picture(path: Path) -> None:
    """Check the name before the work begins."""
    if path.suffix.lower() != ".svg":
        raise ConfigurationError(f"picture: expected a name that ends in .svg, got {path}")
    if not path.parent.is_dir():
        raise ConfigurationError(f"picture: the directory {path.parent} does not exist")


def _read(request: ReplayRequest, recording: Recording, progress: Progress) -> LinesRead:
    try:
        total = sum(path.stat().st_size for path in request.logs)
    except OSError as error:
        raise ConfigurationError(f"log: {error}") from error
    task = progress.add_task("reading", total=total)
    return read_logs(request.logs, recording, request.sample, lambda read: progress.advance(task, read))


def _try_all(
    request: ReplayRequest, recording: Recording, progress: Progress
) -> tuple[Result | None, list[Result]]:
    """Return the result of the operator's node, if its settings are given, and of each setting with each size."""
    sizes = parse_cache_sizes(request.cache_sizes, int(recording.footprint / request.sample))
    own, rules = request.own, request.own.rules if request.own is not None else NodeRules()
    trials = [(size, setting) for size in sizes for setting in request.settings]
    if own is not None:
        trials.insert(0, (CacheSize(own.limit, format_size(own.limit)), own.setting))
    task = progress.add_task("trying", total=len(recording) * len(trials))
    results = []
    for size, setting in trials:
        progress.update(task, description=f"{size.label}, {setting.name}")
        outcome = try_setting(
            recording.requests(),
            setting,
            rules.at(size.limit, request.sample),
            lambda done: progress.advance(task, done),
            rules.admission_window,
        )
        results.append(Result(setting, size, outcome))
    return (None, results) if own is None else (results[0], results[1:])


def _about(recording: Recording, counts: LinesRead) -> list[str]:
    lines = [
        f"{len(recording)} requests for {recording.objects} objects ({recording.footprint / 1024**3:.1f} GiB) in"
        f" {recording.days:.1f} days; {counts.other} other lines, {counts.unreadable} unreadable"
        + (f", {counts.not_sampled} not in the sample." if counts.not_sampled else ".")
    ]
    if counts.first_unreadable:
        lines.append(f"The first unreadable line: {counts.first_unreadable}")
    if recording.guessed_sizes:
        lines.append(
            f"{recording.guessed_sizes} objects have only partial responses, so their sizes are lower bounds"
            " (see --sizes)."
        )
    if recording.logged_hit_ratio is not None:
        lines.append(f"By the log's own account, {recording.logged_hit_ratio:.1%} of requests were hits.")
    return lines
