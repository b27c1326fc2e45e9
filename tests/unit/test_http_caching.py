"""The decisions of a shared cache, row by row: RFC 9111 sections 3, 4.2, 4.3, 5.2, and RFC 5861.

Ages and times to live are in seconds since the response was received, at NOW.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from email.utils import formatdate

import pytest

from distributor_node.shared.domain.conditionals import NO_VALIDATORS, Validators
from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.http_caching import (
    MAX_DELTA,
    CachingRules,
    Freshness,
    Use,
    Validation,
    conditional_headers,
    decode_freshness,
    encode_freshness,
    freshness_of,
    is_useful,
    passed_cache_control,
    unknown_freshness,
    validate,
    why_not_stored,
)

NOW = 1_700_000_000
RULES = CachingRules(default_ttl=60, max_ttl=100_000, stale_while_revalidate=10, stale_if_error=3600)
FRESH, STALE, ASK, REFUSE = Use.FRESH, Use.STALE, Use.REVALIDATE, Use.REFUSE


def at(seconds: int) -> str:
    return formatdate(NOW + seconds, usegmt=True)


# Section 3: what is stored. `ETag` and `Last-Modified` where the row needs a validator.

STORING = [
    (200, {}, True),
    (200, {"Cache-Control": "max-age=60"}, True),
    (200, {"Cache-Control": "public"}, True),
    (200, {"Cache-Control": "s-maxage=60"}, True),
    (200, {"Cache-Control": "must-revalidate"}, True),
    (200, {"Cache-Control": "max-age=0"}, True),
    (200, {"Cache-Control": "x-new-directive"}, True),
    (200, {"Cache-Control": 'ext="no-store"'}, True),
    (200, {"Expires": "0"}, True),
    (200, {"Cache-Control": "no-store"}, False),
    (200, {"Cache-Control": "NO-STORE"}, False),
    (200, {"Cache-Control": "max-age=60, no-store"}, False),
    (200, {"Cache-Control": "no-store, must-understand"}, True),
    (200, {"Cache-Control": "private"}, False),
    (200, {"Cache-Control": "max-age=60, Private"}, False),
    (200, {"Cache-Control": 'private="set-cookie"'}, False),
    (200, {"Cache-Control": "no-cache"}, False),
    (200, {"Cache-Control": "no-cache", "ETag": '"a"'}, True),
    (200, {"Cache-Control": "no-cache", "ETag": 'W/"a"'}, True),
    (200, {"Cache-Control": "no-cache", "Last-Modified": at(-9)}, True),
    (200, {"Cache-Control": "no-cache", "ETag": "malformed"}, False),
    (200, {"Vary": "*"}, False),
    (200, {"Vary": "Accept-Language"}, False),
    (200, {"Vary": "Accept-Encoding, Cookie"}, False),
    (200, {"Vary": "Accept-Encoding"}, True),
    (200, {"Vary": "accept-encoding, ORIGIN"}, True),
    (200, {"Vary": ""}, True),
    (200, {"Set-Cookie": "a=b"}, False),
    (200, {"Set-Cookie": "a=b", "Cache-Control": "max-age=60"}, False),
    (200, {"Set-Cookie": "a=b", "Cache-Control": "public, max-age=60"}, True),
    (206, {"Cache-Control": "max-age=60"}, False),
    (203, {"Cache-Control": "max-age=60"}, False),
    (302, {"Cache-Control": "max-age=60"}, False),
    (301, {"Cache-Control": "public, max-age=60"}, False),
    (404, {"Cache-Control": "max-age=60"}, False),
    (500, {"Cache-Control": "max-age=60"}, False),
]


@pytest.mark.parametrize(("status", "headers", "stored"), STORING)
def test_what_is_stored(status: int, headers: dict[str, str], stored: bool) -> None:
    assert (why_not_stored(status, headers) is None) is stored


# Sections 4.2, 4.3, 5.2 and RFC 5861: a response, how long it has lain here, what a request gets.


@dataclass(frozen=True)
class Row:
    """FRESH and STALE are served from the store, STALE and ASK ask the origin. `on_error`: served while it is down."""

    cache_control: str | None
    after: int
    use: Use
    age: int
    on_error: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    passed: str | None = None  # Cache-Control for clients, if it is not the origin's
    no_cache: bool = False
    only_if_cached: bool = False

    def freshness(self) -> Freshness:
        headers = {"Date": at(0), **self.headers}
        if self.cache_control is not None:
            headers["Cache-Control"] = self.cache_control
        return freshness_of(headers, NOW, 0.2, RULES)


ROWS = [
    # 4.2.1: lifetimes that the origin states
    Row("max-age=60", 0, FRESH, 0),
    Row("max-age=60", 59, FRESH, 59),
    Row("max-age=60", 60, STALE, 60),
    Row("max-age=60", 69, STALE, 69),
    Row("max-age=60", 70, ASK, 70),
    Row('max-age="60"', 59, FRESH, 59),
    Row("MAX-AGE=60", 59, FRESH, 59),
    Row("public,max-age=60", 59, FRESH, 59),
    Row("max-age=60, max-age=60", 59, FRESH, 59),
    Row("max-age=60, max-age=90", 1, ASK, 1),
    Row("max-age=x", 1, ASK, 1),
    Row("max-age", 1, ASK, 1),
    Row("max-age=-1", 1, ASK, 1),
    Row("max-age=1.5", 1, ASK, 1),
    Row("max-age=99999999999999999999", 99_999, FRESH, 99_999),
    Row("max-age=99999999999999999999", 100_010, ASK, 100_010),
    Row("max-age=0", 0, ASK, 0),
    Row("s-maxage=60", 59, FRESH, 59, on_error=True),
    Row("s-maxage=60, max-age=5", 59, FRESH, 59),
    Row("s-maxage=5, max-age=60", 59, ASK, 59, on_error=False),
    Row("s-maxage=0, max-age=60", 0, ASK, 0, on_error=False),
    Row(None, 59, FRESH, 59, headers={"Expires": at(60)}, passed="max-age=60"),
    Row(None, 60, STALE, 60, headers={"Expires": at(60)}, passed="max-age=60"),
    Row("max-age=5", 20, ASK, 20, headers={"Expires": at(60)}),
    Row("max-age=60", 59, FRESH, 59, headers={"Expires": at(-5)}),
    Row(None, 0, ASK, 0, headers={"Expires": "0"}, passed="max-age=0"),
    Row(None, 0, ASK, 0, headers={"Expires": at(-1)}, passed="max-age=0"),
    Row(None, 0, ASK, 0, headers={"Expires": "Sunday, 06-Nov-94 08:49:37 GMT"}, passed="max-age=0"),
    # 4.2.2: lifetimes that this cache chooses
    Row(None, 59, FRESH, 59, passed="max-age=60"),
    Row(None, 70, ASK, 70, passed="max-age=60"),
    Row("public", 59, FRESH, 59),
    Row(None, 99, FRESH, 99, headers={"Last-Modified": at(-1000)}, passed="max-age=100"),
    Row(None, 100, STALE, 100, headers={"Last-Modified": at(-1000)}, passed="max-age=100"),
    Row(None, 99_999, FRESH, 99_999, headers={"Last-Modified": at(-9_000_000)}, passed="max-age=100000"),
    Row(None, 100_010, ASK, 100_010, headers={"Last-Modified": at(-9_000_000)}, passed="max-age=100000"),
    Row(None, 59, FRESH, 59, headers={"Last-Modified": at(1000)}, passed="max-age=60"),
    Row("max-age=5", 20, ASK, 20, headers={"Last-Modified": at(-1000)}),
    # 4.2.3: the age on arrival
    Row("max-age=60", 0, FRESH, 50, headers={"Age": "50"}),
    Row("max-age=60", 10, STALE, 60, headers={"Age": "50"}),
    Row("max-age=60", 10, STALE, 60, headers={"Date": at(-50)}),
    Row("max-age=60", 0, FRESH, 50, headers={"Date": at(-50), "Age": "20"}),
    Row("max-age=60", 0, FRESH, 50, headers={"Date": at(-20), "Age": "50"}),
    Row("max-age=60", 0, FRESH, 0, headers={"Date": at(50)}),
    Row("max-age=60", 0, FRESH, 0, headers={"Date": "yesterday"}),
    Row("max-age=60", 0, FRESH, 0, headers={"Age": "x"}),
    Row("max-age=60", 0, FRESH, 0, headers={"Age": "-5"}),
    Row("max-age=60", 0, ASK, MAX_DELTA, on_error=False, headers={"Age": "99999999999999999999"}),
    Row(None, 5, ASK, 205, headers={"Expires": at(-100), "Date": at(-200)}, passed="max-age=100"),
    # 4.2.4 and 5.2.2: stale responses that the origin forbids
    Row("max-age=60, must-revalidate", 59, FRESH, 59),
    Row("max-age=60, must-revalidate", 60, ASK, 60, on_error=False),
    Row("max-age=60, proxy-revalidate", 60, ASK, 60, on_error=False),
    Row("max-age=60, must-revalidate, stale-if-error=99", 60, ASK, 60, on_error=False),
    Row("max-age=60, must-revalidate, stale-while-revalidate=99", 60, ASK, 60, on_error=False),
    Row("s-maxage=60", 60, ASK, 60, on_error=False),
    Row("no-cache", 0, ASK, 0, on_error=False, headers={"ETag": '"a"'}),
    Row("no-cache, max-age=60", 1, ASK, 1, on_error=False, headers={"ETag": '"a"'}),
    Row('no-cache="x-id", max-age=60', 1, ASK, 1, on_error=False, headers={"ETag": '"a"'}),
    Row("max-age=60, immutable", 60, STALE, 60),
    # RFC 5861
    Row("max-age=60, stale-while-revalidate=30", 60, STALE, 60),
    Row("max-age=60, stale-while-revalidate=30", 89, STALE, 89),
    Row("max-age=60, stale-while-revalidate=30", 90, ASK, 90),
    Row("max-age=60, stale-while-revalidate=0", 60, ASK, 60),
    Row("max-age=0, stale-while-revalidate=30", 29, STALE, 29),
    Row("s-maxage=60, stale-while-revalidate=30", 89, STALE, 89, on_error=False),
    Row("max-age=5", 9, STALE, 9),
    Row("max-age=5", 10, ASK, 10),
    Row("max-age=60, stale-if-error=100", 159, ASK, 159),
    Row("max-age=60, stale-if-error=100", 160, ASK, 160, on_error=False),
    Row("max-age=60, stale-if-error=0", 75, ASK, 75, on_error=False),
    Row("max-age=60", 3659, ASK, 3659),
    Row("max-age=60", 3660, ASK, 3660, on_error=False),
    Row("s-maxage=60, stale-if-error=100", 159, ASK, 159),
    # 5.2.1: directives of the request
    Row("max-age=60", 5, ASK, 5, no_cache=True),
    Row("max-age=60", 65, ASK, 65, no_cache=True),
    Row("max-age=60", 5, FRESH, 5, only_if_cached=True),
    Row("max-age=60", 65, STALE, 65, only_if_cached=True),
    Row("max-age=60", 75, REFUSE, 75, only_if_cached=True),
    Row("max-age=60, must-revalidate", 60, REFUSE, 60, only_if_cached=True, on_error=False),
    Row("max-age=60", 5, REFUSE, 5, no_cache=True, only_if_cached=True),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.cache_control}+{row.after}")
def test_what_a_request_gets(row: Row) -> None:
    freshness, now = row.freshness(), NOW + row.after + 0.9
    assert freshness.use(now, no_cache=row.no_cache, only_if_cached=row.only_if_cached) is row.use
    assert freshness.age(now) == row.age
    assert freshness.response_cache_control == (row.passed or row.cache_control)
    assert freshness.may_serve_on_error(now) is row.on_error


def test_the_table_is_long_enough() -> None:
    assert len(STORING) + len(ROWS) + len(VALIDATIONS) >= 80


# Section 4.3: what a validating request says, and what its response means.

STRONG, OTHER, WEAK = Validators('"a"'), Validators('"b"'), Validators('W/"a"')
DATED = Validators(None, NOW - 100)
VALIDATIONS = [
    (STRONG, 304, STRONG, Validation.UNCHANGED),
    (STRONG, 304, NO_VALIDATORS, Validation.UNCHANGED),
    (STRONG, 304, OTHER, Validation.REPLACED),
    (WEAK, 304, WEAK, Validation.UNCHANGED),
    (DATED, 304, NO_VALIDATORS, Validation.UNCHANGED),
    (STRONG, 200, OTHER, Validation.REPLACED),
    (STRONG, 200, STRONG, Validation.UNCHANGED),
    (WEAK, 200, WEAK, Validation.REPLACED),
    (DATED, 200, DATED, Validation.REPLACED),
    (NO_VALIDATORS, 200, NO_VALIDATORS, Validation.REPLACED),
    (STRONG, 404, NO_VALIDATORS, Validation.GONE),
    (STRONG, 410, NO_VALIDATORS, Validation.GONE),
    (STRONG, 403, NO_VALIDATORS, Validation.GONE),
    (STRONG, 500, NO_VALIDATORS, Validation.FAILED),
    (STRONG, 503, STRONG, Validation.FAILED),
    (STRONG, 429, NO_VALIDATORS, Validation.FAILED),
    (STRONG, 412, NO_VALIDATORS, Validation.FAILED),
]


@pytest.mark.parametrize(("stored", "status", "received", "validation"), VALIDATIONS)
def test_what_an_answer_means(
    stored: Validators, status: int, received: Validators, validation: Validation
) -> None:
    assert validate(stored, status, received) is validation


@pytest.mark.parametrize(
    ("validators", "headers"),
    [
        (STRONG, {"If-None-Match": '"a"'}),
        (WEAK, {"If-None-Match": 'W/"a"'}),
        (DATED, {"If-Modified-Since": at(-100)}),
        (Validators('"a"', NOW), {"If-None-Match": '"a"', "If-Modified-Since": at(0)}),
        (NO_VALIDATORS, {}),
    ],
)
def test_what_is_asked(validators: Validators, headers: dict[str, str]) -> None:
    assert conditional_headers(validators) == headers


@pytest.mark.parametrize(
    ("stored", "received", "expected"),
    [
        ("max-age=60", {"Cache-Control": "max-age=90"}, (90, "max-age=90")),
        ("max-age=60", {}, (60, "max-age=60")),
        ("max-age=60", {"Expires": at(500)}, (60, "max-age=60")),
        (None, {"Expires": at(500)}, (500, None)),
        (None, {"Cache-Control": "max-age=5"}, (5, "max-age=5")),
        (None, {}, (10, None)),
    ],
)
def test_what_a_304_changes(
    stored: str | None, received: dict[str, str], expected: tuple[int, str | None]
) -> None:
    """Section 4.3.4. The stored response was modified 100 seconds before, and lies here for a long time."""
    before = freshness_of({} if stored is None else {"Cache-Control": stored}, NOW - 5000, 0, RULES)
    after = before.refreshed({"Date": at(0), **received}, DATED, NOW, 0, RULES)
    assert (after.lifetime, after.cache_control) == expected
    assert after.age(NOW) == 0
    assert after.use(NOW) is FRESH


def test_what_is_passed_on_of_a_response_that_is_not_stored() -> None:
    assert passed_cache_control({"Cache-Control": "private, max-age=5"}) == "private, max-age=5"
    assert passed_cache_control({"Set-Cookie": "a=b"}) == "no-store"


def test_a_long_header_is_passed_on_without_what_is_not_known() -> None:
    long = f"public, max-age=60, ext={'x' * 300}, stale-if-error=5"
    assert freshness_of({"Cache-Control": long}, NOW, 0, RULES).cache_control == (
        "public, max-age=60, stale-if-error=5"
    )


def test_the_delay_of_the_request_counts_as_age() -> None:
    assert freshness_of({"Age": "3", "Date": at(0)}, NOW, 2.9, RULES).age(NOW) == 5


def test_an_object_stored_without_freshness_is_asked_about_and_served_in_an_outage() -> None:
    freshness = unknown_freshness(NOW - 1000)
    assert freshness.use(NOW) is ASK
    assert freshness.may_serve_on_error(NOW)
    assert freshness.age(NOW) == 1000


@pytest.mark.parametrize(
    "freshness", [None, unknown_freshness(NOW), Freshness(NOW, 60, 10, 3600, "max-age=60", NOW + 0.25)]
)
def test_freshness_is_read_as_it_was_written(freshness: Freshness | None) -> None:
    assert decode_freshness(encode_freshness(freshness)) == freshness


@pytest.mark.parametrize(
    ("control", "validators", "useful"),
    [
        ("max-age=0", STRONG, True),
        ("max-age=0", DATED, True),
        ("max-age=0", NO_VALIDATORS, False),
        ("max-age=0, stale-while-revalidate=5", NO_VALIDATORS, True),
        ("max-age=1", NO_VALIDATORS, True),
    ],
)
def test_what_is_not_worth_storing(control: str, validators: Validators, useful: bool) -> None:
    assert is_useful(freshness_of({"Cache-Control": control}, NOW, 0, RULES), validators) is useful


@pytest.mark.parametrize("fields", [{"fresh": 1}, {"fresh": [1, 2, 3]}, {"fresh": [1, 2, 3, "4"]}])
def test_malformed_freshness_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="fresh: expected four integers"):
        decode_freshness(fields)
