"""Results as a Markdown table, and the sentence that says what to do."""

from __future__ import annotations

from collections.abc import Sequence

from services.replay.scenarios import Result
from shared.settings.sizes import format_size

TOLERANCE = 0.01
"""Hit ratios that differ by less are as good as equal."""
_GIB = 1024**3
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
            f" | {outcome.bytes_written / _GIB:.1f} GiB | {outcome.evicted} |"
        )
    return "\n".join(lines)


def size_label(result: Result) -> str:
    """As it was asked for, with its bytes where that was a percentage."""
    size = result.size
    return (
        f"{size.label} ({size.limit / _GIB:.2f} GiB)" if size.label.endswith("%") else format_size(size.limit)
    )


def describe_own(own: Result) -> str:
    """One sentence, to be held against what the log itself and the node's metrics say."""
    outcome = own.outcome
    return (
        f"As configured ({own.setting.name}, {size_label(own)}): {outcome.object_hit_ratio:.1%} of requests and"
        f" {outcome.byte_hit_ratio:.1%} of bytes are hits, and the sources give {outcome.source_ratio:.3f} bytes for"
        f" each byte served."
    )


def recommend(results: Sequence[Result]) -> str:
    """One sentence. Of the settings within a point of the best object hit ratio that with the least bytes from sources,
    and of those within a point of it that which writes least; at the largest cache tried, since that was affordable."""
    if not results or not results[0].outcome.requests:
        return "There were no requests to learn from."
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
    """Where a smaller cache would do nearly as well."""
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
    return f"; {size_label(min(enough, key=lambda result: result.size.limit))} would do nearly as well"
