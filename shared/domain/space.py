"""Space of the cache: how bytes are counted against the storage limit, and what of which objects is fetched.

An object above some size is cached on its second view only (second-hit admission). Of a large object that is fetched,
no more is read than its viewers watch, and a little ahead of them (window).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from distributor_node.shared.domain.extents import BLOCK, Extents
from distributor_node.shared.domain.objects import ObjectId

RECORD_BYTES = 1024
"""Counted for each object's record on the volume; the volume refuses to write a longer one."""


def footprint(size: int) -> int:
    """Bytes that an object of `size` bytes takes on the volume, its record included."""
    return size + RECORD_BYTES


@dataclass(frozen=True, slots=True)
class Usage:
    """Space in bytes. `used + reserved <= limit`, always."""

    limit: int
    used: int  # complete objects, those being evicted too
    reserved: int  # promised to fetches, partial files included
    objects: int
    fetches: int
    # False while the index does not match the volume (an empty or restarted state store, before the evictor has
    # reconciled). No bytes can be reserved then.
    reconciled: bool
    # Sum of all bytes ever added to `used` and taken from it: the difference of two readings tells how much moved
    churn: int = field(default=0, compare=False)
    leaving: int = 0  # of `used`: removed objects that are still being sent, and that no entry stands for
    queued: int = field(default=0, compare=False)
    """Fetches whose job is published and has not begun."""
    parked: int = field(default=0, compare=False)
    """Partial objects that no worker fetches."""
    parked_bytes: int = field(default=0, compare=False)
    """Of `reserved`: what these keep."""

    @property
    def parked_size(self) -> int:
        """`parked_bytes` without the records."""
        return max(0, self.parked_bytes - self.parked * RECORD_BYTES)

    @property
    def free(self) -> int:
        return self.limit - self.used - self.reserved


class EvictionReason(StrEnum):
    """Why space has to be freed: the larger of the two demands, and for requests what is short."""

    HIGH_WATERMARK = "high_watermark"
    SPACE_REQUESTED = "space_requested"
    DEVICE_FULL = "device_full"
    DEVICE_INODES = "device_inodes"


@dataclass(frozen=True, slots=True)
class Watermarks:
    """The evictor starts above `high` bytes and evicts down to `low`."""

    low: int
    high: int

    def to_evict(self, usage: Usage, wanted: int, device_free: int) -> int:
        """Bytes to evict now: down to the low mark if above the high one, and always enough for the `wanted` bytes."""
        return max(self._above_low(usage), missing_for(usage, wanted, device_free))

    def reason_to_evict(self, usage: Usage, wanted: int, device_free: int) -> EvictionReason:
        """What makes `to_evict` more than 0."""
        if self._above_low(usage) >= missing_for(usage, wanted, device_free):
            return EvictionReason.HIGH_WATERMARK
        return EvictionReason.DEVICE_FULL if device_free < usage.free else EvictionReason.SPACE_REQUESTED

    def _above_low(self, usage: Usage) -> int:
        taken = usage.used + usage.reserved
        return max(0, taken - self.low) if taken > self.high else 0


def missing_for(usage: Usage, wanted: int, device_free: int) -> int:
    """Bytes that have to be freed before the `wanted` bytes fit, below the limit and on the device. The device may have
    fewer free bytes than the limit says."""
    return max(0, wanted - min(usage.free, device_free))


def fitting_requests(requests: Sequence[int], available: int) -> int:
    """Sum of the requests for space that fit into the `available` bytes together, the smallest first: a large one that
    does not fit must not keep the others waiting."""
    fitting = 0
    for wanted in sorted(requests):
        if fitting + wanted > available:
            break
        fitting += wanted
    return fitting


FILES_PER_OBJECT = 2
"""An object's file and its record."""

_MIN_FREE_FILES, _MAX_FREE_FILES = 32, 1000


@dataclass(frozen=True, slots=True)
class DeviceSpace:
    """What is free on the device behind the volume. It may be less than the storage limit allows."""

    free_bytes: int
    free_files: int | None = None  # inodes; None: the file system makes them as needed
    files: int | None = None  # all inodes, used and free

    def objects_to_evict(self) -> int:
        """Objects to evict so that files can be made: below 2 % of all inodes (32 to 1,000), up to twice that."""
        if self.free_files is None or self.files is None:
            return 0
        reserve = max(_MIN_FREE_FILES, min(self.files // 50, _MAX_FREE_FILES))
        if self.free_files >= reserve:
            return 0
        return -(-(2 * reserve - self.free_files) // FILES_PER_OBJECT)


_TYPICAL_HEADROOM = 8 * 64 * 1024**2
"""Eight concurrent fetches of 64 MiB: what fetchers reserve between two passes of the evictor."""


def watermarks_for(
    limit: int, largest: int | None = None, high_share: float | None = None, low_share: float | None = None
) -> Watermarks:
    """Watermarks from their shares of the limit. A share of None is derived from the limit and from the `largest`
    object that is cached (bytes; None: any that fits).

    The room above the high mark holds `largest`, so that no worker has to wait for it, but is at least 2 % and at most
    10 % of the limit. The low mark is half of that room below the high one. A given mark moves the derived one along.
    """
    room = min(max(largest or 0, _TYPICAL_HEADROOM, limit // 50), limit // 10)
    high = limit - room if high_share is None else int(limit * high_share)
    low = max(0, high - room // 2) if low_share is None else int(limit * low_share)
    if high_share is None:
        high = max(high, low)
    return Watermarks(low=low, high=high)


VIEW_WINDOW = 300.0
"""Seconds from the first request of a view, in which all further requests for the object belong to the same view. A
player requests dozens of ranges."""


class ViewCoalescer:
    """Remembers the current view of at most `max_entries` objects: those whose views began last."""

    def __init__(self, window: float = VIEW_WINDOW, max_entries: int = 50_000) -> None:
        self._window = window
        self._max_entries = max_entries
        self._began: OrderedDict[ObjectId, float] = OrderedDict()

    def continue_view(self, object_id: ObjectId, began: float) -> None:
        """A view that another process has counted began at `began` (seconds). No effect if one is remembered."""
        if object_id not in self._began:
            self.begins_view(object_id, began)

    def begins_view(self, object_id: ObjectId, now: float) -> bool:
        """True if a request at `now` (seconds) is the first of a view.

        A request that is reported late, or by a clock that is somewhat behind, belongs to the current view. If a clock
        was set back by a window or more, a new view begins.
        """
        began = self._began.get(object_id)
        if began is not None and -self._window < now - began < self._window:
            return False
        self._began[object_id] = now
        self._began.move_to_end(object_id)
        if len(self._began) > self._max_entries:
            self._began.popitem(last=False)
        return True


# Cache on second hit: large objects are fetched on their second view only. Half of all objects have no second one.

MAX_FIRST_VIEWS = 100_000
"""First views that are remembered; beyond that the oldest are forgotten."""
MIN_AUTO_ABOVE = 1024**2
"""Bytes. With `auto` all objects up to this size are admitted."""
_AUTO_VIEWS = 2


def auto_above(mean: float) -> float:
    """The size in bytes above which `auto` asks for a second view. `mean`: bytes of a view."""
    return max(MIN_AUTO_ABOVE, _AUTO_VIEWS * mean)


@dataclass(frozen=True, slots=True)
class AdmissionQuestion:
    """Whether to fetch a missing object or only to proxy it."""

    size: int  # bytes of the object
    above: int | None  # bytes; larger objects need a second view. None: `auto_above` of the mean view
    low_watermark: int  # bytes used and reserved; up to it every object is admitted
    window: float = 7 * 24 * 3600.0  # seconds in which the second view has to follow the first
    view_window: float = VIEW_WINDOW  # seconds that one view lasts

    @property
    def settled(self) -> bool:
        """Whether the object is admitted whatever the mean view is."""
        return self.size <= (MIN_AUTO_ABOVE if self.above is None else self.above)


class SecondHitAdmission:
    """Remembers the first views of large objects. claim.lua does the same for processes that share a server."""

    def __init__(self, max_entries: int = MAX_FIRST_VIEWS) -> None:
        """`max_entries`: first views to remember, about 200 bytes each; beyond that the oldest are forgotten."""
        self._max_entries = max_entries
        self._first: OrderedDict[ObjectId, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._first)

    def admits(
        self, object_id: ObjectId, question: AdmissionQuestion, now: float, *, taken: int, mean: float
    ) -> bool:
        """Whether to fetch the object for a request at `now` (seconds).

        `taken`: bytes used and reserved. Up to the low watermark every object is admitted, and first views are
        remembered all the same. Requests of the same view are no second view. `mean`: bytes of a view.
        """
        if question.size <= (auto_above(mean) if question.above is None else question.above):
            return True
        pressure = taken > question.low_watermark
        first = self._first.get(object_id)
        if first is not None and 0 <= now - first <= question.window:
            return not pressure or now - first >= question.view_window
        self._first[object_id] = now
        self._first.move_to_end(object_id)
        if len(self._first) > self._max_entries:
            self._first.popitem(last=False)
        return not pressure


# Window: half of all viewers watch less than 40 % of a film, so a large object is read a little ahead of its viewers.

VIEW_BEGINS = 1024 * 1024
"""Bytes of a large object within which a view begins. A viewer who goes on by ranges has passed them."""
STAYS_SHARE = 0.2
"""The second view completes an object when it has passed this share of it. Its begin alone is no sign that all of the
object is wanted: see docs/eviction.md for what each rule costs."""
WATCHED_SHARE = 0.8
"""Share of an object from which a viewer is expected to want all of it. Its end is sent once all is verified."""
_INDEX_SHARE = 1 / 20
"""Share of an object that a response which begins behind WATCHED_SHARE brings before it counts as a viewer: players
read the index of an MP4, which may lie at its end, before they begin."""
_SETTLING = 5.0
"""Seconds for which a fetch reads on without knowing whether processes tell where their clients are."""


@dataclass(frozen=True, slots=True)
class Viewer:
    """A response that follows an object which is being fetched."""

    first: int  # of the bytes that it needs
    position: int  # of the next byte that it has not got


@dataclass(frozen=True, slots=True)
class Followed:
    """Where the clients of one process read an object that is being fetched."""

    object_id: ObjectId
    viewers: tuple[Viewer, ...] = ()  # empty: they have left, or are served from elsewhere
    requested: bool = False  # a request has begun since the last report


@dataclass(frozen=True, slots=True)
class Followers:
    """Where clients read an object that is being fetched, by what all processes have told lately."""

    viewers: Sequence[Viewer] = ()
    views: int = 0
    """That have begun since the first request of the fetch, in the first VIEW_BEGINS bytes. They only decide whether
    the fetch is completed. The policy counts its own (`Fetch.views`), of all requests that were answered."""
    whole: bool = False  # all of the object was ordered, or it is pinned
    told: bool = False  # a process has told of its clients, be it that there are none
    untold: bool = False  # a process has clients and has not told where: one of the version before


class Completion(StrEnum):
    """Why a fetch reads on, however far ahead of its viewers it is."""

    ORDERED = "ordered"  # by the operator: the object is warmed or pinned
    SECOND_VIEW = "second_view"
    WATCHED = "watched"  # a viewer has passed WATCHED_SHARE
    VIEWERS_UNKNOWN = "viewers_unknown"  # a process does not tell where its clients are
    SPARE_TIME = "spare_time"  # nothing else is to be fetched, and there is room


class FetchWindow:
    """Decides how far the streams of one fetch read. Times are monotonic seconds.

    1. A stream goes on while a viewer that it reads for is less than `window` bytes behind it.
    2. The main stream also goes on towards a viewer that is near, ahead of it, and that no other stream reads for. One
       that is further ahead gets a stream of its own, or is served from elsewhere.
    3. Without viewers it stays where the last ones were.
    4. There is no such limit while `completion` says why.
    """

    def __init__(self, size: int, window: int, now: float, *, near: int = 0, ordered: bool = False) -> None:
        """`size`, `window`: in bytes. `ordered`: all of the object is wanted.

        `near`: bytes up to which a viewer ahead of the main stream waits for that, if they are more than the window.
        """
        self.size = size
        self.window = window
        self._near = max(window, near)
        self._lasting = Completion.ORDERED if ordered else None
        self._passing: Completion | None = None
        # The last ones that there were; until the first `update`, one that has just begun
        self._viewers: Sequence[Viewer] = (Viewer(0, 0),)
        self._unknown_until = now + _SETTLING
        self._told = False
        self._alone_since: float | None = None

    def update(
        self,
        now: float,
        viewers: Sequence[Viewer],
        *,
        views: int = 0,
        ordered: bool = False,
        told: bool = True,
        untold: bool = False,
        spare_time: bool = False,
    ) -> None:
        """Take what is known of the viewers. `told`, `untold`: see Followers. `spare_time`: nothing else is to do."""
        if told and not self._told:
            self._told, self._unknown_until = True, now
        if untold:
            self._unknown_until = max(self._unknown_until, now + _SETTLING)
        if viewers:
            self._viewers = tuple(viewers)
        unknown = now < self._unknown_until
        if viewers or unknown:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        if self._lasting is None:
            self._lasting = self._reason_to_complete(viewers, views, ordered=ordered)
        self._passing = None
        if unknown:
            self._passing = Completion.VIEWERS_UNKNOWN
        elif spare_time:
            self._passing = Completion.SPARE_TIME

    def _reason_to_complete(
        self, viewers: Sequence[Viewer], views: int, *, ordered: bool
    ) -> Completion | None:
        if ordered:
            return Completion.ORDERED
        if views > 1 and any(viewer.position >= self.size * STAYS_SHARE for viewer in viewers):
            return Completion.SECOND_VIEW
        return Completion.WATCHED if any(map(self._has_watched, viewers)) else None

    def _has_watched(self, viewer: Viewer) -> bool:
        passed = self.size * WATCHED_SHARE
        if viewer.position < passed:
            return False
        index = min(self.window, int(self.size * _INDEX_SHARE))
        return viewer.first < passed or viewer.position - viewer.first >= index

    @property
    def completion(self) -> Completion | None:
        """Why the fetch reads on to the end. None: it does not."""
        return self._lasting or self._passing

    def alone_for(self, now: float) -> float:
        """Return for how many seconds there have been no viewers."""
        return 0.0 if self._alone_since is None else now - self._alone_since

    def may_read(
        self, position: int, there: Extents, filling: Collection[int] = (), *, main: bool = True
    ) -> bool:
        """Whether the stream whose next byte is at `position` goes on.

        `there`: what was read. `filling`: the next bytes of all streams. `main`: it is the one that reads in order.
        """
        if self.completion is not None:
            return True
        for viewer in self._viewers:
            missing = there.end_at(viewer.position)
            if missing >= self.size or missing - viewer.position >= self.window:
                continue
            if _reaches(position, missing):
                return True
            if main and position < missing <= position + self._near and missing not in filling:
                return True
        return False

    def has_viewer_of(self, position: int, there: Extents) -> bool:
        """Whether a viewer will need the byte at `position`, be it later, when it has read what is there before."""
        return self.completion is not None or any(
            _reaches(position, there.end_at(viewer.position)) for viewer in self._viewers
        )


def _reaches(position: int, missing: int) -> bool:
    """Whether a stream at `position` brings the missing byte next. Streams begin with a whole block."""
    return position <= missing < position + BLOCK
