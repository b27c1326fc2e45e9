"""The order in which an object's sources are tried: by speed, with failing sources at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distributor_node.shared.domain.objects import source_name

MEAN_SAMPLES = 10
"""Responses whose time to the first byte counts in a source's mean."""

_RECENT_SAMPLES = 2
_INITIAL_PENALTY = 2.0  # seconds
_MAX_PENALTY = 300.0
_UNREACHABLE_PENALTY = (
    300.0  # after a failed probe; longer than the interval, but not for ever if probes stop
)
_MIN_FIRST_BYTE = 0.01  # seconds; faster sources rank equal
_DEFAULT_FIRST_BYTE = 0.25  # for a source without history


@dataclass(frozen=True, slots=True)
class SourceHealth:
    """The history of one source."""

    failures: int = 0  # of downloads, since the last success
    last_failure_at: float = 0.0  # on the same clock as `now`
    first_bytes: tuple[
        float, ...
    ] = ()  # seconds to the first byte of the last MEAN_SAMPLES responses, newest last
    unreachable_at: float | None = None  # when the last probe failed; None: it succeeded

    @property
    def mean_first_byte(self) -> float | None:
        """Seconds; None before the first response."""
        return _mean(self.first_bytes)

    @property
    def expected_first_byte(self) -> float:
        """Seconds to expect: the mean of all samples or of the last two, whichever is higher.

        So a source that slows down is noticed after two probes, and does not recover by one or two fast responses.
        """
        means = _mean(self.first_bytes), _mean(self.first_bytes[-_RECENT_SAMPLES:])
        return max((mean for mean in means if mean is not None), default=_DEFAULT_FIRST_BYTE)

    @property
    def penalty_ends(self) -> float:
        """Until when the source ranks behind the others.

        After one failure 2 s, doubling with each further one. After a failed probe 5 minutes, unless a probe or a
        download succeeds.
        """
        ends = -math.inf if self.unreachable_at is None else self.unreachable_at + _UNREACHABLE_PENALTY
        if self.failures == 0:
            return ends
        # The exponent is bounded: a source may fail for years.
        penalty = min(_INITIAL_PENALTY * 2.0 ** min(self.failures - 1, 32), _MAX_PENALTY)
        return max(ends, self.last_failure_at + penalty)

    @property
    def slowness(self) -> int:
        """0 for up to 10 ms to the first byte, 1 for up to 20 ms, and so on, doubling.

        The steps are coarse, so that noise does not change the catalog's order. A source without history is average.
        """
        expected = self.expected_first_byte
        return math.ceil(math.log2(expected / _MIN_FIRST_BYTE)) if expected > _MIN_FIRST_BYTE else 0


def _mean(seconds: Sequence[float]) -> float | None:
    return sum(seconds) / len(seconds) if seconds else None


_NO_HISTORY = SourceHealth()


@dataclass(frozen=True, slots=True)
class SourceStatsDelta:
    """What one process has seen of a source since its last exchange."""

    seen: SourceHealth = _NO_HISTORY  # in that time alone
    succeeded: bool = False  # a download succeeded, which cancels earlier failures
    reached: bool = False  # a probe or a download succeeded
    rate: float | None = None  # of its running downloads, in bytes a second; None: none was measured

    def apply_to(self, before: SourceHealth) -> SourceHealth:
        """Return the health after this delta."""
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
        """Return both deltas as one."""
        return SourceStatsDelta(
            newer.apply_to(self.seen),
            self.succeeded or newer.succeeded,
            self.reached or newer.reached,
            self.rate if newer.rate is None else newer.rate,
        )


# Rates: whether another source would send the rest sooner.

RATE_MEMORY = 60.0
"""Seconds that a measured rate counts. After that, the source is asked as one of unknown rate."""
ASSUMED_RATE = 128 * 1024
"""Bytes a second expected of a source whose rate is unknown: worth a try instead of a much slower one."""
_SAMPLE_SECONDS = 1.0
_MIN_SAMPLED_BYTES, _MIN_SAMPLED_SECONDS = 256 * 1024, 0.05
_OUTPACED_SECONDS = 3.0  # of waiting below half of the other rate
_MIN_REST_SECONDS = 3.0  # a download that ends sooner is not moved


class RateSampler:
    """The rate of one response, in samples of a second. Only time spent waiting for the source counts."""

    def __init__(self) -> None:
        self._waited = 0.0
        self._received = 0
        self._sampled = self._total_waited = 0.0
        self._total = 0
        self._outpaced_for = 0.0

    def add(self, waited: float, received: int) -> float | None:
        """Add `waited` seconds, at the end of which `received` bytes arrived. Returns the rate if a sample is full."""
        self._waited += waited
        self._received += received
        self._total_waited += waited
        self._total += received
        if self._waited < _SAMPLE_SECONDS:
            return None
        rate = self._received / self._waited
        self._sampled, self._waited, self._received = self._waited, 0.0, 0
        return rate

    @property
    def mean(self) -> float | None:
        """The rate of the whole response. None: too few bytes to tell."""
        if self._total < _MIN_SAMPLED_BYTES:
            return None
        return self._total / max(self._total_waited, _MIN_SAMPLED_SECONDS)

    def is_outpaced(self, rate: float, best_other: float, left: int) -> bool:
        """Whether this source has been below half of the best other one's rate for some seconds.

        Call it once for each sample. `left`: bytes that are still to come.
        """
        slow = rate * 2 < best_other and left > rate * _MIN_REST_SECONDS
        self._outpaced_for = self._outpaced_for + self._sampled if slow else 0.0
        return self._outpaced_for >= _OUTPACED_SECONDS


def rank(health: SourceHealth, now: float) -> tuple[float, int]:
    """Return the sort key of a source: the smallest is tried first."""
    ends = health.penalty_ends
    return ends if ends > now else -math.inf, health.slowness


def order(sources: Sequence[str], health: Mapping[str, SourceHealth], now: float) -> tuple[str, ...]:
    """Return the URLs of one object, best first, each once. `health`: by source name (`host:port`).

    A source under a penalty stays in the list, at the end: it is tried if all others fail.
    """

    def rank_of(url: str) -> tuple[float, int]:
        return rank(health.get(source_name(url), _NO_HISTORY), now)

    return tuple(sorted(dict.fromkeys(sources), key=rank_of))
