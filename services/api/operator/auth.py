"""Who may give orders: whoever signs the very request with the operator's secret, once, within five minutes.

`Authorization: bearer TOKEN`, a JSON Web Token (RFC 7519) with HS256 and the claims `iat`, `reqBody` (the request's
JSON body, `{}` where there is none) and `reqUrl` (path and query).
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jwt

ALGORITHM = "HS256"
MAX_TOKEN_AGE, CLOCK_SKEW = 300.0, 10.0
"""Seconds since `iat` that a token may be used; seconds that the signer's clock may be ahead of ours."""
REPLAY_WINDOW = MAX_TOKEN_AGE + 2 * CLOCK_SKEW
"""Seconds that a used token is remembered: longer than it could be used again."""
_MAX_TOKEN_LENGTH = 16_384
_MAX_TIMESTAMP = 2.0**53  # no whole number of any length, no infinity, no NaN


class AuthenticationError(Exception):
    """Not authorised; the message says why, for the log alone."""


@dataclass(frozen=True, slots=True)
class AuthenticatedRequest:
    """The request's body as JSON, what identifies its token, and when that was issued (POSIX seconds)."""

    body: Any
    token_id: str
    issued: float


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """A request as it came: all Authorization headers, the target's path and query, the body's bytes."""

    authorization: Sequence[str]
    url: str
    body: bytes


def authenticate(signed: SignedRequest, secret: str, now: float) -> AuthenticatedRequest:
    """AuthenticationError unless the token is good for this very request at `now` (POSIX seconds).
    That it was used before is for the caller to find out, by the token's id."""
    token = _bearer_token(signed.authorization)
    claims = _decode_claims(token, secret)
    issued = _issued_at(claims.get("iat"), now)
    url = claims.get("reqUrl")
    if not isinstance(url, str) or not hmac.compare_digest(_bytes(url), _bytes(signed.url)):
        raise AuthenticationError("signed for another URL")
    try:
        body = json.loads(signed.body) if signed.body else {}
        same = "reqBody" in claims and same_json(claims["reqBody"], body)
    except (ValueError, RecursionError) as error:
        raise AuthenticationError("a body that is no JSON") from error
    if not same:
        raise AuthenticationError("signed for another body")
    # Not the signature: the last character of its base64 has spare bits. The rest is what was signed.
    return AuthenticatedRequest(body, hashlib.sha256(token.rpartition(".")[0].encode()).hexdigest(), issued)


def same_json(one: Any, other: Any) -> bool:
    """Equal as JSON values: true is not 1, the order of an object's members does not matter."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(
            same_json(value, other[name]) for name, value in one.items()
        )
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)


def _bearer_token(headers: Sequence[str]) -> str:
    if len(headers) != 1:
        raise AuthenticationError("not exactly one Authorization header")
    scheme, _, token = headers[0].strip().partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token.isascii() or not 0 < len(token) <= _MAX_TOKEN_LENGTH:
        raise AuthenticationError("no bearer token")
    return token


def _decode_claims(token: str, secret: str) -> dict[str, Any]:
    try:
        return jwt.decode(
            token,
            secret,
            algorithms=[ALGORITHM],
            options={"require": ["iat", "reqBody", "reqUrl"], "verify_iat": False},
        )
    except (jwt.PyJWTError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AuthenticationError(f"no valid token: {type(error).__name__}") from error


def _issued_at(issued: Any, now: float) -> float:
    if isinstance(issued, bool) or not isinstance(issued, int | float) or not abs(issued) < _MAX_TIMESTAMP:
        raise AuthenticationError("no time of issue")
    if issued > now + CLOCK_SKEW:
        raise AuthenticationError("issued in the future")
    if issued < now - MAX_TOKEN_AGE:
        raise AuthenticationError("too old")
    return issued


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
