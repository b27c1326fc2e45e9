"""The media of the demo are what they claim to be, and the manifest tells the truth about them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import base58
import pytest
import yaml

from distributor_node.services.demo.manifest import (
    DEFAULT_BASE_URL,
    DEMO_DIRECTORY,
    content_hash,
    main,
    manifest_text,
)
from distributor_node.services.demo.objects import FileContent, bytes_object, demo_objects, media_objects

MEDIA = DEMO_DIRECTORY / "media"
OBJECTS = {item.object_id: item for item in demo_objects(MEDIA)}
MANIFEST: dict[str, Any] = yaml.safe_load((DEMO_DIRECTORY / "manifest.yaml").read_text())
FIRST_BYTES = {
    "image/png": (0, b"\x89PNG\r\n\x1a\n"),
    "image/jpeg": (0, b"\xff\xd8\xff"),
    "image/webp": (8, b"WEBP"),
    "image/svg+xml": (0, b"<svg "),
    "video/mp4": (4, b"ftyp"),
    "video/webm": (0, b"\x1a\x45\xdf\xa3"),
    "audio/ogg": (0, b"OggS"),
    "text/vtt": (0, b"WEBVTT"),
}


def _boxes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The top-level boxes of an MP4 file (ISO/IEC 14496-12 section 4.2): type and payload."""
    position = 0
    while position < len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        assert 8 <= size <= len(data) - position
        yield kind.decode("ascii"), data[position + 8 : position + size]
        position += size


@pytest.mark.parametrize("item", media_objects(MEDIA), ids=lambda item: item.name + "-" + item.object_id)
def test_a_file_begins_as_its_media_type_says(item: Any) -> None:
    offset, magic = FIRST_BYTES[item.media_type]
    assert item.content.read(offset, len(magic)) == magic


def test_every_media_type_is_there_and_all_are_small() -> None:
    media = media_objects(MEDIA)
    assert {item.media_type for item in media} == set(FIRST_BYTES)
    assert sum(item.size for item in media) < 4_000_000


def test_the_film_has_its_index_at_the_end_and_lasts_a_minute() -> None:
    boxes = list(_boxes((MEDIA / "5-day.mp4").read_bytes()))
    kinds = [kind for kind, _ in boxes]
    assert kinds[-1] == "moov"
    assert kinds.index("mdat") < kinds.index("moov")
    header = next(payload for kind, payload in _boxes(boxes[-1][1]) if kind == "mvhd")
    timescale, duration = struct.unpack_from(">II", header, 12)
    assert duration / timescale >= 60


def test_the_manifest_lists_every_object_with_true_sizes_and_hashes() -> None:
    assert MANIFEST["version"] == 1
    assert MANIFEST["base_urls"] == [DEFAULT_BASE_URL]
    listed = {entry["id"]: entry for entry in MANIFEST["objects"]}
    assert set(listed) == set(OBJECTS)
    for object_id, entry in listed.items():
        item = OBJECTS[object_id]
        assert (entry["size"], entry["media_type"]) == (item.size, item.media_type)
        if isinstance(item.content, FileContent):
            assert entry["hash"] == content_hash(item.content)


def test_the_manifest_is_what_the_command_writes(tmp_path: Path) -> None:
    assert (DEMO_DIRECTORY / "manifest.yaml").read_text() == manifest_text(OBJECTS.values(), DEFAULT_BASE_URL)
    target = tmp_path / "new" / "manifest.yaml"
    main(["--output", str(target), "--base-url", "http://127.0.0.1:4711/api/v1/files"])
    written = yaml.safe_load(target.read_text())
    assert written["base_urls"] == ["http://127.0.0.1:4711/api/v1/files/"]
    assert written["objects"] == MANIFEST["objects"]


def test_the_manifest_has_an_object_of_another_node_and_one_not_accepted() -> None:
    assert [entry["id"] for entry in MANIFEST["objects"] if entry["bucket"] == "9:9"] == ["900"]
    assert [entry["id"] for entry in MANIFEST["objects"] if not entry.get("accepted", True)] == ["901"]


def test_a_hash_is_a_multihash_in_base58() -> None:
    # The published blake3 hash of nothing.
    digest = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert base58.b58decode(content_hash(bytes_object("1", b"").content)).hex() == "1e20" + digest


def test_two_files_with_one_id_are_refused(tmp_path: Path) -> None:
    (tmp_path / "1-a.png").write_bytes(b"a")
    (tmp_path / "1-b.png").write_bytes(b"b")
    with pytest.raises(ValueError, match="object id 1 is used twice"):
        media_objects(tmp_path)


def test_a_file_of_an_unknown_type_is_refused_and_other_names_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"")
    assert media_objects(tmp_path) == []
    (tmp_path / "1-a.exe").write_bytes(b"a")
    with pytest.raises(ValueError, match="no media type known"):
        media_objects(tmp_path)
