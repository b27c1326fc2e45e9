"""What is told of each request to a source when it ends: for metrics, and for ranking the sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SourceObservation:
    """One request. `source` is host:port, `first_byte` the seconds until the answer's headers (None: there was no
    answer), `waited` all seconds spent waiting for the source, `received` the body's bytes taken off the wire.
    `failure` is the SourceError's reason; None for success and for a reader who left early."""

    source: str
    first_byte: float | None
    waited: float
    received: int
    failure: str | None


Observer = Callable[[SourceObservation], None]


def ignore(observation: SourceObservation) -> None:
    """The observer of those who want none."""
