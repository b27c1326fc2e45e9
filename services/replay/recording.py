"""Many log lines in 25 bytes each, and what is known of their objects' sizes."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping

from services.replay.log_lines import LogLine
from shared.domain.eviction.simulator import Request
from shared.domain.objects import ObjectId
from shared.domain.space import footprint

_PENDING, _HIT, _MISS, _NOT_LOGGED = range(4)
_CACHE_CODES: Mapping[str | None, int] = {"pending": _PENDING, "hit": _HIT, None: _NOT_LOGGED}
_NOT_MODIFIED = 4
"""Added to the code of a 304."""
_MISSED_304 = _MISS + _NOT_MODIFIED
_TOGETHER = 1.0
"""Seconds: no object is fetched, evicted and fetched again within less."""


class Recording:
    """Filled with `add`; then `requests` gives them in the order of time, as often as wanted.

    Sizes: what `known_sizes` says (a manifest); else the largest that a line named (a total in Content-Range, the
    Content-Length of a 200, a CSV column); else the bytes of the longest whole answer; else those of the longest part,
    which is only a lower bound: `guessed_sizes` counts such objects.
    """

    def __init__(self, known_sizes: Mapping[str, int] | None = None) -> None:
        self._known_sizes = known_sizes or {}
        self._numbers: dict[str, int] = {}
        self._ids: list[ObjectId] = []
        self._named, self._whole, self._part = array("q"), array("q"), array("q")
        self._at = array("d")
        self._object = array("I")
        self._sent = array("Q")
        self._cache = bytearray()

    def __len__(self) -> int:
        """Requests."""
        return len(self._at)

    @property
    def objects(self) -> int:
        return len(self._ids)

    def add(self, line: LogLine) -> None:
        number = self._numbers.get(line.object_id)
        if number is None:
            number = self._numbers[line.object_id] = len(self._ids)
            self._ids.append(line.object_id)
            for column in (self._named, self._whole, self._part):
                column.append(-1)
        if line.size is not None:
            self._named[number] = max(self._named[number], line.size)
        column = self._whole if line.whole else self._part
        column[number] = max(column[number], line.sent)
        self._at.append(line.at)
        self._object.append(number)
        self._sent.append(line.sent)
        self._cache.append(_CACHE_CODES.get(line.cache, _MISS) + _NOT_MODIFIED * line.not_modified)

    def sizes(self) -> array[int]:
        """Bytes of each object."""
        found = array("q")
        for number, object_id in enumerate(self._ids):
            named, whole = self._named[number], self._whole[number]
            seen = named if named >= 0 else max(whole, self._part[number], 0)
            found.append(self._known_sizes.get(object_id, seen))
        return found

    @property
    def guessed_sizes(self) -> int:
        """Objects of which only parts were seen."""
        return sum(
            named < 0 and whole < 0 and object_id not in self._known_sizes
            for named, whole, object_id in zip(self._named, self._whole, self._ids, strict=True)
        )

    @property
    def footprint(self) -> int:
        """Bytes that all objects together would take on the volume."""
        return sum(map(footprint, self.sizes()))

    @property
    def days(self) -> float:
        return (max(self._at) - min(self._at)) / 86_400 if self._at else 0.0

    @property
    def logged_hit_ratio(self) -> float | None:
        """Share of requests that the log itself calls hits, None where it does not say."""
        counted = Counter(code % _NOT_MODIFIED for code in self._cache)
        logged = len(self._cache) - counted[_NOT_LOGGED]
        return counted[_HIT] / logged if logged else None

    def requests(self) -> Iterator[Request]:
        sizes, ids, fetches = self.sizes(), self._ids, _Fetches(len(self._ids))
        for position in sorted(range(len(self._at)), key=self._at.__getitem__):
            number, at = self._object[position], self._at[position]
            code = self._cache[position]
            not_modified = code >= _NOT_MODIFIED
            joined = fetches.joined(number, at, code % _NOT_MODIFIED) if code != _MISSED_304 else None
            yield Request(at, ids[number], sizes[number], self._sent[position], joined, not_modified)


class _Fetches:
    """Which requests waited for one fetch, by what the log calls them: pending ones joined the fetch that the miss
    before began. Of requests that come together the one that began the fetch need not be the first."""

    def __init__(self, objects: int) -> None:
        never = array("d", [-math.inf]) * objects
        self._began, self._pending_since, self._pending_last = never, never[:], never[:]

    def joined(self, number: int, at: float, cache: int) -> float | None:
        """When the fetch began that a request waited for; None if it waited for none, or began one."""
        if cache in (_HIT, _NOT_LOGGED):
            self._began[number] = self._pending_last[number] = -math.inf
            return None
        together = at - self._pending_last[number] < _TOGETHER
        if cache == _MISS:
            self._pending_last[number] = -math.inf
            self._began[number] = self._pending_since[number] if together else at
            return self._began[number] if together else None
        if not together:
            self._pending_since[number] = at
        self._pending_last[number] = at
        if self._began[number] == -math.inf:
            self._began[number] = at
        return self._began[number]
