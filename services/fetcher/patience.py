"""How long a job waits when it cannot begin at once, and what becomes of it then. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.domain.jobs import Hopeless, JobOutcome, LookAgain, TryLater
from shared.ports.state_store import AlreadyStored, HeldElsewhere, NeverFits, NoSpace, NotReconciled

Refusal = AlreadyStored | HeldElsewhere | NoSpace | NeverFits | NotReconciled

_RENEWED_BY = 0.5
"""Seconds by which a lease must end later than it was first seen to, for its holder to count as alive."""


@dataclass(slots=True)
class Patience:
    """Of one job. `space_wait` and `lease`: seconds, from the settings; times given to it are of any clock that never
    goes back."""

    space_wait: float
    lease: float
    _begun: dict[type, float] = field(default_factory=dict)
    _lease_ends: float | None = None

    def decide(self, refusal: Refusal, now: float) -> JobOutcome | None:
        """The job's outcome; None: wait a little and ask again."""
        waited = now - self._begun.setdefault(type(refusal), now)
        match refusal:
            case NeverFits():
                return Hopeless("larger than the storage limit")
            case AlreadyStored():
                return TryLater("the index and the volume contradict each other")
            case NoSpace(missing):
                return (
                    TryLater(f"no space: {missing} bytes are missing") if waited >= self.space_wait else None
                )
            case NotReconciled():
                return TryLater("the volume is not reconciled yet") if waited >= self.space_wait else None
            case HeldElsewhere(seconds_left):
                return self._held(now, seconds_left, waited)

    def _held(self, now: float, seconds_left: float, waited: float) -> JobOutcome | None:
        """A holder that died leaves this very job, redelivered, as the only one: it must not end before the dead
        worker's lease does. So it may be with one that gives signs of life, if its delivery was lost with its
        connection. Either shows within the time of one lease; a lease that neither ends nor is renewed is one whose
        end a clock that was put back has moved away."""
        if seconds_left <= 0:
            return TryLater("being evicted") if waited >= self.space_wait else None
        ends = now + seconds_left
        if self._lease_ends is None:
            self._lease_ends = ends
        elif ends > self._lease_ends + _RENEWED_BY:
            return LookAgain("fetched elsewhere")
        return TryLater("held by a lease that does not end") if waited >= 2 * self.lease else None
