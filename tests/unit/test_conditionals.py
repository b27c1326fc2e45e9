"""Preconditions are evaluated as RFC 9110 section 13 says."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributor_node.shared.domain.conditionals import (
    Conditions,
    Verdict,
    evaluate,
    parse_entity_tags,
    parse_http_date,
    range_applies,
)

ETAG = '"abc"'
MODIFIED = int(datetime(1994, 11, 6, 8, 49, 37, tzinfo=UTC).timestamp())
SAME = "Sun, 06 Nov 1994 08:49:37 GMT"
BEFORE = "Sun, 06 Nov 1994 08:49:36 GMT"
AFTER = "Sun, 06 Nov 1994 08:49:38 GMT"
GO, KNOWN, FAILED = Verdict.PROCEED, Verdict.NOT_MODIFIED, Verdict.PRECONDITION_FAILED


@pytest.mark.parametrize(
    ("conditions", "verdict"),
    [
        (Conditions(), GO),
        (Conditions(if_match=ETAG), GO),
        (Conditions(if_match="*"), GO),
        (Conditions(if_match='"x", "abc"'), GO),
        (Conditions(if_match='"x"'), FAILED),
        (Conditions(if_match='W/"abc"'), FAILED),
        (Conditions(if_match="abc"), GO),
        (Conditions(if_unmodified_since=SAME), GO),
        (Conditions(if_unmodified_since=AFTER), GO),
        (Conditions(if_unmodified_since=BEFORE), FAILED),
        (Conditions(if_unmodified_since="yesterday"), GO),
        (Conditions(if_match=ETAG, if_unmodified_since=BEFORE), GO),
        (Conditions(if_match='"x"', if_unmodified_since=AFTER), FAILED),
        (Conditions(if_none_match=ETAG), KNOWN),
        (Conditions(if_none_match='W/"abc"'), KNOWN),
        (Conditions(if_none_match="*"), KNOWN),
        (Conditions(if_none_match='"x",, W/"abc" ,'), KNOWN),
        (Conditions(if_none_match='"x"'), GO),
        (Conditions(if_none_match='"ABC"'), GO),
        (Conditions(if_none_match="abc"), GO),
        (Conditions(if_none_match=""), GO),
        (Conditions(if_modified_since=SAME), KNOWN),
        (Conditions(if_modified_since=AFTER), KNOWN),
        (Conditions(if_modified_since=BEFORE), GO),
        (Conditions(if_modified_since="0"), GO),
        (Conditions(if_modified_since=f"{SAME}, {SAME}"), GO),
        (Conditions(if_none_match='"x"', if_modified_since=AFTER), GO),
        (Conditions(if_none_match="abc", if_modified_since=AFTER), GO),
        (Conditions(if_match='"x"', if_none_match=ETAG), FAILED),
        (Conditions(if_match=ETAG, if_none_match=ETAG), KNOWN),
        (Conditions(if_unmodified_since=BEFORE, if_none_match=ETAG), FAILED),
        (Conditions(if_unmodified_since=SAME, if_modified_since=SAME), KNOWN),
    ],
)
def test_preconditions(conditions: Conditions, verdict: Verdict) -> None:
    assert evaluate(conditions, ETAG, MODIFIED) is verdict


def test_dates_decide_nothing_where_no_date_is_known() -> None:
    assert evaluate(Conditions(if_modified_since=AFTER), ETAG, None) is GO
    assert evaluate(Conditions(if_unmodified_since=BEFORE), ETAG, None) is GO


@pytest.mark.parametrize(
    ("if_range", "applies"),
    [
        (None, True),
        (ETAG, True),
        (f" {ETAG} ", True),
        (SAME, True),
        ("Sunday, 06-Nov-94 08:49:37 GMT", True),
        ('W/"abc"', False),
        ('"x"', False),
        (f'{ETAG}, "x"', False),
        ("*", False),
        (BEFORE, False),
        (AFTER, False),
        ("nonsense", False),
        ("", False),
    ],
)
def test_if_range(if_range: str | None, applies: bool) -> None:
    assert range_applies(if_range, ETAG, MODIFIED) is applies


def test_a_dated_if_range_needs_a_date() -> None:
    assert range_applies(SAME, ETAG, None) is False


@pytest.mark.parametrize(
    "text",
    [SAME, "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994", " Sun, 06 Nov 1994 08:49:37 GMT "],
)
def test_the_three_formats_of_a_date(text: str) -> None:
    assert parse_http_date(text) == MODIFIED


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sun, 6 Nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 08:49:37 +0000",
        "Sun, 06 Nov 1994 08:49:37",
        "sun, 06 nov 1994 08:49:37 gmt",
        "Sun, 31 Feb 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 24:49:37 GMT",
        "Sun, 06 Nov 1994 08:60:37 GMT",
        "Sun, 06 Nov 1994 08:49:61 GMT",
        "Sun, 06 Nov 0000 08:49:37 GMT",
        "Fri, 31 Dec 9999 23:59:60 GMT",  # no HTTP date has five digits for the year
        "784111777",
    ],
)
def test_invalid_dates(text: str) -> None:
    assert parse_http_date(text) is None


def test_a_leap_second_is_the_next_second() -> None:
    assert parse_http_date("Sat, 31 Dec 2016 23:59:60 GMT") == parse_http_date(
        "Sun, 01 Jan 2017 00:00:00 GMT"
    )


def test_a_year_of_two_digits_is_near() -> None:
    assert parse_http_date("Friday, 06-Nov-26 08:49:37 GMT") == parse_http_date(
        "Fri, 06 Nov 2026 08:49:37 GMT"
    )


@given(st.integers(0, 4 * 10**9))
def test_every_written_date_is_read(moment: int) -> None:
    assert parse_http_date(formatdate(moment, usegmt=True)) == moment


def test_entity_tags_may_hold_commas() -> None:
    tags = parse_entity_tags('"a,b",W/"c"')
    assert tags is not None
    assert [(tag.opaque, tag.weak) for tag in tags] == [('"a,b"', False), ('"c"', True)]


@pytest.mark.parametrize("header", ['"a" "b"', '"a', 'w/"a"', '"a b"', "a", "", ",", '"a\x7f"'])
def test_malformed_lists_of_entity_tags(header: str) -> None:
    assert parse_entity_tags(header) is None


_VALUES = st.none() | st.text() | st.sampled_from([ETAG, 'W/"abc"', "*", SAME, BEFORE, AFTER, '"x", "abc"'])


@given(_VALUES, _VALUES, _VALUES, _VALUES, st.none() | st.integers(0, 2**40))
def test_any_headers_are_accepted_or_rejected(
    match: str | None, unmodified: str | None, none_match: str | None, modified: str | None, date: int | None
) -> None:
    conditions = Conditions(match, unmodified, none_match, modified)
    assert evaluate(conditions, ETAG, date) in Verdict
    assert range_applies(match, ETAG, date) in (True, False)
    if match is None and unmodified is None and none_match == ETAG:
        assert evaluate(conditions, ETAG, date) is Verdict.NOT_MODIFIED


@given(
    st.lists(st.text(st.characters(exclude_characters='"', min_codepoint=33, max_codepoint=126)), min_size=1)
)
def test_every_written_list_of_entity_tags_is_read(opaques: list[str]) -> None:
    tags = parse_entity_tags(", ".join(f'"{opaque}"' for opaque in opaques))
    assert tags is not None
    assert [tag.opaque for tag in tags] == [f'"{opaque}"' for opaque in opaques]


@pytest.mark.parametrize(
    ("conditions", "etag", "verdict"),
    [
        (Conditions(if_none_match='"v1"'), 'W/"v1"', Verdict.NOT_MODIFIED),
        (Conditions(if_none_match='W/"v1"'), 'W/"v1"', Verdict.NOT_MODIFIED),
        (Conditions(if_match='"v1"'), 'W/"v1"', Verdict.PRECONDITION_FAILED),
        (Conditions(if_match='W/"v1"'), 'W/"v1"', Verdict.PRECONDITION_FAILED),
        (Conditions(if_match="*"), None, Verdict.PROCEED),
        (Conditions(if_match='"v1"'), None, Verdict.PRECONDITION_FAILED),
        (Conditions(if_none_match='"v1"'), None, Verdict.PROCEED),
    ],
)
def test_objects_with_a_weak_tag_or_none(conditions: Conditions, etag: str | None, verdict: Verdict) -> None:
    assert evaluate(conditions, etag, None) is verdict


def test_a_range_is_resumed_by_nothing_weaker_than_a_strong_tag() -> None:
    date = "Sun, 06 Nov 1994 08:49:37 GMT"
    assert not range_applies('"v1"', 'W/"v1"', None)
    assert not range_applies('W/"v1"', 'W/"v1"', None)
    assert not range_applies('"v1"', None, None)
    assert not range_applies(date, 'W/"v1"', 784111777, immutable=False)
    assert range_applies(date, '"hash"', 784111777, immutable=True)
