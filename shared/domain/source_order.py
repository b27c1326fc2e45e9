"""The order in which an object's sources are asked: the quick ones first, the failing ones behind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distributor_node.shared.domain.objects import source_name

MEAN_SAMPLES = 10
"""Answers whose times to the first byte make a source's mean."""

_RECENT_SAMPLES = 2
_INITIAL_PENALTY = 2.0
_MAX_PENALTY = 300.0
# Seconds that a failed probe is believed: longer than until the next one, shorter than for ever when nobody probes.
_UNREACHABLE_PENALTY = 300.0
_MIN_FIRST_BYTE = 0.01
_DEFAULT_FIRST_BYTE = 0.25


@dataclass(frozen=True, slots=True)
class SourceHealth:
    """What has been seen of one source. `failures`: of downloads, in a row, none since the last success;
    `last_failure_at`: on the clock that `now` is of; `first_bytes`: seconds from request to first byte of the last
    MEAN_SAMPLES answers, newest last; `unreachable_at`: when the last probe failed, None if it did not."""

    failures: int = 0
    last_failure_at: float = 0.0
    first_bytes: tuple[float, ...] = ()
    unreachable_at: float | None = None

    @property
    def mean_first_byte(self) -> float | None:
        """Seconds; None before the first answer."""
        return _mean(self.first_bytes)

    @property
    def expected_first_byte(self) -> float:
        """Seconds to reckon with: the mean, or that of the last two answers where it is worse. A source that slows down
        is found out after two probes, not when most of ten are slow; a quick answer or two forgive nothing."""
        means = _mean(self.first_bytes), _mean(self.first_bytes[-_RECENT_SAMPLES:])
        return max((mean for mean in means if mean is not None), default=_DEFAULT_FIRST_BYTE)

    @property
    def penalty_ends(self) -> float:
        """Until when the source goes behind the others: 2 s after one failure, twice that after each further one; after
        a failed probe until a good one, or a good download."""
        ends = -math.inf if self.unreachable_at is None else self.unreachable_at + _UNREACHABLE_PENALTY
        if self.failures == 0:
            return ends
        # Bounded exponent: a source may fail for years.
        penalty = min(_INITIAL_PENALTY * 2.0 ** min(self.failures - 1, 32), _MAX_PENALTY)
        return max(ends, self.last_failure_at + penalty)

    @property
    def slowness(self) -> int:
        """0 for up to 10 ms to the first byte, 1 up to twice that, and so on: coarse, so that chance does not undo the
        catalog's order. A source of which nothing is known counts as neither quick nor slow."""
        expected = self.expected_first_byte
        return math.ceil(math.log2(expected / _MIN_FIRST_BYTE)) if expected > _MIN_FIRST_BYTE else 0


def _mean(seconds: Sequence[float]) -> float | None:
    return sum(seconds) / len(seconds) if seconds else None


_NO_HISTORY = SourceHealth()


@dataclass(frozen=True, slots=True)
class SourceStatsDelta:
    """What one process has seen of a source lately, to be put after what was known before. `seen`: that alone;
    `succeeded`: a download succeeded, failures before it count no more; `reached`: a probe, or a download, did."""

    seen: SourceHealth = _NO_HISTORY
    succeeded: bool = False
    reached: bool = False

    def apply_to(self, before: SourceHealth) -> SourceHealth:
        """The health as it is with this delta."""
        seen = self.seen
        unreachable_at = seen.unreachable_at
        if unreachable_at is None and not self.reached:
            unreachable_at = before.unreachable_at
        failures = seen.failures + (0 if self.succeeded else before.failures)
        last_failure_at = seen.last_failure_at if seen.failures else before.last_failure_at
        return SourceHealth(
            failures=failures,
            last_failure_at=last_failure_at if failures else 0.0,
            first_bytes=(before.first_bytes + seen.first_bytes)[-MEAN_SAMPLES:],
            unreachable_at=unreachable_at,
        )

    def followed_by(self, newer: SourceStatsDelta) -> SourceStatsDelta:
        """Both, as one."""
        return SourceStatsDelta(
            newer.apply_to(self.seen), self.succeeded or newer.succeeded, self.reached or newer.reached
        )


def rank(health: SourceHealth, now: float) -> tuple[float, int]:
    """The smaller, the earlier it is asked."""
    ends = health.penalty_ends
    return ends if ends > now else -math.inf, health.slowness


def order(sources: Sequence[str], health: Mapping[str, SourceHealth], now: float) -> tuple[str, ...]:
    """URLs of one object, best first, each once; `health` is by source name (`host:port`).

    Under a penalty a source is still there, at the end: when all others fail it is asked all the same.
    """

    def rank_of(url: str) -> tuple[float, int]:
        return rank(health.get(source_name(url), _NO_HISTORY), now)

    return tuple(sorted(dict.fromkeys(sources), key=rank_of))
