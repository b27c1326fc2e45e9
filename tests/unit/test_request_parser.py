"""Which requests the fast path parses, and which it leaves to Sanic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributor_node.services.api.fast_path.handler import RequestParser
from distributor_node.shared.domain.conditionals import Conditions

_LINE = b"GET /api/v1/assets/7 HTTP/1.1\r\n"


def head(*fields: bytes, line: bytes = _LINE) -> bytes:
    return line + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def test_an_unconditional_request() -> None:
    parser = RequestParser()
    for _ in range(2):
        request = parser.parse(head(b"Host: a", b"Accept: */*", b"Connection: Keep-Alive"))
        assert request is not None
        assert (request.is_head, request.object_id, request.range_header) == (False, b"7", None)
        assert request.fields.unconditional


def test_ranges_conditions_and_the_request_id_are_read() -> None:
    fields = (b"range: bytes=-5", b"Host:a", b'If-None-Match:  "x"', b"if-range: y ", b"X-Request-ID: id-1")
    request = RequestParser().parse(head(*fields, line=b"HEAD /api/v1/assets/a.b HTTP/1.1\r\n"))
    assert request is not None
    assert (request.is_head, request.object_id, request.range_header) == (True, b"a.b", "bytes=-5")
    assert request.fields.conditions == Conditions(if_none_match='"x"')
    assert (request.fields.if_range, request.fields.request_id) == ("y ", b"id-1")
    assert not request.fields.unconditional


@pytest.mark.parametrize("place", [0, 1, 2])
def test_another_range_leaves_the_cached_fields_alone(place: int) -> None:
    parser = RequestParser()
    others = [b"Host: a", b"Accept: b"]
    for wanted in (b"bytes=0-5", b"bytes=6-", None):
        fields = others[:place] + ([b"Range: " + wanted] if wanted else []) + others[place:]
        request = parser.parse(head(*fields))
        assert request is not None
        assert request.range_header == (wanted.decode() if wanted else None)


@pytest.mark.parametrize(
    ("wanted", "bounds"),
    [
        (b"bytes=0-5", (0, 5)),
        (b"bytes=007-010", (7, 10)),
        (b"bytes=9-3", (9, 3)),
        (b"bytes=6-", None),
        (b"bytes=-5", None),
        (b"bytes=0-5,7-9", None),
        (b"bytes=1234567890123456-1234567890123456", None),
    ],
)
def test_the_numbers_of_the_commonest_range_are_at_hand(
    wanted: bytes, bounds: tuple[int, int] | None
) -> None:
    parser = RequestParser()
    for _ in range(2):
        request = parser.parse(head(b"Host: a", b"Range: " + wanted))
        assert request is not None
        assert (request.range_header, request.bounds) == (wanted.decode(), bounds)


def test_an_invalid_offered_request_id_is_ignored() -> None:
    request = RequestParser().parse(head(b"Host: a", b"X-Request-ID: a b"))
    assert request is not None
    assert request.fields.request_id is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        _LINE,
        head(),
        head(b"Accept: a"),
        head(b"Host: a")[:-1],
        head(b"Host: a") * 2,
        head(b"Host: a") + b"x",
        head(b"Host: a", b"Host: b"),
        head(b"Host: a", b"Range: bytes=0-1", b"Range: bytes=2-3"),
        head(b"Host: a", b"Range: bytes=0-1", b"range: bytes=-3"),
        head(b"Host: a", b"Range: bytes=0-1\r"),
        head(b"Host: a", b"Range: bytes=0-1\rX: y"),
        head(b"Host: a", b"If-Match: x", b"if-match: y"),
        head(b"Host: a", b"Connection: close"),
        head(b"Host: a", b"Connection: keep-alive, upgrade"),
        head(b"Host: a", b"Content-Length: 0"),
        head(b"Host: a", b"Transfer-Encoding: chunked"),
        head(b"Host: a", b"Expect: 100-continue"),
        head(b"Host: a", b"Upgrade: h2c"),
        head(b"Host: a", b"X-Sendfile-Type: X-Accel-Redirect"),
        head(b"Host: a", b"Accept:"),
        head(b"Host: a", b"Accept : b"),
        head(b"Host: a", b" folded"),
        head(b"Host: a", b"Accept: \x00"),
        head(b"Host: a", b"Accept: \xc3\xa9"),
        head(b"Host: a", b"No colon"),
        head(b"Host: a", b"Accept: b\nC: d"),
        head(b"Host: " + b"a" * 5000),
        head(b"Host: a", line=b"POST /api/v1/assets/7 HTTP/1.1\r\n"),
        head(b"Host: a", line=b"get /api/v1/assets/7 HTTP/1.1\r\n"),
        head(b"Host: a", line=b"GET /api/v1/assets/7 HTTP/1.0\r\n"),
        head(b"Host: a", line=b"GET /api/v1/assets/ HTTP/1.1\r\n"),
        head(b"Host: a", line=b"GET /api/v1/status HTTP/1.1\r\n"),
        head(b"Host: a", line=b"GET /api/v1/assets/7 HTTP/1.1\n"),
        head(b"Host: a", line=b"GET http://a/api/v1/assets/7 HTTP/1.1\r\n"),
    ],
)
def test_complex_requests_are_left_to_the_framework(data: bytes) -> None:
    assert RequestParser().parse(data) is None


@given(data=st.binary(max_size=200), at=st.integers(0, 80))
def test_nothing_breaks_the_parser(data: bytes, at: int) -> None:
    good = head(b"Host: a", b"Range: bytes=0-1", b"Accept: b")
    RequestParser().parse(good[:at] + data + good[at:])
    RequestParser().parse(data)
