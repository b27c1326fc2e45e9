"""The existing node's cache.json: read as far as it makes sense, and what of it becomes recency."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributor_node.services.evictor.node_import import CacheState, read_cache_state
from distributor_node.shared.domain.errors import InvalidInput

GOOD = {"sizeKB": 20, "popularity": 3, "lastAccessTime": 1_700_000_000_500}


def read(folder: Path, document: Any) -> CacheState:
    (folder / "cache.json").write_text(json.dumps(document))
    return read_cache_state(folder)


def test_views_times_and_types(tmp_path: Path) -> None:
    groups: list[list[Any]] = [[] for _ in range(24)]
    groups[3] = [["17", GOOD], ["18", {**GOOD, "popularity": 1}]]
    groups[20] = [["19", {**GOOD, "lastAccessTime": 0}]]
    found = read(
        tmp_path, {"lruCacheGroups": groups, "mimeTypeByObjectId": [["17", "image/png"], ["18", "text/vtt"]]}
    )
    assert found.views == {"17": (3, 1_700_000_000.5), "18": (1, 1_700_000_000.5), "19": (3, 0.0)}
    assert found.media_types == {"17": "image/png", "18": "text/vtt"}
    assert read_cache_state(tmp_path / "cache.json") == found


def test_nonsensical_entries_are_left_out(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        {
            "lruCacheGroups": [
                [["17", GOOD], ["../18", GOOD], ["19"], 5, [20, GOOD], ["21", None], ["22", {}]],
                [["23", {**GOOD, "popularity": "many"}], ["24", {**GOOD, "lastAccessTime": -1}]],
                [["25", {**GOOD, "popularity": 0}]],
                None,
            ],
            "mimeTypeByObjectId": [["17", "no type"], ["26", 5], ["27", "image/gif"]],
        },
    )
    assert found.views == {"17": (3, 1_700_000_000.5), "25": (1, 1_700_000_000.5)}
    assert found.media_types == {"27": "image/gif"}


@pytest.mark.parametrize(
    "body", [b"", b'{"lruCacheGroups": [[["1", {"size', b"[]", b"\xff\xfe", b"[" * 100_000]
)
def test_a_torn_file_is_rejected_completely(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "cache.json").write_bytes(body)
    with pytest.raises(InvalidInput):
        read_cache_state(tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_cache_state(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=20,
)


@given(groups=JSON, types=JSON)
def test_any_json_is_survived(tmp_path_factory: pytest.TempPathFactory, groups: Any, types: Any) -> None:
    folder = tmp_path_factory.mktemp("state")
    read(folder, {"lruCacheGroups": groups, "mimeTypeByObjectId": types})
