"""Exceptions by which a handler ends a request: an error response, or an aborted connection. See sanic_app.py."""

from __future__ import annotations

from collections.abc import Mapping

from distributor_node.shared.domain.errors import SourceError

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

    Nothing has been sent. A fetch of the object may still bring the range. `home`: what the node of the fleet failed
    with that fetches it, if it was asked.
    """

    def __init__(self, home: SourceError | None = None) -> None:
        super().__init__(502, "No source could deliver the object", "sources_failed")
        self.home = home


class RangeNotFetchedYet(HttpError):
    """A source sends no ranges, and the fetch of the object reaches this one later."""

    def __init__(self, headers: Mapping[str, str] = RETRY_LATER) -> None:
        message = "The source sends no ranges, and the fetch of the object has not reached this one yet"
        super().__init__(503, message, "range_not_fetched_yet", headers)


class AbortResponse(Exception):
    """Aborts the connection, so that the client notices that its response is incomplete."""

    def __init__(self, reason: str) -> None:
        """`reason`: a label for logs and metrics, such as `source_failed`, `verification_failed`, `object_gone`."""
        super().__init__(reason)
        self.reason = reason
