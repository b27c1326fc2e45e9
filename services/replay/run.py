"""The replay: reads the logs, tries every setting with every cache size, and returns the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from xml.sax.saxutils import escape

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from distributor_node.services.replay.access_logs import LinesRead, read_logs, read_sizes
from distributor_node.services.replay.comparison import OTHER_POLICIES
from distributor_node.services.replay.recording import Recording
from distributor_node.services.replay.scenarios import (
    CacheSize,
    NodeRules,
    Result,
    Setting,
    parse_cache_sizes,
    try_setting,
)
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.domain.eviction import AUTO_COST
from distributor_node.shared.domain.eviction.simulator import Outcome, WindowRules
from distributor_node.shared.settings.sizes import format_size, plural, size_in_words


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
    window: WindowRules | None = None  # tried beside whole objects, in every size
    as_json: bool = False
    path_prefix: str | None = None  # in front of the objects' paths; None: all up to `/assets/`


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
            raise ConfigurationError(_without_objects(request.logs, counts))
        own, results, windowed = _try_all(request, recording, progress)
    if request.picture is not None:
        request.picture.write_text(
            render_chart(results, f"Replay of {plural(len(recording), 'request')}"), encoding="utf-8"
        )
    report = Report(recording, counts, own, results, windowed, request.window)
    return json.dumps(report.document(), indent=2) + "\n" if request.as_json else report.text()


def _without_objects(logs: Sequence[Path], counts: LinesRead) -> str:
    if not counts.total:
        empty = "an empty file" if len(logs) == 1 else f"{len(logs)} empty files"
        return f"log: expected responses with objects, got {empty}: {', '.join(map(str, logs))}"
    lines = plural(counts.total, "line")
    message = f"log: expected responses with objects, got none in {lines}: {_not_counted(counts)}"
    if counts.first_elsewhere:
        message += f". {_elsewhere(counts)}"
    if counts.first_unreadable:
        message += f". The first unreadable line: {counts.first_unreadable}"
    return message


def _not_counted(counts: LinesRead) -> str:
    """Say why lines are not replayed. Empty: all are."""
    one = "is no response with an object", "is unreadable", "is not in the sample"
    more = "are no responses with objects", "are unreadable", "are not in the sample"
    numbers = counts.other, counts.unreadable, counts.not_sampled
    said = [
        f"{number} {singular if number == 1 else several}"
        for number, singular, several in zip(numbers, one, more, strict=True)
        if number
    ]
    return " and ".join(filter(None, (", ".join(said[:-1]), *said[-1:])))


def _elsewhere(counts: LinesRead) -> str:
    return (
        f"{plural(counts.elsewhere, 'response')} at other paths, the first: {counts.first_elsewhere}; --path-prefix"
        " says where the objects are, such as --path-prefix /"
    )


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
        raise ConfigurationError(f"{error.filename}: cannot be read: {error.strerror}") from error
    task = progress.add_task("reading", total=total)
    return read_logs(
        request.logs,
        recording,
        request.sample,
        lambda read: progress.advance(task, read),
        request.path_prefix,
    )


def _try_all(
    request: ReplayRequest, recording: Recording, progress: Progress
) -> tuple[Result | None, list[Result], list[WindowResult]]:
    """Return the result of the operator's node, if its settings are given, of each setting with each size, and what a
    window changes: for the operator's node, and for the node's default with each size."""
    sizes = parse_cache_sizes(request.cache_sizes, int(recording.footprint / request.sample))
    own, rules = request.own, request.own.rules if request.own is not None else NodeRules()
    trials = [(size, setting) for size in sizes for setting in request.settings]
    if own is not None:
        trials.insert(0, (CacheSize(own.limit, format_size(own.limit)), own.setting))
    window, base = request.window, _default_of(request.settings)
    if window is not None and max(recording.sizes()) <= window.above:
        window = None
    twins = {}
    if window is not None:
        for place, (size, setting) in enumerate(trials):
            if setting == base or (own is not None and place == 0):
                twins[place] = (size, replace(setting, window=window if setting.window is None else None))
    task = progress.add_task("trying", total=len(recording) * (len(trials) + len(twins)))

    def run(size: CacheSize, setting: Setting) -> Result:
        progress.update(task, description=f"{size.label}, {setting.name}")
        outcome = try_setting(
            recording.requests(),
            setting,
            rules.at(size.limit, request.sample),
            lambda done: progress.advance(task, done),
            rules.admission_window,
        )
        return Result(setting, size, outcome)

    results = [run(size, setting) for size, setting in trials]
    windowed = [WindowResult.of(results[place], run(*twin)) for place, twin in twins.items()]
    return (None, results, windowed) if own is None else (results[0], results[1:], windowed)


def _default_of(settings: Sequence[Setting]) -> Setting | None:
    """Return what a node has by default, without admission if that is not tried; else the first setting."""
    defaults = (Setting("gdsf", AUTO_COST, "auto"), Setting("gdsf", AUTO_COST), *settings[:1])
    return next((setting for setting in defaults if setting in settings), None)


def _about(recording: Recording, counts: LinesRead) -> list[str]:
    objects = f"{plural(recording.objects, 'object')} ({size_in_words(recording.footprint)})"
    lines = [f"{plural(len(recording), 'request')} for {objects} in {_span(recording.days)}."]
    if counts.counted < counts.total:
        lines.append(f"Of {plural(counts.total, 'line')}, {_not_counted(counts)}.")
    if counts.first_unreadable:
        lines.append(f"The first unreadable line: {counts.first_unreadable}")
    if counts.elsewhere > len(recording):
        lines.append(f"{_elsewhere(counts)}.")
    guessed = recording.guessed_sizes
    if guessed:
        have, bounds = (
            ("has", "its size is a lower bound") if guessed == 1 else ("have", "their sizes are lower bounds")
        )
        lines.append(f"{plural(guessed, 'object')} {have} only partial responses, so {bounds} (see --sizes).")
    if recording.logged_hit_ratio is not None:
        lines.append(f"By the log's own account, {recording.logged_hit_ratio:.1%} of requests were hits.")
    return lines


def _span(days: float) -> str:
    for unit, length in (("days", 1.0), ("h", 1 / 24), ("min", 1 / 1440)):
        if days >= length:
            return f"{days / length:.1f} {unit}"
    return f"{days * 86_400:.0f} s"


# What windows change


@dataclass(frozen=True, slots=True)
class WindowResult:
    """One setting with one cache size: objects fetched as a whole, and with a window."""

    whole: Result
    windowed: Result

    @classmethod
    def of(cls, one: Result, other: Result) -> WindowResult:
        """In any order."""
        return cls(one, other) if one.setting.window is None else cls(other, one)

    def __contains__(self, result: object) -> bool:
        return result is self.whole or result is self.windowed

    @property
    def source_bytes_saved(self) -> int:
        return self.whole.outcome.bytes_from_sources - self.windowed.outcome.bytes_from_sources

    @property
    def written_bytes_saved(self) -> int:
        return self.whole.outcome.bytes_written - self.windowed.outcome.bytes_written

    @property
    def object_hits_gained(self) -> float:
        """Points of the object hit ratio, as a share."""
        return self.windowed.outcome.object_hit_ratio - self.whole.outcome.object_hit_ratio

    @property
    def byte_hits_gained(self) -> float:
        return self.windowed.outcome.byte_hit_ratio - self.whole.outcome.byte_hit_ratio

    def sentence(self) -> str:
        whole = self.whole.outcome
        return (
            f"With {self.whole.setting.name}, {size_label(self.whole)}, a window would save"
            f" {_share(self.source_bytes_saved, whole.bytes_from_sources)} of the bytes from sources and"
            f" {_share(self.written_bytes_saved, whole.bytes_written)} of the bytes written; object hits"
            f" {100 * self.object_hits_gained:+.1f} points, byte hits {100 * self.byte_hits_gained:+.1f} points."
        )


def _share(saved: int, before: int) -> str:
    """Less than 0 where more is fetched: what is evicted early is fetched again."""
    return f"{saved / max(1, before):.1%} ({size_in_words(saved)})"


def describe_viewing(shares: Sequence[float], above: int) -> str:
    """Return one sentence. `shares`: of the object that each view watched, in rising order."""
    if not shares:
        return f"There are no views of objects above {format_size(above)}."
    finished = sum(share >= _FINISHED for share in shares) / len(shares)
    return (
        f"{plural(len(shares), 'view')} of objects above {format_size(above)} got"
        f" {sum(shares) / len(shares):.1%} of the object in the mean and {shares[len(shares) // 2]:.1%} in the median;"
        f" {finished:.1%} got nearly all of it."
    )


_FINISHED = 0.95


# The report: as text, or as JSON


@dataclass(frozen=True, slots=True)
class Report:
    """All that a replay found."""

    recording: Recording
    counts: LinesRead
    own: Result | None
    results: Sequence[Result]
    windowed: Sequence[WindowResult]
    window: WindowRules | None

    def text(self) -> str:
        about = _about(self.recording, self.counts)
        if self.own is not None:
            about.append(describe_own(self.own))
        rows = [*self.results, *(pair.windowed for pair in self.windowed if self.own not in pair)]
        rows.sort(key=lambda result: result.size.limit)
        conclusion = [*self._window_sentences(), describe_gap(self.results), recommend(self.results)]
        return "\n".join([*about, "", render_table(rows), "", *filter(None, conclusion), ""])

    def _window_sentences(self) -> Iterator[str]:
        """What windows change for the operator's node, and with the largest cache tried."""
        window = self.window
        if window is None:
            return
        if not self.windowed:
            yield f"No object is larger than {format_size(window.above)}: a window would change nothing."
            return
        yield describe_viewing(self.recording.watched_shares(window.above), window.above)
        largest = max(self.windowed, key=lambda pair: (self.own not in pair, pair.whole.size.limit))
        shown = {id(pair): pair for pair in self.windowed if self.own in pair or pair is largest}
        yield from (pair.sentence() for pair in shown.values())

    def document(self) -> Mapping[str, object]:
        """As JSON: sizes in bytes, ratios and shares from 0 to 1, savings as differences to whole objects."""
        recording, counts, window = self.recording, self.counts, self.window
        shares = recording.watched_shares(window.above) if window is not None else ()
        return {
            "requests": len(recording),
            "objects": recording.objects,
            "object_bytes": recording.footprint,
            "days": recording.days,
            "lines": asdict(counts),
            "guessed_sizes": recording.guessed_sizes,
            "logged_hit_ratio": recording.logged_hit_ratio,
            "as_configured": None if self.own is None else _result_document(self.own),
            "results": [_result_document(result) for result in self.results],
            "window": None if window is None else asdict(window),
            "watched": {
                "views": len(shares),
                "mean": sum(shares) / len(shares) if shares else None,
                "shares": [shares[len(shares) * tenth // 10] for tenth in range(10)] if shares else [],
            },
            "windowed": [
                {
                    **_result_document(pair.windowed),
                    "source_bytes_saved": pair.source_bytes_saved,
                    "written_bytes_saved": pair.written_bytes_saved,
                    "object_hits_gained": pair.object_hits_gained,
                    "byte_hits_gained": pair.byte_hits_gained,
                }
                for pair in self.windowed
            ],
            "gap": describe_gap(self.results) or None,
            "recommendation": recommend(self.results),
        }


def _result_document(result: Result) -> Mapping[str, object]:
    outcome = result.outcome
    return {
        "cache": result.size.label,
        "limit": result.size.limit,
        "setting": result.setting.name,
        **asdict(outcome),
        "object_hit_ratio": outcome.object_hit_ratio,
        "byte_hit_ratio": outcome.byte_hit_ratio,
        "source_ratio": outcome.source_ratio,
        "write_ratio": outcome.write_ratio,
    }


# Parts of the report: a Markdown table, a recommendation, and a chart (SVG)


TOLERANCE = 0.01  # hit ratios that differ by less count as equal
FEWEST_REQUESTS = 1000
"""From fewer nothing is concluded. With so many the standard error of a hit ratio is 1.6 points at most."""
_COLUMNS = (
    "cache",
    "setting",
    "object hit ratio",
    "byte hit ratio",
    "bytes from sources per byte served",
    "bytes written per byte served",
    "bytes written",
    "evicted",
)


def render_table(results: Sequence[Result]) -> str:
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|---|" + "---:|" * (len(_COLUMNS) - 2)]
    for result in results:
        outcome = result.outcome
        ratios = (
            outcome.object_hit_ratio,
            outcome.byte_hit_ratio,
            outcome.source_ratio,
            outcome.write_ratio,
        )
        lines.append(
            f"| {size_label(result)} | {result.setting.name} | {' | '.join(f'{ratio:.3f}' for ratio in ratios)}"
            f" | {size_in_words(outcome.bytes_written)} | {outcome.evicted} |"
        )
    return "\n".join(lines)


def size_label(result: Result) -> str:
    """Return the cache size as requested, with its bytes if it was a percentage."""
    size = result.size
    return (
        f"{size.label} ({size_in_words(size.limit)})" if size.label.endswith("%") else format_size(size.limit)
    )


def describe_own(own: Result) -> str:
    """Return one sentence, which can be compared with the log and the node's metrics."""
    outcome = own.outcome
    return (
        f"As configured ({own.setting.name}, {size_label(own)}): {outcome.object_hit_ratio:.1%} of requests and"
        f" {outcome.byte_hit_ratio:.1%} of bytes are hits, and the sources give {outcome.source_ratio:.3f} bytes for"
        f" each byte served."
    )


def describe_gap(results: Sequence[Result]) -> str:
    """Return one sentence: how far what a node has by default is behind the best of each column, at the largest size;
    without admission if that was not tried. Empty if neither was tried, or nothing beside it, or with too few requests.
    """
    if not results or results[0].outcome.requests < FEWEST_REQUESTS:
        return ""
    limit = max((result.size.limit for result in results), default=0)
    at_size = [result for result in results if result.size.limit == limit]
    defaults = (Setting("gdsf", AUTO_COST, "auto"), Setting("gdsf", AUTO_COST))
    tried = {result.setting: result for result in at_size}
    own = next((tried[setting] for setting in defaults if setting in tried), None)
    if own is None or len(at_size) == 1:
        return ""
    objects = max(at_size, key=lambda result: result.outcome.object_hit_ratio)
    by_bytes = max(at_size, key=lambda result: result.outcome.byte_hit_ratio)
    object_gap = objects.outcome.object_hit_ratio - own.outcome.object_hit_ratio
    byte_gap = by_bytes.outcome.byte_hit_ratio - own.outcome.byte_hit_ratio
    return (
        f"{own.setting.name} is {100 * object_gap:.1f} points behind the best object hit ratio ({objects.setting.name})"
        f" and {100 * byte_gap:.1f} points behind the best byte hit ratio ({by_bytes.setting.name})."
    )


def recommend(results: Sequence[Result]) -> str:
    """Return one sentence that recommends a setting for the largest cache tried.

    Of the settings within one percentage point of the best object hit ratio, those within one point of the fewest
    bytes from sources; of these, the one that writes the fewest bytes.
    """
    results = [result for result in results if result.setting.policy not in OTHER_POLICIES]
    if not results or not results[0].outcome.requests:
        return "There were no requests to compare the settings by."
    requests = results[0].outcome.requests
    if requests < FEWEST_REQUESTS:
        return (
            f"{plural(requests, 'request')} {'is' if requests == 1 else 'are'} too few to choose a setting by: the rows"
            f" may differ by chance. Expected at least {FEWEST_REQUESTS}."
        )
    limit = max(result.size.limit for result in results)
    at_size = [result for result in results if result.size.limit == limit]
    best_hits = max(result.outcome.object_hit_ratio for result in at_size)
    good = [result for result in at_size if best_hits - result.outcome.object_hit_ratio <= TOLERANCE]
    least = min(result.outcome.source_ratio for result in good)
    good = [result for result in good if result.outcome.source_ratio - least <= TOLERANCE]
    chosen = min(good, key=lambda result: (result.outcome.write_ratio, result.outcome.source_ratio))
    outcome = chosen.outcome
    return (
        f"With {size_label(chosen)} choose {chosen.setting.name}: {outcome.object_hit_ratio:.1%} of requests and"
        f" {outcome.byte_hit_ratio:.1%} of bytes are hits, and the sources give {outcome.source_ratio:.2f} bytes for"
        f" each byte served{_compared(chosen, at_size)}{_smaller(chosen, results)}."
    )


def _compared(chosen: Result, at_size: Sequence[Result]) -> str:
    worst = max(at_size, key=lambda result: result.outcome.source_ratio)
    if worst.outcome.source_ratio - chosen.outcome.source_ratio <= TOLERANCE:
        return ""
    return f" ({worst.outcome.source_ratio:.2f} under {worst.setting.name})"


def _smaller(chosen: Result, results: Sequence[Result]) -> str:
    """Return a remark if a smaller cache has nearly the same hit ratios."""
    same = [result for result in results if result.setting == chosen.setting]
    enough = [
        result
        for result in same
        if result.size.limit < chosen.size.limit
        and chosen.outcome.byte_hit_ratio - result.outcome.byte_hit_ratio <= TOLERANCE
        and chosen.outcome.object_hit_ratio - result.outcome.object_hit_ratio <= TOLERANCE
    ]
    if not enough:
        return ""
    return f"; {size_label(min(enough, key=lambda result: result.size.limit))} would be nearly as good"


# The chart: four panels over the cache size, with a line for each setting.

_WIDTH, _HEIGHT = 430, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 34, 40
_LEGEND_LINE = 20
# The colours of Okabe and Ito, which colour-blind readers can distinguish.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#a0a000")
_PANELS: Sequence[tuple[str, Callable[[Outcome], float]]] = (
    ("Object hit ratio", lambda outcome: outcome.object_hit_ratio),
    ("Byte hit ratio", lambda outcome: outcome.byte_hit_ratio),
    ("Bytes from sources per byte served", lambda outcome: outcome.source_ratio),
    ("Bytes written per byte served", lambda outcome: outcome.write_ratio),
)


def render_chart(results: Sequence[Result], title: str) -> str:
    """Return the whole SVG document."""
    settings = list(dict.fromkeys(result.setting for result in results))
    height = 40 + 2 * _HEIGHT + _LEGEND_LINE * len(settings) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * _WIDTH} {height}" font-family="sans-serif">',
        "<style>text { font-size: 12px } .title { font-size: 16px }</style>",
        f'<rect width="{2 * _WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_WIDTH}" y="24" text-anchor="middle" class="title">{escape(title)}</text>',
    ]
    for number, (name, metric) in enumerate(_PANELS):
        x, y = (number % 2) * _WIDTH, 40 + (number // 2) * _HEIGHT
        parts.append(f'<g transform="translate({x},{y})">')
        parts += _panel(name, metric, results, settings)
        parts.append("</g>")
    for number, setting in enumerate(settings):
        y = 40 + 2 * _HEIGHT + _LEGEND_LINE * (number + 1)
        parts.append(f'<rect x="{_LEFT}" y="{y - 10}" width="24" height="4" fill="{_colour(number)}"/>')
        parts.append(f'<text x="{_LEFT + 32}" y="{y - 4}">{escape(setting.name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _panel(
    name: str, metric: Callable[[Outcome], float], results: Sequence[Result], settings: Sequence[Setting]
) -> list[str]:
    y_max = _round_up(max(metric(result.outcome) for result in results))
    limits = {result.size.limit: result.size.label for result in results}
    low, high = math.log(min(limits)), math.log(max(limits))

    def x(limit: int) -> float:
        share = (math.log(limit) - low) / (high - low) if high > low else 0.5
        return _LEFT + 10 + share * (_WIDTH - _LEFT - _RIGHT - 20)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - value / y_max * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<text x="{_LEFT}" y="{_TOP - 14}" font-weight="bold">{name}</text>']
    for step in range(5):
        value = y_max * step / 4
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#dddddd"/>'
        )
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for limit, label in limits.items():
        parts.append(
            f'<text x="{x(limit):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{escape(label)}</text>'
        )
    for number, setting in enumerate(settings):
        points = [(x(r.size.limit), y(metric(r.outcome))) for r in results if r.setting == setting]
        line = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{_colour(number)}" stroke-width="2" stroke-opacity="0.8"/>'
        )
        parts += [
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3.5" fill="{_colour(number)}"/>'
            for across, down in points
        ]
    return parts


def _round_up(value: float) -> float:
    """Return a round number for the top of the axis: 1, or the next of 1, 2, 5 × a power of ten."""
    if value <= 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)
