"""Exceptions by which a handler ends a request: an error response, or an aborted connection. See sanic_app.py."""

from __future__ import annotations

from collections.abc import Mapping

RETRY_LATER: Mapping[str, str] = {"Retry-After": "5"}
"""Headers of a 503 that is expected to be short. Seconds."""


NOT_CACHED = "not_cached"
"""`kind` of the error for what only-if-cached asked for and is not here. Nodes of a fleet ask each other so."""

RETRY_SOON: Mapping[str, str] = {"Retry-After": "2"}
"""Headers of a 503 for load alone (seconds)."""


class HttpError(Exception):
    """Ends a request with an error response. Raise AbortResponse instead once the first byte has been sent."""

    def __init__(
        self, status: int, message: str, kind: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """`message` and `kind` are the fields of the body. `headers` are added to the usual ones."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.headers = dict(headers or {})


class RangeOutOfReach(HttpError):
    """A source has the object, but sends it from its first byte on alone, and the range begins too far from there.

    Nothing has been sent. A fetch of the object may still bring the range.
    """

    def __init__(self) -> None:
        super().__init__(502, "No source could deliver the object", "sources_failed")


class AbortResponse(Exception):
    """Aborts the connection, so that the client notices that its response is incomplete."""

    def __init__(self, reason: str) -> None:
        """`reason`: a label for logs and metrics, such as `source_failed`, `verification_failed`, `object_gone`."""
        super().__init__(reason)
        self.reason = reason
