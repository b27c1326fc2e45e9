"""Simulates a cache of a given size under one policy, for a sequence of requests. No I/O, no clock.

It decides as the node does: requests for one object within five minutes are one view, recently accessed objects are not
evicted, eviction starts above a high watermark and ends at a low one, and an object that does not fit is proxied. Its
times differ: a fetch takes no time unless the request itself says that it joined one, and eviction starts at once.
With `WindowRules` a large object grows with its furthest viewer and is evicted as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from distributor_node.shared.domain.eviction.policy import EvictionPolicy
from distributor_node.shared.domain.extents import Extents
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import (
    AdmissionQuestion,
    SecondHitAdmission,
    ViewCoalescer,
    Watermarks,
    footprint,
    watermarks_for,
)

MIN_IDLE = 120.0
"""Seconds. A player's pause between two ranges is shorter."""


class Request(NamedTuple):
    """One GET of an object."""

    at: float  # POSIX seconds
    object_id: ObjectId
    size: int  # bytes of the whole object
    sent: int  # bytes of this response
    joined: float | None = None
    """POSIX seconds of the request that began the fetch, if this request came during it (the log says pending). It
    is no hit then, however fast the node is."""
    not_modified: bool = False
    """The response was a 304. It counts as a request, but neither as a view nor as a reason to fetch."""
    first: int = 0  # first byte of this response within the object


@dataclass(slots=True)
class Outcome:
    """Counts, and sums of bytes."""

    requests: int = 0
    hits: int = 0
    proxied: int = 0  # misses that were not cached
    evicted: int = 0  # objects
    completed: int = 0  # objects fetched in part at first, and as a whole later
    bytes_sent: int = 0
    bytes_hit: int = 0
    bytes_from_sources: int = 0
    bytes_written: int = 0

    @property
    def object_hit_ratio(self) -> float:
        """Share of requests that were hits."""
        return self.hits / max(1, self.requests)

    @property
    def byte_hit_ratio(self) -> float:
        """Share of the bytes sent that belonged to hits."""
        return self.bytes_hit / max(1, self.bytes_sent)

    @property
    def source_ratio(self) -> float:
        """Bytes from sources per byte sent. Above 1 if whole objects are fetched for a few of their bytes."""
        return self.bytes_from_sources / max(1, self.bytes_sent)

    @property
    def write_ratio(self) -> float:
        """Bytes written to the volume per byte sent."""
        return self.bytes_written / max(1, self.bytes_sent)


@dataclass(frozen=True, slots=True)
class Rules:
    """The limits of the cache."""

    limit: int  # bytes
    watermarks: Watermarks
    min_idle: float = MIN_IDLE  # seconds since its last access before an object may be evicted
    largest: int | None = None  # bytes of the largest object that is cached; None: any that fits

    @classmethod
    def of(cls, limit: int, low: float | None = None, high: float | None = None) -> Rules:
        """Rules with watermarks as shares of the limit; None: as the node derives them."""
        return cls(limit, watermarks_for(limit, None, high, low))


@dataclass(frozen=True, slots=True)
class WindowRules:
    """How far a fetch of a large object runs ahead of its viewers, and when all of it is fetched."""

    ahead: int = 8 * 1024**2  # bytes
    above: int = 16 * 1024**2  # bytes; smaller objects are fetched as a whole
    watched_share: float | None = 0.8  # of the object, which a viewer has passed; None: never for that
    second_view_share: float | None = (
        0.2  # of the object, which a second viewer has passed; None: never for that
    )

    def completes(self, size: int, first: int, sent: int, *, seen_again: bool) -> bool:
        """Whether a response is a reason to fetch all of the object. `seen_again`: it has had a second view."""
        shares = (self.watched_share, self.second_view_share if seen_again else None)
        return any(share is not None and self._passes(share * size, size, first, sent) for share in shares)

    def _passes(self, place: float, size: int, first: int, sent: int) -> bool:
        """Players read the index of an MP4, which may lie at its end, before they begin: that is no viewer."""
        index = min(self.ahead, size // 20)
        return first + sent >= place and (first < place or sent >= index)


@dataclass(slots=True)
class _Partial:
    """An object that is there in part."""

    extents: Extents = field(default_factory=Extents)
    watched: Extents = field(default_factory=Extents)
    seen_again: bool = False  # a second view has begun


class Simulation:
    """One cache. Call `process` with each request, in the order of their times."""

    def __init__(
        self,
        policy: EvictionPolicy,
        rules: Rules,
        admission: AdmissionQuestion | None = None,
        window: WindowRules | None = None,
    ) -> None:
        """`admission`: what is asked about every object, its size aside; None: all are admitted. `window`: None:
        objects are fetched as a whole."""
        self.outcome = Outcome()
        self._policy = policy
        self._rules = rules
        self._window = window
        self._partials: dict[ObjectId, _Partial] = {}
        self._question, self._admission = admission, SecondHitAdmission()
        self._views = ViewCoalescer()
        self._used = 0
        self._fetched_at: dict[ObjectId, float] = {}

    @property
    def used(self) -> int:
        """Bytes that the cache takes."""
        return self._used

    def process(self, request: Request) -> bool:
        """True for a hit: all bytes of the response were there when the request came."""
        at, object_id, _, sent, joined, not_modified, first = request
        outcome = self.outcome
        outcome.requests += 1
        outcome.bytes_sent += sent
        stored = object_id in self._policy
        partial = self._partials.get(object_id)
        held = stored and (partial is None or partial.extents.contains(first, first + sent))
        if not not_modified:
            begins_view = self._views.begins_view(object_id, at)
            if stored:
                self._policy.access(object_id, int(begins_view), at)
                if partial is not None:
                    self._extend(request, partial, begins_view=begins_view)
            else:
                self._miss(request, begins_view=begins_view)
        if not held or (joined is not None and self._fetched_at.get(object_id, joined) >= joined):
            return False  # if it joined a fetch, the bytes were counted with that
        outcome.hits += 1
        outcome.bytes_hit += sent
        return True

    def _miss(self, request: Request, *, begins_view: bool) -> None:
        at, object_id, size, sent, *_ = request
        outcome = self.outcome
        if not self._admitted(object_id, size, at) or not self._make_room(footprint(size), at):
            outcome.proxied += 1
            outcome.bytes_from_sources += sent
            return
        self._policy.store(object_id, size, at, begins_view=begins_view)
        self._fetched_at[object_id] = at
        window = self._window
        if window is None or size <= window.above:
            self._used += footprint(size)
            outcome.bytes_from_sources += size
            outcome.bytes_written += size
            return
        self._used += footprint(0)
        self._partials[object_id] = partial = _Partial()
        self._fill(request, partial, window)

    def _extend(self, request: Request, partial: _Partial, *, begins_view: bool) -> None:
        """Fetch what a viewer of a partial object needs, and what lies ahead of it.

        A viewer that watches for longer than a view lasts goes on behind the bytes watched so far: that is no second
        view. A fetch reserves the whole object. So when a view begins, there must be room for all that is missing.
        """
        at, object_id, size, sent, _, _, first = request
        window = self._window
        if window is None:
            return
        if begins_view and partial.watched.contains(first, first + 1):
            partial.seen_again = True
        missing = size - partial.extents.total if begins_view else self._growth(request, partial, window)
        if not missing or (self._make_room(missing, at) and object_id in self._policy):
            self._fill(request, partial, window)
            return
        end = first + sent
        there = sum(max(0, min(known.end, end) - max(known.first, first)) for known in partial.extents)
        self.outcome.bytes_from_sources += sent - there

    def _fill(self, request: Request, partial: _Partial, window: WindowRules) -> None:
        """Fetch the bytes of this response and those ahead of it, or all. There is room for them."""
        object_id, size, first = request.object_id, request.size, request.first
        before = partial.extents.total
        partial.watched = partial.watched.adding(first, first + request.sent)
        partial.extents = self._wanted(request, partial, window)
        total = partial.extents.total
        grown = total - before
        self._used += grown
        self.outcome.bytes_from_sources += grown
        self.outcome.bytes_written += grown
        entry = self._policy.get(object_id)
        if entry is not None and entry.size != total:
            self._policy.add(replace(entry, size=total, priority=0.0))
        if total == size:
            del self._partials[object_id]
            self.outcome.completed += 1

    def _growth(self, request: Request, partial: _Partial, window: WindowRules) -> int:
        return self._wanted(request, partial, window).total - partial.extents.total

    @staticmethod
    def _wanted(request: Request, partial: _Partial, window: WindowRules) -> Extents:
        size, first = request.size, request.first
        end = min(size, first + request.sent + window.ahead)
        extents = partial.extents
        if not extents.contains(first, end):
            extents = extents.adding(first, end)
        completes = window.completes(size, first, request.sent, seen_again=partial.seen_again)
        return Extents.of((0, size)) if completes else extents

    def _admitted(self, object_id: ObjectId, size: int, at: float) -> bool:
        rules = self._rules
        if footprint(size) > rules.limit or (rules.largest is not None and size > rules.largest):
            return False
        if self._question is None:
            return True
        question = replace(self._question, size=size)
        if question.settled:
            return True
        taken = self._used + footprint(size)
        mean = self._policy.basis.mean_view or self._used / max(1, len(self._policy))
        return self._admission.admits(object_id, question, at, taken=taken, mean=mean)

    def _make_room(self, asked: int, now: float) -> bool:
        """Evict down to the watermarks if `asked` more bytes would pass them. Whether these bytes fit now.

        As in the node, nothing is evicted for bytes for which there would be no room even then.
        """
        rules, missing = self._rules, self._used + asked - self._rules.limit
        fits = missing <= 0 or self._policy.evictable(missing, now, min_idle=rules.min_idle) >= missing
        needed = asked if fits else 0
        if self._used + needed > rules.watermarks.high:
            goal = min(rules.watermarks.low, rules.limit) - needed
            while self._used > goal and self._evict(self._used - goal, now):
                pass
        return self._used + asked <= rules.limit

    def _evict(self, wanted: int, now: float) -> bool:
        """Evict a batch of about `wanted` bytes. False: no object may be evicted."""
        victims = self._policy.victims(wanted, now, min_idle=self._rules.min_idle)
        for victim in victims:
            self._policy.remove(victim.object_id, evicted=True)
            self._partials.pop(victim.object_id, None)
            del self._fetched_at[victim.object_id]
            self._used -= footprint(victim.size)
            self.outcome.evicted += 1
        return bool(victims)
