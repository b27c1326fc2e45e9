"""Authentication of the operator API, token by token."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributor_node.services.api.operator.auth import (
    CLOCK_SKEW,
    MAX_TOKEN_AGE,
    AuthenticationError,
    SignedRequest,
    authenticate,
    same_json,
    weak_secret,
)
from tests.servers.operator_token import SECRET, sign

NOW = 1_800_000_000.0
URL = "/api/v1/set-buckets"
BODY = {"buckets": ["0:1"]}
OTHER_SECRET = "another-secret-that-is-long-enough-0"


def ask(token: str, url: str = URL, body: bytes = json.dumps(BODY).encode(), scheme: str = "bearer") -> Any:
    return authenticate(SignedRequest([f"{scheme} {token}"], url, body), SECRET, NOW).body


def token(**claims: Any) -> str:
    return sign(URL, BODY, **{"iat": int(NOW), **claims})


def part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def unsigned(algorithm: Any, signature: str = "") -> str:
    claims = {"iat": int(NOW), "reqUrl": URL, "reqBody": BODY}
    return f"{part({'alg': algorithm, 'typ': 'JWT'})}.{part(claims)}.{signature}"


@pytest.mark.parametrize("scheme", ["bearer", "Bearer", "BEARER"])
def test_a_valid_token_is_accepted(scheme: str) -> None:
    assert ask(token(), scheme=scheme) == BODY


@pytest.mark.parametrize("age", [-CLOCK_SKEW, 0, 1, MAX_TOKEN_AGE])
def test_a_token_of_any_valid_age_is_accepted(age: float) -> None:
    assert ask(token(iat=NOW - age)) == BODY


def test_a_short_secret_is_named_once_and_works() -> None:
    """The library would warn at each request, in its own words."""
    short = "sixteen-letters!"
    assert weak_secret(short) == (
        "operator_api.secret: expected at least 32 bytes (RFC 7518, section 3.2), got 16"
    )
    assert weak_secret("ä" * 16) is None, "bytes count"
    with pytest.warns(jwt.InsecureKeyLengthWarning):
        signed = jwt.encode({"iat": int(NOW), "reqUrl": URL, "reqBody": BODY}, short, algorithm="HS256")
    request = SignedRequest([f"bearer {signed}"], URL, json.dumps(BODY).encode())
    assert authenticate(request, short, NOW).body == BODY


def test_no_body_is_an_empty_object() -> None:
    assert ask(sign("/api/v1/stop-api", {}, iat=int(NOW)), "/api/v1/stop-api", b"") == {}


def test_bodies_are_compared_as_values() -> None:
    spaced = b' { "b" : [1, 2.0], "a" : null } '
    assert ask(sign(URL, {"a": None, "b": [1.0, 2]}, iat=int(NOW)), body=spaced) == {"a": None, "b": [1, 2]}


def test_the_query_belongs_to_the_url() -> None:
    signed = sign("/api/v1/cache?limit=5", {}, iat=int(NOW))
    assert ask(signed, "/api/v1/cache?limit=5", b"") == {}
    with pytest.raises(AuthenticationError):
        ask(signed, "/api/v1/cache?limit=6", b"")


REFUSED: dict[str, Callable[[], str]] = {
    "forged": lambda: token(secret=OTHER_SECRET),
    "expired": lambda: token(iat=int(NOW - MAX_TOKEN_AGE - 1)),
    "future": lambda: token(iat=int(NOW + CLOCK_SKEW + 1)),
    "past exp": lambda: token(exp=1_000_000_000),
    "alg none": lambda: unsigned("none"),
    "alg None": lambda: unsigned("None", "AAAA"),
    "alg RS256": lambda: unsigned("RS256", "AAAA"),
    "alg of no text": lambda: unsigned(["HS256"], "AAAA"),
    "no alg": lambda: unsigned(None, "AAAA"),
    "alg HS512": lambda: jwt.encode(
        {"iat": int(NOW), "reqUrl": URL, "reqBody": BODY}, SECRET * 2, algorithm="HS512"
    ),
    "no signature": lambda: token().rpartition(".")[0] + ".",
    "claims exchanged": lambda: ".".join(
        [token().split(".")[0], unsigned("HS256").split(".")[1], token().split(".")[2]]
    ),
    "another URL": lambda: token(reqUrl="/api/v1/shutdown"),
    "URL with host": lambda: token(reqUrl="http://node" + URL),
    "URL of no text": lambda: token(reqUrl=7),
    "another body": lambda: token(reqBody={"buckets": ["0:2"]}),
    "true for one": lambda: token(reqBody={"buckets": ["0:1"], "more": True}),
    "body as text": lambda: token(reqBody=json.dumps(BODY)),
    "without iat": lambda: token(iat=None),
    "without reqUrl": lambda: token(reqUrl=None),
    "without reqBody": lambda: token(reqBody=None),
    "iat as text": lambda: token(iat=str(int(NOW))),
    "iat true": lambda: token(iat=True),
    "iat beyond all numbers": lambda: token(iat=10**400),
    "iat below all numbers": lambda: token(iat=-(10**400)),
    "iat infinite": lambda: token(iat=float("inf")),
    "for an audience": lambda: token(aud="other"),
    "nothing": lambda: "",
    "garbage": lambda: "a.b.c",
    "not ASCII": lambda: "ä.ö.ü",
    "deep header": lambda: base64.urlsafe_b64encode(b"[" * 9000).decode() + ".e30.AAAA",
    "long": lambda: "a" * 20_000,
}


@pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_all_other_tokens_are_rejected(name: str) -> None:
    with pytest.raises(AuthenticationError):
        ask(REFUSED[name]())


@pytest.mark.parametrize(
    "headers",
    [[], ["bearer"], [token()], [f"Basic {token()}"], [f"bearer {token()}"] * 2],
    ids=["none", "bare", "no scheme", "basic", "twice"],
)
def test_the_header_must_be_valid(headers: list[str]) -> None:
    with pytest.raises(AuthenticationError):
        authenticate(SignedRequest(headers, URL, json.dumps(BODY).encode()), SECRET, NOW)


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 9000, b"nul"])
def test_a_body_that_is_not_json_is_rejected(body: bytes) -> None:
    with pytest.raises(AuthenticationError):
        ask(token(), body=body)


def test_the_same_token_has_the_same_id_in_every_notation() -> None:
    good = token()
    signed = [SignedRequest([f"bearer {text}"], URL, json.dumps(BODY).encode()) for text in (good, good)]
    first, second = (authenticate(each, SECRET, NOW).token_id for each in signed)
    assert first == second
    # The last base64 digit of 32 bytes has two spare bits: other digits there mean the same signature.
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    twins = [good[:-1] + digits[digits.index(good[-1]) ^ spare] for spare in range(4)]
    assert len(set(twins)) == 4
    token_ids: list[str | None] = []
    for twin in twins:
        try:
            signed_so = SignedRequest([f"bearer {twin}"], URL, json.dumps(BODY).encode())
            token_ids.append(authenticate(signed_so, SECRET, NOW).token_id)
        except AuthenticationError:  # as strict readers of base64 do
            token_ids.append(None)
    assert token_ids[0] == first
    assert set(token_ids) <= {first, None}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_json_is_the_same_as_itself(value: Any) -> None:
    assert same_json(value, json.loads(json.dumps(value)))


@pytest.mark.parametrize(
    ("one", "other"),
    [(True, 1), (0, False), (None, False), ("1", 1), ([], {}), ([1], [1, 2]), ({"a": 1}, {})],
)
def test_json_of_another_type_is_different(one: Any, other: Any) -> None:
    assert not same_json(one, other)
    assert not same_json(other, one)


@given(st.text())
def test_no_text_is_more_than_refused(text: str) -> None:
    with pytest.raises(AuthenticationError):
        ask(text)
