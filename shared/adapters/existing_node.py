"""What the network's existing node leaves behind: the state of its cache, in `cache.json`.

    lruCacheGroups      24 lists of [object id, {sizeKB, popularity, lastAccessTime}], times in POSIX milliseconds
    mimeTypeByObjectId  a list of [object id, media type]

The file is written from time to time, and not in one step: it may be missing, torn or old. That loses recency, no more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.domain.errors import InvalidInput
from shared.domain.media_types import media_type_or_none
from shared.domain.objects import ObjectId

FILE_NAME = "cache.json"
_MAX_VIEWS = 2**31


@dataclass(frozen=True, slots=True)
class CacheState:
    """Views and POSIX seconds of the last one, and media types, by object id."""

    views: Mapping[ObjectId, tuple[int, float]] = field(default_factory=dict)
    media_types: Mapping[ObjectId, str] = field(default_factory=dict)


def read_cache_state(path: Path) -> CacheState:
    """`path`: the file, or the directory it lies in. OSError if it cannot be read; InvalidInput if it is torn. Entries
    that make no sense are left out."""
    file = path / FILE_NAME if path.is_dir() else path
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"not whole JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidInput("not a JSON object")
    return CacheState(dict(_views(document)), dict(_media_types(document)))


def _views(document: Mapping[str, Any]) -> Iterator[tuple[ObjectId, tuple[int, float]]]:
    for group in _as_list(document.get("lruCacheGroups")):
        for object_id, stated in _pairs(group):
            if not isinstance(stated, dict):
                continue
            popularity = _number(stated.get("popularity"))
            accessed = _number(stated.get("lastAccessTime"))
            if popularity is not None and accessed is not None:
                yield object_id, (int(min(max(popularity, 1), _MAX_VIEWS)), accessed / 1000)


def _media_types(document: Mapping[str, Any]) -> Iterator[tuple[ObjectId, str]]:
    for object_id, stated in _pairs(document.get("mimeTypeByObjectId")):
        media_type = media_type_or_none(stated) if isinstance(stated, str) else None
        if media_type is not None:
            yield object_id, media_type


def _pairs(value: object) -> Iterator[tuple[ObjectId, Any]]:
    for pair in _as_list(value):
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            continue
        try:
            yield ObjectId.parse(pair[0]), pair[1]
        except InvalidInput:
            continue


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: object) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**63
    return value if usable and isinstance(value, int | float) else None
