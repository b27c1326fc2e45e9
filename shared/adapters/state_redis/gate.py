"""While the server cannot be reached, most verbs fail at once: a thousand misses must not wait a second each."""

from __future__ import annotations

import time

from shared.domain.errors import StateStoreUnavailable

PAUSE_SECONDS = 0.5


class Gate:
    """Closed for a moment after each failure to reach the server; then one verb at a time goes through to try."""

    def __init__(self, pause: float = PAUSE_SECONDS) -> None:
        self._pause = pause
        self._cause: BaseException | None = None
        self._closed_until = 0.0
        self._probing = False

    def enter(self) -> bool:
        """True if the caller is the one that tries. Raises StateStoreUnavailable while closed."""
        if self._cause is None:
            return False
        if self._probing or time.monotonic() < self._closed_until:
            raise StateStoreUnavailable("state store out of reach a moment ago") from self._cause
        self._probing = True
        return True

    def leave(self, probe: bool) -> None:
        """Must follow each `enter` that returned, whatever the end; else nobody would try again."""
        if probe:
            self._probing = False

    def open(self) -> None:
        """The server answered."""
        self._cause = None

    def close(self, cause: BaseException) -> bool:
        """The server did not answer. True if it did before."""
        was_open = self._cause is None
        self._cause = cause
        self._closed_until = time.monotonic() + self._pause
        return was_open
