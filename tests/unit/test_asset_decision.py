"""Decisions about a response, before anything is read or sent."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributor_node.services.api.assets.decision import (
    UNVERIFIED_TAIL_BYTES,
    AssetRequest,
    PreconditionResult,
    Representation,
    Span,
    is_cacheable,
    is_far,
    is_fetched_ahead,
    live_fetch,
    may_resume,
    select_range,
    sendable_end,
)
from distributor_node.services.api.assets.proxy import VerifyingBuffer
from distributor_node.shared.domain.conditionals import Conditions, Unsatisfiable
from distributor_node.shared.domain.objects import ContentHash, MediaObject, ObjectId
from distributor_node.shared.ports.state_store import Failure, Fetch, FetchPhase, ObjectStatus

MIB = 1024 * 1024

SIZE = 1_000_000
ETAG = '"abc"'
NOTHING = Conditions()


def representation(size: int | None = SIZE, last_modified: int | None = None) -> Representation:
    return Representation(ObjectId("1"), size, ETAG, None, "image/png", last_modified)


@pytest.mark.parametrize(
    ("asset_request", "expected"),
    [
        (AssetRequest(False, NOTHING), Span(0, SIZE - 1, SIZE)),
        (AssetRequest(True, NOTHING), Span(0, SIZE - 1, SIZE)),
        (AssetRequest(False, NOTHING, "bytes=5-9"), Span(5, 9, SIZE, partial=True)),
        (AssetRequest(True, NOTHING, "bytes=5-9"), Span(0, SIZE - 1, SIZE)),
        (AssetRequest(True, NOTHING, "bytes=1000000-"), Span(0, SIZE - 1, SIZE)),
        (AssetRequest(False, NOTHING, "bytes=9-5"), Span(0, SIZE - 1, SIZE)),
        (AssetRequest(False, NOTHING, "bytes=1000000-"), Unsatisfiable(SIZE)),
        (AssetRequest(False, NOTHING, "bytes=5-9", ETAG), Span(5, 9, SIZE, partial=True)),
        (AssetRequest(False, NOTHING, "bytes=5-9", '"other"'), Span(0, SIZE - 1, SIZE)),
        (AssetRequest(False, NOTHING, "bytes=1000000-", '"other"'), Span(0, SIZE - 1, SIZE)),
        (
            AssetRequest(False, Conditions(if_none_match=ETAG), "bytes=1000000-"),
            PreconditionResult.NOT_MODIFIED,
        ),
        (AssetRequest(True, Conditions(if_none_match="*")), PreconditionResult.NOT_MODIFIED),
        (
            AssetRequest(False, Conditions(if_match='"x"'), "bytes=1000000-"),
            PreconditionResult.PRECONDITION_FAILED,
        ),
        # The end of a running fetch is unknown: dates decide nothing.
        (
            AssetRequest(False, Conditions(if_modified_since="Tue, 14 Nov 2023 22:13:20 GMT")),
            Span(0, SIZE - 1, SIZE),
        ),
    ],
)
def test_select_range(
    asset_request: AssetRequest, expected: Span | Unsatisfiable | PreconditionResult
) -> None:
    assert select_range(asset_request, representation()) == expected


def test_a_range_of_an_object_of_unknown_size_is_ignored() -> None:
    assert select_range(AssetRequest(False, NOTHING, "bytes=5-9"), representation(None)) == Span(
        0, None, None
    )


def test_an_empty_object_is_whole_and_has_no_bytes() -> None:
    span = select_range(AssetRequest(False, NOTHING), representation(0))
    assert isinstance(span, Span)
    assert (span.length, span.whole, span.reaches_end) == (0, True, True)


@pytest.mark.parametrize(
    ("span", "on_disk", "verified", "end"),
    [
        (Span(0, SIZE - 1, SIZE), 0, False, 0),
        (Span(0, SIZE - 1, SIZE), 70_000, False, 70_000),
        (Span(0, SIZE - 1, SIZE), SIZE, False, SIZE - UNVERIFIED_TAIL_BYTES),
        (Span(0, SIZE - 1, SIZE), SIZE, True, SIZE),
        (Span(500, SIZE - 1, SIZE, True), SIZE, False, SIZE - UNVERIFIED_TAIL_BYTES),
        (Span(SIZE - 10, SIZE - 1, SIZE, True), SIZE, False, SIZE - UNVERIFIED_TAIL_BYTES),
        (Span(500, 900, SIZE, True), SIZE, False, 901),
        (Span(500, 900, SIZE, True), 600, False, 600),
        (Span(SIZE - 10, SIZE - 2, SIZE, True), SIZE, False, SIZE - 1),
        (Span(0, 99, 100), 100, False, 0),
        (Span(0, 99, 100), 100, True, 100),
    ],
)
def test_sendable_bytes_of_a_growing_file(span: Span, on_disk: int, verified: bool, end: int) -> None:
    assert sendable_end(span, on_disk, verified=verified) == end


@pytest.mark.parametrize(
    ("first", "on_disk", "far"), [(0, 0, False), (4096, 0, False), (4097, 0, True), (9000, 5000, False)]
)
def test_far_ranges(first: int, on_disk: int, far: bool) -> None:
    assert is_far(first, on_disk, 4096) is far


HASH = ContentHash("sha256", bytes(32))


@pytest.mark.parametrize(
    ("size", "content_hash", "expected"),
    [
        (None, None, True),
        (None, HASH, False),
        (0, None, True),
        (SIZE, HASH, True),
        (SIZE + 1, HASH, False),
        (SIZE + 1, None, False),
    ],
)
def test_what_is_fetched(size: int | None, content_hash: ContentHash | None, expected: bool) -> None:
    wanted = MediaObject(ObjectId("1"), size, content_hash)
    assert is_cacheable(wanted, SIZE) is expected
    assert not is_cacheable(replace(wanted, not_stored="no-store"), SIZE)


@pytest.mark.parametrize(
    ("phase", "live"),
    [
        (FetchPhase.CLAIMED, True),
        (FetchPhase.QUEUED, True),
        (FetchPhase.FETCHING, True),
        (FetchPhase.PARKED, False),
        (None, False),
    ],
)
def test_live_fetches(phase: FetchPhase | None, live: bool) -> None:
    fetch = Fetch(ObjectId("1"), phase, 1, "w", None, 1.0, 1.0) if phase else None
    assert (live_fetch(ObjectStatus(fetch, None)) is not None) is live
    assert may_resume(ObjectStatus(fetch, None)) is (phase is not None)
    assert not may_resume(ObjectStatus(fetch, Failure("dead-lettered", 1.0)))


@given(st.lists(st.binary(max_size=90)), st.integers(0, 100), st.booleans())
def test_a_verifying_buffer_holds_back_the_end(
    chunks: list[bytes], tail_bytes: int, size_known: bool
) -> None:
    data = b"".join(chunks)
    hasher = ContentHash("sha256", bytes(32)).hasher()
    hasher.update(data)
    buffer = VerifyingBuffer(
        ContentHash("sha256", hasher.digest()), len(data) if size_known else None, tail_bytes
    )
    passed, given_in = b"", b""
    for chunk in chunks:
        given_in += chunk
        passed += b"".join(bytes(part) for part in buffer.feed(chunk))
        if size_known:
            assert passed == given_in[: max(0, len(data) - tail_bytes)]
    assert passed == data[: max(0, len(data) - tail_bytes)]
    assert buffer.verify()
    assert passed + b"".join(bytes(part) for part in buffer.drain()) == data


@given(
    st.lists(st.binary(max_size=50), max_size=8),
    st.integers(0, 60),
    st.integers(0, 200),
)
def test_a_verifying_buffer_from_a_later_byte_returns_nothing_before_it(
    chunks: list[bytes], tail_bytes: int, first: int
) -> None:
    data = b"".join(chunks)
    hasher = ContentHash("sha256", bytes(32)).hasher()
    hasher.update(data)
    buffer = VerifyingBuffer(ContentHash("sha256", hasher.digest()), len(data), tail_bytes, first)
    passed = b"".join(bytes(part) for chunk in chunks for part in buffer.feed(chunk))
    assert passed == data[first : max(0, len(data) - tail_bytes)]
    assert buffer.verify()
    assert not buffer.resumed
    assert passed + b"".join(bytes(part) for part in buffer.drain()) == data[first:]


def test_a_verifying_buffer_rejects_other_bytes() -> None:
    buffer = VerifyingBuffer(ContentHash("blake3", bytes(32)), None)
    buffer.hash_only(b"sent before")
    buffer.feed(b"wrong")
    assert not buffer.verify()
    assert buffer.resumed


@pytest.mark.parametrize(
    ("first", "last", "size", "expected"),
    [
        (40 * MIB, 41 * MIB, 64 * MIB, True),
        (MIB, 2 * MIB, 64 * MIB, True),  # near, and perhaps far at the rate of the fetch
        (40 * MIB, 64 * MIB - 1, 64 * MIB, True),
        (MIB, 64 * MIB - 1, 64 * MIB, False),  # it is verified from its first byte
        (64 * MIB - UNVERIFIED_TAIL_BYTES, 64 * MIB - 1, 64 * MIB, False),
        (64 * MIB - UNVERIFIED_TAIL_BYTES - 1, 64 * MIB - 1, 64 * MIB, True),
        (2 * MIB, 3 * MIB - 2, 3 * MIB, False),  # it is fetched soon
    ],
)
def test_what_is_fetched_ahead(first: int, last: int, size: int, expected: bool) -> None:
    assert is_fetched_ahead(Span(first, last, size, partial=True), far_distance=4 * MIB) is expected
    assert not is_fetched_ahead(Span(0, None, None), far_distance=4 * MIB)
