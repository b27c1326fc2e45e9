"""What counts as one view: all requests for one object within a few minutes. A player asks for dozens of ranges."""

from __future__ import annotations

from collections import OrderedDict

from shared.domain.objects import ObjectId

VIEW_WINDOW = 300.0
"""Seconds from a view's first request in which all further ones for the object belong to it."""


class ViewCoalescer:
    """Remembers the running view of at most `max_entries` objects, those whose views began last."""

    def __init__(self, window: float = VIEW_WINDOW, max_entries: int = 50_000) -> None:
        self._window = window
        self._max_entries = max_entries
        self._began: OrderedDict[ObjectId, float] = OrderedDict()

    def begins_view(self, object_id: ObjectId, now: float) -> bool:
        """True if a request at `now` (seconds) is the first of a view. One that is reported late, or by a clock
        somewhat behind, belongs to the view that is running; a clock set back by a window or more begins a new one."""
        began = self._began.get(object_id)
        if began is not None and -self._window < now - began < self._window:
            return False
        self._began[object_id] = now
        self._began.move_to_end(object_id)
        if len(self._began) > self._max_entries:
            self._began.popitem(last=False)
        return True
