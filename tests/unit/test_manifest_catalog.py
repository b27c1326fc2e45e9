"""The manifest: what is accepted, what is rejected with which message, and how changes are noticed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from distributor_node.shared.adapters.catalogs.documents import read_json, read_yaml
from distributor_node.shared.adapters.catalogs.manifest import Manifest, ManifestCatalog, parse_manifest
from distributor_node.shared.domain.errors import ConfigurationError, InvalidInput
from distributor_node.shared.domain.objects import ContentHash, DistributionBucket, ObjectId

BLAKE3 = str(ContentHash("blake3", bytes(range(32))))
SHA256 = "sha256:" + "ab" * 32
HEAD = 'version: 1\nbase_urls: ["http://a.example/files/", "http://b.example/"]\nobjects:\n'
ONE = HEAD + '  - {id: "1", size: 10}\n'
FULL = (
    HEAD
    + f"""\
  - id: "1"
    size: 12345
    hash: "{BLAKE3}"
    media_type: image/png
    bucket: "0:1"
    accepted: true
    name: "Sunrise: ☀"
  - id: 2
    size: 0
    hash: {SHA256}
    bucket: 0:1
    accepted: false
    urls: ["http://c.example/two"]
"""
)


def parsed(text: str) -> Manifest:
    return parse_manifest(read_yaml(text))


def test_every_field_is_read() -> None:
    manifest = parsed(FULL.replace("id: 2", 'id: "2"'))
    first, second = manifest.objects["1"], manifest.objects["2"]
    assert first.size == 12345
    assert str(first.content_hash) == BLAKE3
    assert first.media_type == "image/png"
    assert first.buckets == (DistributionBucket("0:1"),)
    assert first.sources == ("http://a.example/files/1", "http://b.example/1")
    assert first.accepted
    assert (first.name, second.name) == ("Sunrise: ☀", None)
    assert str(second.content_hash) == SHA256
    assert second.sources == ("http://c.example/two",)
    assert not second.accepted
    assert second.buckets == first.buckets
    assert manifest.bucket_ids == ("0:1",)


def test_json_is_read_too() -> None:
    document = {"version": 1, "base_urls": ["http://a/"], "objects": [{"id": "1", "size": 3}]}
    manifest = parse_manifest(read_json(json.dumps(document)))
    assert manifest.objects["1"].sources == ("http://a/1",)
    assert parsed(json.dumps(document)) == manifest


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected one YAML document"),
        ("[]", "expected a mapping"),
        ("a: [", "invalid YAML"),
        ("objects: []", "version: expected 1"),
        ("version: 2\nobjects: []", "version: expected 1, got 2"),
        ("version: true\nobjects: []", "version: expected 1"),
        ("version: 1", "objects: expected a list"),
        ("version: 1\nobjects: {}", "objects: expected a list"),
        ("version: 1\nobjects: []\nbase_url: x", "unknown field 'base_url'"),
        ("version: 1\nversion: 1\nobjects: []", "line 2: 'version' is given twice"),
        ("version: 1\nbase_urls: [ftp://a/]\nobjects: []", "base_urls: URL: "),
        ("version: 1\nbase_urls: ['http://u:p@a/']\nobjects: []", "credentials"),
        ("version: 1\nbase_urls: http://a/\nobjects: []", "base_urls: expected a list"),
        (HEAD + "  - 1", "object 1: expected a mapping"),
        (HEAD + "  - size: 1", "line 4, object 1: id: expected text"),
        (HEAD + "  - {id: 1, size: 1}", "id: expected text (in quotes)"),
        (HEAD + '  - {id: "../1", size: 1}', "malformed object id"),
        (HEAD + '  - {id: "1"}', "size: expected a number of bytes"),
        (HEAD + '  - {id: "1", size: -1}', "size: expected a number of bytes"),
        (HEAD + '  - {id: "1", size: 1.5}', "size: expected a number of bytes"),
        (HEAD + '  - {id: "1", size: true}', "size: expected a number of bytes"),
        (HEAD + '  - {id: "1", size: "1"}', "size: expected a number of bytes"),
        (HEAD + '  - {id: "1", size: 9223372036854775808}', "size: expected a number of bytes"),
        (HEAD + '  - {id: "1", size: 1, hash: nonsense0}', "hash: malformed content hash"),
        (HEAD + '  - {id: "1", size: 1, hash: "sha256:ab"}', "hash: a sha256 digest has 32 bytes"),
        (HEAD + '  - {id: "1", size: 1, media_type: image}', "media_type: media type: "),
        (HEAD + '  - {id: "1", size: 1, media_type: "a/b\\r\\nX: y"}', "media_type: media type: "),
        (HEAD + '  - {id: "1", size: 1, bucket: zero}', "bucket: malformed bucket id"),
        (HEAD + '  - {id: "1", size: 1, accepted: yes}', "accepted: expected true or false"),
        (HEAD + '  - {id: "1", size: 1, sise: 1}', "unknown field 'sise'"),
        (HEAD + '  - {id: "1", size: 1, urls: [1]}', "urls: expected http(s) URLs"),
        (HEAD + '  - {id: "1", size: 1, urls: ["http://a/\\n"]}', "urls: URL: "),
        (ONE + '  - {id: "1", size: 10}', "line 5, object 2: id: 1 is listed twice"),
        ('version: 1\nobjects: [{id: "1", size: 1}]', "no source"),
        ("version: 1\nobjects: &a []\nbase_urls: *a", "aliases are not supported"),
        ("!!python/object:os.system {}", "tags are not supported"),
        ("[" * 50, "nested more than 20 levels deep"),
        ("{[1]: 2}", "a key must be text"),
        ("a: 1\n---\nb: 2", "expected one YAML document, got 2"),
    ],
)
def test_errors_are_named(text: str, reason: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parsed(text)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "line 1: invalid JSON"), ('{"a": 1, "a": 2}', "equal keys"), ("[" * 100_000, "invalid JSON")],
)
def test_errors_in_json_are_named(text: str, reason: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_json(text)
    assert reason in str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "manifest.yaml"
    path.write_text(ONE)
    return path


def replace(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


async def test_a_missing_or_broken_file_stops_the_start(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        await ManifestCatalog(path.with_name("other.yaml")).open()
    path.write_text(ONE + "  - {}")
    with pytest.raises(ConfigurationError, match="line 5, object 2: id"):
        await ManifestCatalog(path).open()
    path.write_bytes(b"version: 1\n# \xff")
    with pytest.raises(ConfigurationError, match="line 2: not UTF-8"):
        await ManifestCatalog(path).open()


async def test_a_changed_file_is_noticed_and_a_broken_one_refused(path: Path) -> None:
    catalog = ManifestCatalog(path, check_interval=0)
    await catalog.open()
    replace(path, ONE.replace("size: 10", "size: 11"))
    found = await catalog.look_up(ObjectId("1"))
    assert found is not None
    assert found.size == 11
    with capture_logs() as logs:
        replace(path, ONE + "  - {}")
        assert await catalog.look_up(ObjectId("1")) == found
        assert await catalog.look_up(ObjectId("1")) == found
        path.unlink()
        assert await catalog.look_up(ObjectId("1")) == found
        assert await catalog.look_up(ObjectId("1")) == found
    assert [(log["event"], log["log_level"]) for log in logs] == [("manifest_rejected", "error")] * 2
    assert "line 5, object 2" in logs[0]["reason"]
    replace(path, HEAD + "  []\n")
    assert await catalog.look_up(ObjectId("1")) is None
    await catalog.close()


async def test_the_file_is_checked_once_a_second(path: Path) -> None:
    now = 100.0
    catalog = ManifestCatalog(path, clock=lambda: now)
    await catalog.open()
    replace(path, HEAD + "  []\n")
    now += 0.9
    assert await catalog.look_up(ObjectId("1")) is not None
    now += 0.2
    assert await catalog.look_up(ObjectId("1")) is None
    await catalog.close()


async def test_the_same_size_and_another_time_is_a_change(path: Path) -> None:
    catalog = ManifestCatalog(path, check_interval=0)
    await catalog.open()
    path.write_text(ONE.replace("size: 10", "size: 99"))
    os.utime(path, ns=(1, 1))
    found = await catalog.look_up(ObjectId("1"))
    assert found is not None
    assert found.size == 99
    await catalog.close()


async def test_twenty_thousand_objects_load_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    entry = '  - {{id: "{0}", size: {0}, media_type: image/png, bucket: "0:{1}"}}\n'
    path.write_text(HEAD + "".join(entry.format(number, number % 7) for number in range(20_000)))
    catalog = ManifestCatalog(path)
    started = time.process_time()
    await catalog.open()
    assert time.process_time() - started < 10  # 0.6 s on an idle core
    assert len(await catalog.bucket_ids()) == 7
    await catalog.close()
