"""Authentication of operator requests: each carries a JWT that signs this request, valid once, for five minutes.

`Authorization: bearer TOKEN`, a JSON Web Token (RFC 7519) with HS256 and the claims `iat`, `reqBody` (the request's
JSON body, `{}` if it is empty) and `reqUrl` (path and query).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jwt
from jwt.warnings import InsecureKeyLengthWarning

ALGORITHM = "HS256"
MAX_TOKEN_AGE, CLOCK_SKEW = 300.0, 10.0
"""Seconds after `iat` for which a token is valid, and seconds that the signer's clock may be ahead of ours."""
REPLAY_WINDOW = MAX_TOKEN_AGE + 2 * CLOCK_SKEW
"""Seconds for which a used token is remembered, longer than it is valid."""
_MAX_TOKEN_LENGTH = 16_384
_MAX_TIMESTAMP = 2.0**53  # excludes infinity, NaN and integers of any length


class AuthenticationError(Exception):
    """A request that is not authenticated. The message is for the log only."""


@dataclass(frozen=True, slots=True)
class AuthenticatedRequest:
    """A request whose token is valid."""

    body: Any  # decoded JSON
    token_id: str  # identifies the token, for replay protection
    issued: float  # POSIX seconds


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """The parts of a request that its token signs, as received."""

    authorization: Sequence[str]  # all Authorization headers
    url: str  # path and query
    body: bytes


def authenticate(signed: SignedRequest, secret: str, now: float) -> AuthenticatedRequest:
    """Verify that the token signs this request and is valid at `now` (POSIX seconds). Raises AuthenticationError.

    The caller must reject tokens that were used before, by `token_id`.
    """
    token = _bearer_token(signed.authorization)
    claims = _decode_claims(token, secret)
    issued = _issued_at(claims.get("iat"), now)
    url = claims.get("reqUrl")
    if not isinstance(url, str) or not hmac.compare_digest(_bytes(url), _bytes(signed.url)):
        raise AuthenticationError("reqUrl: does not match the request's URL")
    try:
        body = json.loads(signed.body) if signed.body else {}
        same = "reqBody" in claims and same_json(claims["reqBody"], body)
    except (ValueError, RecursionError) as error:
        raise AuthenticationError("request body: not valid JSON") from error
    if not same:
        raise AuthenticationError("reqBody: does not match the request's body")
    # Without the signature: the last character of its base64 has unused bits, so one token has several spellings.
    return AuthenticatedRequest(body, hashlib.sha256(token.rpartition(".")[0].encode()).hexdigest(), issued)


def same_json(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal. true is not 1. The order of an object's members does not matter."""
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
        raise AuthenticationError(f"Authorization headers: expected 1, got {len(headers)}")
    scheme, _, token = headers[0].strip().partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token.isascii() or not 0 < len(token) <= _MAX_TOKEN_LENGTH:
        raise AuthenticationError("Authorization: expected a bearer token")
    return token


MIN_KEY_BYTES = 32
"""Of a key for HS256 (RFC 7518, section 3.2). Secrets of the existing node may be shorter, and are accepted."""


def weak_secret(secret: str) -> str | None:
    """Return what is wrong with a secret that is shorter than it should be; None: nothing is."""
    length = len(secret.encode())
    if length >= MIN_KEY_BYTES:
        return None
    return (
        f"operator_api.secret: expected at least {MIN_KEY_BYTES} bytes (RFC 7518, section 3.2), got {length}"
    )


def _decode_claims(token: str, secret: str) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            # It is said once, at the start: see weak_secret
            warnings.simplefilter("ignore", InsecureKeyLengthWarning)
            return jwt.decode(
                token,
                secret,
                algorithms=[ALGORITHM],
                options={"require": ["iat", "reqBody", "reqUrl"], "verify_iat": False},
            )
    except (jwt.PyJWTError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AuthenticationError(f"invalid token: {type(error).__name__}") from error


def _issued_at(issued: Any, now: float) -> float:
    if isinstance(issued, bool) or not isinstance(issued, int | float) or not abs(issued) < _MAX_TIMESTAMP:
        raise AuthenticationError("iat: expected a POSIX timestamp")
    if issued > now + CLOCK_SKEW:
        raise AuthenticationError("iat: in the future")
    if issued < now - MAX_TOKEN_AGE:
        raise AuthenticationError("iat: too old")
    return issued


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
