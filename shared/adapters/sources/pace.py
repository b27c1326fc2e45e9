"""Decides whether a source is too slow, from the time spent waiting for it alone. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_SLOTS = 10


@dataclass(slots=True)
class _Slot:
    begins: float
    latest: float
    received: int


class MinimumRate:
    """A sliding window of `window` seconds of waiting, in which at least `minimum` bytes must arrive.

    Its clock stands still while nobody waits for the source, so a reader that pauses costs the source nothing. Arrivals
    are kept in slots of a tenth of the window, by which a verdict may come late.
    """

    def __init__(self, window: float, minimum: int) -> None:
        """`window` in seconds, `minimum` in bytes; at least one byte is always demanded."""
        self._window = window
        self._minimum = max(1, minimum)
        self.waited = 0.0
        # Bytes lent at the beginning, so that the first window is judged by the same rule as the rest.
        self._slots = deque([_Slot(0.0, 0.0, self._minimum)])
        self._sum = self._minimum

    def record(self, waited: float, received: int) -> None:
        """`waited` seconds more, at the end of which `received` bytes came."""
        self.waited += waited
        while self._slots and self._slots[0].latest <= self.waited - self._window:
            self._sum -= self._slots.popleft().received
        self._sum += received
        newest = self._slots[-1] if self._slots else None
        # The lent bytes stay in a slot of their own, or early arrivals would prolong the loan.
        if newest is not None and newest.begins > 0.0 and self.waited - newest.begins < self._window / _SLOTS:
            newest.latest = self.waited
            newest.received += received
        else:
            self._slots.append(_Slot(self.waited, self.waited, received))

    @property
    def time_left(self) -> float:
        """Seconds that may still be waited for the next bytes; 0 or less: too slow already."""
        left = self._sum
        for slot in self._slots:
            if left < self._minimum:
                return 0.0
            left -= slot.received
            if left < self._minimum:
                return slot.latest + self._window - self.waited
        return 0.0
