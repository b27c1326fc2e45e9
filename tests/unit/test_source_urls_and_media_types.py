"""Only valid URLs and media types are accepted."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.media_types import media_type_or_none, parse_media_type
from distributor_node.shared.domain.urls import (
    api_base_of,
    distinct_hosts,
    parse_source_url,
    url_origin,
    url_without_credentials,
)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:3390/files/1", "https://a.example", "http://[::1]:80/a?b=c&d=%20"]
)
def test_usable_urls(url: str) -> None:
    assert parse_source_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        "", "a", "/files/1", "ftp://a/b", "file:///etc/passwd", "http://", "http:///a", "http://a:99999/", "http://a:0/",
        "http://user@a/", "http://user:secret@a/", "http://a/b c", "http://a/\r\nX: y", "http://a/#b", "http://ä/",
        "http://[::1/", "http://a/" + "b" * 7000, "HTTP ://a", 'http://a/"',
    ],
)  # fmt: skip
def test_unusable_urls(url: str) -> None:
    with pytest.raises(InvalidInput):
        parse_source_url(url)


@pytest.mark.parametrize(
    "text", ["image/png", "text/vtt; charset=utf-8", 'video/mp4;codecs="avc1, mp4a"', "a/b;", "image/svg+xml"]
)
def test_media_types(text: str) -> None:
    assert parse_media_type(text) == text


@pytest.mark.parametrize(
    "text",
    ["", "image", "image/", "/png", "image/png/x", "image/png\r\nX: y", "image/png; a", "ä/b", "a b/c", "a/b, c/d",
     "image/" + "a" * 300, "text/html\x00"],
)  # fmt: skip
def test_invalid_media_types(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_media_type(text)
    assert media_type_or_none(text) is None


@given(st.text())
def test_no_text_breaks_the_parsers(text: str) -> None:
    found = media_type_or_none(text)
    assert found is None or found.isprintable() or "\t" in found
    with suppress(InvalidInput):
        assert parse_source_url(text).isprintable()


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://a.example/api/v1/files/7", "https://a.example/api/v1/"),
        ("https://a.example/files/7", "https://a.example/"),
        ("https://a.example:81/media/7.mp4?x=1", "https://a.example:81/"),
        ("https://a.example/myfiles/7", "https://a.example/"),
    ],
)
def test_the_base_of_a_sources_api(url: str, base: str) -> None:
    assert api_base_of(url, "7") == base


def test_each_host_once() -> None:
    bases = ["https://a/x/", "https://b/", "https://a/y/", "https://a:81/"]
    assert distinct_hosts(bases) == ("https://a/x/", "https://b/", "https://a:81/")


def test_urls_are_shown_without_credentials() -> None:
    url = "https://me:secret@squid.example:8443/graphql?key=1"
    assert url_without_credentials(url) == "https://squid.example:8443/graphql"
    assert url_origin(url) == "https://squid.example:8443"
