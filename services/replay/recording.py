"""The requests of access logs and traces, in columns: 33 bytes per request, and the sizes of the objects."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from distributor_node.shared.domain.eviction.simulator import Request
from distributor_node.shared.domain.extents import Extents
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import VIEW_WINDOW, footprint

MAX_BYTES = 2**63 - 1  # the most that a column can hold

_PENDING, _HIT, _MISS, _NOT_LOGGED = range(4)
_CACHE_CODES: Mapping[str | None, int] = {"pending": _PENDING, "hit": _HIT, None: _NOT_LOGGED}
_NOT_MODIFIED = 4  # added to the code of a 304
_MISSED_304 = _MISS + _NOT_MODIFIED
_TOGETHER = 1.0  # seconds; no object is fetched, evicted and fetched again in less


@dataclass(frozen=True, slots=True)
class LogLine:
    """A response with an object, or a part of it."""

    at: float  # POSIX seconds of the request; of the response, if the log does not have its duration
    object_id: ObjectId
    sent: int  # bytes of the body
    size: int | None = None  # of the object, if the line states it
    whole: bool = False  # whether `sent` is the whole object, by the log's account
    cache: str | None = None  # hit, pending or miss, if it was logged
    not_modified: bool = False  # whether the response was a 304
    first: int | None = None  # first byte within the object, if it is known


class Recording:
    """Requests from the logs. After they are added, `requests` yields them in the order of time, repeatedly.

    The size of an object is, in this order: its size in `known_sizes` (from a manifest); the largest size that a line
    states (in Content-Range, in the Content-Length of a 200, or in a CSV column); the length of the longest complete
    response; the end of the furthest partial one. The last is a lower bound, which `guessed_sizes` counts.

    The first byte of a response is what its line states. Without that a partial response goes on where the one before
    it ended, if that was less than a view's length ago, and begins at 0 otherwise. So several viewers at a time look
    like one who watches more.
    """

    def __init__(self, known_sizes: Mapping[str, int] | None = None) -> None:
        self._known_sizes = known_sizes or {}
        self._numbers: dict[str, int] = {}
        self._ids: list[ObjectId] = []
        self._named, self._whole, self._part = array("q"), array("q"), array("q")
        self._at = array("d")
        self._object = array("I")
        self._sent = array("Q")
        self._first = array("q")  # -1: not stated
        self._cache = bytearray()

    def __len__(self) -> int:
        """Return the number of requests."""
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
        column[number] = max(column[number], line.sent + (line.first or 0))
        self._at.append(line.at)
        self._object.append(number)
        self._sent.append(line.sent)
        self._first.append(-1 if line.first is None else line.first)
        self._cache.append(_CACHE_CODES.get(line.cache, _MISS) + _NOT_MODIFIED * line.not_modified)

    def sizes(self) -> array[int]:
        """Return the size of each object in bytes."""
        found = array("q")
        for number, object_id in enumerate(self._ids):
            named, whole = self._named[number], self._whole[number]
            seen = named if named >= 0 else max(whole, self._part[number], 0)
            found.append(self._known_sizes.get(object_id, seen))
        return found

    @property
    def guessed_sizes(self) -> int:
        """Number of objects with only partial responses in the logs."""
        return sum(
            named < 0 and whole < 0 and object_id not in self._known_sizes
            for named, whole, object_id in zip(self._named, self._whole, self._ids, strict=True)
        )

    @property
    def footprint(self) -> int:
        """Bytes that all objects together take on a volume."""
        return sum(map(footprint, self.sizes()))

    @property
    def days(self) -> float:
        return (max(self._at) - min(self._at)) / 86_400 if self._at else 0.0

    @property
    def logged_hit_ratio(self) -> float | None:
        """Share of requests that are hits by the log's own account. None: it does not say."""
        counted = Counter(code % _NOT_MODIFIED for code in self._cache)
        logged = len(self._cache) - counted[_NOT_LOGGED]
        return counted[_HIT] / logged if logged else None

    def requests(self) -> Iterator[Request]:
        sizes, ids = self.sizes(), self._ids
        fetches, positions = _Fetches(len(ids)), _Positions(len(ids))
        for position in sorted(range(len(self._at)), key=self._at.__getitem__):
            number, at = self._object[position], self._at[position]
            code = self._cache[position]
            not_modified = code >= _NOT_MODIFIED
            joined = fetches.joined(number, at, code % _NOT_MODIFIED) if code != _MISSED_304 else None
            size, sent = sizes[number], self._sent[position]
            first = positions.first(number, at, self._first[position], sent, size)
            yield Request(at, ids[number], size, sent, joined, not_modified, first)

    def watched_shares(self, above: int) -> array[float]:
        """Return for each view of an object larger than `above` bytes which share of it was sent, in rising order.

        A view ends when nothing is sent for as long as a view lasts, or when a response begins at byte 0.
        """
        shares, current = array("d"), dict[ObjectId, tuple[float, Extents]]()
        sizes: dict[ObjectId, int] = {}
        for request in self.requests():
            if request.size <= above or not request.sent:
                continue
            object_id, first = request.object_id, request.first
            sizes[object_id] = request.size
            last, extents = current.get(object_id, (request.at, Extents()))
            if extents and (request.at - last > VIEW_WINDOW or first == 0):
                shares.append(extents.total / request.size)
                extents = Extents()
            end = min(request.size, first + request.sent)
            current[object_id] = (request.at, extents.adding(first, end))
        shares.extend(extents.total / sizes[object_id] for object_id, (_, extents) in current.items())
        return array("d", sorted(shares))


class _Positions:
    """Finds out where responses begin within their object."""

    def __init__(self, objects: int) -> None:
        self._last, self._end = array("d", [-math.inf]) * objects, array("Q", [0]) * objects

    def first(self, number: int, at: float, stated: int, sent: int, size: int) -> int:
        """Return the first byte. `stated`: what the line says, -1 for nothing."""
        if stated >= 0:
            first = min(stated, size)
        elif at - self._last[number] < VIEW_WINDOW:
            first = max(0, min(self._end[number], size - sent))
        else:
            first = 0
        if sent:
            self._last[number], self._end[number] = at, min(size, first + sent)
        return first


class _Fetches:
    """Finds out which requests shared a fetch, by the cache results in the log.

    A pending request joined the fetch that an earlier miss began. Among simultaneous requests, the log may have the
    miss after the pending ones. Objects that are fetched with a window stay pending for days: after as long a pause as
    a view lasts a pending request has begun another fetch.
    """

    def __init__(self, objects: int) -> None:
        never = array("d", [-math.inf]) * objects
        self._began, self._pending_since, self._pending_last = never, never[:], never[:]
        self._last = never[:]  # request

    def joined(self, number: int, at: float, cache: int) -> float | None:
        """Return when the fetch began that a request joined. None: it joined none, or began one."""
        paused = at - self._last[number] >= VIEW_WINDOW
        self._last[number] = at
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
        if paused or self._began[number] == -math.inf:
            self._began[number] = at
        return self._began[number]
