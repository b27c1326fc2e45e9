"""SIEVE and S3-FIFO as they were published, to stand beside ours in the table; the node does not have them.

Both only know queues: no sizes, no times. So `min_idle` means nothing to them, and `victims` names one at a time and
changes their state on the way, which is all that the simulator asks for.
Sources: Zhang et al., "SIEVE is simpler than LRU", NSDI 2024; Yang et al., "FIFO queues are all you need for cache
eviction", SOSP 2023.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence

from distributor_node.shared.domain.eviction import PolicyEntry, PriorityBasis
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint

_NO_IDS: frozenset[ObjectId] = frozenset()
_SMALL_SHARE = 0.1
_MAX_COUNT = 3
_MIN_COUNT = 2


class _Queues(ABC):
    """What both share: the entries, and one victim at a time."""

    inflation = 0.0

    def __init__(self) -> None:
        self._entries: dict[ObjectId, PolicyEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, object_id: object) -> bool:
        return object_id in self._entries

    def get(self, object_id: ObjectId) -> PolicyEntry | None:
        return self._entries.get(object_id)

    def ids(self) -> Sequence[ObjectId]:
        return list(self._entries)

    def dump(self) -> Iterator[PolicyEntry]:
        return iter(self._entries.values())

    @property
    def basis(self) -> PriorityBasis:
        return PriorityBasis()

    def store(self, object_id: ObjectId, size: int, now: float, *, begins_view: bool = True) -> None:
        self.add(PolicyEntry(object_id, size, 1, now))

    @abstractmethod
    def add(self, entry: PolicyEntry) -> None: ...

    def restore(self, entries: Iterable[PolicyEntry], basis: PriorityBasis) -> None:
        for entry in entries:
            self.add(entry)

    def end_restore(self) -> None:  # noqa: B027 - nothing is translated, in no subclass
        pass

    def victims(
        self,
        wanted: int,
        now: float,
        *,
        min_idle: float = 0.0,
        spared: Collection[ObjectId] = _NO_IDS,
        at_most: int = 1000,
    ) -> list[PolicyEntry]:
        return [self._next_victim()] if self._entries and wanted > 0 else []

    @abstractmethod
    def _next_victim(self) -> PolicyEntry: ...


class Sieve(_Queues):
    """One queue; a hand goes from the oldest to the newest, spares who was visited, once, and stays where it is."""

    name = "sieve"

    def __init__(self) -> None:
        super().__init__()
        self._newer: dict[ObjectId, ObjectId | None] = {}
        self._older: dict[ObjectId, ObjectId | None] = {}
        self._oldest: ObjectId | None = None
        self._newest: ObjectId | None = None
        self._hand: ObjectId | None = None
        self._visited: set[ObjectId] = set()

    def add(self, entry: PolicyEntry) -> None:
        object_id = entry.object_id
        self.remove(object_id)
        self._entries[object_id] = entry
        self._older[object_id], self._newer[object_id] = self._newest, None
        if self._newest is None:
            self._oldest = object_id
        else:
            self._newer[self._newest] = object_id
        self._newest = object_id

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        if object_id in self._entries:
            self._visited.add(object_id)

    def remove(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        if self._entries.pop(object_id, None) is None:
            return
        self._visited.discard(object_id)
        older, newer = self._older.pop(object_id), self._newer.pop(object_id)
        if self._hand == object_id:
            self._hand = newer
        if older is None:
            self._oldest = newer
        else:
            self._newer[older] = newer
        if newer is None:
            self._newest = older
        else:
            self._older[newer] = older

    def _next_victim(self) -> PolicyEntry:
        hand = self._hand or self._oldest
        while hand in self._visited:
            self._visited.remove(hand)
            hand = self._newer[hand] or self._oldest
        if hand is None:
            raise LookupError("no object to evict")
        self._hand = hand
        return self._entries[hand]


class S3Fifo(_Queues):
    """A small queue of a tenth of the bytes for newcomers, a main one for who was seen again there (or was thrown out
    lately: the ghosts, as many as main has); who is counted in main goes round again."""

    name = "s3-fifo"

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._small_limit = int(limit * _SMALL_SHARE)
        self._small_bytes = 0
        self._small: OrderedDict[ObjectId, None] = OrderedDict()
        self._main: OrderedDict[ObjectId, None] = OrderedDict()
        self._ghosts: OrderedDict[ObjectId, None] = OrderedDict()
        self._counts: dict[ObjectId, int] = {}

    def add(self, entry: PolicyEntry) -> None:
        object_id = entry.object_id
        self.remove(object_id)
        self._entries[object_id], self._counts[object_id] = entry, 0
        if object_id in self._ghosts:
            del self._ghosts[object_id]
            self._main[object_id] = None
        else:
            self._small[object_id] = None
            self._small_bytes += footprint(entry.size)

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        if object_id in self._entries:
            self._counts[object_id] = min(_MAX_COUNT, self._counts[object_id] + 1)

    def remove(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        entry = self._entries.pop(object_id, None)
        if entry is None:
            return
        del self._counts[object_id]
        if object_id in self._main:
            del self._main[object_id]
            return
        del self._small[object_id]
        self._small_bytes -= footprint(entry.size)
        if evicted:
            self._ghosts[object_id] = None
            while len(self._ghosts) > max(1, len(self._main)):
                self._ghosts.popitem(last=False)

    def _next_victim(self) -> PolicyEntry:
        while True:
            if self._small and (self._small_bytes >= self._small_limit or not self._main):
                object_id = next(iter(self._small))
                if self._counts[object_id] < _MIN_COUNT:
                    return self._entries[object_id]
                del self._small[object_id]
                self._small_bytes -= footprint(self._entries[object_id].size)
                self._main[object_id], self._counts[object_id] = None, 0
            else:
                object_id = next(iter(self._main))
                if not self._counts[object_id]:
                    return self._entries[object_id]
                self._counts[object_id] -= 1
                self._main.move_to_end(object_id)
