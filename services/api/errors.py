"""What a handler raises to end a request otherwise than with content; `sanic_app` makes the answer of it."""

from __future__ import annotations

from collections.abc import Mapping

RETRY_LATER: Mapping[str, str] = {"Retry-After": "5"}
"""Headers of a 503 that may be over in a moment (seconds)."""


class HttpError(Exception):
    """Ends a request with an error answer. `message` and `kind` are for the client; `headers` go beside the usual ones.

    To be raised before the first byte of an answer is sent; after that, raise AbortResponse.
    """

    def __init__(
        self, status: int, message: str, kind: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.headers = dict(headers or {})


class AbortResponse(Exception):
    """An answer that has begun cannot be ended rightly: the connection is cut, so that the client knows.

    `reason` is a short word for logs and metrics, such as `source_failed`, `verification_failed`, `object_gone`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
