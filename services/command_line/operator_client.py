"""A client of a node's operator API, which signs each request."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any
from urllib.parse import urlencode

import httpx
import jwt

_TIMEOUT = 60.0  # seconds


class OperatorError(Exception):
    """The node rejected the request, or cannot be reached. The message says why."""


class OperatorClient:
    """`url`: of the operator API, such as http://127.0.0.1:3335."""

    def __init__(self, url: str, secret: str) -> None:
        self._url, self._secret = url.rstrip("/"), secret

    def command(self, name: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a POST and return the JSON of the response. Raises OperatorError."""
        return self._request("POST", f"/api/v1/{name}", {} if body is None else body)

    def query(self, name: str, **parameters: str | int) -> dict[str, Any]:
        """Send a GET and return the JSON of the response. Raises OperatorError."""
        query_string = f"?{urlencode(parameters)}" if parameters else ""
        return self._request("GET", f"/api/v1/{name}{query_string}", None)

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        claims = {
            "iat": int(time.time()),
            # Two equal requests within a second must not have the same token.
            "jti": uuid.uuid4().hex,
            "reqUrl": path,
            "reqBody": {} if body is None else body,
        }
        headers = {"Authorization": f"bearer {jwt.encode(claims, self._secret, algorithm='HS256')}"}
        content = None if body is None else json.dumps(body)
        try:
            response = httpx.request(
                method, self._url + path, headers=headers, content=content, timeout=_TIMEOUT, trust_env=False
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise OperatorError(
                f"{self._url} cannot be reached: {str(error) or type(error).__name__}"
            ) from error
        try:
            result = response.json()
        except ValueError as error:
            raise OperatorError(
                f"{self._url} is not an operator API: it responded {response.status_code} without JSON"
            ) from error
        if not response.is_success or not isinstance(result, dict):
            message = result.get("message", "") if isinstance(result, dict) else ""
            raise OperatorError(f"{response.status_code} {message}")
        return result
