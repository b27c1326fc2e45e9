"""Signs tokens as an operator's tool does."""

from __future__ import annotations

import time
import uuid
from typing import Any

import jwt

SECRET = "the-operators-secret-of-the-tests-0"


def sign(url: str, body: Any = None, secret: str = SECRET, *, algorithm: str = "HS256", **claims: Any) -> str:
    """For one request; `claims` replace or add, None leaves out."""
    said = {
        "iat": int(time.time()),
        "jti": uuid.uuid4().hex,
        "reqUrl": url,
        "reqBody": {} if body is None else body,
        **claims,
    }
    return jwt.encode({name: value for name, value in said.items() if value is not None}, secret, algorithm)
