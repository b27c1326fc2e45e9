"""Views and admission: which requests count as one view, and which objects are cached on their second view only."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from distributor_node.shared.domain.objects import ObjectId

VIEW_WINDOW = 300.0
"""Seconds from the first request of a view, in which all further requests for the object belong to the same view. A
player requests dozens of ranges."""


class ViewCoalescer:
    """Remembers the current view of at most `max_entries` objects: those whose views began last."""

    def __init__(self, window: float = VIEW_WINDOW, max_entries: int = 50_000) -> None:
        self._window = window
        self._max_entries = max_entries
        self._began: OrderedDict[ObjectId, float] = OrderedDict()

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
    """Whether to fetch a missing object or only to proxy it, for the state store, which remembers first views."""

    size: int  # bytes of the object
    above: int | None  # bytes; larger objects need a second view. None: `auto_above` of the mean view
    low_watermark: int  # bytes used and reserved; up to it every object is admitted
    window: float  # seconds in which the second view has to follow the first
    view_window: float = VIEW_WINDOW  # seconds that one view lasts


class SecondHitAdmission:
    """Remembers first views in two generations: when the newer one is full or as old as the window, the older one is
    dropped. So at least the last `max_entries / 2` first views within the window are known.
    """

    def __init__(
        self,
        above: int | None,
        window: float = 7 * 24 * 3600.0,
        view_window: float = VIEW_WINDOW,
        max_entries: int = MAX_FIRST_VIEWS,
    ) -> None:
        """`above`: objects of more bytes need a second view, None: `auto_above`; `window`: seconds in which it has to
        follow the first; `view_window`: seconds that one view lasts; `max_entries`: first views to remember, about
        130 bytes each.
        """
        self._above = above
        self._window = window
        self._view_window = view_window
        self._max_per_generation = max(1, max_entries // 2)
        self._newer: dict[str, float] = {}
        self._older: dict[str, float] = {}
        self._rotated_at = float("-inf")

    def __len__(self) -> int:
        return len(self._newer) + len(self._older)

    def admits_any(self, size: int) -> bool:
        """Whether an object of `size` bytes needs no second view whatever the mean view is."""
        return size <= (MIN_AUTO_ABOVE if self._above is None else self._above)

    def admits(
        self, object_id: ObjectId, size: int, now: float, *, pressure: bool, mean: float = 0.0
    ) -> bool:
        """Whether to fetch a missing object of `size` bytes for a request at `now` (seconds), or only to proxy it.

        `pressure`: another object would have to be evicted for it. While there is room every object is admitted, and
        first views are remembered all the same. Requests of the same view are no second view. `mean`: bytes of a view.
        """
        if size <= (auto_above(mean) if self._above is None else self._above):
            return True
        first = self._newer.get(object_id, self._older.get(object_id))
        if first is None or not 0 <= now - first <= self._window:
            self._remember(object_id, now)
            return not pressure
        return not pressure or now - first >= self._view_window

    def _remember(self, object_id: ObjectId, now: float) -> None:
        if len(self._newer) >= self._max_per_generation or not 0 <= now - self._rotated_at <= self._window:
            self._older, self._newer = self._newer, {}
            self._rotated_at = now
        self._newer[str(object_id)] = now
