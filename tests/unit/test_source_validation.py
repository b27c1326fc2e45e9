"""Validation of response headers of a source."""

from __future__ import annotations

from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributor_node.shared.adapters.sources.client import (
    MAX_SKIP,
    BodyPlan,
    Expected,
    validate_response,
)
from distributor_node.shared.adapters.sources.connections import SourceLimits
from distributor_node.shared.domain.conditionals import NO_VALIDATORS, ByteRange, Validators, Version
from distributor_node.shared.domain.errors import (
    AllSourcesFailed,
    ConfigurationError,
    SourceError,
    SourceIgnoresRange,
    SourceRefused,
    SourceTooSlow,
    SourceWrong,
    VersionChanged,
)
from distributor_node.shared.domain.objects import ContentHash

RANGE = ByteRange(10, 19)
V1, V2, WEAK = Validators('"v1"', 1000), Validators('"v2"', 1000), Validators('W/"v1"', 1000)


def of_size(size: int | None) -> Expected:
    return Expected(Version(size=size))


def test_the_whole_object() -> None:
    assert validate_response(
        200, {"Content-Length": "100", "Content-Type": "image/png"}, None, of_size(100)
    ) == BodyPlan(200, 0, 100, 100, "image/png")
    assert validate_response(200, {"Content-Length": "100"}, None, of_size(None)) == BodyPlan(
        200, 0, 100, 100, None
    )
    assert validate_response(200, {}, None, of_size(100)) == BodyPlan(200, 0, 100, 100, None)
    assert validate_response(200, {"Content-Type": "rubbish"}, None, of_size(None)) == BodyPlan(
        200, 0, None, None, None
    )


def test_a_range() -> None:
    headers = {"Content-Range": "bytes 10-19/100", "Content-Length": "10"}
    assert validate_response(206, headers, RANGE, of_size(100)) == BodyPlan(206, 10, 10, 100, None)
    assert validate_response(206, headers, RANGE, of_size(None)) == BodyPlan(206, 10, 10, 100, None)
    unsized = {"Content-Range": "bytes 10-19/*"}
    assert validate_response(206, unsized, RANGE, of_size(None)) == BodyPlan(206, 10, 10, None, None)
    assert validate_response(206, unsized, RANGE, of_size(100)) == BodyPlan(206, 10, 10, 100, None)


def test_a_range_beyond_an_object_of_unknown_size_is_clamped() -> None:
    headers = {"Content-Range": "bytes 10-14/15", "Content-Length": "5"}
    assert validate_response(206, headers, RANGE, of_size(None)) == BodyPlan(206, 10, 5, 15, None)


def test_an_ignored_range_is_reached_by_skipping() -> None:
    plan = validate_response(200, {"Content-Length": "100"}, RANGE, of_size(100))
    assert plan == BodyPlan(206, 10, 10, 100, None, skip=10, to_the_end=False)
    assert validate_response(200, {}, ByteRange(10, 99), of_size(100)).to_the_end


@pytest.mark.parametrize("status", [204, 301, 304, 403, 404, 416, 500, 503])
def test_no_success(status: int) -> None:
    with pytest.raises(SourceRefused) as caught:
        validate_response(status, {}, None, of_size(100))
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("status", "headers", "byte_range", "expected_size"),
    [
        (200, {"Content-Encoding": "gzip"}, None, 100),
        (200, {"Content-Length": "99"}, None, 100),
        (200, {"Content-Length": "99"}, RANGE, 100),
        (200, {"Content-Length": "-1"}, None, None),
        (200, {"Content-Length": "1" * 19}, None, None),
        (200, {"Content-Length": "5"}, RANGE, None),
        (200, {}, ByteRange(MAX_SKIP + 1, MAX_SKIP + 2), MAX_SKIP * 2),
        (206, {"Content-Range": "bytes 0-99/100"}, None, 100),
        (206, {}, RANGE, 100),
        (206, {"Content-Type": "multipart/byteranges; boundary=x"}, RANGE, 100),
        (206, {"Content-Range": "bytes 10-20/100"}, RANGE, 100),
        (206, {"Content-Range": "bytes 10-18/100"}, RANGE, 100),
        (206, {"Content-Range": "bytes 9-19/100"}, RANGE, 100),
        (206, {"Content-Range": "bytes 10-19/101"}, RANGE, 100),
        (206, {"Content-Range": "bytes 10-14/20"}, RANGE, None),
        (206, {"Content-Range": "bytes 10-19/100", "Content-Length": "11"}, RANGE, 100),
        (206, {"Content-Range": "bytes 10-19/100", "Content-Encoding": "br"}, RANGE, 100),
    ],
)
def test_contradictions(
    status: int, headers: dict[str, str], byte_range: ByteRange | None, expected_size: int | None
) -> None:
    with pytest.raises(SourceWrong):
        validate_response(status, headers, byte_range, of_size(expected_size))


_NAMES = st.sampled_from(["Content-Length", "Content-Range", "Content-Type", "Content-Encoding"])
_VALUES = st.text() | st.sampled_from(["identity", "10", "100", "bytes 10-19/100", "bytes 10-19/*"])


@given(st.sampled_from([200, 206]), st.dictionaries(_NAMES, _VALUES), st.booleans(), st.none() | st.just(100))
def test_any_headers_give_a_plan_within_the_request_or_an_error(
    status: int, headers: dict[str, str], ranged: bool, expected_size: int | None
) -> None:
    try:
        plan = validate_response(status, headers, RANGE if ranged else None, of_size(expected_size))
    except SourceError:
        return
    assert plan.status == (206 if ranged else 200)
    assert plan.first == (10 if ranged else 0)
    if ranged:
        assert plan.length is not None
        assert plan.length <= RANGE.length
    if expected_size is not None:
        assert plan.total == expected_size
        assert plan.length == (10 if ranged else 100)


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(ConfigurationError):
        SourceLimits(stall_timeout=0)
    with pytest.raises(ConfigurationError):
        SourceLimits(max_connections=0)


def headers_of(validators: Validators) -> dict[str, str]:
    headers = {"Content-Range": "bytes 10-19/100"}
    if validators.etag is not None:
        headers["ETag"] = validators.etag
    if validators.last_modified is not None:
        headers["Last-Modified"] = formatdate(validators.last_modified, usegmt=True)
    return headers


@pytest.mark.parametrize("status", [200, 206])
@pytest.mark.parametrize(
    ("expected", "received", "must_match", "accepted"),
    [
        (V1, V1, True, True),
        (V1, V2, False, False),
        (V1, V2, True, False),
        (WEAK, WEAK, False, True),
        (WEAK, WEAK, True, False),
        (V1, NO_VALIDATORS, False, True),
        (V1, NO_VALIDATORS, True, False),
        (NO_VALIDATORS, V1, False, True),
        (NO_VALIDATORS, V1, True, False),
        (NO_VALIDATORS, NO_VALIDATORS, True, False),
        (Validators(None, 1000), Validators(None, 1000), True, False),
        (Validators(None, 1000), Validators(None, 2000), False, False),
    ],
)
def test_every_response_is_compared_with_the_version(
    status: int, expected: Validators, received: Validators, *, must_match: bool, accepted: bool
) -> None:
    wanted = Expected(Version(None, expected, 100), must_match=must_match)
    if accepted:
        assert validate_response(status, headers_of(received), RANGE, wanted).validators == received
        return
    with pytest.raises(VersionChanged):
        validate_response(status, headers_of(received), RANGE, wanted)


def test_with_a_content_hash_the_tags_of_sources_may_differ() -> None:
    wanted = Expected(Version(ContentHash("sha256", bytes(32)), V1, 100), must_match=True)
    assert validate_response(206, headers_of(V2), RANGE, wanted).validators == V2


def test_what_peers_failed_with_does_not_tell_whether_sources_ignore_ranges() -> None:
    ignores, slow = SourceIgnoresRange("from its first byte on"), SourceTooSlow("no response headers")
    assert AllSourcesFailed(
        {"http://peer/1": slow, "http://far/1": ignores}, slow, {"http://peer/1"}
    ).ranges_ignored
    assert not AllSourcesFailed({"http://near/1": slow, "http://far/1": ignores}).ranges_ignored
    assert not AllSourcesFailed({"http://peer/1": ignores}, None, {"http://peer/1"}).ranges_ignored
