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
OLDEST, SKEW = 300.0, 10.0
"""Seconds since `iat` that a token may be used; seconds that the signer's clock may be ahead of ours."""
REMEMBERED = OLDEST + 2 * SKEW
"""Seconds that a used token is remembered: longer than it could be used again."""
_LONGEST_TOKEN = 16_384
_LATEST = 2.0**53  # no whole number of any length, no infinity, no NaN


class Refused(Exception):
    """Not authorised; the message says why, for the log alone."""


@dataclass(frozen=True, slots=True)
class Authorised:
    """The request's body as JSON, what identifies its token, and when that was issued (POSIX seconds)."""

    body: Any
    ticket: str
    issued: float


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came: all Authorization headers, the target's path and query, the body's bytes."""

    authorization: Sequence[str]
    url: str
    body: bytes


def authorise(asked: Asked, secret: str, now: float) -> Authorised:
    """Refused unless the token is good for this very request at `now` (POSIX seconds). That it was used before is for
    the caller to find out, by the ticket."""
    token = _token_of(asked.authorization)
    claims = _claims_of(token, secret)
    issued = _time_of_issue(claims.get("iat"), now)
    url = claims.get("reqUrl")
    if not isinstance(url, str) or not hmac.compare_digest(_bytes(url), _bytes(asked.url)):
        raise Refused("signed for another URL")
    try:
        body = json.loads(asked.body) if asked.body else {}
        same = "reqBody" in claims and same_json(claims["reqBody"], body)
    except (ValueError, RecursionError) as error:
        raise Refused("a body that is no JSON") from error
    if not same:
        raise Refused("signed for another body")
    # Not the signature: the last character of its base64 has spare bits. The rest is what was signed.
    return Authorised(body, hashlib.sha256(token.rpartition(".")[0].encode()).hexdigest(), issued)


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


def _token_of(headers: Sequence[str]) -> str:
    if len(headers) != 1:
        raise Refused("not exactly one Authorization header")
    scheme, _, token = headers[0].strip().partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token.isascii() or not 0 < len(token) <= _LONGEST_TOKEN:
        raise Refused("no bearer token")
    return token


def _claims_of(token: str, secret: str) -> dict[str, Any]:
    try:
        return jwt.decode(
            token,
            secret,
            algorithms=[ALGORITHM],
            options={"require": ["iat", "reqBody", "reqUrl"], "verify_iat": False},
        )
    except (jwt.PyJWTError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"no valid token: {type(error).__name__}") from error


def _time_of_issue(issued: Any, now: float) -> float:
    if isinstance(issued, bool) or not isinstance(issued, int | float) or not abs(issued) < _LATEST:
        raise Refused("no time of issue")
    if issued > now + SKEW:
        raise Refused("issued in the future")
    if issued < now - OLDEST:
        raise Refused("too old")
    return issued


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
