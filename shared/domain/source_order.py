"""The order in which an object's sources are asked: the catalog's, with the failing and the slow ones behind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared.domain.objects import source_name

_FIRST_PENALTY = 2.0
_LONGEST_PENALTY = 300.0
_QUICK_ENOUGH = 0.25


@dataclass(frozen=True, slots=True)
class SourceHealth:
    """What a process has seen of one source. `failures`: in a row, none since the last success; `last_failure_at`: on
    the clock that `now` is of; `mean_first_byte`: seconds from request to first byte, None before the first answer."""

    failures: int = 0
    last_failure_at: float = 0.0
    mean_first_byte: float | None = None

    @property
    def penalty_ends(self) -> float:
        """Until when the source goes behind the others: 2 s after one failure, twice that after each further one."""
        if self.failures == 0:
            return -math.inf
        # Bounded exponent: a source may fail for years.
        return self.last_failure_at + min(
            _FIRST_PENALTY * 2.0 ** min(self.failures - 1, 32), _LONGEST_PENALTY
        )

    @property
    def slowness(self) -> int:
        """0 for up to 250 ms to the first byte (or not known), 1 up to twice that, and so on: coarse, so that chance
        does not undo the catalog's order."""
        if self.mean_first_byte is None or self.mean_first_byte <= _QUICK_ENOUGH:
            return 0
        return math.ceil(math.log2(self.mean_first_byte / _QUICK_ENOUGH))


def order(sources: Sequence[str], health: Mapping[str, SourceHealth], now: float) -> tuple[str, ...]:
    """URLs of one object, best first, each once; `health` is by source name (`host:port`).

    Under a penalty a source is still there, at the end: when all others fail it is asked all the same.
    """
    unknown = SourceHealth()

    def rank(url: str) -> tuple[float, int]:
        seen = health.get(source_name(url), unknown)
        penalty = seen.penalty_ends if seen.penalty_ends > now else -math.inf
        return penalty, seen.slowness

    return tuple(sorted(dict.fromkeys(sources), key=rank))
