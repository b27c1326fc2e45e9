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
