"""How long a job waits when it cannot begin at once, and what becomes of it then. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.domain.jobs import Hopeless, JobOutcome, LookAgain, TryLater
from shared.ports.state_store import AlreadyStored, HeldElsewhere, NeverFits, NoSpace, NotReconciled

Denied = AlreadyStored | HeldElsewhere | NoSpace | NeverFits | NotReconciled

_MIN_RENEWAL = 0.5
"""Seconds by which a lease must end later than it was first seen to, for its holder to count as alive."""


@dataclass(slots=True)
class AdmissionWait:
    """Of one job. `space_wait` and `lease`: seconds, from the settings; times given to it are of any clock that never
    goes back."""

    space_wait: float
    lease: float
    _first_seen: dict[type, float] = field(default_factory=dict)
    _lease_expires_at: float | None = None

    def decide(self, denied: Denied, now: float) -> JobOutcome | None:
        """The job's outcome; None: wait a little and ask again."""
        waited = now - self._first_seen.setdefault(type(denied), now)
        match denied:
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
                return self._decide_held(now, seconds_left, waited)

    def _decide_held(self, now: float, seconds_left: float, waited: float) -> JobOutcome | None:
        """A holder that died leaves this very job, redelivered, as the only one: it must not end before the dead
        worker's lease does. So it may be with one that renews its lease, if its delivery was lost with its
        connection. Either shows within the time of one lease; a lease that neither ends nor is renewed is one whose
        end a clock that was put back has moved away."""
        if seconds_left <= 0:
            return TryLater("being evicted") if waited >= self.space_wait else None
        expires_at = now + seconds_left
        if self._lease_expires_at is None:
            self._lease_expires_at = expires_at
        elif expires_at > self._lease_expires_at + _MIN_RENEWAL:
            return LookAgain("fetched elsewhere")
        return TryLater("held by a lease that does not end") if waited >= 2 * self.lease else None
