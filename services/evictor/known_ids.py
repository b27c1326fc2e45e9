"""A set of object ids in eight bytes each: what 10^6 objects are compared with must not cost as much as they do."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable

from shared.domain.objects import ObjectId


class CompactIdSet:
    """Ids as their 64-bit hashes (keyed anew in each process). Two ids in 10^6 share one with a chance of about 10^-7;
    then an object that should be looked at is taken for a known one, until the next process looks."""

    def __init__(self) -> None:
        self._hashes = array("q")
        self._sorted = True

    def __len__(self) -> int:
        """Ids added; those added twice count twice."""
        return len(self._hashes)

    def update(self, object_ids: Iterable[ObjectId]) -> None:
        self._hashes.extend(hash(object_id) for object_id in object_ids)
        self._sorted = False

    def __contains__(self, object_id: object) -> bool:
        if not self._sorted:
            self._hashes = array("q", sorted(self._hashes))
            self._sorted = True
        target = hash(object_id)
        index = bisect_left(self._hashes, target)
        return index < len(self._hashes) and self._hashes[index] == target
