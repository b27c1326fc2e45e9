"""While the server cannot be reached, most verbs fail at once: a thousand misses must not wait a second each."""

from __future__ import annotations

import time

from shared.domain.errors import StateStoreUnavailable

OPEN_SECONDS = 0.5


class CircuitBreaker:
    """Open for a moment after each failure to reach the server; then one verb at a time goes through to try."""

    def __init__(self, open_seconds: float = OPEN_SECONDS) -> None:
        self._open_seconds = open_seconds
        self._cause: BaseException | None = None
        self._open_until = 0.0
        self._probing = False

    def before_call(self) -> bool:
        """True if the caller is the one that tries. Raises StateStoreUnavailable while open."""
        if self._cause is None:
            return False
        if self._probing or time.monotonic() < self._open_until:
            raise StateStoreUnavailable("state store out of reach a moment ago") from self._cause
        self._probing = True
        return True

    def after_call(self, probe: bool) -> None:
        """Must follow each `before_call` that returned, whatever the end; else nobody would try again."""
        if probe:
            self._probing = False

    def on_success(self) -> None:
        """The server answered."""
        self._cause = None

    def on_failure(self, cause: BaseException) -> bool:
        """The server did not answer. True if it did before."""
        was_closed = self._cause is None
        self._cause = cause
        self._open_until = time.monotonic() + self._open_seconds
        return was_closed
