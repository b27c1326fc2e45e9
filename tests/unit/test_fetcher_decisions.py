"""Pure decisions of the fetcher: waits, source groups, batches, media types."""

from __future__ import annotations

import errno
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from distributor_node.services.fetcher.admission import AdmissionWait
from distributor_node.services.fetcher.download import (
    MAX_BATCH,
    SourceGroups,
    batch_size,
    groups_after_corruption,
)
from distributor_node.services.fetcher.fetcher import Fetcher, outcome_label
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.adapters.volume import volume as volume_module
from distributor_node.shared.domain.jobs import Ack, DeadLetter, JobOutcome, Nack, Requeue, Retry
from distributor_node.shared.domain.media_types import detect_media_type
from distributor_node.shared.ports.state_store import (
    AlreadyStored,
    HeldElsewhere,
    NeverFits,
    NoSpace,
    NotReconciled,
)
from distributor_node.shared.settings.model import Settings

JPEG = b"\xff\xd8\xff\xe0" + bytes(100)
MP4 = b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom" + bytes(100)
WEBM = b"\x1a\x45\xdf\xa3\x9fB\x86\x81\x01B\xf7\x81\x01B\xf2\x81\x04B\xf3\x81\x08B\x82\x84webm" + bytes(100)
OGG = b"OggS" + bytes(100)
ZIP = b"PK\x03\x04" + bytes(100)
MP3 = b"ID3\x03" + bytes(100)


@pytest.mark.parametrize(
    ("stated", "head", "detected"),
    [
        (None, JPEG, "image/jpeg"),
        ("video/mp4", JPEG, "image/jpeg"),
        (None, MP4, "video/mp4"),
        ("audio/mp4", MP4, "audio/mp4"),
        ("video/mp4; codecs=avc1", MP4, "video/mp4; codecs=avc1"),
        (None, WEBM, "video/webm"),
        ("audio/webm", WEBM, "audio/webm"),
        ("video/ogg", OGG, "video/ogg"),
        ("application/epub+zip", ZIP, "application/epub+zip"),
        (None, ZIP, "application/octet-stream"),
        ("audio/mpeg", MP3, "audio/mpeg"),
        ("image/svg+xml", b'<svg xmlns="http://www.w3.org/2000/svg">' + b" " * 100, "image/svg+xml"),
        ("text/vtt", b"WEBVTT\n\n00:00.000 --> 00:01.000\nGIF89a" + b"\n" * 100, "text/vtt"),
        ("text/vtt", b"GIF89a says the first line\n" * 10, "text/vtt"),
        ("text/vtt", b"\xef\xbb\xbfWEBVTT\n" + "Grüße\n".encode() * 20, "text/vtt"),
        (None, b"<html><script>alert(1)</script>" * 5, "application/octet-stream"),
        ("no type at all", b"plain" * 50, "application/octet-stream"),
        (None, b"", "application/octet-stream"),
        ("image/png", b"", "image/png"),
    ],
)
def test_media_types(stated: str | None, head: bytes, detected: str) -> None:
    assert detect_media_type(stated, head) == detected


@given(st.none() | st.text(max_size=30), st.binary(max_size=300))
def test_any_bytes_have_a_media_type(stated: str | None, head: bytes) -> None:
    detected = detect_media_type(stated, head)
    assert "/" in detected
    assert detected.isprintable()


@pytest.mark.parametrize(
    ("groups", "contributors", "resumed", "left"),
    [
        ((("a", "b"),), {"a"}, False, (("b",),)),
        ((("a",),), {"a"}, False, ()),
        ((("a", "b", "c"),), {"a", "b"}, False, (("c",), ("a",), ("b",))),
        ((("a", "b"),), {"a", "b"}, False, (("a",), ("b",))),
        ((("a",), ("b",)), {"a"}, False, (("b",),)),
        ((("a", "b"),), {"a"}, True, (("a", "b"),)),
        (((),), set(), False, ()),
    ],
)
def test_source_groups(
    groups: SourceGroups, contributors: set[str], resumed: bool, left: SourceGroups
) -> None:
    assert groups_after_corruption(groups, contributors, resumed=resumed) == left


@given(st.lists(st.sampled_from("abcdef"), unique=True, max_size=6), st.data())
def test_source_groups_are_finite(sources: list[str], data: st.DataObject) -> None:
    """Whichever sources sent the corrupt bytes."""
    groups: SourceGroups = (tuple(sources),)
    turns = 0
    while groups:
        turns += 1
        assert turns <= 2 * len(sources) + 1
        contributors = data.draw(st.sets(st.sampled_from(groups[0]), min_size=1)) if groups[0] else set()
        groups = groups_after_corruption(groups, contributors, resumed=False)


@given(st.integers(0, 10**12))
def test_batches_grow_and_are_bounded(received: int) -> None:
    assert 1 <= batch_size(received) <= MAX_BATCH
    assert batch_size(received) <= batch_size(received + 1)


def test_permanent_refusals_are_not_waited_for() -> None:
    wait = AdmissionWait(space_wait=10, lease=15)
    assert wait.decide(NeverFits(), 0) == DeadLetter("size: larger than the storage limit")
    assert isinstance(wait.decide(AlreadyStored(1), 0), Retry)


@pytest.mark.parametrize("denied", [NoSpace(5), NotReconciled(), HeldElsewhere(0.0)])
def test_waiting_for_space_is_bounded(denied: NoSpace | NotReconciled | HeldElsewhere) -> None:
    wait = AdmissionWait(space_wait=10, lease=15)
    assert wait.decide(denied, 100.0) is None
    assert wait.decide(denied, 109.9) is None
    assert isinstance(wait.decide(denied, 110.0), Retry)


def test_waiting_for_a_live_holder_ends_at_its_next_renewal() -> None:
    wait = AdmissionWait(space_wait=10, lease=15)
    assert wait.decide(HeldElsewhere(12.0), 100.0) is None
    assert wait.decide(HeldElsewhere(10.0), 102.0) is None
    assert wait.decide(HeldElsewhere(14.9), 104.0) == Requeue("fetched by another worker")


def test_waiting_for_a_dead_holder_lasts_as_long_as_its_lease() -> None:
    wait = AdmissionWait(space_wait=10, lease=15)
    for second in range(15):
        assert wait.decide(HeldElsewhere(15.0 - second), 100.0 + second) is None
    assert wait.decide(HeldElsewhere(0.1), 115.1) is None


def test_waiting_for_a_lease_moved_by_the_clock_ends_after_two_leases() -> None:
    wait = AdmissionWait(space_wait=10, lease=15)
    for second in range(30):
        assert wait.decide(HeldElsewhere(3615.0 - second), 100.0 + second) is None
    assert isinstance(wait.decide(HeldElsewhere(3585.0), 130.0), Retry)


def test_outcomes_have_few_labels() -> None:
    outcomes: list[JobOutcome] = [
        Ack("already_cached"),
        Retry("anything"),
        Requeue("anything"),
        DeadLetter("anything"),
        Nack(),
    ]
    assert [outcome_label(outcome) for outcome in outcomes] == [
        "already_cached", "retry", "requeue", "dead_letter", "nack",
    ]  # fmt: skip


@pytest.mark.parametrize("follows", [True, False])
async def test_a_fetch_waits_for_viewers_only_where_they_follow_it(tmp_path: Path, follows: bool) -> None:
    settings = Settings(
        catalog={"manifest": tmp_path / "unused.yaml"},
        storage={"path": tmp_path, "limit": "1G"},
        public_api={"follow_growing_files": follows},
    )
    made = Fetcher(settings, Mock(), Mock(), Volume(tmp_path), Mock(), Mock())
    assert (made._worker._fetch_runner._limits.window is not None) is follows


async def test_a_full_disk_on_which_holes_cannot_be_tried_out_stops_no_fetcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node whose disk is full has to start: it serves what it has, and makes room."""

    def full(_: int) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    Volume(tmp_path).prepare()
    monkeypatch.setattr(volume_module, "has_holes", full)
    settings = Settings(
        catalog={"manifest": tmp_path / "unused.yaml"}, storage={"path": tmp_path, "limit": "1G"}
    )
    made = Fetcher(settings, Mock(), Mock(), Volume(tmp_path), Mock(), Mock())
    with capture_logs() as logs:
        await made._try_holes()
    assert made._side_streams.most == 0
    assert "No space left on device" in logs[0]["reason"]
