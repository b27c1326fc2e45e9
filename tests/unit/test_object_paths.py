"""Ids that are paths: which are valid, which are equal, and what they are called on disk and in a URL."""

from __future__ import annotations

import pytest

from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.objects import ObjectId


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ("a/b.mp4", "a/b.mp4"), ("my%20video.mp4", "my%20video.mp4"), ("caf%C3%A9.jpg", "caf%C3%A9.jpg"),
        ("caf%c3%a9.jpg", "caf%C3%A9.jpg"), ("_x.png", "_x.png"), ("x@2x.png", "x@2x.png"), ("(1).jpg", "(1).jpg"),
        ("%281%29.jpg", "(1).jpg"), ("a" * 129, "a" * 129), ("a//b", "a//b"), ("a%3Fb", "a%3Fb"), ("a%23b", "a%23b"),
        ("a%25b", "a%25b"), ("a%2525", "a%2525"), ("...", "..."), ("a/.b", "a/.b"), ("a;v=1,2", "a;v=1,2"),
        ("%E2%98%80" * 341, "%E2%98%80" * 341), ("x" * 1024, "x" * 1024),
    ],
)  # fmt: skip
def test_a_path_has_the_digest_of_its_canonical_form(raw: str, path: str) -> None:
    found = ObjectId.parse_path(raw)
    assert found.path == path
    assert found.is_digest
    assert ObjectId.parse(str(found)) == found, "a file name, and safe in a URL"
    assert ObjectId.parse_path(path) == found
    assert len(found) == 71


@pytest.mark.parametrize("raw", ["10", "a.b~c_d-e", "%31%30", "9" * 128])
def test_a_plain_id_stays_as_it_is(raw: str) -> None:
    found = ObjectId.parse_path(raw)
    assert not found.is_digest
    assert found.path == found == ("10" if raw == "%31%30" else raw)


@pytest.mark.parametrize(
    "raw",
    [
        "", ".", "..", "a/../b", "a/./b", "../a", "a/..", "%2e%2e", "a/%2E%2e/b", "%00", "a%0Ab", "a%7f", "a%2Fb",
        "a%2fb", "%zz", "%4", "a b", "a?b", "a#b", 'a"b', "a<b", "a\\b", "a{b}", "caf\xe9", "%ff", "%c0%af",
        "%ED%A0%80", "x" * 1025, "sha256-" + "0" * 64,
    ],
)  # fmt: skip
def test_malformed_paths(raw: str) -> None:
    with pytest.raises(InvalidInput):
        ObjectId.parse_path(raw)


def test_a_query_is_part_of_the_id_in_its_order() -> None:
    ids = {ObjectId.parse_path("a", query) for query in ("", "v=2", "v=3", "a=1&b=2", "b=2&a=1")}
    assert len(ids) == 5
    assert ObjectId.parse_path("a", "v=2").path == "a?v=2"
    assert ObjectId.parse_path("a%3Fv=2") != ObjectId.parse_path("a", "v=2")
    for query in ("a b", "%zz", "x" * 1025, "caf\xe9", "a#b"):
        with pytest.raises(InvalidInput):
            ObjectId.parse_path("a", query)


def test_text_of_a_manifest_is_the_same_id_as_a_request() -> None:
    for text, raw in (
        ("a/b.mp4", "a/b.mp4"),
        ("my video.mp4", "my%20video.mp4"),
        ("café.jpg", "caf%C3%A9.jpg"),
        ("7", "7"),
    ):
        assert ObjectId.parse_text(text) == ObjectId.parse_path(raw)
    assert ObjectId.parse_text("50%.jpg") == ObjectId.parse_path("50%25.jpg")
    for text in ("..", "a/../b", "\0", "\ud800", ""):
        with pytest.raises(InvalidInput):
            ObjectId.parse_text(text)


def test_a_digest_that_was_read_back_does_not_know_its_path() -> None:
    known = ObjectId.parse_path("a/b")
    assert ObjectId.parse(str(known)).path == known
